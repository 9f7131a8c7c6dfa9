//! One more iteration, on vectors that come in parts: more than memory holds.

use super::super::nearest::Codewords;
use super::lloyd::{Lloyd, assign, normalise};
use super::means::Means;
use super::neighbours::{Neighbours, reassign};
use super::partitions::{FEW, NEIGHBOURS};
use super::points::Points;
use super::rough::{self, Groups};
use crate::error::Result;

/// The iteration, as far as vectors have come.
pub struct Streamed {
    lloyd: Lloyd,
    centroids: Vec<f32>,
    dimension: usize,
    beside: Beside,
    means: Means,
}

/// Where a vector's centroid is looked for.
enum Beside {
    /// All are compared.
    All(Codewords),
    /// Groups for a first look, and then the neighbours of what was found.
    Near(Groups, Neighbours),
}

impl Streamed {
    /// Of `lloyd`, whose iterations are done, and its centroids.
    pub fn new(lloyd: Lloyd, centroids: Vec<f32>, dimension: usize) -> Result<Self> {
        let points = Points::new(&centroids, dimension);
        let beside = if points.len() <= FEW {
            Beside::All(Codewords::new(&centroids, dimension, lloyd.form()))
        } else {
            Beside::Near(Groups::to_place(points, lloyd.seed)?, rough::neighbours(points, NEIGHBOURS, lloyd.seed)?)
        };
        let means = Means::new(points.len(), dimension);
        Ok(Self { lloyd, centroids, dimension, beside, means })
    }

    /// Add vectors, in order: in how many parts they come makes no difference.
    pub fn add(&mut self, vectors: &[f32]) {
        let (points, centroids) = (Points::new(vectors, self.dimension), Points::new(&self.centroids, self.dimension));
        let labels = match &self.beside {
            Beside::All(codewords) => {
                let mut labels = vec![0; points.len()];
                assign(vectors, self.dimension, codewords, &mut labels);
                labels
            }
            Beside::Near(groups, neighbours) => {
                let mut labels = groups.place(points, centroids);
                reassign(points, centroids, neighbours, &mut labels);
                labels
            }
        };
        self.means.add(vectors, &labels);
    }

    /// The means. A centroid without vectors stays where it was.
    pub fn finish(mut self) -> Vec<f32> {
        self.means.move_to(&mut self.centroids);
        if self.lloyd.spherical {
            normalise(&mut self.centroids, self.dimension);
        }
        self.centroids
    }
}

#[cfg(test)]
mod tests {
    use super::super::partitions::partitions;
    use super::super::testing::{blobs, lloyd, quality};
    use super::*;

    fn of_parts(lloyd: Lloyd, centroids: &[f32], vectors: &[f32], dimension: usize, rows: usize) -> Vec<f32> {
        let mut streamed = Streamed::new(lloyd, centroids.to_vec(), dimension).unwrap();
        vectors.chunks(rows * dimension).for_each(|part| streamed.add(part));
        streamed.finish()
    }

    #[test]
    fn means_of_more_vectors_are_nearer_to_all_of_them() {
        let dimension = 12;
        let vectors = blobs(24_000, dimension, 250);
        for clusters in [40, 300] {
            let few = partitions(lloyd(clusters, false), &vectors[..clusters * 5 * dimension], dimension, &|_| Ok(())).unwrap().centroids;
            let more = of_parts(lloyd(clusters, false), &few, &vectors, dimension, 5000);
            let ((before, _), (after, used)) = (quality(&vectors, dimension, &few), quality(&vectors, dimension, &more));
            assert!(after < before * 0.95, "{clusters}: {after} {before}");
            assert!(used > clusters * 9 / 10, "{used}");
        }
    }

    #[test]
    fn parts_and_threads_make_no_difference() {
        let dimension = 8;
        let vectors = blobs(9000, dimension, 200);
        for spherical in [false, true] {
            let lloyd = lloyd(200, spherical);
            let centroids = lloyd.run(&vectors[..400 * dimension], dimension, &|_| Ok(())).unwrap().centroids;
            let run = |rows, threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| of_parts(lloyd, &centroids, &vectors, dimension, rows))
            };
            let whole = run(9000, 1);
            assert_eq!(whole, run(777, 3));
            if spherical {
                assert!(whole.chunks_exact(dimension).all(|c| (c.iter().map(|v| v * v).sum::<f32>() - 1.0).abs() < 1e-5));
            }
        }
    }

    #[test]
    fn a_centroid_without_vectors_stays() {
        let centroids = [0.0, 0.0, 100.0, 100.0];
        assert_eq!(of_parts(lloyd(2, false), &centroids, &[1.0, 2.0, 3.0, 4.0], 2, 1), [2.0, 3.0, 100.0, 100.0]);
    }
}
