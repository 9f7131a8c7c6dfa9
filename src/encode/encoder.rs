//! What every backend is to the pipeline.

use arrow_array::FixedSizeListArray;

use crate::artifact::Assignment;
use crate::error::Result;

/// What an encoder makes of `n` vectors.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoded {
    /// `n` partition ids.
    pub part_ids: Vec<u32>,
    /// `n` codes of `code_width` bytes, one after the other.
    pub codes: Vec<u8>,
    /// The sum of the distances to the centroids, as statistics of an index have it.
    pub loss: f64,
    pub checked: Checked,
}

/// Of an encoder that does not compare every vector with all centroids: those that were, and those that are not with their nearest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Checked {
    pub rows: u64,
    pub missed: u64,
}

impl Checked {
    pub fn add(&mut self, other: Self) {
        self.rows += other.rows;
        self.missed += other.missed;
    }
}

/// A trained backend, ready to encode prepared vectors of the model's dtype and dimension.
pub trait Encoder: Send + Sync {
    fn encode(&self, vectors: &FixedSizeListArray) -> Result<Encoded>;

    /// Bytes of one code.
    fn code_width(&self) -> usize;

    /// How vectors are given their partitions, after so many were checked.
    fn assignment(&self, checked: Checked) -> Assignment;
}
