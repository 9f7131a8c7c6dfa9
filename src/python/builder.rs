//! `PartitionArtifactBuilder`.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::types::PyType;

use super::artifact::PyArtifact;
use super::convert::{
    CodeWidth, ExpectedRows, FormatVersion, MemoryLimit, NumBuckets, NumPartitions, RowsDropped, RowsSeen, SourceArg, UriArg, overwrite,
    record_batches, sync,
};
use super::exit::{self, Entry};
use super::model::ModelArg;
use super::runtime::{clean_up_blocking, run, run_blocking};
use super::storage::{StorageOptionsArg, parts};
use crate::artifact::{Artifact, BuilderOptions, Encoding, PartitionArtifactBuilder, RowCounts};
use crate::error::Error;
use crate::sync::spawn;

/// How long a caller that was interrupted waits until nothing of its builder is left. What takes longer goes on behind it.
const UNCLAIMED: Duration = Duration::from_secs(5);

/// Say beside the error that is on its way that what was written could not be removed: it stays the one that is raised, but for a
/// Ctrl-C meanwhile, which nobody may keep to himself.
fn not_removed(py: Python<'_>, error: Option<&Bound<'_, PyAny>>, left: PyErr) -> PyResult<()> {
    let Some(error) = error.filter(|_| left.is_instance_of::<PyException>(py)) else { return Err(left) };
    py.import("lance_artifact._tidy")?.call_method1("not_removed", (error, left.into_value(py))).map(drop)
}

#[pyclass(name = "PartitionArtifactBuilder", module = "lance_artifact", frozen)]
/// Streams encoded batches into a partition artifact, in bounded memory and one pass.
///
/// Use it as a context manager: the artifact is published when the block ends, and removed if it ends with an exception.
/// Methods may be called from any thread. Several writers may write to one target at once, also in other processes and on other
/// machines: the first to publish wins, the others get an ArtifactExistsError and spoil nothing.
///
/// Parameters
/// ----------
/// uri : str or os.PathLike
///     A new or empty folder: a local path, which is resolved at once (a later change of the working directory does not matter),
///     or a URI of an object store (s3://, gs://, az://, memory://). A folder that holds anything but an artifact, or lies in a
///     Lance dataset, is refused.
/// model : IvfPqModel, optional
///     Stored with the artifact. Without it, num_partitions and pq_code_width are needed, and finalize() needs the model.
/// num_partitions : int, optional
/// pq_code_width : int, optional
///     Bytes of a code: num_sub_vectors * num_bits / 8.
/// num_buckets : int, optional
///     Files; default min(num_partitions, 256), fewer where expected_rows would not fill a MiB of each, where the process may not
///     open as many (ulimit -n), or where the upload buffers of an object store would not fit memory_limit.
/// memory_limit : int, optional
///     Bytes staged, sorted and being written; default 1 GiB or a quarter of RAM, whichever is less.
/// expected_rows : int, optional
///     Rows that will be appended, about; plans memory and the parts of uploads. On object stores a file is an upload of at most
///     10,000 parts, whose size is fixed here: what cannot hold twice the mean bucket of so many rows is refused. Without it
///     parts are as large as an eighth of memory_limit allows, 64 MiB at most. More rows may come while they fit.
/// overwrite : bool, default False
///     Replace an artifact that is there. It stays whole until the new one is published, which happens only if it is still the
///     one that was there when the builder was made. Needs a store with conditional writes.
/// storage_options : dict of str to str, or callable that gives one, optional
///     A callable is asked again when what it gave ends (its key expires_at_millis).
/// source : dict, optional
///     Where the rows come from, as describe_source() gives it; finalize() checks it.
/// sync : bool, default True
///     finish() waits until the files, and the entries of new folders in their parents, are on the local disk, so that a crash of
///     the machine cannot lose a finished artifact. False is for artifacts that do not outlive their build; what a crash spoils then is found by the checksums.
/// format_version : {1, 2}, optional
///     1 lists the partitions in the manifest, which other readers know; 2 has them in a file of their own. Default 1, unless there
///     are so many ranges (some 200,000) that a manifest is no place for them.
///
/// Raises
/// ------
/// InvalidInputError
///     An option cannot be used, or the target is no place for an artifact: a file, a Lance dataset or inside one, a folder with
///     other things, a store without the conditional writes that are needed. Nothing was changed.
/// ArtifactExistsError
///     The target holds an artifact and overwrite is False.
/// StorageError
///     The target cannot be reached, or threads or files that are needed cannot be had.
pub struct PyPartitionArtifactBuilder {
    pub builder: Arc<PartitionArtifactBuilder>,
    storage_options: Option<HashMap<String, String>>,
    finished: Arc<Mutex<Option<Arc<Artifact>>>>,
    aborted: AtomicBool,
}

impl PyPartitionArtifactBuilder {
    #[allow(clippy::too_many_arguments)]
    fn open(
        py: Python<'_>,
        uri: UriArg,
        encoding: Encoding,
        num_buckets: Option<NumBuckets>,
        memory_limit: Option<MemoryLimit>,
        held: u64,
        overwrite: bool,
        storage_options: Option<StorageOptionsArg>,
        source: Option<SourceArg>,
        sync: bool,
        expected_rows: Option<ExpectedRows>,
        format_version: Option<FormatVersion>,
    ) -> PyResult<Self> {
        let (accessor, storage_options) = parts(storage_options);
        let options = BuilderOptions {
            num_buckets: num_buckets.map(usize::from),
            memory_limit: memory_limit.map(|limit| limit.0),
            held,
            expected_rows: expected_rows.map(|rows| rows.0),
            overwrite,
            storage_options: accessor,
            source: source.map(|s| s.0),
            format_version: format_version.map(|version| version.0 as u32),
            sync,
        };
        let builder = run(py, None, |_, cancel| async move {
            // To its end, whatever happens: a claim that nobody knows of any more would stay.
            let mut making = tokio::spawn(async move { PartitionArtifactBuilder::try_new(&uri.0, encoding, options).await.map(Arc::new) });
            match cancel.race(async { Ok((&mut making).await) }).await {
                Ok(made) => made?,
                Err(interrupted) => {
                    // The end of the interpreter waits for it.
                    let inside = exit::enter(Entry::Cleanup);
                    let winding_up = tokio::spawn(async move {
                        if let Ok(Ok(builder)) = making.await {
                            let _ = spawn(move || builder.abort()).await;
                        }
                        drop(inside);
                    });
                    // So does the caller, who may remove the folder in which a claim would appear again.
                    let _ = tokio::time::timeout(UNCLAIMED, winding_up).await;
                    Err(interrupted)
                }
            }
        })?;
        exit::watch(&builder);
        Ok(Self { builder, storage_options, finished: Arc::default(), aborted: AtomicBool::new(false) })
    }
}

#[pymethods]
impl PyPartitionArtifactBuilder {
    #[new]
    #[pyo3(signature = (uri, model = None, *, num_partitions = None, pq_code_width = None, num_buckets = None, memory_limit = None, overwrite = false, storage_options = None, source = None, sync = true, expected_rows = None, format_version = None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        uri: UriArg,
        model: Option<ModelArg>,
        num_partitions: Option<NumPartitions>,
        pq_code_width: Option<CodeWidth>,
        num_buckets: Option<NumBuckets>,
        memory_limit: Option<MemoryLimit>,
        #[pyo3(from_py_with = overwrite)] overwrite: bool,
        storage_options: Option<StorageOptionsArg>,
        source: Option<SourceArg>,
        #[pyo3(from_py_with = sync)] sync: bool,
        expected_rows: Option<ExpectedRows>,
        format_version: Option<FormatVersion>,
    ) -> PyResult<Self> {
        let encoding = match (model, num_partitions, pq_code_width) {
            (Some(model), None, None) => Encoding::Model(model.0.0),
            (None, Some(num_partitions), Some(pq_code_width)) => {
                Encoding::Shape { num_partitions: num_partitions.into(), pq_code_width: pq_code_width.into() }
            }
            _ => {
                return Err(Error::invalid("PartitionArtifactBuilder: pass either model, or both num_partitions and pq_code_width").into());
            }
        };
        Self::open(py, uri, encoding, num_buckets, memory_limit, 0, overwrite, storage_options, source, sync, expected_rows, format_version)
    }

    /// A builder of a call of which others hold bytes too; exceptions speak of the call's limit.
    #[staticmethod]
    #[pyo3(signature = (uri, model, *, num_partitions, pq_code_width, num_buckets, memory_limit, held, overwrite, storage_options, source, sync, expected_rows))]
    #[allow(clippy::too_many_arguments)]
    fn _share(
        py: Python<'_>,
        uri: UriArg,
        model: Option<ModelArg>,
        num_partitions: NumPartitions,
        pq_code_width: CodeWidth,
        num_buckets: Option<NumBuckets>,
        memory_limit: MemoryLimit,
        held: u64,
        overwrite: bool,
        storage_options: Option<StorageOptionsArg>,
        source: Option<SourceArg>,
        sync: bool,
        expected_rows: Option<ExpectedRows>,
    ) -> PyResult<Self> {
        let encoding = match model {
            Some(model) => Encoding::Model(model.0.0),
            None => Encoding::Shape { num_partitions: num_partitions.into(), pq_code_width: pq_code_width.into() },
        };
        Self::open(py, uri, encoding, num_buckets, Some(memory_limit), held, overwrite, storage_options, source, sync, expected_rows, None)
    }

    /// Append encoded rows.
    ///
    /// The batch is checked first: a refused batch changes nothing and the builder stays usable. Of a stream, batches before
    /// the refused one have been taken.
    ///
    /// Parameters
    /// ----------
    /// data : object with __arrow_c_array__ or __arrow_c_stream__
    ///     Columns ``_rowid: uint64``, ``__ivf_part_id: uint32``, ``__pq_code: fixed_size_list<uint8>[pq_code_width]``
    ///     (or ``row_id``, ``part_id``, ``pq_code``), in any order, without nulls.
    ///
    /// Returns
    /// -------
    /// int
    ///     Rows appended by this call.
    fn append_batch(&self, py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<usize> {
        let mut rows = 0;
        for batch in record_batches(data)? {
            let batch = batch?;
            rows += batch.num_rows();
            let builder = self.builder.clone();
            run_blocking(py, move || builder.append_batch(&batch))?;
        }
        Ok(rows)
    }

    /// Write what is staged, close and sync the files, publish the manifest. Nothing can be appended after.
    ///
    /// Publishing is tried for some seconds. If that fails with a StorageError whose message says so, the files stay, and finish()
    /// may be called again, also after the with block: it only publishes them. abort() removes them.
    ///
    /// Parameters
    /// ----------
    /// rows_seen : int, optional
    ///     Rows the encoder looked at; default: those appended.
    /// rows_dropped : dict of str to int, optional
    ///     Rows it dropped, by reason. rows_seen must be their sum and the rows appended.
    ///
    /// Returns
    /// -------
    /// Artifact
    ///
    /// Raises
    /// ------
    /// StorageError
    ///     Writing or publishing failed.
    /// ArtifactExistsError
    ///     Another writer has published at this target meanwhile. Its artifact stays.
    /// CommitConflictError
    ///     Somebody removed or changed the files of this build. Nothing was published.
    #[pyo3(signature = (*, rows_seen = None, rows_dropped = None))]
    fn finish(&self, py: Python<'_>, rows_seen: Option<RowsSeen>, rows_dropped: Option<RowsDropped>) -> PyResult<PyArtifact> {
        if rows_seen.is_none() && rows_dropped.is_none() {
            return self.publish(py, None);
        }
        let written = self.builder.num_rows();
        let dropped = rows_dropped.map(|rows| rows.0).unwrap_or_default();
        let accounted = dropped.values().try_fold(written, |sum, rows| sum.checked_add(*rows));
        let accounted =
            accounted.ok_or_else(|| Error::invalid(format!("rows_dropped: the sum of {:?} is no number of rows", dropped.values())))?;
        let seen = rows_seen.map_or(accounted, |rows| rows.0);
        if seen != accounted {
            return Err(
                Error::invalid(format!("finish: {seen} rows seen, but {written} appended and {} dropped", accounted - written)).into()
            );
        }
        self.publish(py, Some(RowCounts { seen, written, dropped }))
    }

    /// Stop and remove what was written; uploads are aborted when it returns, or half a minute was spent on that. After
    /// finish() it does nothing. Where not all could be removed it raises, and may be called again.
    fn abort(&self, py: Python<'_>) -> PyResult<()> {
        self.aborted.store(true, Ordering::Relaxed);
        self.builder.cancel();
        if exit::is_closed() {
            // It was aborted when the interpreter wound up.
            return Ok(());
        }
        let builder = self.builder.clone();
        clean_up_blocking(py, move || builder.abort())
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (exc_type, exc_value, _traceback))]
    fn __exit__(
        &self,
        py: Python<'_>,
        exc_type: Option<Bound<'_, PyType>>,
        exc_value: Option<Bound<'_, PyAny>>,
        _traceback: Option<Bound<'_, PyAny>>,
    ) -> PyResult<bool> {
        if exc_type.is_some() {
            // What only has to be published is not thrown away because that failed, also where finish() was called in the block.
            let storage = py.import("lance_artifact.exceptions")?.getattr("StorageError")?;
            let unpublished =
                exc_value.as_ref().is_some_and(|e| e.is_instance(&storage).unwrap_or(false)) && self.builder.can_publish_again();
            if !unpublished && let Err(left) = self.abort(py) {
                not_removed(py, exc_value.as_ref(), left)?;
            }
        } else if !self.aborted.load(Ordering::Relaxed)
            && self.finished.lock().unwrap_or_else(PoisonError::into_inner).is_none()
            && let Err(error) = self.finish(py, None, None)
        {
            // What only has to be published is not thrown away.
            if !self.builder.can_publish_again()
                && let Err(left) = self.abort(py)
            {
                not_removed(py, Some(error.value(py).as_any()), left)?;
            }
            return Err(error);
        }
        Ok(false)
    }

    /// The finished Artifact.
    #[getter]
    fn artifact(&self) -> PyResult<PyArtifact> {
        let finished = self.finished.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match finished {
            Some(artifact) => Ok(PyArtifact { artifact, storage_options: self.storage_options.clone() }),
            None => Err(Error::invalid("artifact: the builder is not finished; call finish() or leave the with block first").into()),
        }
    }

    /// Whether finish() failed when all files were complete, so that another call has only to publish them.
    #[getter]
    fn can_finish_again(&self) -> bool {
        let opened = self.finished.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        self.builder.can_publish_again() || (self.builder.is_finished() && !opened)
    }

    /// The target: a path is absolute, and passwords, signatures and tokens are not shown.
    #[getter]
    fn uri(&self) -> String {
        self.builder.store().uri().to_string()
    }

    /// Rows appended so far.
    #[getter]
    fn num_rows(&self) -> u64 {
        self.builder.num_rows()
    }

    /// Partitions.
    #[getter]
    fn num_partitions(&self) -> usize {
        self.builder.num_partitions()
    }

    /// Bytes of a code.
    #[getter]
    fn pq_code_width(&self) -> usize {
        self.builder.pq_code_width()
    }

    /// Files at most.
    #[getter]
    fn num_buckets(&self) -> usize {
        self.builder.num_buckets()
    }

    /// Bytes.
    #[getter]
    fn memory_limit(&self) -> u64 {
        self.builder.memory_plan().limit
    }

    fn __repr__(&self) -> String {
        format!(
            "PartitionArtifactBuilder({:?}, num_partitions={}, pq_code_width={}, num_rows={})",
            self.uri(),
            self.num_partitions(),
            self.pq_code_width(),
            self.num_rows()
        )
    }
}

impl Drop for PyPartitionArtifactBuilder {
    /// An open builder is aborted, without the GIL: that waits for threads and for stores.
    fn drop(&mut self) {
        let builder = self.builder.clone();
        builder.cancel();
        // The last of its owners may hold the GIL, and would with all other threads wait for a store that fails.
        builder.leave();
        // Where the interpreter has wound up, that has aborted it.
        if let Ok(inside) = exit::enter(Entry::Cleanup) {
            let attached = Python::try_attach(|py| inside.detach(py, || builder.abort()));
            // Without an interpreter there is no GIL to hold.
            let _ = attached.unwrap_or_else(|| builder.abort());
        }
    }
}

impl PyPartitionArtifactBuilder {
    pub fn publish(&self, py: Python<'_>, counts: Option<RowCounts>) -> PyResult<PyArtifact> {
        let builder = self.builder.clone();
        let finished = self.finished.clone();
        let artifact = run(py, None, |_, cancel| async move {
            let finishing = builder.clone();
            let opened = finished.lock().unwrap_or_else(PoisonError::into_inner).is_some();
            let mut work = spawn(move || {
                // It may be published already, and opening it have failed.
                if !opened && finishing.is_finished() { Ok(()) } else { finishing.finish(counts).map(|_| ()) }
            });
            // An interrupt stops the writing between two chunks; if the manifest is out already, the artifact stands.
            let result = match cancel.race(async { Ok((&mut work).await) }).await {
                Ok(result) => result,
                Err(_) => {
                    builder.cancel();
                    work.await
                }
            };
            result?;
            let artifact = Arc::new(Artifact::open_in(builder.store().clone()).await?);
            *finished.lock().unwrap_or_else(PoisonError::into_inner) = Some(artifact.clone());
            Ok(artifact)
        })?;
        Ok(PyArtifact { artifact, storage_options: self.storage_options.clone() })
    }
}
