//! Artifacts as they are read: by partition, in the ranges that the manifest records, and checked.

mod artifact;
mod files;
mod flat_file;
mod partition_reader;
mod rows;
mod sorted;
mod verify;

pub use artifact::{Artifact, CONCURRENT_ARTIFACTS, read_manifest};
pub use files::BucketFiles;
pub use partition_reader::{PartitionReader, SLICE_BYTES};
pub use rows::{PartitionRows, row_ids_and_codes};
pub use verify::VerifyReport;
