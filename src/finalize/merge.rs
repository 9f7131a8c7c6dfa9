//! Committed segments of one model into one, without the rows that are not live any more: a segment is read like an artifact.

use std::collections::HashMap;
use std::sync::Arc;

use super::build::{window_bytes, write_files};
use super::live::{COUNT_BYTES, LiveSegment};
use super::partitions::{LEAST_DEAD_BYTES, Partitions, RowSource};
use super::segment::Segment;
use super::target::SegmentTarget;
use crate::budget::{Budget, default_limit};
use crate::error::{Error, Result};
use crate::lance::dataset::{Dataset, VectorColumn};
use crate::lance::segment::{CommittedSegment, IndexType, RowIdRemapper, index_details, model_of_segments};
use crate::progress::Progress;

/// Which segments of which index to put together.
pub struct MergeRequest {
    /// At the version whose live rows are wanted.
    pub dataset: Dataset,
    pub name: String,
    /// Of the segments of that name.
    pub segments: Vec<String>,
    pub index_type: IndexType,
    /// Names the folder of the segment.
    pub uuid: String,
    pub hints: HashMap<String, String>,
    pub sync: bool,
    /// Bytes that all of this may hold; by default [`default_limit`].
    pub memory_limit: Option<u64>,
}

/// A finished segment, and what became of the rows of those that it replaces.
pub struct Merged {
    /// `None` where it would be the only one there was: nothing was written.
    pub segment: Option<Segment>,
    /// Fingerprint of the model of all of them.
    pub model: String,
    /// Rows in it.
    pub num_rows: u64,
    /// Rows that are not live any more, or live in a fragment that another segment covers.
    pub rows_dropped: u64,
    /// Live rows of the fragments that no segment held: they have no usable vector, if the segments were right.
    pub rows_missing: u64,
}

/// Check everything, then merge. A failure leaves no files behind.
pub async fn merge_segments(request: MergeRequest, progress: Arc<dyn Progress>) -> Result<Merged> {
    match merge(&request, progress.clone(), false).await {
        // A segment whose rows seemed to be live, and were not.
        Err(Error::CorruptArtifact(_)) => merge(&request, progress, true).await,
        result => result,
    }
}

/// `counts`: count the live rows of every segment, whatever it seems.
async fn merge(request: &MergeRequest, progress: Arc<dyn Progress>, counts: bool) -> Result<Merged> {
    let MergeRequest { dataset, name, .. } = request;
    let chosen: Vec<CommittedSegment> =
        CommittedSegment::of_index(dataset, name).await?.into_iter().filter(|segment| request.segments.contains(&segment.uuid)).collect();
    if chosen.is_empty() || chosen.len() != request.segments.len() {
        return Err(Error::invalid(format!(
            "segments: got {:?}, of which index {name:?} has {} at version {}",
            request.segments,
            chosen.len(),
            dataset.version()
        )));
    }
    if let Some(other) = chosen.iter().find(|segment| !segment.says_coverage || segment.index_version != request.index_type.version()) {
        return Err(Error::invalid(format!(
            "index {name:?}: segment {} {}; build the index anew",
            other.uuid,
            if other.says_coverage {
                format!("is of version {} of its format, expected {}", other.index_version, request.index_type.version())
            } else {
                "does not say which fragments it covers".to_string()
            }
        )));
    }
    for segment in &chosen {
        if let Some((fragment, version)) = dataset.overlaid_since(segment.fields[0], &segment.fragment_ids, segment.dataset_version) {
            return Err(Error::invalid(format!(
                "index {name:?}: version {version} gave rows of fragment {fragment} other vectors by an overlay, and segment {} of version \
                 {} has their old codes, which Lance passes over as long as the segment stays; build the index anew",
                segment.uuid, segment.dataset_version
            )));
        }
    }
    let model = Arc::new(model_of_segments(dataset, name, Some(&request.segments)).await?);
    let field_id = chosen[0].fields[0];
    let column = VectorColumn::resolve(dataset, &dataset.field_path(field_id)?)?;
    let budget = Budget::new(request.memory_limit.unwrap_or_else(default_limit));
    let model_bytes = model.num_bytes() as u64;
    let spare = LEAST_DEAD_BYTES * chosen.len() as u64;
    let least = window_bytes(0, model.code_width()).max(COUNT_BYTES) + spare;
    let _model = budget.hold(model_bytes, "centroids and codebook", least)?;
    let remapper = RowIdRemapper::of(dataset).await?;
    let mut segments = Vec::with_capacity(chosen.len());
    let mut held = Vec::with_capacity(chosen.len());
    for segment in &chosen {
        let mut live = LiveSegment::open(dataset, segment, remapper.clone()).await?;
        let shape = (live.reader().num_partitions(), live.reader().code_width());
        if shape != (model.num_partitions(), model.code_width()) {
            return Err(Error::corrupt(format!(
                "index segment {} has {} partitions and codes of {} bytes, its model {} and {}",
                segment.uuid,
                shape.0,
                shape.1,
                model.num_partitions(),
                model.code_width()
            )));
        }
        held.push(budget.hold(live.held_bytes(), "the partitions of a segment and a bit for each row", least)?);
        // Of a single one whose rows are all live nothing is read again, where it would be noticed.
        if counts || chosen.len() == 1 || !live.seems_live() {
            live.count(&budget).await?;
        } else {
            live.take_for_live();
        }
        segments.push(Arc::new(live));
    }
    let sources = segments.iter().cloned().map(RowSource::Segment).collect();
    let partitions = Arc::new(Partitions::new(sources, model.num_partitions(), model.code_width()));
    let num_rows = partitions.num_rows();
    let stored: u64 = segments.iter().map(|segment| segment.reader().num_rows()).sum();
    if segments.len() == 1 && stored == num_rows {
        let rows_missing = segments.iter().map(|segment| segment.rows_missing()).sum::<u64>() - num_rows;
        return Ok(Merged { segment: None, model: model.fingerprint().to_string(), num_rows, rows_dropped: 0, rows_missing });
    }
    let target = SegmentTarget {
        dataset,
        column: &column,
        uuid: &request.uuid,
        index_type: request.index_type,
        transposed: true,
        sync: request.sync,
        memory_limit: request.memory_limit,
    };
    let files = write_files(target, &model, partitions, &budget, progress, async { Ok(()) }).await?;
    let (details_type_url, details) = index_details(&model, model.training(), request.index_type, true, request.hints.clone())?;
    let mut fragment_ids: Vec<u32> = segments.iter().flat_map(|segment| segment.fragment_ids().iter().copied()).collect();
    fragment_ids.sort_unstable();
    fragment_ids.dedup();
    Ok(Merged {
        model: model.fingerprint().to_string(),
        num_rows,
        rows_dropped: stored - num_rows,
        rows_missing: segments.iter().map(|segment| segment.rows_missing()).sum(),
        segment: Some(Segment {
            uuid: request.uuid.clone(),
            metric: model.metric(),
            field_id,
            dataset_version: dataset.version(),
            fragment_ids,
            index_version: request.index_type.version(),
            details_type_url,
            details,
            files,
            num_rows,
            bytes_read: segments.iter().map(|segment| segment.reader().bytes_read()).sum(),
        }),
    })
}
