//! `Artifact` and `VerifyReport`.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use arrow_array::RecordBatch;
use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;
use pyo3_arrow::{PyRecordBatch, PySchema};

use super::convert::{PartitionId, UriArg, to_python};
use super::model::PyIvfPqModel;
use super::runtime::run;
use super::storage::{StorageOptionsArg, parts};
use crate::artifact::{Artifact, PartitionReader, SLICE_BYTES};
use crate::error::Error;
use crate::progress::Progress;

#[pyclass(name = "Artifact", module = "lance_artifact", frozen, from_py_object)]
#[derive(Clone)]
/// A finished partition artifact. Get one with Artifact.open(uri), build_artifact() or a PartitionArtifactBuilder.
pub struct PyArtifact {
    pub artifact: Arc<Artifact>,
    pub storage_options: Option<HashMap<String, String>>,
}

#[pymethods]
impl PyArtifact {
    /// Open the artifact at `uri`; reads its manifest and model, nothing else.
    ///
    /// Raises
    /// ------
    /// ArtifactNotFoundError
    ///     There is no manifest at uri.
    /// CorruptArtifactError
    ///     The manifest or the model breaks the format.
    #[staticmethod]
    #[pyo3(signature = (uri, storage_options = None))]
    fn open(py: Python<'_>, uri: UriArg, storage_options: Option<StorageOptionsArg>) -> PyResult<Self> {
        let (options, storage_options) = parts(storage_options);
        let artifact = run(py, None, |_, cancel| async move { cancel.race(Artifact::open(&uri.0, options.as_ref())).await })?;
        Ok(Self { artifact: Arc::new(artifact), storage_options })
    }

    /// Open several artifacts side by side: pairs of a URI and storage options. Those of one model share it.
    #[staticmethod]
    fn _open_all(py: Python<'_>, places: Vec<(UriArg, Option<StorageOptionsArg>)>) -> PyResult<Vec<Self>> {
        let mut shown = Vec::with_capacity(places.len());
        let mut wanted = Vec::with_capacity(places.len());
        for (uri, options) in places {
            let (options, storage_options) = parts(options);
            shown.push(storage_options);
            wanted.push((uri.0, options));
        }
        let opened = run(py, None, |_, cancel| async move { cancel.race(Artifact::open_all(&wanted)).await })?;
        let pair = opened.into_iter().zip(shown);
        Ok(pair.map(|(artifact, storage_options)| Self { artifact: Arc::new(artifact), storage_options }).collect())
    }

    /// The URI: a path is absolute, and passwords, signatures and tokens are not shown.
    #[getter]
    fn uri(&self) -> String {
        self.artifact.uri().to_string()
    }

    /// Rows in all partitions.
    #[getter]
    fn num_rows(&self) -> u64 {
        self.artifact.num_rows()
    }

    /// Partitions, empty ones included.
    #[getter]
    fn num_partitions(&self) -> usize {
        self.artifact.num_partitions()
    }

    /// Bytes of a code; 0 where the artifact has neither rows nor a model.
    #[getter]
    fn pq_code_width(&self) -> usize {
        self.artifact.pq_code_width()
    }

    /// The IvfPqModel, or None where the artifact holds none.
    #[getter]
    fn model(&self) -> Option<PyIvfPqModel> {
        self.artifact.model().cloned().map(PyIvfPqModel)
    }

    /// The manifest as a dict, without the list of partitions.
    #[getter]
    fn manifest<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, &self.artifact.manifest().without_partitions())
    }

    /// Where its rows come from, as the manifest says, or None.
    #[getter]
    fn _source<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.artifact.manifest().source.as_ref().map(|source| to_python(py, source)).transpose()
    }

    /// The storage options it was opened with, as they were then.
    #[getter]
    fn storage_options(&self) -> Option<HashMap<String, String>> {
        self.storage_options.clone()
    }

    /// Rows of each partition, in id order.
    fn partition_sizes(&self) -> Vec<u64> {
        (0..self.artifact.num_partitions()).map(|p| self.artifact.partition_rows(p)).collect()
    }

    /// Ranges of each partition, in id order; fewer are faster to read.
    fn partition_range_counts(&self) -> Vec<usize> {
        self.artifact.manifest().partitions.iter().map(|p| p.ranges().count()).collect()
    }

    /// The rows of a partition, read a few MiB at a time as the reader is asked for them.
    ///
    /// Returns
    /// -------
    /// pyarrow.RecordBatchReader
    ///     ``_rowid: uint64``, ``__pq_code: fixed_size_list<uint8>[pq_code_width]``.
    ///
    /// Raises
    /// ------
    /// IndexError
    ///     There is no such partition.
    /// CorruptArtifactError, StorageError
    ///     The first rows cannot be read; the reader raises it for later ones. The checksum of a partition is known with its
    ///     last row: of one larger than 4 MiB, rows are handed out before.
    fn read_partition<'py>(&self, py: Python<'py>, partition: PartitionId) -> PyResult<Bound<'py, PyAny>> {
        let partition = usize::from(partition);
        if partition >= self.artifact.num_partitions() {
            return Err(PyIndexError::new_err(format!("partition {partition}: expected 0 to {}", self.artifact.num_partitions() - 1)));
        }
        let mut reader = PartitionReader::of(self.artifact.clone(), partition, SLICE_BYTES);
        let (first, reader) = run(py, None, |_, cancel| async move {
            let first = cancel.race(reader.next()).await?;
            Ok((first, reader))
        })?;
        let batches = PyPartitionBatches {
            ahead: Mutex::new(first.map(|rows| rows.batches(0)).unwrap_or_default().into()),
            reader: Arc::new(tokio::sync::Mutex::new(reader)),
        };
        let schema = PySchema::new(self.artifact.partition_schema()).into_pyarrow(py)?;
        py.import("pyarrow")?.getattr("RecordBatchReader")?.call_method1("from_batches", (schema, Bound::new(py, batches)?))
    }

    /// Check every promise of the manifest against the files: sizes, rows, ranges, gaps, partition ids, checksums and duplicate
    /// row ids. Reads the whole artifact. Problems are reported, not raised.
    ///
    /// Parameters
    /// ----------
    /// progress : callable, optional
    ///     Called as progress(event, stage, completed, total, unit).
    ///
    /// Returns
    /// -------
    /// VerifyReport
    #[pyo3(signature = (progress = None))]
    fn verify(&self, py: Python<'_>, progress: Option<Bound<'_, PyAny>>) -> PyResult<PyVerifyReport> {
        if let Some(other) = progress.as_ref().filter(|progress| !progress.is_callable()) {
            return Err(Error::invalid(format!("progress: got {}, expected a callable or None", other.get_type())).into());
        }
        let artifact = self.artifact.clone();
        let report = run(py, progress, |reporter, cancel| async move {
            reporter.start("verify", Some(artifact.num_rows()), "rows");
            let report = cancel.race(artifact.verify(|rows| reporter.advance("verify", rows))).await?;
            reporter.complete("verify");
            Ok(report)
        })?;
        Ok(PyVerifyReport {
            ok: report.ok(),
            num_rows: report.num_rows,
            num_partitions: report.num_partitions,
            num_files: report.num_files,
            num_ranges: report.num_ranges,
            checksums_checked: report.checksums_checked,
            part_ids_checked: report.part_ids_checked,
            duplicate_row_ids: report.duplicate_row_ids,
            num_problems: report.num_problems,
            problems: report.problems,
        })
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let py = slf.py();
        let artifact = slf.get();
        let open = py.get_type::<Self>().getattr("open")?;
        Ok((open, (artifact.artifact.true_uri(), artifact.storage_options.clone()).into_pyobject(py)?.into_any()))
    }

    fn __repr__(&self) -> String {
        format!(
            "Artifact({:?}, num_rows={}, num_partitions={}, pq_code_width={})",
            self.uri(),
            self.num_rows(),
            self.num_partitions(),
            self.pq_code_width()
        )
    }
}

/// The batches of a partition, for a pyarrow.RecordBatchReader.
#[pyclass(name = "_PartitionBatches", module = "lance_artifact._lance_artifact", frozen)]
pub struct PyPartitionBatches {
    ahead: Mutex<VecDeque<RecordBatch>>,
    reader: Arc<tokio::sync::Mutex<PartitionReader>>,
}

#[pymethods]
impl PyPartitionBatches {
    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        loop {
            let next = self.ahead.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            if let Some(batch) = next {
                return PyRecordBatch::new(batch).into_pyarrow(py).map(Some);
            }
            let reader = self.reader.clone();
            let read = run(py, None, |_, cancel| async move { cancel.race(async { reader.lock().await.next().await }).await })?;
            let Some(rows) = read else { return Ok(None) };
            self.ahead.lock().unwrap_or_else(PoisonError::into_inner).extend(rows.batches(0));
        }
    }
}

#[pyclass(name = "VerifyReport", module = "lance_artifact", frozen, get_all)]
/// What Artifact.verify() found. `problems` spells out the first hundred of `num_problems`.
pub struct PyVerifyReport {
    ok: bool,
    num_rows: u64,
    num_partitions: usize,
    num_files: usize,
    num_ranges: u64,
    checksums_checked: bool,
    part_ids_checked: bool,
    duplicate_row_ids: u64,
    num_problems: u64,
    problems: Vec<String>,
}

#[pymethods]
impl PyVerifyReport {
    fn __repr__(&self) -> String {
        format!(
            "VerifyReport(ok={}, num_rows={}, num_problems={})",
            if self.ok { "True" } else { "False" },
            self.num_rows,
            self.num_problems
        )
    }
}
