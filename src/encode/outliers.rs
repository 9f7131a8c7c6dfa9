//! Vectors of a sample that are far larger than all others: a few of them, as a broken pipeline makes them, would take the clusters
//! and the digits of float32 that training has for all.

use arrow_array::cast::AsArray;
use arrow_array::types::{Float16Type, Float32Type, Float64Type};
use arrow_array::{Array, BooleanArray, FixedSizeListArray};
use arrow_buffer::{ArrowNativeType, MutableBuffer};
use half::f16;
use num_traits::Float;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::model::{ElementType, Metric, fixed_size_list, flat_values};

/// Far: a vector whose largest element is more than so many times the median vector's.
const FAR: f64 = 1e4;
/// For dot the largest vectors are the nearest to most queries, and need codewords: those that float32 has room for beside the others.
const FAR_FOR_DOT: f64 = 1e12;
/// More than one in so many are no outliers, but a part of the table.
const RARE: usize = 1000;
/// Vectors that tell the median.
const LOOKED_AT: usize = 1 << 16;
/// Vectors looked through by one task.
const TASK_ROWS: usize = 4096;

/// Which vectors to leave out of training.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outliers {
    /// What the elements of those that stay may be; none is left out without it.
    limit: Option<f64>,
}

impl Outliers {
    /// Leave them out of a sample, in place, where so many vectors as `least` are left; the last ones take their places.
    ///
    /// An error where one of those could not be encoded either.
    pub fn trim(drawn: &mut MutableBuffer, element: ElementType, dimension: usize, metric: Metric, least: usize) -> Result<Self> {
        let times = match metric {
            Metric::L2 => FAR,
            Metric::Dot => FAR_FOR_DOT,
            // All have the same length.
            Metric::Cosine => return Ok(Self::default()),
        };
        if dimension == 0 {
            return Ok(Self::default());
        }
        let (found, most) = match element {
            ElementType::Float16 => (trim_values::<f16>(drawn, dimension, times, least), f64::from(f32::MAX)),
            ElementType::Float32 => (trim_values::<f32>(drawn, dimension, times, least), f64::from(f32::MAX)),
            ElementType::Float64 => (trim_values::<f64>(drawn, dimension, times, least), f64::from(f32::MAX)),
        };
        let Trimmed { rows, limit, far, largest } = found;
        if far == 0 {
            return Ok(Self { limit });
        }
        if limit.is_some() && largest * largest > most / dimension as f64 {
            return Err(Error::invalid(format!(
                "training: a vector of the sample has an element of {largest:.3e}, so large that its distances overflow to infinity; scale the column or \
                 remove the vector"
            )));
        }
        let (median, done) = (limit.unwrap_or_default() / times, if limit.is_some() { "left out" } else { "not left out" });
        let why = if limit.is_some() { "they are encoded as all others are" } else { "they are too many, or the sample too small" };
        log::warn!(
            "training: {far} of {rows} vectors of the sample have an element more than {times:e} times as large as the median vector's \
             largest{}; {done}: {why}. If they are mistakes, remove them",
            if limit.is_some() { format!(", {median:.3e}") } else { String::new() }
        );
        Ok(Self { limit })
    }

    /// The vectors of a further part of the sample that stay, and how many do not.
    pub fn without(self, vectors: FixedSizeListArray) -> Result<(FixedSizeListArray, usize)> {
        let Some(limit) = self.limit else { return Ok((vectors, 0)) };
        let (values, dimension) = (flat_values(&vectors), vectors.value_length() as usize);
        let far = match ElementType::try_from(&vectors.value_type())? {
            ElementType::Float16 => beyond(values.as_primitive::<Float16Type>().values(), dimension, limit),
            ElementType::Float32 => beyond(values.as_primitive::<Float32Type>().values(), dimension, limit),
            ElementType::Float64 => beyond(values.as_primitive::<Float64Type>().values(), dimension, limit),
        };
        if far.is_empty() {
            return Ok((vectors, 0));
        }
        let mut stays = vec![true; vectors.len()];
        far.iter().for_each(|row| stays[*row] = false);
        let kept = arrow_select::filter::filter(&vectors, &BooleanArray::from(stays))?;
        Ok((fixed_size_list(flat_values(kept.as_fixed_size_list()), dimension)?, far.len()))
    }
}

struct Trimmed {
    /// That there were.
    rows: usize,
    /// `None` where those beyond it were left.
    limit: Option<f64>,
    far: usize,
    /// The largest element of those.
    largest: f64,
}

fn trim_values<F>(drawn: &mut MutableBuffer, dimension: usize, times: f64, least: usize) -> Trimmed
where
    F: Float + ArrowNativeType + Into<f64>,
{
    let values = drawn.typed_data_mut::<F>();
    let rows = values.len() / dimension;
    let limit = match median(values, dimension) {
        Some(median) => median * times,
        None => return Trimmed { rows, limit: None, far: 0, largest: 0.0 },
    };
    let far = beyond(values, dimension, limit);
    let most = far.iter().map(|row| largest(&values[row * dimension..(row + 1) * dimension])).fold(0.0, f64::max);
    let found = Trimmed { rows, limit: Some(limit), far: far.len(), largest: most };
    if far.is_empty() {
        return found;
    }
    if far.len() > (rows / RARE).max(1) || rows - far.len() < least {
        return Trimmed { limit: None, ..found };
    }
    let mut end = rows;
    // From the last one on: what takes a place is not far itself.
    for row in far.iter().rev() {
        end -= 1;
        values.copy_within(end * dimension..(end + 1) * dimension, row * dimension);
    }
    drawn.truncate(end * dimension * size_of::<F>());
    found
}

/// The largest element of a vector.
fn largest<F: Float + Into<f64>>(vector: &[F]) -> f64 {
    vector.iter().fold(F::zero(), |most, v| if v.abs() > most { v.abs() } else { most }).into()
}

/// Of the vectors that are not zero.
fn median<F: Float + Into<f64>>(values: &[F], dimension: usize) -> Option<f64> {
    let step = (values.len() / dimension).div_ceil(LOOKED_AT).max(1);
    let mut found: Vec<f64> = values.chunks_exact(dimension).step_by(step).map(largest).filter(|most| *most > 0.0).collect();
    let middle = found.len() / 2;
    if found.is_empty() { None } else { Some(*found.select_nth_unstable_by(middle, f64::total_cmp).1) }
}

/// The vectors with an element beyond the limit, in order.
fn beyond<F: Float + Into<f64> + Sync>(values: &[F], dimension: usize, limit: f64) -> Vec<usize> {
    let parts = values.par_chunks(TASK_ROWS * dimension).enumerate().map(|(part, values)| {
        let far = values.chunks_exact(dimension).enumerate().filter(|(_, vector)| largest(vector) > limit);
        far.map(|(row, _)| part * TASK_ROWS + row).collect::<Vec<_>>()
    });
    parts.collect::<Vec<_>>().concat()
}
