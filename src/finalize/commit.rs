//! What must hold right before a segment is committed, and right after.

use std::collections::{HashMap, HashSet};

use lance::Dataset;
use lance::dataset::transaction::Operation;
use lance::index::DatasetIndexExt;
use lance_table::format::{Fragment, IndexMetadata, Manifest};

use super::leftovers::unmark;
use super::segment::Segment;
use crate::encode::{DatasetHandle, column_files, difference};
use crate::error::{Error, Result};

/// What a commit is based on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommitBase {
    /// The column's path now: it may have been renamed.
    pub column: String,
    /// Fragments that came after the rows' version.
    pub new_fragment_ids: Vec<u32>,
    /// Segments of the index of that name that are there, to be replaced, or put back.
    pub previous: Vec<Previous>,
}

/// A committed segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Previous {
    pub uuid: String,
    pub fields: Vec<i32>,
    pub dataset_version: u64,
    pub fragment_ids: Vec<u32>,
    pub index_version: i32,
    /// Of the base path where its files are, if that is another one.
    pub base_id: Option<u32>,
    /// Type URL and bytes, where there are any.
    pub details: Option<(String, Vec<u8>)>,
}

impl From<IndexMetadata> for Previous {
    fn from(index: IndexMetadata) -> Self {
        Self {
            uuid: index.uuid.to_string(),
            fields: index.fields,
            dataset_version: index.dataset_version,
            fragment_ids: index.fragment_bitmap.map(|bitmap| bitmap.iter().collect()).unwrap_or_default(),
            index_version: index.index_version,
            base_id: index.base_id,
            details: index.index_details.map(|details| (details.type_url.clone(), details.value.clone())),
        }
    }
}

/// Check that `segment`, built from `then`, which `handle` shows, can be committed on top of `base`, which must be the latest version as
/// it is in the store. `Ok(None)`: `base` is not the latest any more; take the latest, and ask again.
pub async fn check_commit(
    handle: &DatasetHandle,
    then: &Dataset,
    base: &Manifest,
    segment: &Segment,
    name: &str,
) -> Result<Option<CommitBase>> {
    let built_from = then.manifest();
    let latest = handle.open_latest().await?;
    let there = latest.manifest();
    if let Some(what) = difference(base, there) {
        if base.version < there.version {
            return Ok(None);
        }
        return Err(conflict(&format!(
            "version {} of {} is not the one that the handle shows ({what} differs): the dataset was removed and written anew",
            base.version,
            handle.shown_uri()
        )));
    }
    if base.version < built_from.version {
        return Err(conflict(&format!(
            "the latest version of {} is {}, older than version {} from which the rows were encoded: the dataset was removed and written \
             anew",
            handle.shown_uri(),
            base.version,
            built_from.version
        )));
    }
    let column = match column_now(built_from, there, segment.field_id)? {
        Ok(column) => column,
        Err(what) => return Err(conflict(&what)),
    };
    if let Some(what) = fragments_changed(then, &latest, segment).await? {
        return Err(conflict(&what));
    }
    let store = latest.object_store(None).await?;
    // Before the files are looked at: from here on nobody takes them for what somebody left.
    unmark(&store, &latest.indices_dir().join(segment.uuid.as_str())).await?;
    if let Some(what) = missing_files(&latest, segment).await? {
        return Err(conflict(&what));
    }
    let before: HashSet<u64> = built_from.fragments.iter().map(|f| f.id).collect();
    let new_fragment_ids = there.fragments.iter().filter(|f| !before.contains(&f.id)).map(|f| f.id as u32).collect();
    let previous = latest.load_indices_by_name(name).await?.into_iter().map(Previous::from).collect();
    Ok(Some(CommitBase { column, new_fragment_ids, previous }))
}

/// What changed between the version `segment` was built from and another one, so that it cannot be an index of that one; in words.
/// None where nothing did.
pub async fn changed_since(handle: &DatasetHandle, then: &Dataset, now: Manifest, segment: &Segment) -> Result<Option<String>> {
    let now = handle.at(now).open().await?;
    if let Err(what) = column_now(then.manifest(), now.manifest(), segment.field_id)? {
        return Ok(Some(what));
    }
    fragments_changed(then, &now, segment).await
}

/// Which file of a segment is not there as it was written, if any. A cleanup that deletes unverified files takes them before the
/// commit.
pub async fn missing_files(dataset: &Dataset, segment: &Segment) -> Result<Option<String>> {
    let store = dataset.object_store(None).await?;
    let folder = dataset.indices_dir().join(segment.uuid.as_str());
    for (name, bytes) in &segment.files {
        let found = match store.size(&folder.clone().join(name.as_str())).await {
            Ok(size) => Some(size),
            Err(lance_core::Error::NotFound { .. }) => None,
            Err(e) => return Err(Error::from(e).context(format!("looking for {name} of index segment {}", segment.uuid))),
        };
        if found != Some(*bytes) {
            return Ok(Some(format!(
                "{name} of the new segment {} {}; a cleanup with delete_unverified=True removes segments that are not committed yet",
                segment.uuid,
                found.map_or("is gone".to_string(), |size| format!("has {size} bytes, {bytes} were written"))
            )));
        }
    }
    Ok(None)
}

fn conflict(what: &str) -> Error {
    Error::CommitConflict(format!("the index was not committed: {what}; build again"))
}

/// The column's path in a later version, or why it has none: dropping or casting it gives it, or what comes in its place, another
/// field id.
fn column_now(then: &Manifest, now: &Manifest, field_id: i32) -> Result<std::result::Result<String, String>> {
    let kind = |manifest: &Manifest| manifest.schema.field_by_id(field_id).map(|field| field.data_type());
    if kind(now).is_none() || kind(now) != kind(then) {
        return Ok(Err(format!(
            "its column was dropped or changed its type after version {}, from which the rows were encoded (now {})",
            then.version,
            kind(now).map_or("gone".to_string(), |kind| kind.to_string())
        )));
    }
    now.schema.field_path(field_id).map(Ok).map_err(|e| Error::from(e).context("the path of the indexed column"))
}

/// Where the column's files of a fragment to be covered are not those that were read any more, or have a row more: what happened. A
/// fragment whose rows were all deleted stays in the coverage, because Lance hides the rows of covered fragments that are gone, and
/// of those only.
async fn fragments_changed(then: &Dataset, latest: &Dataset, segment: &Segment) -> Result<Option<String>> {
    let by_id = |dataset: &Dataset| -> HashMap<u32, Fragment> {
        dataset.manifest().fragments.iter().map(|fragment| (fragment.id as u32, fragment.clone())).collect()
    };
    let (before, after) = (by_id(then), by_id(latest));
    let same = |id: &u32| match (before.get(id), after.get(id)) {
        (Some(a), Some(b)) => column_files(a, segment.field_id) == column_files(b, segment.field_id) && a.row_id_meta == b.row_id_meta,
        _ => false,
    };
    let (kept, mut lost): (Vec<u32>, Vec<u32>) = segment.fragment_ids.iter().partition(|id| same(id));
    let (from, to) = (then.version().version, latest.version().version);
    if !lost.is_empty() && lost.iter().all(|id| !after.contains_key(id)) {
        let emptied = emptied_fragments(from, latest).await;
        lost.retain(|id| !emptied.contains(id));
    }
    if lost.is_empty() && kept.is_empty() {
        return Ok(Some(format!("all rows that it covers were deleted by version {to}")));
    }
    if !lost.is_empty() {
        return Ok(Some(format!(
            "fragments {} of version {from}, from which the rows were encoded, were rewritten by version {to} (a compaction, an overwrite, or \
             an update of the column in place)",
            few(&lost)
        )));
    }
    let mut back = Vec::new();
    for id in kept {
        if rows_came_back(then, latest, id).await? {
            back.push(id);
        }
    }
    if !back.is_empty() {
        return Ok(Some(format!(
            "rows of fragments {} that were deleted in version {from}, from which the rows were encoded, are back in version {to}: an \
             older version was restored",
            few(&back)
        )));
    }
    Ok(None)
}

fn few(ids: &[u32]) -> String {
    let shown = &ids[..ids.len().min(10)];
    if ids.len() > shown.len() { format!("{shown:?} and {} more", ids.len() - shown.len()) } else { format!("{shown:?}") }
}

/// Whether a row that was deleted in one version is live in a later one.
async fn rows_came_back(then: &Dataset, latest: &Dataset, id: u32) -> Result<bool> {
    let (Some(before), Some(after)) = (then.get_fragment(id as usize), latest.get_fragment(id as usize)) else {
        return Ok(false);
    };
    let Some(file) = &before.metadata().deletion_file else { return Ok(false) };
    if after.metadata().deletion_file.as_ref().is_some_and(|now| (now.read_version, now.id) == (file.read_version, file.id)) {
        return Ok(false);
    }
    let Some(deleted) = before.get_deletion_vector().await? else { return Ok(false) };
    let now = after.get_deletion_vector().await?;
    Ok(deleted.iter().any(|row| !now.as_ref().is_some_and(|now| now.contains(row))))
}

/// Fragments that went because their rows were deleted, or updated and so moved, since a version. Those of which the history says
/// nothing, or nothing any more, are not among them.
async fn emptied_fragments(since: u64, latest: &Dataset) -> HashSet<u32> {
    let mut emptied = HashSet::new();
    for version in since + 1..=latest.version().version {
        match latest.read_transaction_by_version(version).await.ok().flatten().map(|transaction| transaction.operation) {
            Some(Operation::Delete { deleted_fragment_ids, .. }) => emptied.extend(deleted_fragment_ids.iter().map(|id| *id as u32)),
            Some(Operation::Update { removed_fragment_ids, .. }) => emptied.extend(removed_fragment_ids.iter().map(|id| *id as u32)),
            _ => {}
        }
    }
    emptied
}
