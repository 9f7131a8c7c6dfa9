//! Sampling, scanning and encoding for the Python layer. Private: the public functions are in Python.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_schema::{DataType, Field, Schema};
use futures::{StreamExt, TryStreamExt};
use pyo3::prelude::*;
use pyo3_arrow::PyRecordBatch;
use tokio::sync::{Mutex, mpsc};

use super::builder::PyPartitionArtifactBuilder;
use super::convert::{MemoryLimit, MetricArg, to_pyarrow, to_python};
use super::dataset::PyDataset;
use super::model::PyIvfPqModel;
use super::runtime::run;
use crate::budget::{Budget, default_limit};
use crate::encode::{
    CpuEncoder, Dropped, EncodeShares, Order, PartedSample, TrainParams, TrainShares, TrainingShape, VectorSource, encode_into,
    train_centroids_in_parts,
};
use crate::error::{Error, Result};
use crate::finalize::{IndexShape, least_memory};
use crate::progress::Progress;
use crate::sync::spawn;

/// A vector column of a dataset.
#[pyclass(name = "_VectorSource", module = "lance_artifact._lance_artifact", frozen)]
pub struct PyVectorSource(pub(super) Arc<VectorSource>);

#[pymethods]
impl PyVectorSource {
    #[new]
    #[pyo3(signature = (dataset, column, *, fragment_ids = None))]
    fn new(dataset: &PyDataset, column: &str, fragment_ids: Option<Vec<u32>>) -> PyResult<Self> {
        let dataset = dataset.dataset.clone();
        Ok(Self(Arc::new(VectorSource::try_new(dataset, column, fragment_ids.as_deref())?)))
    }

    /// The same, whose scans keep within so many bytes.
    fn with_scan_bytes(&self, scan_bytes: u64) -> Self {
        Self(Arc::new(self.0.as_ref().clone().with_scan_bytes(scan_bytes)))
    }

    /// The bytes of an encoding call: of all of it, of its scan and of its writer.
    #[pyo3(signature = (num_partitions, num_bits, memory_limit = None))]
    fn encode_shares(&self, num_partitions: usize, num_bits: u32, memory_limit: Option<MemoryLimit>) -> PyResult<(u64, u64, u64)> {
        let shares = EncodeShares::of(memory_limit.map(|limit| limit.0), self.0.vectors(), num_partitions, num_bits)?;
        Ok((shares.limit, shares.scan, shares.writer))
    }

    /// The least memory_limit with which these rows can be finalized afterwards, about; `writer`: the bytes of their writer.
    fn least_to_finalize(&self, py: Python<'_>, num_partitions: usize, pq_code_width: usize, num_bits: u32, writer: u64) -> PyResult<u64> {
        let source = self.0.clone();
        let rows = run(py, None, |_, cancel| async move { cancel.race(source.count_rows()).await })?;
        let vectors = self.0.vectors();
        let model_bytes = (vectors.dimension * vectors.byte_width) as u64 * (num_partitions as u64 + (1 << num_bits.min(16)));
        let staged = writer / (2 * (pq_code_width as u64 + 12) + 4);
        let stages = rows.div_ceil((staged / 2).max(1));
        Ok(least_memory(IndexShape { rows, num_partitions, code_width: pq_code_width, model_bytes, stages }))
    }

    /// The bytes of a training call, of all of it and of its scan, and the vectors that its sample may have.
    #[pyo3(signature = (num_partitions, num_sub_vectors, num_bits, sample_rate, trains_centroids, memory_limit = None))]
    fn train_shares(
        &self,
        num_partitions: usize,
        num_sub_vectors: usize,
        num_bits: u32,
        sample_rate: usize,
        trains_centroids: bool,
        memory_limit: Option<MemoryLimit>,
    ) -> (u64, u64, u64) {
        let shape = TrainingShape { num_partitions, num_sub_vectors, num_bits, sample_rate, trains_centroids };
        let shares = TrainShares::of(memory_limit.map(|limit| limit.0), self.0.vectors(), shape);
        (shares.limit, shares.scan, shares.rows)
    }

    #[getter]
    fn dimension(&self) -> usize {
        self.0.column.dimension
    }

    #[getter]
    fn dtype(&self) -> String {
        self.0.column.element_type.to_string()
    }

    fn describe<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, &self.0.describe())
    }

    fn count_rows(&self, py: Python<'_>) -> PyResult<u64> {
        let source = self.0.clone();
        run(py, None, |_, cancel| async move { cancel.race(source.count_rows()).await })
    }

    /// Up to `rows` random prepared vectors, in random order, or as they were read. With `least` they are to train on: a few that are
    /// far larger than all others are left out, with a warning, where `least` are left.
    #[pyo3(signature = (rows, metric, seed, memory_limit = None, *, shuffled = true, least = None))]
    #[allow(clippy::too_many_arguments)]
    fn sample<'py>(
        &self,
        py: Python<'py>,
        rows: usize,
        metric: MetricArg,
        seed: u64,
        memory_limit: Option<u64>,
        shuffled: bool,
        least: Option<usize>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let source = self.0.clone();
        let budget = Budget::new(memory_limit.unwrap_or_else(default_limit));
        let order = if shuffled { Order::Random } else { Order::AsRead };
        let sample = run(py, None, |_, cancel| async move {
            let drawn = async {
                match least {
                    Some(least) => Ok(source.sample_to_train((rows, least), metric.0, seed, order, &budget).await?.0),
                    None => source.sample(rows, metric.0, seed, order, &budget).await,
                }
            };
            cancel.race(drawn).await
        })?;
        to_pyarrow(py, Arc::new(sample))
    }

    /// Centroids trained on `at_once` vectors, and moved to the means of about `rows`, with the embedded CPU backend.
    #[pyo3(signature = (rows, at_once, metric, *, num_partitions, sample_rate, max_iters, seed, memory_limit, progress = None))]
    #[allow(clippy::too_many_arguments)]
    fn train_centroids_in_parts<'py>(
        &self,
        py: Python<'py>,
        rows: usize,
        at_once: usize,
        metric: MetricArg,
        num_partitions: usize,
        sample_rate: usize,
        max_iters: usize,
        seed: u64,
        memory_limit: u64,
        progress: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (source, budget) = (self.0.clone(), Budget::new(memory_limit));
        let params = TrainParams { num_partitions, num_sub_vectors: 1, num_bits: 8, sample_rate, max_iters, seed, centroids: None };
        let centroids = run(py, progress, |reporter, cancel| async move {
            let sample = PartedSample { rows, at_once };
            cancel.race(train_centroids_in_parts(&source, metric.0, params, sample, &budget, Arc::new(reporter))).await
        })?;
        to_pyarrow(py, Arc::new(centroids))
    }

    /// Scan and do nothing with it: the limit of everything that encodes. Returns rows and seconds.
    fn drain(&self, py: Python<'_>) -> PyResult<(u64, f64)> {
        let source = self.0.clone();
        run(py, None, |_, cancel| async move {
            let start = std::time::Instant::now();
            let rows = cancel
                .race(async {
                    let mut scan = Box::pin(source.scan_unfiltered().await?);
                    let mut rows = 0;
                    while let Some(batch) = scan.try_next().await? {
                        rows += batch.len() as u64;
                    }
                    Ok(rows)
                })
                .await?;
            Ok((rows, start.elapsed().as_secs_f64()))
        })
    }

    /// Prepared vectors, batch by batch, a few read ahead.
    fn scan(&self, py: Python<'_>, metric: MetricArg) -> PyResult<PyVectorScan> {
        let source = self.0.clone();
        let (sender, receiver) = mpsc::channel(2);
        run(py, None, |_, cancel| async move {
            let mut stream = cancel.race(async { Ok(source.scan(metric.0).await?.boxed()) }).await?;
            tokio::spawn(async move {
                loop {
                    let next = stream.try_next().await.transpose();
                    // A reader that went away ends the scan.
                    let Some(next) = next else { return };
                    let failed = next.is_err();
                    if sender.send(next).await.is_err() || failed {
                        return;
                    }
                }
            });
            Ok(())
        })?;
        Ok(PyVectorScan { receiver: Arc::new(Mutex::new(receiver)), dropped: std::sync::Mutex::default() })
    }

    /// Encode all rows on the CPU into an open builder. Returns the rows seen and those dropped, by reason. `fast`: rows are compared
    /// with the centroids of the nearest groups only, where that is worth it.
    #[pyo3(signature = (model, builder, memory_limit, fast, progress = None))]
    fn encode_on_cpu(
        &self,
        py: Python<'_>,
        model: PyIvfPqModel,
        builder: &Bound<'_, PyPartitionArtifactBuilder>,
        memory_limit: u64,
        fast: bool,
        progress: Option<Bound<'_, PyAny>>,
    ) -> PyResult<(u64, BTreeMap<String, u64>)> {
        let (source, builder) = (self.0.clone(), builder.get().builder.clone());
        let metric = model.0.metric();
        let budget = Budget::new(memory_limit);
        let counts = run(py, progress, |reporter, cancel| async move {
            let encoder = cancel
                .race(async {
                    let sample = if fast { Some(source.sample_of_encoded(metric, &budget).await?) } else { None };
                    let made = move || sample.map_or_else(|| CpuEncoder::new(&model.0), |sample| CpuEncoder::fast(&model.0, &sample));
                    spawn(move || Ok(Arc::new(made()?))).await
                })
                .await?;
            reporter.start("shuffle", Some(source.count_rows().await?), "rows");
            let counts =
                cancel.race(encode_into(&source, metric, encoder, builder, &budget, |rows| reporter.advance("shuffle", rows))).await?;
            reporter.complete("shuffle");
            Ok(counts)
        })?;
        Ok((counts.seen, counts.dropped))
    }
}

type Prepared = Result<crate::encode::PreparedVectors>;

/// Iterates `_rowid: uint64`, `vector: fixed_size_list<T>[dimension]` batches.
#[pyclass(name = "_VectorScan", module = "lance_artifact._lance_artifact", frozen)]
pub struct PyVectorScan {
    receiver: Arc<Mutex<mpsc::Receiver<Prepared>>>,
    dropped: std::sync::Mutex<Dropped>,
}

#[pymethods]
impl PyVectorScan {
    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let receiver = self.receiver.clone();
        let next = run(py, None, |_, cancel| async move { cancel.race(async { receiver.lock().await.recv().await.transpose() }).await })?;
        let Some(prepared) = next else { return Ok(None) };
        self.dropped.lock().unwrap_or_else(std::sync::PoisonError::into_inner).add(prepared.dropped);
        let schema = Schema::new(vec![
            Field::new("_rowid", DataType::UInt64, false),
            Field::new("vector", arrow_array::Array::data_type(&prepared.vectors).clone(), false),
        ]);
        let batch =
            RecordBatch::try_new(Arc::new(schema), vec![Arc::new(prepared.row_ids), Arc::new(prepared.vectors)]).map_err(Error::from)?;
        PyRecordBatch::new(batch).into_pyarrow(py).map(Some)
    }

    /// Rows dropped so far, by reason.
    #[getter]
    fn dropped(&self) -> BTreeMap<String, u64> {
        self.dropped.lock().unwrap_or_else(std::sync::PoisonError::into_inner).by_reason()
    }
}
