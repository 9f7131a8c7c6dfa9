//! The vector column: found by its path, described, and taken out of scanned batches.

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, FixedSizeListArray, RecordBatch};
use arrow_schema::DataType;

use super::version::Dataset;
use crate::error::{Error, Result};
use crate::model::ElementType;

/// A column that an IVF_PQ index can be built on.
#[derive(Debug, Clone)]
pub struct VectorColumn {
    /// As given: `vector`, or `a.b` for a nested field.
    pub path: String,
    pub field_id: i32,
    pub element_type: ElementType,
    pub dimension: usize,
    parts: Vec<String>,
}

impl VectorColumn {
    /// Not of a struct.
    pub fn is_top_level(&self) -> bool {
        self.parts.len() == 1
    }

    /// Find and check the column `path` of `dataset`.
    pub fn resolve(dataset: &Dataset, path: &str) -> Result<Self> {
        let schema = dataset.0.schema();
        let field = schema.field(path).ok_or_else(|| {
            Error::invalid(format!(
                "column {path:?} does not exist in {}; its columns are {}",
                dataset.shown_uri(),
                schema.fields.iter().map(|f| f.name.as_str()).collect::<Vec<_>>().join(", ")
            ))
        })?;
        let (item, dimension) = match field.data_type() {
            DataType::FixedSizeList(item, width) if width > 0 => (item.data_type().clone(), width as usize),
            DataType::List(_) => {
                return Err(Error::invalid(format!(
                    "column {path:?} is {}, a multivector column; expected fixed_size_list<float16|float32|float64>; build its index with pylance's own create_index",
                    field.data_type()
                )));
            }
            other => {
                return Err(Error::invalid(format!("column {path:?} is {other}, expected fixed_size_list<float16|float32|float64>")));
            }
        };
        let element_type = ElementType::try_from(&item).map_err(|e| e.context(format!("column {path:?}")))?;
        let parts = lance_core::datatypes::parse_field_path(path)?;
        Ok(Self { path: path.to_string(), field_id: field.id, element_type, dimension, parts })
    }

    /// The vectors of a scanned batch. A null struct above a nested column makes its vectors null.
    pub fn extract(&self, batch: &RecordBatch) -> Result<FixedSizeListArray> {
        let missing = || Error::internal(format!("column {:?} is missing in a scanned batch", self.path));
        let column: ArrayRef = match batch.column_by_name(&self.path) {
            Some(column) => column.clone(),
            None => {
                let mut parts = self.parts.iter();
                let mut column = parts.next().and_then(|root| batch.column_by_name(root)).ok_or_else(missing)?.clone();
                let mut nulls = column.nulls().cloned();
                for part in parts {
                    let parent = column.as_struct_opt().ok_or_else(missing)?;
                    nulls = arrow_buffer::NullBuffer::union(nulls.as_ref(), parent.nulls());
                    let child = parent.column_by_name(part).ok_or_else(missing)?.clone();
                    column = child;
                }
                let nulls = arrow_buffer::NullBuffer::union(nulls.as_ref(), column.nulls());
                let list = column.as_fixed_size_list_opt().ok_or_else(missing)?;
                let (field, width, values, _) = list.clone().into_parts();
                std::sync::Arc::new(FixedSizeListArray::try_new(field, width, values, nulls)?)
            }
        };
        column.as_fixed_size_list_opt().cloned().ok_or_else(missing)
    }
}
