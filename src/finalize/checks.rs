//! What must agree before anything is written: artifacts with each other, with the model, the column and the dataset.

use std::collections::BTreeMap;
use std::sync::Arc;

use lance::Dataset;

use crate::artifact::{Artifact, without_credentials};
use crate::encode::{VectorColumn, data_files};
use crate::error::{Error, Result};
use crate::model::{IvfPqModel, Metric};

/// The one model of the artifacts and the caller.
pub fn agree_on_model(artifacts: &[Arc<Artifact>], given: Option<&Arc<IvfPqModel>>) -> Result<Arc<IvfPqModel>> {
    let mut agreed: Option<(Arc<IvfPqModel>, String)> = given.map(|model| (model.clone(), "the model given".to_string()));
    for artifact in artifacts {
        let Some(model) = artifact.model() else { continue };
        match &agreed {
            None => agreed = Some((model.clone(), artifact.uri().to_string())),
            Some((other, _)) if other.fingerprint() == model.fingerprint() => {}
            Some((other, whose)) => {
                return Err(Error::mismatch(format!(
                    "the model of {} ({}) is not that of {whose} ({}); artifacts of one index must be encoded with one model",
                    artifact.uri(),
                    describe(model),
                    describe(other)
                )));
            }
        }
    }
    let Some((model, _)) = agreed else {
        return Err(Error::mismatch("the artifacts hold no model (no metadata.lance); pass model="));
    };
    for artifact in artifacts {
        if artifact.num_partitions() != model.num_partitions() {
            return Err(Error::mismatch(format!(
                "{} has {} partitions, the model {}",
                artifact.uri(),
                artifact.num_partitions(),
                model.num_partitions()
            )));
        }
        // An artifact of another writer without rows does not tell its width.
        if artifact.num_rows() > 0 && artifact.pq_code_width() != model.code_width() {
            return Err(Error::mismatch(format!(
                "{} has codes of {} bytes, the model's codes take {}",
                artifact.uri(),
                artifact.pq_code_width(),
                model.code_width()
            )));
        }
    }
    Ok(model)
}

fn describe(model: &IvfPqModel) -> String {
    format!(
        "{} {} K={} M={} bits={} dim={} fingerprint {}",
        model.metric(),
        model.element_type(),
        model.num_partitions(),
        model.num_sub_vectors(),
        model.num_bits(),
        model.dimension(),
        model.fingerprint()
    )
}

/// Lance builds and commits an index whose model has another dtype than the column; then every query panics.
pub fn model_fits_column(model: &IvfPqModel, column: &VectorColumn, metric: Option<Metric>) -> Result<()> {
    if model.element_type() != column.element_type {
        return Err(Error::mismatch(format!("the model is {}, column {:?} is {}", model.element_type(), column.path, column.element_type)));
    }
    if model.dimension() != column.dimension {
        return Err(Error::mismatch(format!(
            "the model has dimension {}, column {:?} has {}",
            model.dimension(),
            column.path,
            column.dimension
        )));
    }
    match metric {
        Some(metric) if metric != model.metric() => {
            Err(Error::mismatch(format!("metric: got {metric}, the artifacts were encoded for {}", model.metric())))
        }
        _ => Ok(()),
    }
}

/// The fragments the index will cover: those the artifacts say they were encoded from, which must be whole, apart and of the
/// dataset's version; where an artifact does not say, those the caller names, or all.
pub async fn agree_on_fragments(
    dataset: &Dataset,
    column: &VectorColumn,
    artifacts: &[Arc<Artifact>],
    given: Option<&[u32]>,
) -> Result<Vec<u32>> {
    let version = dataset.version().version;
    let existing: Vec<u32> = dataset.manifest().fragments.iter().map(|f| f.id as u32).collect();
    let mut owner: BTreeMap<u32, &str> = BTreeMap::new();
    let mut all_known = true;
    for artifact in artifacts {
        let Some(source) = &artifact.manifest().source else {
            all_known = false;
            continue;
        };
        let uri = artifact.uri();
        if source.version != version {
            return Err(Error::mismatch(format!(
                "{uri} was encoded from version {} of the dataset, the index is being built at {version}",
                source.version
            )));
        }
        if source.field_id.is_some_and(|id| id != column.field_id) || (source.field_id.is_none() && source.column != column.path) {
            return Err(Error::mismatch(format!(
                "{uri} was encoded from column {:?} (field {:?}), not from {:?} (field {})",
                source.column, source.field_id, column.path, column.field_id
            )));
        }
        if source.stable_row_ids != dataset.manifest().uses_stable_row_ids() {
            return Err(Error::mismatch(format!(
                "{uri} holds {} row ids, the dataset uses {} ones",
                if source.stable_row_ids { "stable" } else { "address" },
                if source.stable_row_ids { "address" } else { "stable" }
            )));
        }
        if source.data_files.as_ref().is_some_and(|said| *said != data_files(dataset, &source.fragment_ids, column.field_id)) {
            return Err(Error::mismatch(format!(
                "{uri} was encoded from {}, whose data files are not those of {} at version {version}; it is another dataset",
                source.dataset_uri,
                without_credentials(dataset.uri())
            )));
        }
        check_counts(dataset, artifact, &source.fragment_ids).await?;
        for id in &source.fragment_ids {
            if let Some(other) = owner.insert(*id, uri) {
                return Err(Error::mismatch(format!(
                    "fragment {id} is in two artifacts, {other} and {uri}; each fragment must be encoded once"
                )));
            }
        }
    }
    let mut fragments: Vec<u32> = match given {
        Some(given) => given.to_vec(),
        None if all_known => owner.keys().copied().collect(),
        None => existing.clone(),
    };
    fragments.sort_unstable();
    fragments.dedup();
    if all_known && !owner.keys().eq(fragments.iter()) {
        return Err(Error::mismatch(format!(
            "fragment_ids: got {fragments:?}, the artifacts were encoded from {:?}; the index must cover exactly those",
            owner.keys().collect::<Vec<_>>()
        )));
    }
    let gone: Vec<&u32> = fragments.iter().filter(|id| !existing.contains(id)).collect();
    if !gone.is_empty() {
        return Err(Error::mismatch(format!("fragments {gone:?} are not in the dataset at version {version}")));
    }
    if fragments.is_empty() {
        return Err(Error::invalid("the dataset has no fragment to index"));
    }
    Ok(fragments)
}

/// The rows an artifact accounts for, written or dropped, must be the live rows of its fragments: a row that its encoder
/// skipped without counting it would be missing from every search.
async fn check_counts(dataset: &Dataset, artifact: &Artifact, fragment_ids: &[u32]) -> Result<()> {
    let Some(rows) = &artifact.manifest().rows else {
        return Ok(());
    };
    let mut live = 0;
    for id in fragment_ids {
        if let Some(fragment) = dataset.get_fragment(*id as usize) {
            live += fragment.count_rows(None).await? as u64;
        }
    }
    if rows.seen != live {
        return Err(Error::mismatch(format!(
            "{} accounts for {} rows ({} written, {} dropped), its {} fragments have {live} at version {}; rows that an encoder drops must be counted (rows_dropped of finish()), and it must be this dataset that was encoded",
            artifact.uri(),
            rows.seen,
            rows.written,
            rows.dropped.values().sum::<u64>(),
            fragment_ids.len(),
            dataset.version().version
        )));
    }
    Ok(())
}
