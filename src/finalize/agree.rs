//! What must agree before anything is written: artifacts with each other, with the model, the column and the dataset.
//!
//! A commit needs to know the following, and nothing that nobody said is taken as fine:
//!
//! | what | who says it | what it is compared with |
//! | --- | --- | --- |
//! | the dataset, branch and version | the caller's handle; `source.version` of an artifact | the manifest in the store ([`DatasetHandle`](crate::lance::dataset::DatasetHandle)), `source.data_files` |
//! | the column | the caller | `source.field_id`, the dtype and dimension of the model |
//! | the model | `metadata.lance` where the manifest names it, else `model=` | its fingerprint, all artifacts, `metric=` |
//! | the fragments covered | `source.fragment_ids`, else `fragment_ids=` | each other, the dataset |
//! | the rows covered | the row ids, as they are read ([`Coverage`](super::coverage::Coverage)) | the live rows of those fragments: each once, no other |
//! | the rows left out | `rows.dropped`, else the vectors themselves | the live rows that were not seen |
//! | partitions and codes | the bucket files | checksums or partition ids, the model's code width |
//! | what changed since | the latest version in the store, right before the commit ([`check_commit`](super::commit::check_commit)) | the files of the column in every fragment covered |
//! | the segment's files | the store, before and after the commit | names and bytes as they were written |

use std::collections::BTreeMap;
use std::sync::Arc;

use super::coverage::Coverage;
use crate::artifact::{Artifact, Source};
use crate::error::{Error, Result};
use crate::lance::dataset::{Dataset, VectorColumn};
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

/// The fragments the index will cover, in order: those the artifacts say they were encoded from, which must be whole, apart and of the
/// dataset's version; where an artifact does not say, those the caller names.
pub async fn agree_on_fragments(
    dataset: &Dataset,
    column: &VectorColumn,
    artifacts: &[Arc<Artifact>],
    given: Option<&[u32]>,
) -> Result<Vec<u32>> {
    let version = dataset.version();
    let existing = dataset.fragment_ids();
    let mut owner: BTreeMap<u32, &str> = BTreeMap::new();
    let mut unknown = None;
    for artifact in artifacts {
        let uri = artifact.uri();
        let Some(source) = &artifact.manifest().source else {
            unknown = Some(uri);
            continue;
        };
        check_source(dataset, column, uri, source)?;
        check_counts(dataset, artifact, &source.fragment_ids).await?;
        for id in &source.fragment_ids {
            if let Some(other) = owner.insert(*id, uri) {
                return Err(Error::mismatch(format!(
                    "fragment {id} is in two artifacts, {other} and {uri}; each fragment must be encoded once"
                )));
            }
        }
    }
    let mut fragments: Vec<u32> = match (given, unknown) {
        (Some(given), _) => given.to_vec(),
        (None, None) => owner.keys().copied().collect(),
        (None, Some(uri)) => {
            return Err(Error::mismatch(format!(
                "{uri} does not say which fragments it was encoded from (its manifest has no source); pass fragment_ids= with those of this \
                 dataset at version {version}, where they are {}; artifacts written with source=describe_source(...) say it themselves",
                numbers(&existing)
            )));
        }
    };
    fragments.sort_unstable();
    fragments.dedup();
    let encoded: Vec<u32> = owner.keys().copied().collect();
    let fits = if unknown.is_some() { encoded.iter().all(|id| fragments.contains(id)) } else { encoded == fragments };
    if !fits {
        return Err(Error::mismatch(format!(
            "fragment_ids: got {}, the artifacts were encoded from {}; the index must cover exactly those",
            numbers(&fragments),
            numbers(&encoded)
        )));
    }
    let gone: Vec<u32> = fragments.iter().filter(|id| !existing.contains(id)).copied().collect();
    if !gone.is_empty() {
        return Err(Error::mismatch(format!("fragments {} are not in the dataset at version {version}", numbers(&gone))));
    }
    if fragments.is_empty() {
        return Err(Error::invalid("the dataset has no fragment to index"));
    }
    Ok(fragments)
}

/// The rows that artifacts account for, written or dropped, must be the live rows of the fragments.
pub fn agree_on_rows(artifacts: &[Arc<Artifact>], coverage: &Coverage) -> Result<()> {
    let live = coverage.live_rows();
    let written: u64 = artifacts.iter().map(|a| a.num_rows()).sum();
    let counted: Option<u64> = artifacts.iter().map(|a| a.manifest().rows.as_ref().map(|rows| rows.seen)).sum();
    if counted.is_some_and(|seen| seen != live) || written > live {
        return Err(Error::mismatch(format!(
            "the artifacts account for {} rows ({written} written), the fragments being indexed have {live}; rows that an encoder drops must \
             be counted (rows_dropped of finish()), fragment_ids= must name just the fragments that were encoded, and the handle must be at \
             the version that was encoded",
            counted.unwrap_or(written)
        )));
    }
    Ok(())
}

fn check_source(dataset: &Dataset, column: &VectorColumn, uri: &str, source: &Source) -> Result<()> {
    let version = dataset.version();
    if source.version != version {
        return Err(Error::mismatch(format!(
            "{uri} was encoded from version {} of the dataset, the index is being built at {version}",
            source.version
        )));
    }
    if source.branch.as_deref() != dataset.branch() {
        let name = |branch: Option<&str>| branch.unwrap_or("main").to_string();
        return Err(Error::mismatch(format!(
            "{uri} was encoded from branch {:?} of the dataset, the handle is on {:?}",
            name(source.branch.as_deref()),
            name(dataset.branch())
        )));
    }
    if source.field_id.is_some_and(|id| id != column.field_id) || (source.field_id.is_none() && source.column != column.path) {
        return Err(Error::mismatch(format!(
            "{uri} was encoded from column {:?} (field {:?}), not from {:?} (field {})",
            source.column, source.field_id, column.path, column.field_id
        )));
    }
    if source.stable_row_ids != dataset.has_stable_row_ids() {
        return Err(Error::mismatch(format!(
            "{uri} holds {} row ids, the dataset uses {} ones",
            if source.stable_row_ids { "stable" } else { "address" },
            if source.stable_row_ids { "address" } else { "stable" }
        )));
    }
    if source.data_files.as_ref().is_some_and(|files| *files != dataset.column_fingerprint(&source.fragment_ids, column.field_id)) {
        return Err(Error::mismatch(format!(
            "{uri} was encoded from {}, whose data files are not those of {} at version {version}; it is another dataset",
            source.dataset_uri,
            dataset.shown_uri()
        )));
    }
    Ok(())
}

/// Numbers for a message: all of them where they are few.
fn numbers(ids: &[u32]) -> String {
    match ids {
        [first, .., last] if ids.len() > 20 => format!("{} of them, from {first} to {last}", ids.len()),
        _ => format!("{ids:?}"),
    }
}

/// The rows an artifact accounts for, written or dropped, must be the live rows of its fragments: a row that its encoder
/// skipped without counting it would be missing from every search.
async fn check_counts(dataset: &Dataset, artifact: &Artifact, fragment_ids: &[u32]) -> Result<()> {
    let Some(rows) = &artifact.manifest().rows else {
        return Ok(());
    };
    let live = dataset.count_rows(fragment_ids).await?;
    if rows.seen != live {
        return Err(Error::mismatch(format!(
            "{} accounts for {} rows ({} written, {} dropped), its {} fragments have {live} at version {}; rows that an encoder drops must be counted (rows_dropped of finish()), and it must be this dataset that was encoded",
            artifact.uri(),
            rows.seen,
            rows.written,
            rows.dropped.values().sum::<u64>(),
            fragment_ids.len(),
            dataset.version()
        )));
    }
    Ok(())
}
