//! Rows as a scan gives them.

use arrow_array::cast::AsArray;
use arrow_array::types::UInt64Type;
use arrow_array::{FixedSizeListArray, RecordBatch, UInt64Array};

use super::column::VectorColumn;
use crate::error::{Error, Result};

/// Scanned rows, not yet filtered.
#[derive(Debug, Clone)]
pub struct ScannedRows {
    pub row_ids: UInt64Array,
    pub vectors: FixedSizeListArray,
}

impl ScannedRows {
    pub(super) fn of(batch: &RecordBatch, column: &VectorColumn) -> Result<Self> {
        let row_ids = batch
            .column_by_name(lance_core::ROW_ID)
            .and_then(|c| c.as_primitive_opt::<UInt64Type>())
            .ok_or_else(|| Error::internal("a scanned batch has no row ids"))?;
        Ok(Self { row_ids: row_ids.clone(), vectors: column.extract(batch)? })
    }

    pub fn len(&self) -> usize {
        self.row_ids.len()
    }

    pub fn is_empty(&self) -> bool {
        self.row_ids.is_empty()
    }

    /// `rows` rows from `first` on, without a copy.
    pub fn slice(&self, first: usize, rows: usize) -> Self {
        Self { row_ids: self.row_ids.slice(first, rows), vectors: self.vectors.slice(first, rows) }
    }
}
