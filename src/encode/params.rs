//! What is to be trained.

use arrow_array::FixedSizeListArray;

use crate::error::{Error, Result};

/// Training parameters; they mean what they mean in pylance.
#[derive(Debug, Clone)]
pub struct TrainParams {
    pub num_partitions: usize,
    pub num_sub_vectors: usize,
    /// 4 or 8.
    pub num_bits: u32,
    /// Training vectors per centroid and per codeword.
    pub sample_rate: usize,
    pub max_iters: usize,
    pub seed: u64,
    /// Given centroids: only the codebook is trained.
    pub centroids: Option<FixedSizeListArray>,
}

impl TrainParams {
    /// Vectors to draw from the dataset for both trainings.
    pub fn sample_rows(&self) -> usize {
        self.sample_rate.saturating_mul(self.num_partitions.max(1 << self.num_bits.min(8)))
    }

    pub fn validate(&self, dimension: usize) -> Result<()> {
        if self.num_partitions == 0 || self.num_partitions > u32::MAX as usize {
            return Err(Error::invalid(format!("num_partitions: got {}, expected 1 to {}", self.num_partitions, u32::MAX)));
        }
        if !matches!(self.num_bits, 4 | 8) {
            return Err(Error::invalid(format!("num_bits: got {}, expected 4 or 8", self.num_bits)));
        }
        if self.num_sub_vectors == 0 || !dimension.is_multiple_of(self.num_sub_vectors) {
            return Err(Error::invalid(format!(
                "num_sub_vectors: got {}, expected a divisor of the dimension {dimension}",
                self.num_sub_vectors
            )));
        }
        if self.num_bits == 4 && !self.num_sub_vectors.is_multiple_of(2) {
            return Err(Error::invalid(format!("num_sub_vectors: got {}, expected an even number with num_bits=4", self.num_sub_vectors)));
        }
        if self.sample_rate < 1 {
            return Err(Error::invalid(format!("sample_rate: got {}, expected at least 1", self.sample_rate)));
        }
        if self.max_iters == 0 || self.max_iters > u32::MAX as usize {
            return Err(Error::invalid(format!("max_iters: got {}, expected 1 to {}", self.max_iters, u32::MAX)));
        }
        Ok(())
    }
}
