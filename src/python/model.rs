//! `IvfPqModel` and `CpuEncoder`.

use std::sync::Arc;

use arrow_array::{UInt8Array, UInt32Array};
use pyo3::prelude::*;

use super::convert::{
    FixedSizeListArg, MaxIters, MetricArg, NumSubVectors, SampleRate, TargetPartitionSize, ivf_centroids, pq_codebook, shown, to_pyarrow,
    to_python, vectors,
};
use super::dataset::PyDataset;
use super::runtime::{run, run_apart, run_blocking};
use crate::encode::{CpuEncoder, Encoder, TrainParams, check_prepared, train_cpu};
use crate::error::Error;
use crate::lance::segment::model_of_segments;
use crate::model::{IvfPqModel, Training, fixed_size_list};
use crate::sync::spawn;

#[pyclass(name = "IvfPqModel", module = "lance_artifact", frozen, from_py_object)]
#[derive(Clone)]
/// A trained IVF_PQ model: IVF centroids, PQ codebook and metric, validated.
///
/// Parameters
/// ----------
/// ivf_centroids : fixed_size_list<T>[dimension], num_partitions rows
///     Any object with ``__arrow_c_array__``, or a numpy array (num_partitions, dimension). T is float16, float32 or float64 and must be the dtype of the column.
/// pq_codebook : fixed_size_list<T>[dimension], 2**num_bits rows
///     The flat buffer is ordered [sub-vector][code][dimension / num_sub_vectors]. Rows of dimension / num_sub_vectors
///     values are taken too, as is a numpy array (num_sub_vectors, 2**num_bits, dimension / num_sub_vectors); they tell
///     num_sub_vectors.
/// metric : {"l2", "cosine", "dot"}, default "l2"
/// num_sub_vectors : int, optional
///     Needed where the codebook's rows are whole vectors.
///
/// Raises
/// ------
/// InvalidInputError
///     Shapes or dtypes do not fit each other, or a value is null or not finite.
pub struct PyIvfPqModel(pub Arc<IvfPqModel>);

#[pymethods]
impl PyIvfPqModel {
    #[new]
    #[pyo3(signature = (ivf_centroids, pq_codebook, metric = MetricArg(crate::model::Metric::L2), *, num_sub_vectors = None), text_signature = "(ivf_centroids, pq_codebook, metric=\"l2\", *, num_sub_vectors=None)")]
    fn new(
        py: Python<'_>,
        #[pyo3(from_py_with = ivf_centroids)] ivf_centroids: FixedSizeListArg,
        #[pyo3(from_py_with = pq_codebook)] pq_codebook: FixedSizeListArg,
        metric: MetricArg,
        num_sub_vectors: Option<NumSubVectors>,
    ) -> PyResult<Self> {
        // Values are checked, copied and hashed.
        let num_sub_vectors = num_sub_vectors.map(usize::from);
        let make = move || IvfPqModel::try_new(&ivf_centroids.0, &pq_codebook.0, metric.0, num_sub_vectors);
        Ok(Self(Arc::new(run_apart(py, make)?)))
    }

    /// pyarrow.FixedSizeListArray, num_partitions rows of dimension values, as pylance takes them.
    #[getter]
    fn ivf_centroids<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_pyarrow(py, Arc::new(self.0.centroids().clone()))
    }

    /// pyarrow.FixedSizeListArray, 2**num_bits rows of dimension values, as pylance takes it.
    #[getter]
    fn pq_codebook<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_pyarrow(py, Arc::new(self.0.codebook().clone()))
    }

    /// "l2", "cosine" or "dot".
    #[getter]
    fn metric(&self) -> String {
        self.0.metric().to_string()
    }

    /// "float16", "float32" or "float64".
    #[getter]
    fn dtype(&self) -> String {
        self.0.element_type().to_string()
    }

    /// Number of IVF partitions.
    #[getter]
    fn num_partitions(&self) -> usize {
        self.0.num_partitions()
    }

    /// Number of PQ sub-vectors.
    #[getter]
    fn num_sub_vectors(&self) -> usize {
        self.0.num_sub_vectors()
    }

    /// Bits of a sub-vector's code, 4 or 8.
    #[getter]
    fn num_bits(&self) -> u32 {
        self.0.num_bits()
    }

    /// Values of a vector.
    #[getter]
    fn dimension(&self) -> usize {
        self.0.dimension()
    }

    /// Bytes of a PQ code: num_sub_vectors * num_bits / 8.
    #[getter]
    fn pq_code_width(&self) -> usize {
        self.0.code_width()
    }

    /// 32 hexadecimal digits over metric, dtype, shapes and values; equal for equal models.
    #[getter]
    fn fingerprint(&self) -> String {
        self.0.fingerprint().to_string()
    }

    /// How it was trained, as Lance records it in an index and goes by it in optimize_indices: a dict with
    /// target_partition_size, sample_rate and max_iters (those that are known), or None. No part of the fingerprint.
    #[getter]
    fn training<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.0.training().map(|training| to_python(py, &training)).transpose()
    }

    /// The model of a committed IVF_PQ or IVF_HNSW_PQ index, whoever built it: what new rows are encoded with, so that they can join it.
    ///
    /// Parameters
    /// ----------
    /// dataset : lance.LanceDataset, LanceDB table, or path
    /// name : str
    ///     Of the index.
    ///
    /// Returns
    /// -------
    /// IvfPqModel
    ///
    /// Raises
    /// ------
    /// InvalidInputError
    ///     There is no index of that name, or it has no centroids or no PQ codebook.
    /// ArtifactMismatchError
    ///     Its segments are of different models.
    #[staticmethod]
    fn from_index<'py>(py: Python<'py>, dataset: Bound<'py, PyAny>, name: Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        py.import("lance_artifact._model_of_index")?.getattr("model_of_index")?.call1((dataset, name))
    }

    /// The same model with other training parameters on record.
    ///
    /// Parameters
    /// ----------
    /// target_partition_size : int, optional
    ///     Rows that a partition was to have.
    /// sample_rate : int, optional
    ///     Training vectors per centroid and per codeword.
    /// max_iters : int, optional
    ///
    /// Returns
    /// -------
    /// IvfPqModel
    #[pyo3(signature = (*, target_partition_size = None, sample_rate = None, max_iters = None))]
    fn with_training(
        &self,
        target_partition_size: Option<TargetPartitionSize>,
        sample_rate: Option<SampleRate>,
        max_iters: Option<MaxIters>,
    ) -> Self {
        let training = Training {
            target_partition_size: target_partition_size.map(|n| n.0),
            sample_rate: sample_rate.map(|n| n.0),
            max_iters: max_iters.map(|n| n.0),
        };
        Self(Arc::new(self.0.as_ref().clone().with_training((training != Training::default()).then_some(training))))
    }

    fn __eq__(&self, other: &Self) -> bool {
        self.0.fingerprint() == other.0.fingerprint()
    }

    fn __hash__(&self) -> u64 {
        xxhash_rust::xxh3::xxh3_64(self.0.fingerprint().as_bytes())
    }

    fn __repr__(&self) -> String {
        format!(
            "IvfPqModel(metric=\"{}\", dtype=\"{}\", num_partitions={}, num_sub_vectors={}, num_bits={}, dimension={}, fingerprint=\"{}\")",
            self.metric(),
            self.dtype(),
            self.num_partitions(),
            self.num_sub_vectors(),
            self.num_bits(),
            self.dimension(),
            self.fingerprint()
        )
    }

    /// Pickle as arrays: workers of a cluster get the model by value.
    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let py = slf.py();
        let model = slf.get();
        let make = py.import("lance_artifact._model")?.getattr("_unpickle_model")?;
        let state = (model.ivf_centroids(py)?, model.pq_codebook(py)?, model.metric(), model.num_sub_vectors(), model.training(py)?);
        Ok((make, state.into_pyobject(py)?.into_any()))
    }
}

/// The model of the index of a name.
#[pyfunction]
#[pyo3(signature = (dataset, name, segments = None))]
pub fn model_of_index(py: Python<'_>, dataset: &PyDataset, name: String, segments: Option<Vec<String>>) -> PyResult<PyIvfPqModel> {
    let dataset = dataset.dataset.clone();
    let model = run(py, None, |_, cancel| async move { cancel.race(model_of_segments(&dataset, &name, segments.as_deref())).await })?;
    Ok(PyIvfPqModel(Arc::new(model)))
}

/// A model, and nothing that only looks like one.
pub struct ModelArg(pub PyIvfPqModel);

impl<'a, 'py> FromPyObject<'a, 'py> for ModelArg {
    type Error = PyErr;

    fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let model = value.extract::<PyIvfPqModel>();
        model.map(Self).map_err(|_| Error::invalid(format!("model: got {}, expected an IvfPqModel", shown(value))).into())
    }
}

#[pyclass(name = "CpuEncoder", module = "lance_artifact", frozen)]
/// The embedded CPU encoder of a model: exact assignment, residuals (not for dot), L2-nearest codewords.
///
/// Parameters
/// ----------
/// model : IvfPqModel
pub struct PyCpuEncoder(Arc<CpuEncoder>, Arc<IvfPqModel>);

#[pymethods]
impl PyCpuEncoder {
    #[new]
    fn new(py: Python<'_>, model: ModelArg) -> PyResult<Self> {
        let model = model.0;
        // Values are copied, in the order of the kernels.
        let copied = model.0.clone();
        Ok(Self(Arc::new(run_apart(py, move || CpuEncoder::new(&copied))?), model.0))
    }

    /// Encode prepared vectors, as prepared_vectors() gives them: no nulls, finite, and of unit norm for cosine. Others are
    /// refused, because Lance does not index them as they are.
    ///
    /// Parameters
    /// ----------
    /// vectors : fixed_size_list<T>[dimension], n rows
    ///     Any object with ``__arrow_c_array__``, of the model's dtype, without nulls.
    ///
    /// Returns
    /// -------
    /// (pyarrow.UInt32Array, pyarrow.FixedSizeListArray)
    ///     n partition ids, and n codes of pq_code_width bytes.
    ///
    /// Raises
    /// ------
    /// InvalidInputError
    ///     A vector is null, has a null, NaN or infinite element, or (cosine) is not of unit norm.
    /// ArtifactMismatchError
    ///     The dtype or dimension is not the model's.
    fn encode<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = vectors)] vectors: FixedSizeListArg,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let encoder = self.0.clone();
        let metric = self.1.metric();
        let encoded = run_blocking(py, move || {
            check_prepared(&vectors.0, metric)?;
            encoder.encode(&vectors.0)
        })?;
        let codes = fixed_size_list(Arc::new(UInt8Array::from(encoded.codes)), self.0.code_width())?;
        Ok((to_pyarrow(py, Arc::new(UInt32Array::from(encoded.part_ids)))?, to_pyarrow(py, Arc::new(codes))?))
    }
}

/// Train on prepared vectors in random order with the embedded CPU backend.
#[pyfunction]
#[pyo3(signature = (sample, metric, *, num_partitions, num_sub_vectors, num_bits, sample_rate, max_iters, seed, ivf_centroids = None, progress = None))]
#[allow(clippy::too_many_arguments)]
pub fn train_on_cpu(
    py: Python<'_>,
    sample: FixedSizeListArg,
    metric: MetricArg,
    num_partitions: usize,
    num_sub_vectors: usize,
    num_bits: u32,
    sample_rate: usize,
    max_iters: usize,
    seed: u64,
    ivf_centroids: Option<FixedSizeListArg>,
    progress: Option<Bound<'_, PyAny>>,
) -> PyResult<PyIvfPqModel> {
    let centroids = ivf_centroids.map(|c| c.0);
    let params = TrainParams { num_partitions, num_sub_vectors, num_bits, sample_rate, max_iters, seed, centroids };
    let model = run(py, progress, |reporter, cancel| async move {
        // Interrupted training has no side effect: the caller gets control back while the last k-means ends by itself.
        cancel.race(spawn(move || train_cpu(&sample.0, metric.0, &params, &reporter))).await
    })?;
    Ok(PyIvfPqModel(Arc::new(model)))
}
