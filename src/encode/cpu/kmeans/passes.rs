//! Iterations on growing parts of a sample.

use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::lloyd::{Clustering, Lloyd};
use crate::error::{Error, Result};

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

/// For few centroids.
pub const OF_FEW: &[Pass] = &[pass(8, usize::MAX, 12), pass(2, 6, 6), pass(1, 6, 0)];

/// For the codewords of a sub-vector. Twice as many iterations bring vectors nearer to their codewords by 0.4 to 2 %.
pub const OF_CODEWORDS: &[Pass] = &[pass(4, 20, 4), pass(1, 4, 0)];

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
    use super::super::testing::{blobs, lloyd};
    use super::*;

    fn iterations(passes: &[Pass]) -> usize {
        passes.iter().fold(0, |sum, pass| sum.saturating_add(pass.iterations))
    }

    #[test]
    fn thin_samples_get_all_clusters_and_the_iterations_of_every_stage() {
        for (passes, clusters) in [(OF_FEW, 100), (OF_CODEWORDS, 100)] {
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
}
