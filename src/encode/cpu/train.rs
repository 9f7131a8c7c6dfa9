//! Training on the CPU: k-means of the centroids and of each sub-vector's codewords, on a sample that is already prepared.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow_array::cast::AsArray;
use arrow_array::types::Float64Type;
use arrow_array::{Array, ArrayRef, FixedSizeListArray, Float32Array, Float64Array};
use arrow_buffer::ScalarBuffer;
use arrow_schema::DataType;
use rayon::prelude::*;

use super::encoder::as_float32;
use super::kmeans::{Lloyd, OF_CODEWORDS, partitions, progressive};
use super::nearest::Form;
use super::search::Search;
use crate::encode::params::TrainParams;
use crate::error::{Error, Result};
use crate::model::{ElementType, IvfPqModel, Metric, fixed_size_list};
use crate::progress::Progress;

/// Magnitudes whose squares, and sums of them, are far from the ends of float32.
const COMFORT: std::ops::RangeInclusive<f64> = 1e-12..=1e12;

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
        None => {
            let rows = sample.len().min(params.num_partitions.saturating_mul(params.sample_rate).max(params.num_partitions));
            progress.start("train_ivf", Some(params.max_iters as u64), "iterations");
            let trained = train_centroids(&vectors[..rows * dimension], dimension, metric, params, progress)?;
            progress.complete("train_ivf");
            // Centroids for dot have unit norm, whatever the vectors' scale.
            in_type(trained, if metric == Metric::Dot { 1.0 } else { scale }, element_type, dimension)?
        }
    };

    progress.start("train_quantizer", Some(params.num_sub_vectors as u64), "sub_vectors");
    let rows = sample.len().min(codes.saturating_mul(params.sample_rate)).max(codes);
    let training = &vectors[..rows * dimension];
    let nearest = metric.encodes_residuals().then(|| NearestCentroids::new(training, dimension, &centroids, scale));
    let codebook = train_codebook(training, nearest.as_ref(), dimension, params, progress)?;
    progress.complete("train_quantizer");
    let codebook = in_type(codebook, scale, element_type, dimension)?;
    IvfPqModel::try_new(&centroids, &codebook, metric, Some(params.num_sub_vectors))
}

/// The sample as float32, and what it was divided by: a power of two, 1 unless its squares would leave float32.
fn scaled(sample: &FixedSizeListArray) -> Result<(ScalarBuffer<f32>, f64)> {
    let float32 = as_float32(sample);
    let most = float32.par_chunks(1 << 16).map(|c| c.iter().fold(0f32, |most, v| most.max(v.abs()))).reduce(|| 0.0, f32::max);
    if most == 0.0 || COMFORT.contains(&f64::from(most)) {
        return Ok((float32, 1.0));
    }
    let values = arrow_cast::cast(&crate::model::flat_values(sample), &DataType::Float64)?;
    let values = values.as_primitive::<Float64Type>().values();
    let most = values.iter().fold(0f64, |most, v| most.max(v.abs()));
    let scale = 2f64.powi(most.log2().floor() as i32);
    Ok((values.iter().map(|v| (v / scale) as f32).collect::<Vec<_>>().into(), scale))
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

/// K-means is told apart from who watches it: that one is called from here, and cannot hold it up.
fn train_centroids(vectors: &[f32], dimension: usize, metric: Metric, params: &TrainParams, progress: &dyn Progress) -> Result<Vec<f32>> {
    let spherical = metric == Metric::Dot;
    let lloyd = Lloyd { clusters: params.num_partitions, iterations: params.max_iters, seed: params.seed, spherical };
    let check = |iteration: usize| {
        progress.advance("train_ivf", iteration as u64);
        progress.check()
    };
    Ok(partitions(lloyd, vectors, dimension, &check)?.centroids)
}

/// The centroid nearest to each vector of the scaled sample. Residuals are taken as they are needed: all of them would take as much
/// memory as the sample.
struct NearestCentroids {
    centroids: Vec<f32>,
    labels: Vec<u32>,
}

impl NearestCentroids {
    fn new(vectors: &[f32], dimension: usize, centroids: &FixedSizeListArray, scale: f64) -> Self {
        let centroids: Vec<f32> = as_float32(centroids).iter().map(|v| (f64::from(*v) / scale) as f32).collect();
        let mut labels = vec![0; vectors.len() / dimension];
        Search::new(&centroids, dimension, Form::L2).label(vectors, &mut labels);
        Self { centroids, labels }
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
            let part = m * width..(m + 1) * width;
            let mut sub_vectors: Vec<f32> = Vec::with_capacity(vectors.len() / dimension * width);
            match nearest {
                None => vectors.chunks_exact(dimension).for_each(|vector| sub_vectors.extend_from_slice(&vector[part.clone()])),
                Some(NearestCentroids { centroids, labels }) => {
                    for (vector, label) in vectors.chunks_exact(dimension).zip(labels) {
                        let centroid = &centroids[*label as usize * dimension..][part.clone()];
                        sub_vectors.extend(vector[part.clone()].iter().zip(centroid).map(|(v, c)| v - c));
                    }
                }
            }
            let seed = params.seed.wrapping_add(1 + m as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let lloyd = Lloyd { clusters: codes, iterations: params.max_iters, seed, spherical: false };
            let trained = progressive(lloyd, OF_CODEWORDS, &sub_vectors, width, &|_| progress.check())?;
            progress.advance("train_quantizer", done.fetch_add(1, Ordering::Relaxed) + 1);
            Ok(trained.centroids)
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(books.concat())
}
