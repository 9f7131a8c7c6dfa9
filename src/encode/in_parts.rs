//! Centroids of a sample that memory does not hold: trained on a part of it, and moved to the means of all of it.

use arrow_array::{Array, FixedSizeListArray};
use futures::TryStreamExt;

use super::cpu::{Refinement, train_centroids};
use super::params::TrainParams;
use super::source::{Order, VectorSource};
use crate::budget::Budget;
use crate::error::Result;
use crate::model::{ElementType, Metric};
use crate::progress::Progress;
use crate::sync::spawn;

/// Vectors that are read while others are compared: each may be a half of these.
const HALVES: usize = 2;
/// Of a sample's memory so much goes to a part's: it is there as it was read, and put together.
const COPIES: usize = 2;

/// A sample that comes in parts.
#[derive(Debug, Clone, Copy)]
pub struct PartedSample {
    pub rows: usize,
    /// That fit memory.
    pub at_once: usize,
}

/// Train `params.num_partitions` centroids on as many vectors as fit, and move them to the means of `sample.rows` others, which counts as
/// an iteration: with `max_iters=1` they stay.
pub async fn train_centroids_in_parts(
    source: &VectorSource,
    metric: Metric,
    params: TrainParams,
    sample: PartedSample,
    budget: &Budget,
    progress: std::sync::Arc<dyn Progress>,
) -> Result<FixedSizeListArray> {
    let wanted = (sample.at_once, params.num_partitions);
    let (first, outliers) = source.sample_to_train(wanted, metric, params.seed, Order::Random, budget).await?;
    let last = params.max_iters > 1;
    let shorter = TrainParams { max_iters: (params.max_iters - usize::from(last)).max(1), ..params.clone() };
    let told = progress.clone();
    let centroids = spawn(move || train_centroids(&first, metric, &shorter, told.as_ref())).await?;
    budget.settle();
    if !last {
        return Ok(centroids);
    }
    progress.start("refine_ivf", Some(sample.rows as u64), "rows");
    // Other rows than those that it was trained on, as far as there are.
    let mut parts = source.sample_in_parts(sample.rows, metric, params.seed.wrapping_add(1)).await?;
    let most = (sample.at_once / HALVES / COPIES).max(1);
    let (mut seen, mut far, mut refinement, mut working) = (0, 0, None, None);
    loop {
        let (mut held, mut rows) = (Vec::new(), 0);
        while rows < most {
            let Some(part) = parts.try_next().await? else { break };
            let (vectors, left_out) = outliers.without(part.vectors)?;
            far += left_out;
            rows += vectors.len();
            held.push(vectors);
        }
        progress.check()?;
        if let Some(work) = working.take() {
            refinement = Some(work.await?);
            progress.advance("refine_ivf", seen as u64);
        }
        if rows == 0 {
            break;
        }
        seen += rows;
        let (so_far, centroids, params) = (refinement.take(), centroids.clone(), params.clone());
        working = Some(spawn(move || {
            let arrays: Vec<&dyn Array> = held.iter().map(|part| part as &dyn Array).collect();
            let vectors = arrow_select::concat::concat(&arrays)?;
            drop(held);
            let vectors = arrow_array::cast::AsArray::as_fixed_size_list(vectors.as_ref());
            let mut refinement = match so_far {
                Some(refinement) => refinement,
                None => Refinement::new(&centroids, vectors, metric, &params)?,
            };
            refinement.add(vectors)?;
            Ok(refinement)
        }));
        budget.relieve();
    }
    progress.complete("refine_ivf");
    if far > 0 {
        log::warn!("training: {far} vectors more, which are as large, are left out");
    }
    match refinement {
        Some(refinement) => refinement.finish(metric, ElementType::try_from(&centroids.value_type())?, source.column.dimension),
        None => Ok(centroids),
    }
}
