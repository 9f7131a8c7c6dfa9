//! The model of a committed index, whoever built it.

use lance::index::{DatasetIndexExt, DatasetIndexInternalExt};
use lance_index::metrics::NoOpMetricsCollector;
use lance_index::pb;
use lance_index::vector::quantizer::Quantizer;
use lance_linalg::distance::DistanceType;
use lance_table::format::IndexMetadata;

use crate::error::{Error, Result};
use crate::lance::dataset::Dataset;
use crate::model::{IvfPqModel, Metric, Training};

/// What segments of the index of a name, by default all, were encoded with. A difference between them is an error.
pub async fn model_of_segments(dataset: &Dataset, name: &str, uuids: Option<&[String]>) -> Result<IvfPqModel> {
    let mut segments = dataset.0.load_indices_by_name(name).await?;
    segments.retain(|segment| uuids.is_none_or(|uuids| uuids.contains(&segment.uuid.to_string())));
    let mut found: Option<(IvfPqModel, &IndexMetadata)> = None;
    for segment in &segments {
        let model = model_of_segment(dataset, name, segment).await.map_err(|e| dataset.named(e))?;
        match &found {
            Some((first, of)) if first.fingerprint() != model.fingerprint() => {
                return Err(Error::mismatch(format!(
                    "index {name:?} has segments of different models: segment {} of {} partitions, segment {} of {}; build it anew",
                    of.uuid,
                    first.num_partitions(),
                    segment.uuid,
                    model.num_partitions()
                )));
            }
            Some(_) => {}
            None => found = Some((model, segment)),
        }
    }
    found.map(|(model, _)| model).ok_or_else(|| Error::invalid(format!("name: index {name:?} does not exist in {}", dataset.shown_uri())))
}

async fn model_of_segment(dataset: &Dataset, name: &str, segment: &IndexMetadata) -> Result<IvfPqModel> {
    let [field_id] = segment.fields[..] else {
        return Err(Error::invalid(format!("index {name:?} is on {} columns, expected one", segment.fields.len())));
    };
    let details = segment.index_details.as_ref().filter(|details| details.type_url.ends_with("VectorIndexDetails"));
    if details.is_none() && segment.index_details.as_ref().is_some_and(|details| !details.type_url.is_empty()) {
        return Err(Error::invalid(format!("index {name:?} is no vector index, expected one with a PQ codebook")));
    }
    let column = dataset.field_path(field_id)?;
    let index = dataset.0.open_vector_index(&column, &segment.uuid, &NoOpMetricsCollector).await?;
    let quantizer = match index.quantizer() {
        Quantizer::Product(quantizer) => quantizer,
        other => {
            return Err(Error::invalid(format!(
                "index {name:?} is quantized by {}, expected PQ: there is no codebook in it",
                other.quantization_type()
            )));
        }
    };
    let centroids = index.ivf_model().centroids.as_ref();
    let centroids = centroids.ok_or_else(|| Error::invalid(format!("index {name:?} has no centroids: it was not trained yet")))?;
    let metric = match index.metric_type() {
        DistanceType::L2 => Metric::L2,
        DistanceType::Cosine => Metric::Cosine,
        DistanceType::Dot => Metric::Dot,
        other => return Err(Error::invalid(format!("index {name:?} is of metric {other}, expected l2, cosine or dot"))),
    };
    let model = IvfPqModel::try_new(centroids, &quantizer.codebook, metric, Some(quantizer.num_sub_vectors))
        .map_err(|e| e.context(format!("the model of index {name:?}")))?;
    let details = details.and_then(|details| details.to_msg::<pb::VectorIndexDetails>().ok());
    Ok(model.with_training(details.as_ref().and_then(training_of)))
}

/// As [`index_details`](super::index_details) records it, and stock Lance.
fn training_of(details: &pb::VectorIndexDetails) -> Option<Training> {
    let hint = |key: &str| details.runtime_hints.get(key).and_then(|value| value.parse().ok());
    let training = Training {
        target_partition_size: Some(details.target_partition_size).filter(|size| *size > 0),
        sample_rate: hint("lance.ivf.sample_rate"),
        max_iters: hint("lance.ivf.max_iters"),
    };
    (training != Training::default()).then_some(training)
}
