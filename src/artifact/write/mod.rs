//! Artifacts as they are written: rows are staged, sorted by partition, appended to bucket files, and published.

mod batch;
mod bucket;
mod buckets;
mod builder;
mod options;
mod partitions_file;
mod plan;
mod stage;
mod target;
#[cfg(test)]
mod tests;

pub use builder::PartitionArtifactBuilder;
pub use options::{BuilderOptions, Encoding};
pub use plan::{MemoryPlan, default_limit};
pub use target::{Unfinished, delete_artifact, delete_unfinished, unfinished_files};
