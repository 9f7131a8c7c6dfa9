//! Means of clusters whose labels an external library finds.

use std::sync::{Arc, Mutex, PoisonError};

use arrow_array::cast::AsArray;
use arrow_array::types::UInt32Type;
use arrow_array::{Array, Float32Array};
use pyo3::prelude::*;
use pyo3_arrow::PyArray;

use super::convert::{FixedSizeListArg, to_pyarrow};
use crate::encode::{Means, as_float32};
use crate::error::{Error, Result};
use crate::model::fixed_size_list;

/// Sums of vectors by their cluster, of a sample that comes in parts. For k-means whose labels a device computes.
#[pyclass(name = "_Means", module = "lance_artifact._lance_artifact", frozen)]
pub struct PyMeans(Mutex<Means>);

#[pymethods]
impl PyMeans {
    #[new]
    fn new(clusters: usize, dimension: usize) -> PyResult<Self> {
        if clusters == 0 || dimension == 0 {
            return Err(Error::invalid(format!("means of {clusters} clusters of dimension {dimension}: expected at least one")).into());
        }
        Ok(Self(Mutex::new(Means::new(clusters, dimension))))
    }

    /// Add vectors (float16 or float32) and the cluster of each (uint32).
    fn add(&self, py: Python<'_>, vectors: FixedSizeListArg, labels: PyArray) -> PyResult<()> {
        let (vectors, (labels, _)) = (vectors.0, labels.into_inner());
        py.detach(|| {
            let mut means = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let wrong = |what: String| Error::invalid(format!("means of {} clusters: {what}", means.clusters()));
            let labels = labels.as_primitive_opt::<UInt32Type>().ok_or_else(|| wrong(format!("labels are {}", labels.data_type())))?;
            let shape = (vectors.len(), vectors.value_length() as usize);
            if shape != (labels.len(), means.dimension()) || labels.null_count() + vectors.null_count() > 0 {
                return Err(wrong(format!("got vectors of {shape:?} and {} labels, expected as many, without nulls", labels.len())));
            }
            if let Some(label) = labels.values().iter().find(|label| **label as usize >= means.clusters()) {
                return Err(wrong(format!("got label {label}")));
            }
            let values = as_float32(&vectors);
            means.add(&values, labels.values());
            Ok(())
        })
        .map_err(PyErr::from)
    }

    /// Centroids (float32) moved to the means; one without vectors stays.
    fn moved<'py>(&self, py: Python<'py>, centroids: FixedSizeListArg) -> PyResult<Bound<'py, PyAny>> {
        let moved = py.detach(|| -> Result<_> {
            let means = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let shape = (centroids.0.len(), centroids.0.value_length() as usize);
            if shape != (means.clusters(), means.dimension()) {
                return Err(Error::invalid(format!("means of {} clusters: got centroids of {shape:?}", means.clusters())));
            }
            let mut values = as_float32(&centroids.0).to_vec();
            means.move_to(&mut values);
            fixed_size_list(Arc::new(Float32Array::from(values)), means.dimension())
        })?;
        to_pyarrow(py, Arc::new(moved))
    }
}
