//! The nearest of centroids: by a search through all of them, pruned where they are many.

use rayon::prelude::*;

use super::nearest::{Codewords, Form, Nearest};
use super::pruned::{Pruned, pays};

/// Vectors searched for by one task.
const TASK_ROWS: usize = 4096;

pub enum Search {
    Full(Codewords),
    Pruned(Pruned),
}

impl Search {
    pub fn new(values: &[f32], dimension: usize, form: Form) -> Self {
        if pays(values.len() / dimension, dimension) {
            Self::Pruned(Pruned::new(values, dimension, form))
        } else {
            Self::Full(Codewords::new(values, dimension, form))
        }
    }

    pub fn count(&self) -> usize {
        match self {
            Self::Full(codewords) => codewords.count(),
            Self::Pruned(codewords) => codewords.count(),
        }
    }

    /// See [`Codewords::magnitude`].
    pub fn magnitude(&self, length: f32) -> f32 {
        match self {
            Self::Full(codewords) => codewords.magnitude(length),
            Self::Pruned(codewords) => codewords.magnitude(length),
        }
    }

    /// The nearest of all; the nearest but one at least where it is within `doubt` of a vector's length.
    pub fn nearest(&self, vectors: &[f32], dimension: usize, doubt: impl Fn(f32) -> f32, out: &mut [Nearest]) {
        match self {
            Self::Full(codewords) => codewords.nearest_of_parts(vectors, dimension, out),
            Self::Pruned(codewords) => codewords.nearest(vectors, doubt, out),
        }
    }

    /// The index of the nearest to each vector, on all threads; 0 where no distance is a number.
    pub fn label(&self, vectors: &[f32], labels: &mut [u32]) {
        if labels.is_empty() {
            return;
        }
        let dimension = vectors.len() / labels.len();
        vectors.par_chunks(TASK_ROWS * dimension).zip(labels.par_chunks_mut(TASK_ROWS)).for_each(|(vectors, labels)| {
            let mut found = vec![Nearest { index: 0, distance: 0.0, second: 0.0 }; labels.len()];
            match self {
                Self::Full(codewords) => codewords.only_nearest(vectors, &mut found),
                Self::Pruned(codewords) => codewords.nearest(vectors, |_| 0.0, &mut found),
            }
            for (label, found) in labels.iter_mut().zip(&found) {
                *label = if found.index == u32::MAX { 0 } else { found.index };
            }
        });
    }
}
