//! Arguments parsed once, so that function bodies see only valid values.

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, FixedSizeListArray};
use arrow_schema::DataType;
use pyo3::prelude::*;
use pyo3_arrow::PyArray;
use pyo3_arrow::input::AnyRecordBatch;

use crate::artifact::Source;
use crate::error::Error;
use crate::model::Metric;

/// `"l2"`, `"cosine"` or `"dot"`.
pub struct MetricArg(pub Metric);

impl<'a, 'py> FromPyObject<'a, 'py> for MetricArg {
    type Error = PyErr;

    fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        Ok(Self(value.extract::<String>()?.parse()?))
    }
}

/// A path or a URI.
pub struct UriArg(pub String);

impl<'a, 'py> FromPyObject<'a, 'py> for UriArg {
    type Error = PyErr;

    fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        Ok(Self(value.py().import("os")?.call_method1("fspath", (value,))?.extract()?))
    }
}

/// Any object with `__arrow_c_array__` that is a fixed-size list, or a numpy array, whose last axis is a row.
pub struct FixedSizeListArg(pub FixedSizeListArray);

impl<'a, 'py> FromPyObject<'a, 'py> for FixedSizeListArg {
    type Error = PyErr;

    fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let array = if value.hasattr("__arrow_c_array__")? {
            value.extract::<PyArray>()?.into_inner().0
        } else {
            let value = value.py().import("lance_artifact._model")?.call_method1("as_fixed_size_list", (value,))?;
            value.extract::<PyArray>()?.into_inner().0
        };
        match array.data_type() {
            DataType::FixedSizeList(..) => Ok(Self(array.as_fixed_size_list().clone())),
            other => Err(Error::invalid(format!("got an Arrow array of {other}, expected a fixed_size_list of floats")).into()),
        }
    }
}

/// Record batches of any object with `__arrow_c_array__` (a struct array) or `__arrow_c_stream__`.
pub fn record_batches(data: AnyRecordBatch) -> PyResult<Box<dyn Iterator<Item = PyResult<arrow_array::RecordBatch>>>> {
    let reader = data.into_reader()?;
    Ok(Box::new(reader.map(|batch| batch.map_err(|e| Error::invalid(format!("append_batch: the Arrow stream failed: {e}")).into()))))
}

/// Where rows come from, as a dictionary with the manifest's keys.
pub struct SourceArg(pub Source);

impl<'a, 'py> FromPyObject<'a, 'py> for SourceArg {
    type Error = PyErr;

    fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let json: String = value.py().import("json")?.call_method1("dumps", (value,))?.extract()?;
        serde_json::from_str(&json)
            .map(Self)
            .map_err(|e| Error::invalid(format!("source: {e}; expected the dictionary that describe_source() gives")).into())
    }
}

/// A `serde` value as Python objects.
pub fn to_python<'py>(py: Python<'py>, value: &impl serde::Serialize) -> PyResult<Bound<'py, PyAny>> {
    let json = serde_json::to_string(value).map_err(|e| Error::internal(e.to_string()))?;
    let json_module = py.import("json")?;
    json_module.call_method1("loads", (json,))
}

/// An array as a pyarrow array.
pub fn to_pyarrow<'py>(py: Python<'py>, array: ArrayRef) -> PyResult<Bound<'py, PyAny>> {
    // By way of the C data interface, as any other Arrow object would hand it over.
    let array = Bound::new(py, PyArray::from_array_ref(array))?;
    py.import("pyarrow")?.call_method1("array", (array,))
}
