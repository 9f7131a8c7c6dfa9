//! Writing `partitions.lance`.

use super::buckets::{WrittenPartition, WrittenPartitions};
use crate::artifact::format::{FileEntry, PartitionRowsBuilder, partitions_schema};
use crate::error::Result;
use crate::io::Store;
use crate::lance::file::TableWriter;

/// Bytes of rows that are collected before they are written.
const BATCH_BYTES: usize = 1 << 20;

/// Write a row for each partition.
pub async fn write_partitions(store: &Store, name: &str, partitions: &WrittenPartitions, sync: bool) -> Result<FileEntry> {
    let mut rows = PartitionRowsBuilder::default();
    let mut writer = TableWriter::create(store, name, partitions_schema().as_ref(), sync)?;
    for partition in partitions.iter() {
        let WrittenPartition { file, num_rows, checksum, ranges } = partition?;
        rows.push(file, num_rows, checksum, ranges);
        if rows.bytes() >= BATCH_BYTES {
            writer.write(&rows.finish()?).await?;
        }
    }
    writer.write(&rows.finish()?).await?;
    Ok(FileEntry::of(writer.finish().await?))
}
