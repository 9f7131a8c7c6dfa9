//! What an artifact is: names and schemas, the manifest, checksums, the model's file. Docs: `docs/FORMAT.md`.

mod assignment;
mod checksum;
mod layout;
mod manifest;
mod model_file;
mod partitions;
mod partitions_file;

pub use assignment::{Assignment, Groups};
pub use checksum::{checksum, from_hex, to_hex};
pub use layout::{
    CLAIM_FILE, DEFAULT_MAX_BUCKETS, LISTED, MANIFEST_FILE, MAX_MANIFEST_BYTES, METADATA_FILE, Ours, PART_ID_COLUMN, PARTITIONS_DIR,
    PQ_CODE_COLUMN, ROW_ID_COLUMN, TABLED, bucket_path, bucket_schema, claim_file, metadata_path, new_tag, ours, partition_schema,
    partitions_path, pq_code_type, temporary_prefix,
};
pub use manifest::{CHECKSUM_KIND, FileEntry, Manifest, ModelSummary, RowCounts, Source, WriterInfo};
pub use model_file::{parse_model, told_partitions, write_model};
pub use partitions::{EncodedRanges, Partition, PartitionRange, PartitionTable, RowRange};
pub use partitions_file::{PARTITION_COLUMNS, PartitionRowsBuilder, add_partitions, partitions_schema};
