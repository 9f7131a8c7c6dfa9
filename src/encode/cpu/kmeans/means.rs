//! Means of the vectors of clusters, which come in parts.

use rayon::prelude::*;

use super::lloyd::{add_up, mean};
use super::members::Members;
use super::points::Points;

/// Sums of the vectors of each cluster.
pub struct Means {
    dimension: usize,
    sums: Vec<f64>,
    counts: Vec<u64>,
}

impl Means {
    pub fn new(clusters: usize, dimension: usize) -> Self {
        Self { dimension, sums: vec![0.0; clusters * dimension], counts: vec![0; clusters] }
    }

    pub fn clusters(&self) -> usize {
        self.counts.len()
    }

    pub fn dimension(&self) -> usize {
        self.dimension
    }

    /// Add vectors, in order, each to its cluster: in how many parts they come makes no difference.
    pub fn add(&mut self, vectors: &[f32], labels: &[u32]) {
        let points = Points::new(vectors, self.dimension);
        let members = Members::of(labels, self.clusters());
        let sums = self.sums.par_chunks_exact_mut(self.dimension).zip(self.counts.par_iter_mut());
        sums.enumerate().for_each(|(cluster, (sum, count))| {
            add_up(points, members.of_cluster(cluster), sum);
            *count += members.size(cluster) as u64;
        });
    }

    /// Move centroids to the means. One without vectors stays where it was.
    pub fn move_to(&self, centroids: &mut [f32]) {
        let sums = self.sums.chunks_exact(self.dimension).zip(&self.counts);
        for (centroid, (sum, count)) in centroids.chunks_exact_mut(self.dimension).zip(sums) {
            mean(centroid, sum, *count as usize);
        }
    }
}
