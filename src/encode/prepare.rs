//! Filter and normalise vectors as Lance's own build does, in one place, for every backend; count what is dropped and why.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float16Type, Float32Type, Float64Type};
use arrow_array::{Array, ArrayRef, ArrowPrimitiveType, BooleanArray, FixedSizeListArray, PrimitiveArray, UInt64Array};
use arrow_buffer::NullBuffer;
use half::f16;
use num_traits::Float;

use crate::error::{Error, Result};
use crate::lance::kernels::{Normalizable, normalize};
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

/// An element type of vectors: what is finite, and how a row is normalised.
trait Element: ArrowPrimitiveType<Native: Normalizable> {}
impl Element for Float16Type {}
impl Element for Float32Type {}
impl Element for Float64Type {}

/// Without an early end, which would keep the loop from being vectorised: nearly all rows are finite.
fn all_finite<F: Float>(values: &[F]) -> bool {
    values.iter().fold(true, |finite, v| finite & v.is_finite())
}

/// The rows of a batch: which are null, and their elements.
struct Rows<'a, T: Element> {
    dimension: usize,
    nulls: Option<&'a NullBuffer>,
    element_nulls: Option<&'a NullBuffer>,
    values: &'a [T::Native],
}

impl<'a, T: Element> Rows<'a, T> {
    fn new(vectors: &'a FixedSizeListArray, values: &'a ArrayRef) -> Self {
        let values = values.as_primitive::<T>();
        Self {
            dimension: vectors.value_length() as usize,
            nulls: vectors.nulls().filter(|n| n.null_count() > 0),
            element_nulls: values.nulls().filter(|n| n.null_count() > 0),
            values: values.values(),
        }
    }

    fn is_null(&self, row: usize) -> bool {
        self.nulls.is_some_and(|n| n.is_null(row))
            || self.element_nulls.is_some_and(|n| n.slice(row * self.dimension, self.dimension).null_count() > 0)
    }

    fn len(&self) -> usize {
        self.values.len() / self.dimension
    }

    fn row(&self, row: usize) -> &'a [T::Native] {
        &self.values[row * self.dimension..(row + 1) * self.dimension]
    }

    /// For each row whether it is kept, and the rows dropped.
    fn usable(&self) -> (Vec<bool>, Dropped) {
        let mut dropped = Dropped::default();
        let kept = (0..self.len())
            .map(|row| {
                let (null, finite) = (self.is_null(row), all_finite(self.row(row)));
                dropped.null += u64::from(null);
                dropped.non_finite += u64::from(!null && !finite);
                !null && finite
            })
            .collect();
        (kept, dropped)
    }

    /// Copy the usable rows, one after the other, to the start of `out`; each is read from memory once. Returns the rows
    /// kept. `metric` decides whether they are normalised, with Lance's own kernel so that codes come out equal.
    fn copy_into<O: Float>(&self, metric: Metric, out: &mut [O], convert: impl Fn(T::Native) -> O + Copy) -> Result<(Vec<u32>, Dropped)> {
        let mut dropped = Dropped::default();
        let mut kept = Vec::with_capacity(self.len());
        for row in 0..self.len() {
            let place = kept.len() * self.dimension;
            let target = &mut out[place..place + self.dimension];
            if self.is_null(row) {
                dropped.null += 1;
                continue;
            }
            let source = self.row(row);
            if !all_finite(source) {
                dropped.non_finite += 1;
                continue;
            }
            if metric == Metric::Cosine {
                let mut finite = true;
                for (to, from) in target.iter_mut().zip(normalize(source).0) {
                    finite &= from.is_finite();
                    *to = convert(from);
                }
                // A norm of zero makes NaN and infinities.
                if !finite {
                    dropped.zero_norm += 1;
                    continue;
                }
            } else {
                for (to, from) in target.iter_mut().zip(source) {
                    *to = convert(*from);
                }
            }
            if size_of::<O>() < size_of::<T::Native>() && !all_finite(target) {
                return Err(Error::invalid(
                    "a vector of the float64 column has an element beyond the range of float32, in which this backend computes; \
                     use backend=\"cpu\", or remove the vector",
                ));
            }
            kept.push(row as u32);
        }
        Ok((kept, dropped))
    }
}

/// A place for vectors on their way to a device: of the column's own type, or float32 for float64 columns.
pub enum VectorsMut<'a> {
    Float16(&'a mut [f16]),
    Float32(&'a mut [f32]),
}

/// Copy the usable vectors of a batch, filtered and normalised as [`prepare`] does it, to the start of `out` in one pass.
/// Returns the row ids kept and the rows dropped.
pub fn prepare_into(
    row_ids: &UInt64Array,
    vectors: &FixedSizeListArray,
    metric: Metric,
    out: VectorsMut<'_>,
) -> Result<(Vec<u64>, Dropped)> {
    let values = flat_values(vectors);
    let (kept, dropped) = match (ElementType::try_from(&vectors.value_type())?, out) {
        (ElementType::Float16, VectorsMut::Float16(out)) => Rows::<Float16Type>::new(vectors, &values).copy_into(metric, out, |v| v)?,
        (ElementType::Float16, VectorsMut::Float32(out)) => {
            Rows::<Float16Type>::new(vectors, &values).copy_into(metric, out, f16::to_f32)?
        }
        (ElementType::Float32, VectorsMut::Float32(out)) => Rows::<Float32Type>::new(vectors, &values).copy_into(metric, out, |v| v)?,
        (ElementType::Float64, VectorsMut::Float32(out)) => {
            Rows::<Float64Type>::new(vectors, &values).copy_into(metric, out, |v| v as f32)?
        }
        (element, VectorsMut::Float16(_)) => {
            return Err(Error::invalid(format!(
                "the encoder takes float16, the column is {element}; expected an encoder that takes float32"
            )));
        }
    };
    if row_ids.len() != vectors.len() {
        return Err(Error::internal(format!("{} row ids for {} vectors", row_ids.len(), vectors.len())));
    }
    let ids = row_ids.values();
    Ok((kept.iter().map(|row| ids[*row as usize]).collect(), dropped))
}

fn usable(vectors: &FixedSizeListArray, element_type: ElementType) -> (Vec<bool>, Dropped) {
    let values = flat_values(vectors);
    match element_type {
        ElementType::Float16 => Rows::<Float16Type>::new(vectors, &values).usable(),
        ElementType::Float32 => Rows::<Float32Type>::new(vectors, &values).usable(),
        ElementType::Float64 => Rows::<Float64Type>::new(vectors, &values).usable(),
    }
}

fn normalized(vectors: &FixedSizeListArray, element_type: ElementType) -> Result<(Vec<u32>, ArrayRef, Dropped)> {
    fn run<T: Element>(vectors: &FixedSizeListArray) -> Result<(Vec<u32>, ArrayRef, Dropped)>
    where
        PrimitiveArray<T>: From<Vec<T::Native>>,
    {
        let values = flat_values(vectors);
        let rows = Rows::<T>::new(vectors, &values);
        let mut out = vec![T::Native::default(); rows.values.len()];
        let (kept, dropped) = rows.copy_into(Metric::Cosine, &mut out, |v| v)?;
        out.truncate(kept.len() * rows.dimension);
        Ok((kept, Arc::new(PrimitiveArray::<T>::from(out)), dropped))
    }
    match element_type {
        ElementType::Float16 => run::<Float16Type>(vectors),
        ElementType::Float32 => run::<Float32Type>(vectors),
        ElementType::Float64 => run::<Float64Type>(vectors),
    }
}

/// Drop what Lance drops; for cosine normalise what is left.
pub fn prepare(row_ids: &UInt64Array, vectors: &FixedSizeListArray, metric: Metric) -> Result<PreparedVectors> {
    let element_type = ElementType::try_from(&vectors.value_type())?;
    let dimension = vectors.value_length() as usize;
    if row_ids.len() != vectors.len() {
        return Err(Error::internal(format!("{} row ids for {} vectors", row_ids.len(), vectors.len())));
    }
    if metric == Metric::Cosine {
        let (kept, values, dropped) = normalized(vectors, element_type)?;
        let row_ids = if kept.len() == row_ids.len() {
            row_ids.clone()
        } else {
            kept.iter().map(|row| row_ids.value(*row as usize)).collect::<Vec<_>>().into()
        };
        return Ok(PreparedVectors { row_ids, vectors: fixed_size_list(values, dimension)?, dropped });
    }
    let (kept, dropped) = usable(vectors, element_type);
    let (row_ids, vectors) = if dropped.total() > 0 {
        let mask = BooleanArray::from(kept);
        let row_ids = arrow_select::filter::filter(row_ids, &mask)?.as_primitive().clone();
        (row_ids, arrow_select::filter::filter(vectors, &mask)?.as_fixed_size_list().clone())
    } else {
        (row_ids.clone(), vectors.clone())
    };
    let vectors = fixed_size_list(without_nulls(&flat_values(&vectors)), dimension)?;
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

/// Refuse vectors that [`prepare`] would drop, or normalise: an encoder that took them would put them into an index.
pub fn check_prepared(vectors: &FixedSizeListArray, metric: Metric) -> Result<()> {
    let element_type = ElementType::try_from(&vectors.value_type())?;
    let (_, dropped) = usable(vectors, element_type);
    if dropped.total() > 0 {
        return Err(Error::invalid(format!(
            "encode: {} of {} vectors are null and {} hold NaN or infinite elements; Lance indexes neither. Drop such rows and count them \
             (prepared_vectors() does both)",
            dropped.null,
            vectors.len(),
            dropped.non_finite
        )));
    }
    if metric != Metric::Cosine {
        return Ok(());
    }
    let values = flat_values(vectors);
    let far = match element_type {
        ElementType::Float16 => first_not_unit::<Float16Type>(vectors, &values, 1e-2, f16::to_f64),
        ElementType::Float32 => first_not_unit::<Float32Type>(vectors, &values, 1e-3, f64::from),
        ElementType::Float64 => first_not_unit::<Float64Type>(vectors, &values, 1e-3, |v| v),
    };
    far.map_or(Ok(()), |(row, norm)| {
        Err(Error::invalid(format!(
            "encode: vector {row} has norm {norm:.4}; for cosine an encoder gets vectors of unit norm. Normalise them, and drop and count \
             those of zero norm (prepared_vectors() does both)"
        )))
    })
}

fn first_not_unit<T: Element>(
    vectors: &FixedSizeListArray,
    values: &ArrayRef,
    tolerance: f64,
    wide: impl Fn(T::Native) -> f64,
) -> Option<(usize, f64)> {
    let rows = Rows::<T>::new(vectors, values);
    let norm = |row: usize| rows.row(row).iter().map(|v| wide(*v) * wide(*v)).sum::<f64>().sqrt();
    // Zeros too: Lance leaves them out. (It keeps vectors whose norm overflows, as zeros; those are for the embedded backend.)
    (0..rows.len()).map(|row| (row, norm(row))).find(|(_, norm)| (norm - 1.0).abs() > tolerance)
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
