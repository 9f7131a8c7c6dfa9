//! The partition artifact: layout, manifest, writer, reader and verification. Knows nothing of datasets, GPUs, Python or
//! index builders.

mod batch;
mod bucket;
mod checksum;
mod claim;
mod files;
mod flat;
mod flat_file;
mod flush;
pub mod layout;
mod leftovers;
mod local;
mod manifest;
mod memory;
mod metadata;
mod reader;
mod sink;
mod stage;
mod store;
mod target;
mod uri;
mod verify;
mod writer;

pub use files::BucketFiles;
pub use manifest::{FileEntry, Manifest, ModelSummary, PartitionEntry, RowCounts, RowRange, Source, WriterInfo};
pub use memory::{MemoryPlan, default_limit};
pub use reader::{Artifact, PartitionReader, delete, row_ids_and_codes};
pub use sink::local_writer;
pub use store::{ArtifactStore, StorageOptions};
pub use uri::without_credentials;
pub use verify::VerifyReport;
pub use writer::{BuilderOptions, Encoding, PartitionArtifactBuilder};
