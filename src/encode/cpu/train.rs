//! Training on the CPU: k-means of the centroids and of each sub-vector's codewords, on a sample that is already prepared.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow_array::cast::AsArray;
use arrow_array::types::Float64Type;
use arrow_array::{Array, ArrayRef, FixedSizeListArray, Float32Array, Float64Array};
use arrow_buffer::ScalarBuffer;
use arrow_schema::DataType;
use rayon::prelude::*;

use super::encoder::as_float32;
use super::kmeans::{Lloyd, OF_CODEWORDS, Points, Streamed, partitions, progressive};
use super::nearest::Form;
use super::search::Search;
use super::simd::difference;
use crate::encode::params::TrainParams;
use crate::error::{Error, Result};
use crate::model::{ElementType, IvfPqModel, Metric, fixed_size_list};
use crate::progress::Progress;

/// Rows that are fetched before their sub-vector is copied.
const ROWS_AHEAD: usize = 16;

/// Magnitudes whose squares, and sums of them, are far from the ends of float32.
const COMFORT: std::ops::RangeInclusive<f64> = 1e-12..=1e16;

/// Train centroids and codebook on `sample`: prepared vectors in random order, at least `num_partitions` and `2^num_bits`.
pub fn train(sample: &FixedSizeListArray, metric: Metric, params: &TrainParams, progress: &dyn Progress) -> Result<IvfPqModel> {
    let dimension = sample.value_length() as usize;
    params.validate(dimension)?;
    let element_type = ElementType::try_from(&sample.value_type())?;
    let codes = 1usize << params.num_bits;
    let needed = if params.centroids.is_some() { codes } else { params.num_partitions.max(codes) };
    if sample.len() < needed {
        return Err(Error::invalid(format!(
            "training: {} usable vectors, expected at least {needed} (num_partitions = {}, {codes} codes per sub-vector); lower num_partitions, or num_bits to 4",
            sample.len(),
            params.num_partitions
        )));
    }
    let (vectors, scale) = scaled(sample)?;
    let centroids = match &params.centroids {
        Some(given) => {
            let (rows, width, value_type) = (given.len(), given.value_length() as usize, given.value_type());
            if rows != params.num_partitions || width != dimension || value_type != element_type.data_type() {
                return Err(Error::invalid(format!(
                    "ivf_centroids: got {rows} centroids of {width} {value_type}, expected num_partitions = {} of {dimension} {}, the column's",
                    params.num_partitions,
                    element_type.data_type()
                )));
            }
            fixed_size_list(crate::model::flat_values(given), dimension)?
        }
        None => centroids_of(sample, &vectors, scale, metric, params, progress)?,
    };

    progress.start("train_quantizer", Some(params.num_sub_vectors as u64), "sub_vectors");
    let rows = sample.len().min(codes.saturating_mul(params.sample_rate)).max(codes);
    let training = &vectors[..rows * dimension];
    let nearest = if metric.encodes_residuals() { Some(NearestCentroids::new(training, dimension, &centroids, scale)?) } else { None };
    let codebook = train_codebook(training, nearest.as_ref(), dimension, params, progress)?;
    progress.complete("train_quantizer");
    let codebook = in_type(codebook, scale, element_type, dimension)?;
    IvfPqModel::try_new(&centroids, &codebook, metric, Some(params.num_sub_vectors))
}

/// Centroids alone, as [`train`] finds them.
pub fn train_centroids(
    sample: &FixedSizeListArray,
    metric: Metric,
    params: &TrainParams,
    progress: &dyn Progress,
) -> Result<FixedSizeListArray> {
    params.validate(sample.value_length() as usize)?;
    if sample.len() < params.num_partitions {
        return Err(Error::invalid(format!(
            "training: {} usable vectors, expected at least num_partitions = {}; lower it",
            sample.len(),
            params.num_partitions
        )));
    }
    let (vectors, scale) = scaled(sample)?;
    centroids_of(sample, &vectors, scale, metric, params, progress)
}

/// Of the sample, which is `vectors` after it was divided by `scale`.
fn centroids_of(
    sample: &FixedSizeListArray,
    vectors: &[f32],
    scale: f64,
    metric: Metric,
    params: &TrainParams,
    progress: &dyn Progress,
) -> Result<FixedSizeListArray> {
    let dimension = sample.value_length() as usize;
    let rows = sample.len().min(params.num_partitions.saturating_mul(params.sample_rate).max(params.num_partitions));
    progress.start("train_ivf", Some(params.max_iters as u64), "iterations");
    // K-means is told apart from who watches it: that one is called from here, and cannot hold it up.
    let check = |iteration: usize| {
        progress.advance("train_ivf", iteration as u64);
        progress.check()
    };
    let trained = partitions(lloyd(metric, params), &vectors[..rows * dimension], dimension, &check)?.centroids;
    progress.complete("train_ivf");
    in_type(trained, scale_of_centroids(metric, scale), ElementType::try_from(&sample.value_type())?, dimension)
}

fn lloyd(metric: Metric, params: &TrainParams) -> Lloyd {
    Lloyd { clusters: params.num_partitions, iterations: params.max_iters, seed: params.seed, spherical: metric == Metric::Dot }
}

/// Centroids for dot have unit norm, whatever the vectors' scale.
fn scale_of_centroids(metric: Metric, scale: f64) -> f64 {
    if metric == Metric::Dot { 1.0 } else { scale }
}

/// One more iteration of centroids that were trained, on vectors that come in parts: each centroid goes to the mean of those that
/// are its own.
pub struct Refinement {
    means: Streamed,
    scale: f64,
}

impl Refinement {
    /// `first` are the vectors that come first, for their magnitude.
    pub fn new(centroids: &FixedSizeListArray, first: &FixedSizeListArray, metric: Metric, params: &TrainParams) -> Result<Self> {
        let (_, scale) = scaled(first)?;
        let centroids = divided(centroids, scale_of_centroids(metric, scale))?;
        Ok(Self { means: Streamed::new(lloyd(metric, params), centroids.to_vec(), first.value_length() as usize)?, scale })
    }

    pub fn add(&mut self, vectors: &FixedSizeListArray) -> Result<()> {
        self.means.add(&divided(vectors, self.scale)?);
        Ok(())
    }

    pub fn finish(self, metric: Metric, element_type: ElementType, dimension: usize) -> Result<FixedSizeListArray> {
        in_type(self.means.finish(), scale_of_centroids(metric, self.scale), element_type, dimension)
    }
}

/// The sample as float32, and what it was divided by: a power of two, 1 unless its squares would leave float32.
fn scaled(sample: &FixedSizeListArray) -> Result<(ScalarBuffer<f32>, f64)> {
    let float32 = as_float32(sample);
    let most = float32.par_chunks(1 << 16).map(|c| c.iter().fold(0f32, |most, v| most.max(v.abs()))).reduce(|| 0.0, f32::max);
    if most == 0.0 || COMFORT.contains(&f64::from(most)) {
        return Ok((float32, 1.0));
    }
    let values = arrow_cast::cast(&crate::model::flat_values(sample), &DataType::Float64)?;
    let most = values.as_primitive::<Float64Type>().values().iter().fold(0f64, |most, v| most.max(v.abs()));
    let scale = 2f64.powi(most.log2().floor() as i32);
    Ok((divided(sample, scale)?, scale))
}

/// Vectors as float32, divided in float64: float32 may have no room for them.
fn divided(vectors: &FixedSizeListArray, scale: f64) -> Result<ScalarBuffer<f32>> {
    if scale == 1.0 {
        return Ok(as_float32(vectors));
    }
    let values = arrow_cast::cast(&crate::model::flat_values(vectors), &DataType::Float64)?;
    Ok(values.as_primitive::<Float64Type>().values().iter().map(|v| (v / scale) as f32).collect::<Vec<_>>().into())
}

/// Trained values in the column's type and scale.
fn in_type(values: Vec<f32>, scale: f64, element_type: ElementType, width: usize) -> Result<FixedSizeListArray> {
    let values: ArrayRef = if scale == 1.0 {
        Arc::new(Float32Array::from(values))
    } else {
        Arc::new(Float64Array::from_iter_values(values.iter().map(|v| f64::from(*v) * scale)))
    };
    fixed_size_list(arrow_cast::cast(&values, &element_type.data_type())?, width)
}

/// The centroid nearest to each vector of the scaled sample. Residuals are taken as they are needed: all of them would take as much
/// memory as the sample.
struct NearestCentroids {
    centroids: Vec<f32>,
    labels: Vec<u32>,
}

impl NearestCentroids {
    fn new(vectors: &[f32], dimension: usize, centroids: &FixedSizeListArray, scale: f64) -> Result<Self> {
        let centroids = divided(centroids, scale)?.to_vec();
        let mut labels = vec![0; vectors.len() / dimension];
        Search::new(&centroids, dimension, Form::L2).label(vectors, &mut labels);
        Ok(Self { centroids, labels })
    }
}

/// One k-means for each sub-vector, side by side; the flat codebook `[sub_vector][code][sub_dimension]`.
fn train_codebook(
    vectors: &[f32],
    nearest: Option<&NearestCentroids>,
    dimension: usize,
    params: &TrainParams,
    progress: &dyn Progress,
) -> Result<Vec<f32>> {
    let width = dimension / params.num_sub_vectors;
    let codes = 1usize << params.num_bits;
    let done = AtomicU64::new(0);
    let books = (0..params.num_sub_vectors)
        .into_par_iter()
        .map(|m| {
            let sub_vectors = sub_vectors(Points::new(vectors, dimension), nearest, m * width..(m + 1) * width);
            let seed = params.seed.wrapping_add(1 + m as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let lloyd = Lloyd { clusters: codes, iterations: params.max_iters, seed, spherical: false };
            let trained = progressive(lloyd, OF_CODEWORDS, &sub_vectors, width, &|_| progress.check())?;
            progress.advance("train_quantizer", done.fetch_add(1, Ordering::Relaxed) + 1);
            Ok(trained.centroids)
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(books.concat())
}

/// Some numbers of each vector, or of its residual.
fn sub_vectors(vectors: Points<'_>, nearest: Option<&NearestCentroids>, part: Range<usize>) -> Vec<f32> {
    let (width, dimension) = (part.len(), vectors.dimension);
    let mut found = vec![0f32; vectors.len() * width];
    for (row, out) in found.chunks_exact_mut(width).enumerate() {
        vectors.prefetch_part(row + ROWS_AHEAD, &part);
        let vector = &vectors.values[row * dimension..][part.clone()];
        match nearest {
            None => out.copy_from_slice(vector),
            Some(NearestCentroids { centroids, labels }) => {
                difference(vector, &centroids[labels[row] as usize * dimension..][part.clone()], out);
            }
        }
    }
    found
}
