//! `partitions.lance` of version 2: a row for each partition, in order.
//!
//! | column | |
//! | --- | --- |
//! | `file: uint32` | the number of its bucket file in `bucket_files` of the manifest; null where it has no rows |
//! | `num_rows: uint32` | |
//! | `checksum: uint64` | as in the manifest of version 1 |
//! | `ranges: binary` | for each range two LEB128 numbers: the rows between the end of the one before (at first 0) and it, zigzag, and its own |

use std::sync::Arc;

use arrow_array::builder::BinaryBuilder;
use arrow_array::cast::AsArray;
use arrow_array::types::{UInt32Type, UInt64Type};
use arrow_array::{Array, RecordBatch, UInt32Array, UInt64Array};
use arrow_schema::{DataType, Field, Schema, SchemaRef};

use super::partitions::PartitionTable;
use crate::error::{Error, Result};

pub const PARTITION_COLUMNS: [&str; 4] = ["file", "num_rows", "checksum", "ranges"];

pub fn partitions_schema() -> SchemaRef {
    let [file, num_rows, checksum, ranges] = PARTITION_COLUMNS;
    Arc::new(Schema::new(vec![
        Field::new(file, DataType::UInt32, true),
        Field::new(num_rows, DataType::UInt32, false),
        Field::new(checksum, DataType::UInt64, false),
        Field::new(ranges, DataType::Binary, false),
    ]))
}

/// Collects rows of the file.
#[derive(Debug, Default)]
pub struct PartitionRowsBuilder {
    files: Vec<Option<u32>>,
    num_rows: Vec<u32>,
    checksums: Vec<u64>,
    ranges: BinaryBuilder,
    bytes: usize,
}

impl PartitionRowsBuilder {
    pub fn push(&mut self, file: Option<u32>, num_rows: u32, checksum: u64, ranges: &[u8]) {
        self.files.push(file);
        self.num_rows.push(num_rows);
        self.checksums.push(checksum);
        self.ranges.append_value(ranges);
        self.bytes += 16 + ranges.len();
    }

    /// Bytes that are held.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn finish(&mut self) -> Result<RecordBatch> {
        let mut rows = std::mem::take(self);
        Ok(RecordBatch::try_new(
            partitions_schema(),
            vec![
                Arc::new(UInt32Array::from(rows.files)),
                Arc::new(UInt32Array::from(rows.num_rows)),
                Arc::new(UInt64Array::from(rows.checksums)),
                Arc::new(rows.ranges.finish()),
            ],
        )?)
    }
}

/// Add rows of the file to a table.
pub fn add_partitions(table: &mut PartitionTable, batch: &RecordBatch) -> Result<()> {
    let wrong = |name: &str| Error::corrupt(format!("column {name:?} is missing, of another type, or holds nulls"));
    let column = |name: &'static str| batch.column_by_name(name).ok_or_else(|| wrong(name));
    let [file, num_rows, checksum, ranges] = PARTITION_COLUMNS;
    let files = column(file)?.as_primitive_opt::<UInt32Type>().ok_or_else(|| wrong(file))?;
    let rows = column(num_rows)?.as_primitive_opt::<UInt32Type>().filter(|c| c.null_count() == 0).ok_or_else(|| wrong(num_rows))?;
    let checksums = column(checksum)?.as_primitive_opt::<UInt64Type>().filter(|c| c.null_count() == 0).ok_or_else(|| wrong(checksum))?;
    let encoded = column(ranges)?.as_binary_opt::<i32>().filter(|c| c.null_count() == 0).ok_or_else(|| wrong(ranges))?;
    for row in 0..batch.num_rows() {
        let file = files.is_valid(row).then(|| files.value(row));
        table.push_encoded(file, rows.value(row), checksums.value(row), encoded.value(row))?;
    }
    Ok(())
}
