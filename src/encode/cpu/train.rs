//! Training on the CPU: Lance's k-means, seeded, on a sample that is already prepared.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, Float64Type};
use arrow_array::{Array, ArrayRef, ArrowPrimitiveType, FixedSizeListArray, PrimitiveArray, UInt32Array};
use arrow_schema::DataType;
use lance_index::vector::kmeans::{KMeansParams, train_kmeans};
use lance_linalg::distance::{DistanceType, Dot, L2, Normalize};
use rayon::prelude::*;

use super::encoder::{assign, residuals};
use crate::encode::{TrainParams, TrainProgress};
use crate::error::{Error, Result};
use crate::model::{ElementType, IvfPqModel, Metric, fixed_size_list};

/// Train centroids and codebook on `sample`: prepared vectors in random order, at least `num_partitions` and `2^num_bits`.
pub fn train(sample: &FixedSizeListArray, metric: Metric, params: &TrainParams, progress: &dyn TrainProgress) -> Result<IvfPqModel> {
    let dimension = sample.value_length() as usize;
    params.validate(dimension)?;
    let element_type = ElementType::try_from(&sample.value_type())?;
    let codes = 1usize << params.num_bits;
    let needed = params.num_partitions.max(codes);
    if sample.len() < needed {
        return Err(Error::invalid(format!(
            "training: {} usable vectors, expected at least {needed} (num_partitions = {}, {codes} codes per sub-vector); lower num_partitions, or num_bits to 4",
            sample.len(),
            params.num_partitions
        )));
    }
    // Half precision is too coarse to accumulate means in: train in f32 and round the model to the column's type.
    let wide = if element_type == ElementType::Float16 { cast(sample, DataType::Float32)? } else { sample.clone() };
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
            let rows = wide.len().min(params.num_partitions.saturating_mul(params.sample_rate).max(params.num_partitions));
            progress.start("train_ivf", Some(params.max_iters as u64), "iterations");
            let trained = train_centroids(&wide.slice(0, rows), metric, params, progress)?;
            progress.complete("train_ivf");
            fixed_size_list(narrow(trained, element_type)?, dimension)?
        }
    };

    progress.start("train_quantizer", Some(params.num_sub_vectors as u64), "sub_vectors");
    let pq_rows = wide.len().min(codes.saturating_mul(params.sample_rate)).max(codes);
    // Residuals in the column's own type, as they will be when rows are encoded.
    let training = sample.slice(0, pq_rows);
    let training = if metric.encodes_residuals() {
        let part_ids = UInt32Array::from(assign(&centroids, &training, DistanceType::L2)?);
        residuals(&centroids, &training, part_ids.values())?
    } else {
        fixed_size_list(crate::model::flat_values(&training), dimension)?
    };
    let training = if element_type == ElementType::Float16 { cast(&training, DataType::Float32)? } else { training };
    let codebook = match training.value_type() {
        DataType::Float64 => train_codebook::<Float64Type>(&training, params, progress)?,
        _ => train_codebook::<Float32Type>(&training, params, progress)?,
    };
    let codebook = fixed_size_list(narrow(codebook, element_type)?, dimension)?;
    progress.complete("train_quantizer");
    IvfPqModel::try_new(&centroids, &codebook, metric, Some(params.num_sub_vectors))
}

/// K-means counts its iterations through a shared number; who watches is told from here, so that it cannot be held up.
fn train_centroids(sample: &FixedSizeListArray, metric: Metric, params: &TrainParams, progress: &dyn TrainProgress) -> Result<ArrayRef> {
    let iterations = Arc::new(AtomicU64::new(0));
    let counted = iterations.clone();
    let kmeans = KMeansParams::new(None, params.max_iters as u32, 1, metric.assignment())
        // Balance against the size of the sample, as Lance's own build does.
        .with_balance_factor(1.0)
        .with_seed(params.seed)
        .with_on_progress(Arc::new(move |_, _| {
            counted.fetch_add(1, Ordering::Relaxed);
        }));
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| kmeans_values(sample, kmeans, params.num_partitions, params.sample_rate));
        let mut told = 0;
        while !worker.is_finished() {
            std::thread::park_timeout(std::time::Duration::from_millis(50));
            let now = iterations.load(Ordering::Relaxed);
            if now != told {
                told = now;
                progress.advance("train_ivf", now);
            }
        }
        worker.join().unwrap_or_else(|_| Err(Error::internal("k-means panicked")))
    })
}

fn kmeans_values(data: &FixedSizeListArray, params: KMeansParams, k: usize, sample_rate: usize) -> Result<ArrayRef> {
    fn run<T: ArrowPrimitiveType>(data: &FixedSizeListArray, params: KMeansParams, k: usize, sample_rate: usize) -> Result<ArrayRef>
    where
        T::Native: Dot + L2 + Normalize,
        PrimitiveArray<T>: From<Vec<T::Native>>,
    {
        let values = crate::model::flat_values(data);
        Ok(train_kmeans::<T>(values.as_primitive::<T>(), params, data.value_length() as usize, k, sample_rate)?.centroids)
    }
    match data.value_type() {
        DataType::Float64 => run::<Float64Type>(data, params, k, sample_rate),
        _ => run::<Float32Type>(data, params, k, sample_rate),
    }
}

/// One k-means per sub-vector, side by side; the flat codebook `[sub_vector][code][sub_dimension]`.
fn train_codebook<T: ArrowPrimitiveType>(
    training: &FixedSizeListArray,
    params: &TrainParams,
    progress: &dyn TrainProgress,
) -> Result<ArrayRef>
where
    T::Native: Dot + L2 + Normalize,
    PrimitiveArray<T>: From<Vec<T::Native>>,
{
    let dimension = training.value_length() as usize;
    let sub_dimension = dimension / params.num_sub_vectors;
    let codes = 1usize << params.num_bits;
    let values = training.values().as_primitive::<T>().values();
    let done = AtomicU64::new(0);
    let blocks = (0..params.num_sub_vectors)
        .into_par_iter()
        .map(|m| {
            progress.check()?;
            let first = m * sub_dimension;
            let sub_vectors: Vec<T::Native> =
                values.chunks_exact(dimension).flat_map(|vector| vector[first..first + sub_dimension].iter().copied()).collect();
            let seed = params.seed.wrapping_add(1 + m as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let kmeans = KMeansParams::new(None, params.max_iters as u32, 1, DistanceType::L2).with_seed(seed);
            let trained = train_kmeans::<T>(&PrimitiveArray::<T>::from(sub_vectors), kmeans, sub_dimension, codes, params.sample_rate)?;
            progress.advance("train_quantizer", done.fetch_add(1, Ordering::Relaxed) + 1);
            Ok(trained.centroids)
        })
        .collect::<Result<Vec<ArrayRef>>>()?;
    let blocks: Vec<&dyn Array> = blocks.iter().map(AsRef::as_ref).collect();
    Ok(arrow_select::concat::concat(&blocks)?)
}

fn cast(list: &FixedSizeListArray, to: DataType) -> Result<FixedSizeListArray> {
    fixed_size_list(arrow_cast::cast(&crate::model::flat_values(list), &to)?, list.value_length() as usize)
}

fn narrow(values: ArrayRef, element_type: ElementType) -> Result<ArrayRef> {
    Ok(arrow_cast::cast(&values, &element_type.data_type())?)
}
