//! What the tests share.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::super::nearest::{Codewords, Form};
use super::lloyd::{Lloyd, assign};

pub fn blobs(rows: usize, dimension: usize, blobs: usize) -> Vec<f32> {
    let mut random = SmallRng::seed_from_u64(9);
    let centers: Vec<f32> = (0..blobs * dimension).map(|_| random.random_range(-10.0..10.0)).collect();
    (0..rows * dimension).map(|i| centers[i / dimension % blobs * dimension + i % dimension] + random.random_range(-0.5..0.5)).collect()
}

/// The mean squared distance to the nearest centroid, and how many centroids have members.
pub fn quality(vectors: &[f32], dimension: usize, centroids: &[f32]) -> (f64, usize) {
    let mut labels = vec![0; vectors.len() / dimension];
    assign(vectors, dimension, &Codewords::new(centroids, dimension, Form::L2), &mut labels);
    let squares = vectors.chunks_exact(dimension).zip(&labels).map(|(vector, label)| {
        let centroid = &centroids[*label as usize * dimension..][..dimension];
        vector.iter().zip(centroid).map(|(v, c)| f64::from((v - c) * (v - c))).sum::<f64>()
    });
    (squares.sum::<f64>() / labels.len() as f64, labels.iter().collect::<std::collections::HashSet<_>>().len())
}

pub fn lloyd(clusters: usize, spherical: bool) -> Lloyd {
    Lloyd { clusters, iterations: 30, seed: 5, spherical }
}
