//! Lloyd's k-means: each vector compared with all centroids.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rand::rngs::SmallRng;
use rand::seq::index;
use rand::{Rng, SeedableRng};
use rayon::prelude::*;

use super::super::nearest::{Codewords, Form, Nearest};
use super::super::simd::add;
use super::members::Members;
use super::points::{AHEAD, Points};
use crate::error::Result;

/// Converged when the loss changes by less than this part of it, as in Lance.
const TOLERANCE: f64 = 1e-4;
/// Of what is left out of distances, beside the loss.
const TELLS: f64 = 1e6;
/// Vectors assigned by one task.
const TASK_ROWS: usize = 4096;
/// How far apart two halves of a split cluster start, relative to each coordinate.
const SPLIT: f32 = 1.0 / 1024.0;

/// What to find.
#[derive(Debug, Clone, Copy)]
pub struct Lloyd {
    pub clusters: usize,
    pub iterations: usize,
    pub seed: u64,
    /// Assign by largest dot product and keep centroids at unit norm.
    pub spherical: bool,
}

/// Centroids, and the iterations that it took.
pub struct Clustering {
    pub centroids: Vec<f32>,
    pub iterations: usize,
}

impl Lloyd {
    /// How it ranks centroids.
    pub fn form(&self) -> Form {
        if self.spherical { Form::Dot } else { Form::L2 }
    }

    /// Cluster `vectors (n, dimension)`, `n >= clusters`. `check` is called before each iteration with their number so far,
    /// and can end it with an error.
    pub fn run(&self, vectors: &[f32], dimension: usize, check: &(dyn Fn(usize) -> Result<()> + Sync)) -> Result<Clustering> {
        let rows = vectors.len() / dimension;
        let mut random = SmallRng::seed_from_u64(self.seed);
        let mut centroids = Vec::with_capacity(self.clusters * dimension);
        let mut chosen = index::sample(&mut random, rows, self.clusters.min(rows)).into_vec();
        chosen.sort_unstable();
        for row in chosen {
            centroids.extend_from_slice(&vectors[row * dimension..(row + 1) * dimension]);
        }
        self.refine(vectors, dimension, centroids, self.iterations, &mut random, check)
    }

    /// Up to `iterations` iterations from given centroids.
    pub fn refine(
        &self,
        vectors: &[f32],
        dimension: usize,
        mut centroids: Vec<f32>,
        iterations: usize,
        random: &mut SmallRng,
        check: &(dyn Fn(usize) -> Result<()> + Sync),
    ) -> Result<Clustering> {
        let rows = vectors.len() / dimension;
        let form = self.form();
        let moments = Moments::of(vectors, dimension);
        if self.spherical {
            normalise(&mut centroids, dimension);
        }
        let mut labels = vec![0u32; rows];
        let (mut loss, mut done) = (f64::INFINITY, 0);
        for iteration in 0..iterations {
            check(iteration)?;
            let codewords = Codewords::new(&centroids, dimension, form);
            // The loss itself where its changes mean something; the mean dot product has no such zero.
            let left_out = if self.spherical { moments.squares } else { moments.squares_around(codewords.center()) };
            let total = left_out + assign(vectors, dimension, &codewords, &mut labels);
            self.update(vectors, dimension, &labels, &mut centroids, random);
            done = iteration + 1;
            let previous = std::mem::replace(&mut loss, total);
            // Where few vectors are nearly all of it, their rounding says nothing of the others.
            let tells = left_out <= TELLS * total || previous == total;
            if tells && (previous - total).abs() <= TOLERANCE * total.abs() {
                break;
            }
        }
        Ok(Clustering { centroids, iterations: done })
    }

    /// Means of the clusters. A cluster without members takes half of the largest.
    pub fn update(&self, vectors: &[f32], dimension: usize, labels: &[u32], centroids: &mut [f32], random: &mut SmallRng) {
        let clusters = centroids.len() / dimension;
        let mut sizes = vec![0usize; clusters];
        for label in labels {
            sizes[*label as usize] += 1;
        }
        if centroids.len() * size_of::<f64>() <= 64 << 10 {
            // Small enough for the cache: in one pass, in order.
            let mut sums = vec![0f64; centroids.len()];
            for (vector, label) in vectors.chunks_exact(dimension).zip(labels) {
                add(&mut sums[*label as usize * dimension..][..dimension], vector);
            }
            for ((centroid, sum), size) in centroids.chunks_exact_mut(dimension).zip(sums.chunks_exact(dimension)).zip(&sizes) {
                mean(centroid, sum, *size);
            }
        } else {
            // So that clusters can be summed side by side, each in order.
            let members = Members::of(labels, clusters);
            let points = Points::new(vectors, dimension);
            centroids.par_chunks_exact_mut(dimension).enumerate().for_each(|(cluster, centroid)| {
                let members = members.of_cluster(cluster);
                let mut sum = vec![0f64; dimension];
                add_up(points, members, &mut sum);
                mean(centroid, &sum, members.len());
            });
        }
        split_empty(centroids, dimension, &sizes, random);
        if self.spherical {
            normalise(centroids, dimension);
        }
    }
}

/// Sums over all vectors, from which the sum of squared distances to any one point follows.
struct Moments {
    rows: f64,
    sum: Vec<f64>,
    squares: f64,
}

impl Moments {
    fn of(vectors: &[f32], dimension: usize) -> Self {
        let parts: Vec<(Vec<f64>, f64)> = vectors
            .par_chunks(TASK_ROWS * dimension)
            .map(|part| {
                let (mut sum, mut squares) = (vec![0f64; dimension], 0f64);
                for vector in part.chunks_exact(dimension) {
                    for (sum, value) in sum.iter_mut().zip(vector) {
                        let value = f64::from(*value);
                        *sum += value;
                        squares += value * value;
                    }
                }
                (sum, squares)
            })
            .collect();
        let mut sum = vec![0f64; dimension];
        for (part, _) in &parts {
            sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
        Self { rows: (vectors.len() / dimension) as f64, sum, squares: parts.iter().map(|(_, squares)| squares).sum() }
    }

    fn squares_around(&self, point: &[f64]) -> f64 {
        let (dot, square) = self.sum.iter().zip(point).fold((0.0, 0.0), |(dot, square), (s, p)| (dot + s * p, square + p * p));
        self.squares - 2.0 * dot + self.rows * square
    }
}

/// Add some vectors to a sum, in order.
pub fn add_up(points: Points<'_>, rows: &[u32], sum: &mut [f64]) {
    for (i, row) in rows.iter().enumerate() {
        points.prefetch(rows.get(i + AHEAD));
        add(sum, points.get(*row));
    }
}

/// Without members it stays.
pub fn mean(centroid: &mut [f32], sum: &[f64], members: usize) {
    if members > 0 {
        for (value, sum) in centroid.iter_mut().zip(sum) {
            *value = (sum / members as f64) as f32;
        }
    }
}

fn split_empty(centroids: &mut [f32], dimension: usize, sizes: &[usize], random: &mut SmallRng) {
    let empty: Vec<usize> = (0..sizes.len()).filter(|cluster| sizes[*cluster] == 0).collect();
    if empty.is_empty() {
        return;
    }
    let mut largest: BinaryHeap<(usize, Reverse<usize>)> =
        sizes.iter().enumerate().map(|(cluster, size)| (*size, Reverse(cluster))).collect();
    for empty in empty {
        let Some((size, Reverse(cluster))) = largest.pop().filter(|(size, _)| *size > 1) else { return };
        for d in 0..dimension {
            let value = centroids[cluster * dimension + d];
            let shift = value * SPLIT * if random.random::<bool>() { 1.0 } else { -1.0 };
            centroids[empty * dimension + d] = value + shift;
            centroids[cluster * dimension + d] = value - shift;
        }
        largest.push((size / 2, Reverse(empty)));
        largest.push((size - size / 2, Reverse(cluster)));
    }
}

pub fn normalise(vectors: &mut [f32], dimension: usize) {
    for vector in vectors.chunks_exact_mut(dimension) {
        let norm = vector.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt() as f32;
        if norm > 0.0 {
            vector.iter_mut().for_each(|v| *v /= norm);
        }
    }
}

/// The nearest codeword of each vector, of nearly equal ones any. Returns the sum of distances. Samples are far from the ends of float32.
pub fn assign(vectors: &[f32], dimension: usize, codewords: &Codewords, labels: &mut [u32]) -> f64 {
    let sums: Vec<f64> = vectors
        .par_chunks(TASK_ROWS * dimension)
        .zip(labels.par_chunks_mut(TASK_ROWS))
        .map(|(vectors, labels)| {
            let mut found = vec![Nearest { index: 0, distance: 0.0, second: 0.0 }; labels.len()];
            if codewords.can_tag() {
                codewords.only_nearest_tagged(vectors, &mut found);
            } else {
                codewords.only_nearest(vectors, &mut found);
            }
            let mut sum = 0.0;
            for (label, found) in labels.iter_mut().zip(&found) {
                // Where every distance overflowed any label will do.
                *label = if found.index == u32::MAX { 0 } else { found.index };
                sum += f64::from(found.distance);
            }
            sum
        })
        .collect();
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{blobs, lloyd, quality};

    #[test]
    fn finds_clusters_and_never_leaves_one_empty() {
        let vectors = blobs(4000, 6, 8);
        let found = lloyd(24, false).run(&vectors, 6, &|_| Ok(())).unwrap();
        // Blobs of a twelfth of squared width a coordinate, and three clusters for each.
        let (loss, used) = quality(&vectors, 6, &found.centroids);
        assert!(loss < 0.5, "{loss}");
        assert_eq!(used, 24);
        assert!((2..=30).contains(&found.iterations));
    }

    #[test]
    fn spherical_centroids_have_unit_norm() {
        let found = lloyd(10, true).run(&blobs(2000, 5, 6), 5, &|_| Ok(())).unwrap();
        for centroid in found.centroids.chunks_exact(5) {
            assert!((centroid.iter().map(|v| v * v).sum::<f32>() - 1.0).abs() < 1e-5);
        }
    }

    #[test]
    fn duplicates_and_as_many_clusters_as_rows() {
        let same = vec![1.0f32; 50 * 3];
        let found = lloyd(8, false).run(&same, 3, &|_| Ok(())).unwrap();
        assert!(found.centroids.iter().all(|v| (v - 1.0).abs() < 0.1));
        let vectors = blobs(10, 3, 10);
        let found = lloyd(10, false).run(&vectors, 3, &|_| Ok(())).unwrap();
        assert!(quality(&vectors, 3, &found.centroids).0 < 1e-6);
    }
}
