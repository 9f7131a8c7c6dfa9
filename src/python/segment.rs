//! Segments for the Python layer: built, checked before and after their commit, discarded.

use std::collections::HashMap;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use super::artifact::PyArtifact;
use super::convert::{MemoryLimit, MetricArg};
use super::dataset::PyDataset;
use super::model::PyIvfPqModel;
use super::runtime::{clean_up, run};
use super::storage::{StorageOptionsArg, parts};
use crate::error::Error;
use crate::finalize::{
    MergeRequest, Segment, SegmentRequest, build_segment as build, changed_since, check_commit, merge_segments as merge, missing_files,
};
use crate::lance::dataset::{Dataset, DatasetManifest};
use crate::lance::segment::{CommittedSegment, Graphs, IndexType, SegmentFolder, sizes_of_index};

/// A finished segment, not yet committed.
#[pyclass(name = "_Segment", module = "lance_artifact._lance_artifact", frozen)]
pub struct PySegment(Segment);

#[pymethods]
impl PySegment {
    #[getter]
    fn uuid(&self) -> &str {
        &self.0.uuid
    }

    /// "l2", "cosine" or "dot".
    #[getter]
    fn metric(&self) -> String {
        self.0.metric.to_string()
    }

    #[getter]
    fn field_id(&self) -> i32 {
        self.0.field_id
    }

    #[getter]
    fn fragment_ids(&self) -> Vec<u32> {
        self.0.fragment_ids.clone()
    }

    #[getter]
    fn index_version(&self) -> i32 {
        self.0.index_version
    }

    /// Type URL and bytes.
    #[getter]
    fn details<'py>(&self, py: Python<'py>) -> (String, Bound<'py, PyBytes>) {
        (self.0.details_type_url.clone(), PyBytes::new(py, &self.0.details))
    }

    #[getter]
    fn dataset_version(&self) -> u64 {
        self.0.dataset_version
    }

    #[getter]
    fn num_rows(&self) -> u64 {
        self.0.num_rows
    }

    /// Read from the artifacts, headers included.
    #[getter]
    fn bytes_read(&self) -> u64 {
        self.0.bytes_read
    }

    /// Whether the segment can be committed as index `name` on top of `base`, a serialized manifest: None if `base` is not the
    /// latest version in the store, else a dict: the column's path, the ids of fragments that came after the rows' version, and
    /// the segments of that name. Raises where it cannot.
    fn check_commit<'py>(&self, py: Python<'py>, dataset: &PyDataset, base: &[u8], name: String) -> PyResult<Option<Bound<'py, PyDict>>> {
        let base = DatasetManifest::parse(base)?;
        let (handle, built_from, segment) = (dataset.handle.clone(), dataset.dataset.clone(), self.0.clone());
        let checked = run(py, None, |_, cancel| async move {
            cancel.race(async { check_commit(&handle, &built_from, &base, &segment, &name).await }).await
        })?;
        let Some(base) = checked else { return Ok(None) };
        let found = PyDict::new(py);
        found.set_item("column", base.column)?;
        found.set_item("new_fragment_ids", base.new_fragment_ids)?;
        let previous = base.previous.into_iter().map(|previous| {
            let index = PyDict::new(py);
            index.set_item("uuid", previous.uuid)?;
            index.set_item("fields", previous.fields)?;
            index.set_item("dataset_version", previous.dataset_version)?;
            index.set_item("fragment_ids", previous.fragment_ids)?;
            index.set_item("index_version", previous.index_version)?;
            index.set_item("base_id", previous.base_id)?;
            index.set_item("index_details", previous.details.map(|(url, value)| (url, PyBytes::new(py, &value))))?;
            Ok(index)
        });
        found.set_item("previous", previous.collect::<PyResult<Vec<_>>>()?)?;
        Ok(Some(found))
    }

    /// Take away the marks of an unfinished segment: from here on it is the caller's to commit.
    fn release(&self, py: Python<'_>, dataset: &PyDataset) -> PyResult<()> {
        let (dataset, uuid) = (dataset.dataset.clone(), self.0.uuid.clone());
        run(py, None, |_, cancel| async move { cancel.race(async { SegmentFolder::of(&dataset, &uuid).await?.unmark().await }).await })
    }

    /// What changed between the version it was built from and another one, a serialized manifest, so that it is no index of that
    /// one; in words. None where nothing did.
    fn changed_since(&self, py: Python<'_>, dataset: &PyDataset, now: &[u8]) -> PyResult<Option<String>> {
        let now = DatasetManifest::parse(now)?;
        let (handle, then, segment) = (dataset.handle.clone(), dataset.dataset.clone(), self.0.clone());
        run(py, None, |_, cancel| async move { cancel.race(changed_since(&handle, &then, now, &segment)).await })
    }

    /// Which file is gone or was changed, in words; None where all are there.
    fn missing_files(&self, py: Python<'_>, dataset: &PyDataset) -> PyResult<Option<String>> {
        let (dataset, segment) = (dataset.dataset.clone(), self.0.clone());
        run(py, None, |_, cancel| async move { cancel.race(missing_files(&dataset, &segment)).await })
    }
}

/// Build the files of an index segment.
#[pyfunction]
#[pyo3(signature = (dataset, column, artifacts, uuid, *, model = None, metric = None, index_type = "IVF_PQ", m = 20, ef_construction = 150, max_level = 7, fragment_ids = None, hints = None, skip_transpose = false, sync = false, memory_limit = None, progress = None))]
#[allow(clippy::too_many_arguments)]
pub fn build_segment(
    py: Python<'_>,
    dataset: &PyDataset,
    column: String,
    artifacts: Vec<PyArtifact>,
    uuid: String,
    model: Option<PyIvfPqModel>,
    metric: Option<MetricArg>,
    index_type: &str,
    m: usize,
    ef_construction: usize,
    max_level: u16,
    fragment_ids: Option<Vec<u32>>,
    hints: Option<HashMap<String, String>>,
    skip_transpose: bool,
    sync: bool,
    memory_limit: Option<MemoryLimit>,
    progress: Option<Bound<'_, PyAny>>,
) -> PyResult<PySegment> {
    let index_type = index_type_of(index_type, Graphs { m, ef_construction, max_level })?;
    let training = model.as_ref().and_then(|model| model.0.training());
    let request = SegmentRequest {
        dataset: dataset.dataset.clone(),
        column,
        artifacts: artifacts.into_iter().map(|a| a.artifact).collect(),
        model: model.map(|m| m.0),
        metric: metric.map(|m| m.0),
        index_type,
        fragment_ids,
        uuid: uuid.clone(),
        training,
        hints: hints.unwrap_or_default(),
        transposed: !skip_transpose,
        sync,
        memory_limit: memory_limit.map(|limit| limit.0),
    };
    let dataset = dataset.dataset.clone();
    let segment = run(py, progress, |reporter, cancel| async move {
        let result = cancel.race(build(request, Arc::new(reporter))).await;
        if matches!(result, Err(Error::Interrupted(_))) {
            discard(&dataset, &uuid).await?;
        }
        result
    })?;
    Ok(PySegment(segment))
}

fn index_type_of(name: &str, graphs: Graphs) -> Result<IndexType, Error> {
    match name {
        "IVF_PQ" => Ok(IndexType::IvfPq),
        "IVF_HNSW_PQ" => Ok(IndexType::IvfHnswPq(graphs)),
        other => Err(Error::invalid(format!("index_type: got {other:?}, expected \"IVF_PQ\" or \"IVF_HNSW_PQ\""))),
    }
}

/// Put segments of an index together: the new one, unless it would be the only one there was, the fingerprint of
/// their model, its rows, rows of the old ones that are
/// not live any more, and live rows that none held.
#[pyfunction]
#[pyo3(signature = (dataset, name, segments, uuid, *, index_type = "IVF_PQ", m = 20, ef_construction = 150, max_level = 7, hints = None, sync = false, memory_limit = None, progress = None))]
#[allow(clippy::too_many_arguments)]
pub fn merge_segments(
    py: Python<'_>,
    dataset: &PyDataset,
    name: String,
    segments: Vec<String>,
    uuid: String,
    index_type: &str,
    m: usize,
    ef_construction: usize,
    max_level: u16,
    hints: Option<HashMap<String, String>>,
    sync: bool,
    memory_limit: Option<MemoryLimit>,
    progress: Option<Bound<'_, PyAny>>,
) -> PyResult<(Option<PySegment>, String, u64, u64, u64)> {
    let request = MergeRequest {
        dataset: dataset.dataset.clone(),
        name,
        segments,
        index_type: index_type_of(index_type, Graphs { m, ef_construction, max_level })?,
        uuid: uuid.clone(),
        hints: hints.unwrap_or_default(),
        sync,
        memory_limit: memory_limit.map(|limit| limit.0),
    };
    let dataset = dataset.dataset.clone();
    let merged = run(py, progress, |reporter, cancel| async move {
        let result = cancel.race(merge(request, Arc::new(reporter))).await;
        if matches!(result, Err(Error::Interrupted(_))) {
            discard(&dataset, &uuid).await?;
        }
        result
    })?;
    Ok((merged.segment.map(PySegment), merged.model, merged.num_rows, merged.rows_dropped, merged.rows_missing))
}

/// Segments of an index that do not say which fragments they cover.
#[pyfunction]
pub fn segments_without_coverage(py: Python<'_>, dataset: &PyDataset, name: String) -> PyResult<Vec<String>> {
    Ok(segments_of(py, dataset, name)?.into_iter().filter(|segment| !segment.says_coverage).map(|segment| segment.uuid).collect())
}

fn segments_of(py: Python<'_>, dataset: &PyDataset, name: String) -> PyResult<Vec<CommittedSegment>> {
    let dataset = dataset.dataset.clone();
    run(py, None, |_, cancel| async move { cancel.race(async { CommittedSegment::of_index(&dataset, &name).await }).await })
}

/// The segments of an index whose details hold a text, such as a hint.
#[pyfunction]
pub fn segments_with(py: Python<'_>, dataset: &PyDataset, name: String, text: String) -> PyResult<Vec<String>> {
    let segments = segments_of(py, dataset, name)?;
    Ok(segments.into_iter().filter(|segment| segment.details_hold(&text)).map(|segment| segment.uuid).collect())
}

/// Unfinished segments of builds whose processes are certainly gone.
#[pyfunction]
pub fn unfinished_segments(py: Python<'_>, dataset: &PyDataset) -> PyResult<Vec<String>> {
    let dataset = dataset.dataset.clone();
    run(py, None, |_, cancel| async move { cancel.race(SegmentFolder::leftovers(&dataset)).await })
}

/// Rows of each partition of an index, as its segments hold them: deleted ones too.
#[pyfunction]
pub fn partition_sizes(py: Python<'_>, dataset: &PyDataset, name: String) -> PyResult<Vec<u64>> {
    let dataset = dataset.dataset.clone();
    run(py, None, |_, cancel| async move { cancel.race(sizes_of_index(&dataset, &name)).await })
}

async fn discard(dataset: &Dataset, uuid: &str) -> Result<(), Error> {
    SegmentFolder::of(dataset, uuid).await?.remove().await
}

/// Delete the files of a segment that was not committed.
#[pyfunction]
pub fn discard_segment(py: Python<'_>, dataset: &PyDataset, uuid: String) -> PyResult<()> {
    let dataset = dataset.dataset.clone();
    clean_up(py, async move { discard(&dataset, &uuid).await })
}

/// Delete an artifact: the manifest first, so that what is left at any moment is not an artifact any more.
#[pyfunction]
#[pyo3(signature = (uri, storage_options = None))]
pub fn delete_artifact(py: Python<'_>, uri: String, storage_options: Option<StorageOptionsArg>) -> PyResult<()> {
    let (storage_options, _) = parts(storage_options);
    clean_up(py, async move { crate::artifact::delete_artifact(&uri, storage_options.as_ref()).await })
}
