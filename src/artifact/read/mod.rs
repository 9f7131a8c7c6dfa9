//! Artifacts as they are read: by partition, in the ranges that the manifest records, and checked.

mod artifact;
mod files;
mod flat_file;
mod verify;

pub use artifact::{Artifact, PartitionReader, read_manifest, row_ids_and_codes};
pub use files::BucketFiles;
pub use verify::VerifyReport;
