//! From a dataset to encoded batches: scan, filter, train, encode.
//!
//! What may enter: which vectors an index holds (`prepare`), where they come from (`source`), what a backend is (`encoder`) and the
//! two pipelines that feed one (`pipeline` for the CPU, `device`). Nothing here knows an artifact's files, or Lance.

mod cpu;
pub mod device;
mod encoder;
mod in_parts;
mod memory;
mod outliers;
mod params;
mod pipeline;
mod prepare;
mod source;

pub use cpu::{CpuEncoder, Means, as_float32, train as train_cpu};
pub use encoder::{Checked, Encoded, Encoder};
pub use in_parts::{PartedSample, train_centroids_in_parts};
pub use memory::{EncodeShares, TrainShares, TrainingShape, Vectors};
pub use params::TrainParams;
pub use pipeline::encode_into;
pub use prepare::{Dropped, PreparedVectors, check_prepared, prepare};
pub use source::{Order, VectorSource};
