//! The partition artifact. Knows nothing of datasets, GPUs, Python or index builders.
//!
//! What may enter: `format` is what an artifact is (names, manifest, checksums), `read` opens one and reads and verifies it by
//! partition, `write` makes one. Arrows: `write` -> `read` -> `format`.

pub mod format;
mod read;
mod write;

pub use format::{Assignment, FileEntry, Groups, Manifest, ModelSummary, PartitionTable, RowCounts, RowRange, Source, WriterInfo};
pub use read::{Artifact, BucketFiles, CONCURRENT_ARTIFACTS, PartitionReader, PartitionRows, SLICE_BYTES, VerifyReport, row_ids_and_codes};
pub use write::{
    BuilderOptions, Encoding, MemoryPlan, PartitionArtifactBuilder, Unfinished, default_limit, delete_artifact, delete_unfinished,
    unfinished_files,
};
