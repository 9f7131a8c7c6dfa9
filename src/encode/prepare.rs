//! Filter and normalise vectors as Lance's own build does, in one place, for every backend; count what is dropped and why.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float16Type, Float32Type, Float64Type};
use arrow_array::{Array, ArrayRef, ArrowPrimitiveType, BooleanArray, FixedSizeListArray, PrimitiveArray, UInt64Array};
use lance_linalg::kernels::normalize_fsl;

use crate::error::{Error, Result};
use crate::model::{ElementType, Metric, fixed_size_list, flat_values};

/// Rows dropped, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Dropped {
    /// The vector, or an element of it, is null.
    pub null: u64,
    /// An element is NaN or infinite.
    pub non_finite: u64,
    /// Cosine only: the norm is zero (or so small that its square is).
    pub zero_norm: u64,
}

impl Dropped {
    pub fn total(self) -> u64 {
        self.null + self.non_finite + self.zero_norm
    }

    pub fn add(&mut self, other: Self) {
        self.null += other.null;
        self.non_finite += other.non_finite;
        self.zero_norm += other.zero_norm;
    }

    /// As the manifest has it.
    pub fn by_reason(self) -> BTreeMap<String, u64> {
        [("null", self.null), ("non_finite", self.non_finite), ("zero_norm", self.zero_norm)]
            .into_iter()
            .map(|(reason, rows)| (reason.to_string(), rows))
            .collect()
    }
}

/// Vectors ready to be encoded: no null, all finite, of unit norm for cosine, in a buffer of their own without an offset.
#[derive(Debug, Clone)]
pub struct PreparedVectors {
    pub row_ids: UInt64Array,
    pub vectors: FixedSizeListArray,
    pub dropped: Dropped,
}

/// Why a row is kept or dropped.
#[derive(Clone, Copy, PartialEq)]
enum Fate {
    Kept,
    Null,
    NonFinite,
}

fn fates<T: ArrowPrimitiveType>(vectors: &FixedSizeListArray, values: &ArrayRef, finite: impl Fn(T::Native) -> bool) -> Vec<Fate> {
    let dimension = vectors.value_length() as usize;
    let values: &PrimitiveArray<T> = values.as_primitive();
    let inner_nulls = values.nulls().filter(|n| n.null_count() > 0);
    values
        .values()
        .chunks_exact(dimension)
        .enumerate()
        .map(|(row, vector)| {
            let null = vectors.is_null(row) || inner_nulls.is_some_and(|n| n.slice(row * dimension, dimension).null_count() > 0);
            if null {
                Fate::Null
            } else if vector.iter().all(|v| finite(*v)) {
                Fate::Kept
            } else {
                Fate::NonFinite
            }
        })
        .collect()
}

fn row_fates(vectors: &FixedSizeListArray, element_type: ElementType) -> Vec<Fate> {
    let values = flat_values(vectors);
    match element_type {
        ElementType::Float16 => fates::<Float16Type>(vectors, &values, |v| v.is_finite()),
        ElementType::Float32 => fates::<Float32Type>(vectors, &values, f32::is_finite),
        ElementType::Float64 => fates::<Float64Type>(vectors, &values, f64::is_finite),
    }
}

fn keep(row_ids: &UInt64Array, vectors: &FixedSizeListArray, mask: Vec<bool>) -> Result<(UInt64Array, FixedSizeListArray)> {
    let mask = BooleanArray::from(mask);
    let row_ids = arrow_select::filter::filter(row_ids, &mask)?.as_primitive().clone();
    let vectors = arrow_select::filter::filter(vectors, &mask)?.as_fixed_size_list().clone();
    Ok((row_ids, vectors))
}

/// Drop what Lance drops; for cosine normalise what is left (with Lance's own kernel, so that codes come out equal).
pub fn prepare(row_ids: &UInt64Array, vectors: &FixedSizeListArray, metric: Metric) -> Result<PreparedVectors> {
    let element_type = ElementType::try_from(&vectors.value_type())?;
    if row_ids.len() != vectors.len() {
        return Err(Error::internal(format!("{} row ids for {} vectors", row_ids.len(), vectors.len())));
    }
    let mut dropped = Dropped::default();
    let fates = row_fates(vectors, element_type);
    for fate in &fates {
        dropped.null += u64::from(*fate == Fate::Null);
        dropped.non_finite += u64::from(*fate == Fate::NonFinite);
    }
    let (mut row_ids, mut vectors) = if dropped.total() > 0 {
        keep(row_ids, vectors, fates.iter().map(|f| *f == Fate::Kept).collect())?
    } else {
        (row_ids.clone(), vectors.clone())
    };
    vectors = fixed_size_list(flat_values(&vectors), vectors.value_length() as usize)?;
    if metric == Metric::Cosine && !vectors.is_empty() {
        vectors = normalize_fsl(&vectors)?;
        // A norm of zero turned the vector into NaN.
        let fates = row_fates(&vectors, element_type);
        dropped.zero_norm = fates.iter().filter(|f| **f != Fate::Kept).count() as u64;
        if dropped.zero_norm > 0 {
            (row_ids, vectors) = keep(&row_ids, &vectors, fates.iter().map(|f| *f == Fate::Kept).collect())?;
        }
        vectors = fixed_size_list(without_nulls(&flat_values(&vectors)), vectors.value_length() as usize)?;
    }
    Ok(PreparedVectors { row_ids, vectors, dropped })
}

/// The values without a validity buffer that says all are valid.
fn without_nulls(values: &ArrayRef) -> ArrayRef {
    if values.nulls().is_none() {
        return values.clone();
    }
    match values.data_type() {
        arrow_schema::DataType::Float16 => {
            Arc::new(PrimitiveArray::<Float16Type>::new(values.as_primitive::<Float16Type>().values().clone(), None))
        }
        arrow_schema::DataType::Float32 => {
            Arc::new(PrimitiveArray::<Float32Type>::new(values.as_primitive::<Float32Type>().values().clone(), None))
        }
        _ => Arc::new(PrimitiveArray::<Float64Type>::new(values.as_primitive::<Float64Type>().values().clone(), None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_array::types::Float32Type;

    fn vectors(rows: Vec<Option<Vec<Option<f32>>>>) -> FixedSizeListArray {
        FixedSizeListArray::from_iter_primitive::<Float32Type, _, _>(rows, 2)
    }

    #[test]
    fn drops_and_counts_what_lance_drops() {
        let input = vectors(vec![
            Some(vec![Some(3.0), Some(4.0)]),
            None,
            Some(vec![Some(1.0), None]),
            Some(vec![Some(f32::NAN), Some(1.0)]),
            Some(vec![Some(0.0), Some(0.0)]),
            Some(vec![Some(1e-30), Some(0.0)]),
            Some(vec![Some(f32::NEG_INFINITY), Some(1.0)]),
        ]);
        let row_ids = UInt64Array::from_iter_values(10..17);
        let l2 = prepare(&row_ids, &input, Metric::L2).unwrap();
        assert_eq!(l2.row_ids.values().to_vec(), [10, 14, 15]);
        assert_eq!(l2.dropped, Dropped { null: 2, non_finite: 2, zero_norm: 0 });
        let cosine = prepare(&row_ids, &input, Metric::Cosine).unwrap();
        assert_eq!(cosine.row_ids.values().to_vec(), [10]);
        assert_eq!(cosine.dropped, Dropped { null: 2, non_finite: 2, zero_norm: 2 });
        assert_eq!(cosine.vectors.values().as_primitive::<Float32Type>().values().to_vec(), [0.6, 0.8]);
    }

    #[test]
    fn a_sliced_batch_keeps_its_rows_together() {
        let input = vectors((0..8).map(|i| Some(vec![Some(i as f32), Some(1.0)])).collect());
        let row_ids = UInt64Array::from_iter_values(0..8);
        let prepared = prepare(&row_ids.slice(3, 2), &input.slice(3, 2), Metric::Dot).unwrap();
        assert_eq!(prepared.row_ids.values().to_vec(), [3, 4]);
        assert_eq!(prepared.vectors.values().as_primitive::<Float32Type>().values().to_vec(), [3.0, 1.0, 4.0, 1.0]);
    }
}
