//! Lloyd's k-means on float32: seeded, and the same for any number of threads.

use rand::rngs::SmallRng;
use rand::seq::index;
use rand::{Rng, SeedableRng};
use rayon::prelude::*;

use super::nearest::{Codewords, Form, Nearest};
use crate::error::{Error, Result};

/// Converged when the loss changes by less than this part of it, as in Lance.
const TOLERANCE: f64 = 1e-4;
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
    fn refine(
        &self,
        vectors: &[f32],
        dimension: usize,
        mut centroids: Vec<f32>,
        iterations: usize,
        random: &mut SmallRng,
        check: &(dyn Fn(usize) -> Result<()> + Sync),
    ) -> Result<Clustering> {
        let rows = vectors.len() / dimension;
        let form = if self.spherical { Form::Dot } else { Form::L2 };
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
            if (previous - total).abs() <= TOLERANCE * total.abs() {
                break;
            }
        }
        Ok(Clustering { centroids, iterations: done })
    }

    /// Means of the clusters. A cluster without members takes half of the largest.
    fn update(&self, vectors: &[f32], dimension: usize, labels: &[u32], centroids: &mut [f32], random: &mut SmallRng) {
        let clusters = centroids.len() / dimension;
        let mut sizes = vec![0usize; clusters];
        for label in labels {
            sizes[*label as usize] += 1;
        }
        if centroids.len() * size_of::<f64>() <= 64 << 10 {
            // Small enough for the cache: in one pass, in order.
            let mut sums = vec![0f64; centroids.len()];
            for (vector, label) in vectors.chunks_exact(dimension).zip(labels) {
                let sum = &mut sums[*label as usize * dimension..][..dimension];
                for (sum, value) in sum.iter_mut().zip(vector) {
                    *sum += f64::from(*value);
                }
            }
            for ((centroid, sum), size) in centroids.chunks_exact_mut(dimension).zip(sums.chunks_exact(dimension)).zip(&sizes) {
                mean(centroid, sum, *size);
            }
        } else {
            // Members of each cluster one after the other, so that clusters can be summed side by side, each in order.
            let mut ends = Vec::with_capacity(clusters);
            let mut end = 0;
            for size in &sizes {
                ends.push(end);
                end += size;
            }
            let mut members = vec![0u32; labels.len()];
            for (row, label) in labels.iter().enumerate() {
                let place = &mut ends[*label as usize];
                members[*place] = row as u32;
                *place += 1;
            }
            centroids.par_chunks_exact_mut(dimension).enumerate().for_each(|(cluster, centroid)| {
                let members = &members[ends[cluster] - sizes[cluster]..ends[cluster]];
                let mut sum = vec![0f64; dimension];
                for member in members {
                    let vector = &vectors[*member as usize * dimension..][..dimension];
                    for (sum, value) in sum.iter_mut().zip(vector) {
                        *sum += f64::from(*value);
                    }
                }
                mean(centroid, &sum, members.len());
            });
        }
        split_empty(centroids, dimension, &mut sizes, random);
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

fn mean(centroid: &mut [f32], sum: &[f64], members: usize) {
    if members > 0 {
        for (value, sum) in centroid.iter_mut().zip(sum) {
            *value = (sum / members as f64) as f32;
        }
    }
}

fn split_empty(centroids: &mut [f32], dimension: usize, sizes: &mut [usize], random: &mut SmallRng) {
    for empty in 0..sizes.len() {
        if sizes[empty] > 0 {
            continue;
        }
        let Some(largest) = (0..sizes.len()).max_by_key(|i| (sizes[*i], std::cmp::Reverse(*i))).filter(|i| sizes[*i] > 1) else { return };
        for d in 0..dimension {
            let value = centroids[largest * dimension + d];
            let shift = value * SPLIT * if random.random::<bool>() { 1.0 } else { -1.0 };
            centroids[empty * dimension + d] = value + shift;
            centroids[largest * dimension + d] = value - shift;
        }
        sizes[empty] = sizes[largest] / 2;
        sizes[largest] -= sizes[empty];
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

/// The nearest codeword of each vector. Returns the sum of distances.
pub fn assign(vectors: &[f32], dimension: usize, codewords: &Codewords, labels: &mut [u32]) -> f64 {
    let sums: Vec<f64> = vectors
        .par_chunks(TASK_ROWS * dimension)
        .zip(labels.par_chunks_mut(TASK_ROWS))
        .map(|(vectors, labels)| {
            let mut found = vec![Nearest { index: 0, distance: 0.0, second: 0.0 }; labels.len()];
            codewords.only_nearest(vectors, &mut found);
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

/// A part with fewer vectors for each cluster tells nothing about where they belong.
const LEAST_EACH: usize = 24;

/// Some of the iterations of [`progressive`].
#[derive(Debug, Clone, Copy)]
pub struct Pass {
    /// On one part in so many of the sample.
    part: usize,
    /// At most.
    iterations: usize,
    /// To be left for later passes.
    later: usize,
}

const fn pass(part: usize, iterations: usize, later: usize) -> Pass {
    Pass { part, iterations, later }
}

/// For centroids, of which one iteration on all vectors is long: the sample grows with the clusters, so that operations grow by
/// their square. The more there are, the fewer iterations, of which those on a part place most. Against a hierarchy even one pass
/// in all finds far better centroids where clusters overlap, and about as good ones elsewhere (`docs/performance.md`).
pub fn of_centroids(clusters: usize) -> &'static [Pass] {
    match clusters {
        0..=2048 => const { &[pass(8, usize::MAX, 12), pass(2, 6, 6), pass(1, 6, 0)] },
        2049..=16_384 => const { &[pass(4, 8, 2), pass(1, 2, 0)] },
        _ => const { &[pass(8, 4, 1), pass(2, 1, 0)] },
    }
}

/// For the codewords of a sub-vector.
pub const OF_CODEWORDS: &[Pass] = &[pass(4, usize::MAX, 8), pass(1, 8, 0)];

/// Most iterations on a part of the sample, which comes in random order, and the last few, which settle the rest, on more of
/// it and then all.
pub fn progressive(
    lloyd: Lloyd,
    passes: &[Pass],
    vectors: &[f32],
    dimension: usize,
    check: &(dyn Fn(usize) -> Result<()> + Sync),
) -> Result<Clustering> {
    let rows = vectors.len() / dimension;
    let mut random = SmallRng::seed_from_u64(lloyd.seed);
    let mut centroids: Option<Vec<f32>> = None;
    let mut done = 0;
    for Pass { part, iterations, later } in large_enough(passes, rows, lloyd.clusters) {
        let left = lloyd.iterations.saturating_sub(done);
        if left == 0 && centroids.is_some() {
            break;
        }
        let sample = &vectors[..rows / part * dimension];
        let iterations = iterations.min(left.saturating_sub(later)).max(1);
        let told = |iteration: usize| check(done + iteration);
        let found = match centroids.take() {
            None => Lloyd { iterations, ..lloyd }.run(sample, dimension, &told)?,
            Some(start) => lloyd.refine(sample, dimension, start, iterations, &mut random, &told)?,
        };
        done += found.iterations;
        centroids = Some(found.centroids);
    }
    match centroids {
        Some(centroids) => Ok(Clustering { centroids, iterations: done }),
        None => Err(Error::internal("k-means without a pass")),
    }
}

/// The passes whose part of `rows` vectors is large enough to place the clusters; the first of them does the iterations of those
/// left out too. Where no part is, the whole sample does them all.
fn large_enough(passes: &[Pass], rows: usize, clusters: usize) -> Vec<Pass> {
    let mut kept: Vec<Pass> = Vec::with_capacity(passes.len());
    let mut left_out = 0usize;
    for pass in passes {
        if pass.part > 1 && rows / pass.part < clusters * LEAST_EACH {
            left_out = left_out.saturating_add(pass.iterations);
        } else {
            kept.push(Pass { iterations: pass.iterations.saturating_add(std::mem::take(&mut left_out)), ..*pass });
        }
    }
    if left_out > 0 {
        // Parts grow from pass to pass: what is left out at the end was left out from the start.
        kept.push(pass(1, left_out, 0));
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blobs(rows: usize, dimension: usize, blobs: usize) -> Vec<f32> {
        let mut random = SmallRng::seed_from_u64(9);
        let centers: Vec<f32> = (0..blobs * dimension).map(|_| random.random_range(-10.0..10.0)).collect();
        (0..rows * dimension).map(|i| centers[i / dimension % blobs * dimension + i % dimension] + random.random_range(-0.5..0.5)).collect()
    }

    /// The mean squared distance to the nearest centroid, and how many centroids have members.
    fn quality(vectors: &[f32], dimension: usize, centroids: &[f32]) -> (f64, usize) {
        let mut labels = vec![0; vectors.len() / dimension];
        assign(vectors, dimension, &Codewords::new(centroids, dimension, Form::L2), &mut labels);
        let squares = vectors.chunks_exact(dimension).zip(&labels).map(|(vector, label)| {
            let centroid = &centroids[*label as usize * dimension..][..dimension];
            vector.iter().zip(centroid).map(|(v, c)| f64::from((v - c) * (v - c))).sum::<f64>()
        });
        (squares.sum::<f64>() / labels.len() as f64, labels.iter().collect::<std::collections::HashSet<_>>().len())
    }

    fn lloyd(clusters: usize, spherical: bool) -> Lloyd {
        Lloyd { clusters, iterations: 30, seed: 5, spherical }
    }

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
    fn is_the_same_for_any_number_of_threads() {
        let vectors = blobs(20_000, 40, 50);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| progressive(lloyd(100, false), of_centroids(100), &vectors, 40, &|_| Ok(())).unwrap().centroids)
        };
        assert_eq!(run(1), run(7));
    }

    fn iterations(passes: &[Pass]) -> usize {
        passes.iter().fold(0, |sum, pass| sum.saturating_add(pass.iterations))
    }

    #[test]
    fn thin_samples_get_all_clusters_and_the_iterations_of_every_stage() {
        for (passes, clusters) in [(of_centroids(100), 100), (of_centroids(5000), 100), (of_centroids(20_000), 100), (OF_CODEWORDS, 100)] {
            let planned = iterations(passes);
            for each in [1, 20, 47, 48, 100, 191, 192, 300] {
                let kept = large_enough(passes, clusters * each, clusters);
                assert_eq!(iterations(&kept), planned, "{each} each");
                assert!(kept.iter().all(|pass| pass.part == 1 || each / pass.part >= LEAST_EACH));
            }
            let vectors = blobs(clusters * 30, 4, 50);
            let found = progressive(lloyd(clusters, false), passes, &vectors, 4, &|_| Ok(())).unwrap();
            assert_eq!(found.centroids.len(), clusters * 4);
            assert!(found.iterations <= 30);
            let once = Lloyd { iterations: 1, ..lloyd(clusters, false) };
            assert_eq!(progressive(once, passes, &vectors, 4, &|_| Ok(())).unwrap().iterations, 1);
        }
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
