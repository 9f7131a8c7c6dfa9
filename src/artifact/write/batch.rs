//! What `append_batch` takes, checked as a whole before any of it is used.

use arrow_array::cast::AsArray;
use arrow_array::types::{UInt8Type, UInt32Type, UInt64Type};
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_schema::DataType;

use crate::artifact::format::{PART_ID_COLUMN, PQ_CODE_COLUMN, ROW_ID_COLUMN};
use crate::error::{Error, Result};

/// The three columns of an encoded batch, as flat values.
pub struct EncodedColumns {
    row_ids: ArrayRef,
    part_ids: ArrayRef,
    codes: ArrayRef,
}

const COLUMNS: [(&str, &str, &str); 3] =
    [(ROW_ID_COLUMN, "row_id", "uint64"), (PART_ID_COLUMN, "part_id", "uint32"), (PQ_CODE_COLUMN, "pq_code", "fixed_size_list<uint8>")];

impl EncodedColumns {
    /// Check columns, types, width, nulls and partition ids. A refused batch has had no effect.
    pub fn try_new(batch: &RecordBatch, num_partitions: usize, code_width: usize) -> Result<Self> {
        let schema = batch.schema();
        if let Some(field) = schema.fields().iter().find(|f| COLUMNS.iter().all(|c| c.0 != f.name() && c.1 != f.name())) {
            return Err(Error::invalid(format!(
                "append_batch: unexpected column {:?}; expected just {}",
                field.name(),
                COLUMNS.map(|c| format!("{} ({})", c.0, c.2)).join(", ")
            )));
        }
        let mut found = Vec::with_capacity(3);
        for (name, short, data_type) in COLUMNS {
            let mut columns = schema.fields().iter().zip(batch.columns()).filter(|(f, _)| f.name() == name || f.name() == short);
            let column = match (columns.next(), columns.next()) {
                (Some((_, column)), None) => column.clone(),
                (None, _) => {
                    return Err(Error::invalid(format!("append_batch: column {name:?} ({data_type}) is missing")));
                }
                _ => return Err(Error::invalid(format!("append_batch: column {name:?} is there twice"))),
            };
            if column.null_count() > 0 {
                return Err(Error::invalid(format!(
                    "append_batch: column {name:?} holds {} nulls; drop rows without a code before encoding",
                    column.null_count()
                )));
            }
            found.push(column);
        }
        let mut found = found.into_iter();
        let (Some(row_ids), Some(part_ids), Some(codes)) = (found.next(), found.next(), found.next()) else {
            return Err(Error::internal("append_batch: columns were lost"));
        };
        expect_type(ROW_ID_COLUMN, &row_ids, &DataType::UInt64)?;
        expect_type(PART_ID_COLUMN, &part_ids, &DataType::UInt32)?;
        let codes = code_values(&codes, code_width)?;
        if let Some((row, id)) =
            part_ids.as_primitive::<UInt32Type>().values().iter().enumerate().find(|(_, id)| **id as usize >= num_partitions)
        {
            return Err(Error::invalid(format!(
                "append_batch: partition id {id} in row {row} of the batch; expected less than num_partitions = {num_partitions}"
            )));
        }
        Ok(Self { row_ids, part_ids, codes })
    }

    pub fn row_ids(&self) -> &[u64] {
        self.row_ids.as_primitive::<UInt64Type>().values()
    }

    pub fn part_ids(&self) -> &[u32] {
        self.part_ids.as_primitive::<UInt32Type>().values()
    }

    /// Codes one after the other, `code_width` bytes each.
    pub fn codes(&self) -> &[u8] {
        self.codes.as_primitive::<UInt8Type>().values()
    }
}

fn expect_type(name: &str, column: &ArrayRef, expected: &DataType) -> Result<()> {
    if column.data_type() != expected {
        return Err(Error::invalid(format!(
            "append_batch: column {name:?} is {}, expected {expected}; cast it (a dictionary must be decoded)",
            column.data_type()
        )));
    }
    Ok(())
}

fn code_values(column: &ArrayRef, code_width: usize) -> Result<ArrayRef> {
    match column.data_type() {
        DataType::FixedSizeList(item, width) if item.data_type() == &DataType::UInt8 && *width as usize == code_width => {
            let list = column.as_fixed_size_list();
            let values = crate::model::flat_values(list);
            if values.null_count() > 0 {
                return Err(Error::invalid(format!(
                    "append_batch: column {PQ_CODE_COLUMN:?} holds {} null bytes inside its codes",
                    values.null_count()
                )));
            }
            Ok(values)
        }
        other => Err(Error::invalid(format!(
            "append_batch: column {PQ_CODE_COLUMN:?} is {other}, expected fixed_size_list<uint8>[{code_width}] (num_sub_vectors * num_bits / 8 bytes)"
        ))),
    }
}
