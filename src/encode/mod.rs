//! From a dataset to encoded batches: scan, filter, train, encode. Knows nothing of the artifact's files.

mod column;
mod cpu;
mod dataset;
pub mod device;
mod pipeline;
mod prepare;
mod source;

use arrow_array::FixedSizeListArray;

use crate::error::{Error, Result};

pub use column::VectorColumn;
pub use cpu::{CpuEncoder, train as train_cpu};
pub use dataset::{DatasetHandle, column_files, data_files, difference, parse_manifest};
pub use pipeline::encode_into;
pub use prepare::{Dropped, PreparedVectors, check_prepared, prepare};
pub use source::VectorSource;

/// What an encoder makes of `n` vectors.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoded {
    /// `n` partition ids.
    pub part_ids: Vec<u32>,
    /// `n` codes of `code_width` bytes, one after the other.
    pub codes: Vec<u8>,
    /// The sum of the distances to the centroids, as statistics of an index have it.
    pub loss: f64,
}

/// A trained backend, ready to encode prepared vectors of the model's dtype and dimension.
pub trait Encoder: Send + Sync {
    fn encode(&self, vectors: &FixedSizeListArray) -> Result<Encoded>;

    /// Bytes of one code.
    fn code_width(&self) -> usize;
}

/// Told of training as it goes on; `check` may end it.
pub trait TrainProgress: Send + Sync {
    fn start(&self, stage: &str, total: Option<u64>, unit: &str);
    fn advance(&self, stage: &str, completed: u64);
    fn complete(&self, stage: &str);
    fn check(&self) -> Result<()> {
        Ok(())
    }
}

/// Training that nobody watches.
pub struct NoProgress;

impl TrainProgress for NoProgress {
    fn start(&self, _: &str, _: Option<u64>, _: &str) {}
    fn advance(&self, _: &str, _: u64) {}
    fn complete(&self, _: &str) {}
}

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
        if self.sample_rate < 2 {
            return Err(Error::invalid(format!("sample_rate: got {}, expected at least 2", self.sample_rate)));
        }
        if self.max_iters == 0 || self.max_iters > u32::MAX as usize {
            return Err(Error::invalid(format!("max_iters: got {}, expected 1 to {}", self.max_iters, u32::MAX)));
        }
        Ok(())
    }
}
