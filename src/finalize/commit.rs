//! What must hold right before a segment is committed, and right after.

use std::collections::HashSet;

use super::segment::Segment;
use crate::error::{Error, Result};
use crate::lance::dataset::{Dataset, DatasetHandle, DatasetManifest};
use crate::lance::segment::{CommittedSegment, SegmentFolder};

/// What a commit is based on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommitBase {
    /// The column's path now: it may have been renamed.
    pub column: String,
    /// Fragments that came after the rows' version.
    pub new_fragment_ids: Vec<u32>,
    /// Segments of the index of that name that are there, to be replaced, or put back.
    pub previous: Vec<CommittedSegment>,
}

/// Check that `segment`, built from `then`, which `handle` shows, can be committed on top of `base`, which must be the latest version as
/// it is in the store. `Ok(None)`: `base` is not the latest any more; take the latest, and ask again.
pub async fn check_commit(
    handle: &DatasetHandle,
    then: &Dataset,
    base: &DatasetManifest,
    segment: &Segment,
    name: &str,
) -> Result<Option<CommitBase>> {
    let latest = handle.open_latest().await?;
    if let Some(what) = base.difference(latest.manifest()) {
        if base.version() < latest.version() {
            return Ok(None);
        }
        return Err(conflict(&format!(
            "version {} of {} is not the one that the handle shows ({what} differs): the dataset was removed and written anew",
            base.version(),
            handle.shown_uri()
        )));
    }
    if base.version() < then.version() {
        return Err(conflict(&format!(
            "the latest version of {} is {}, older than version {} from which the rows were encoded: the dataset was removed and written \
             anew",
            handle.shown_uri(),
            base.version(),
            then.version()
        )));
    }
    let column = match column_now(then, &latest, segment.field_id)? {
        Ok(column) => column,
        Err(what) => return Err(conflict(&what)),
    };
    if let Some(what) = fragments_changed(then, &latest, segment).await? {
        return Err(conflict(&what));
    }
    // Before the files are looked at: from here on nobody takes them for what somebody left.
    SegmentFolder::of(&latest, &segment.uuid).await?.unmark().await?;
    if let Some(what) = missing_files(&latest, segment).await? {
        return Err(conflict(&what));
    }
    let before: HashSet<u32> = then.fragment_ids().into_iter().collect();
    let new_fragment_ids = latest.fragment_ids().into_iter().filter(|id| !before.contains(id)).collect();
    let previous = CommittedSegment::of_index(&latest, name).await?;
    Ok(Some(CommitBase { column, new_fragment_ids, previous }))
}

/// What changed between the version `segment` was built from and another one, so that it cannot be an index of that one; in words.
/// None where nothing did.
pub async fn changed_since(handle: &DatasetHandle, then: &Dataset, now: DatasetManifest, segment: &Segment) -> Result<Option<String>> {
    let now = handle.at(now).open().await?;
    if let Err(what) = column_now(then, &now, segment.field_id)? {
        return Ok(Some(what));
    }
    fragments_changed(then, &now, segment).await
}

/// Which file of a segment is not there as it was written, if any. A cleanup that deletes unverified files takes them before the
/// commit.
pub async fn missing_files(dataset: &Dataset, segment: &Segment) -> Result<Option<String>> {
    let folder = SegmentFolder::of(dataset, &segment.uuid).await?;
    for (name, bytes) in &segment.files {
        let found = folder.size(name).await?;
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
fn column_now(then: &Dataset, now: &Dataset, field_id: i32) -> Result<std::result::Result<String, String>> {
    let kind = now.field_type(field_id);
    if kind.is_none() || kind != then.field_type(field_id) {
        return Ok(Err(format!(
            "its column was dropped or changed its type after version {}, from which the rows were encoded (now {})",
            then.version(),
            kind.map_or("gone".to_string(), |kind| kind.to_string())
        )));
    }
    now.field_path(field_id).map(Ok).map_err(|e| e.context("the path of the indexed column"))
}

/// Where the column's files of a fragment to be covered are not those that were read any more, or have a row more: what happened. A
/// fragment whose rows were all deleted stays in the coverage, because Lance hides the rows of covered fragments that are gone, and
/// of those only.
async fn fragments_changed(then: &Dataset, latest: &Dataset, segment: &Segment) -> Result<Option<String>> {
    let (before, after) = (then.column_files(segment.field_id), latest.column_files(segment.field_id));
    let same = |id: &u32| before.get(id).is_some_and(|files| after.get(id) == Some(files));
    let (kept, mut lost): (Vec<u32>, Vec<u32>) = segment.fragment_ids.iter().partition(|id| same(id));
    let (from, to) = (then.version(), latest.version());
    if !lost.is_empty() && lost.iter().all(|id| !after.contains_key(id)) {
        let emptied = latest.emptied_since(from).await;
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
        if latest.rows_came_back(then, id).await? {
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
