//! Arguments parsed once, so that function bodies see only valid values.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, FixedSizeListArray, RecordBatch, RecordBatchOptions};
use arrow_schema::{DataType, Schema};
use pyo3::exceptions::{PyIndexError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict};
use pyo3_arrow::{PyArray, PyArrayReader};

use crate::artifact::Source;
use crate::error::{Error, Result};
use crate::model::Metric;

/// `"l2"`, `"cosine"` or `"dot"`.
pub struct MetricArg(pub Metric);

impl<'a, 'py> FromPyObject<'a, 'py> for MetricArg {
    type Error = PyErr;

    fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let name = value.extract::<String>();
        let name = name.map_err(|_| Error::invalid(format!("metric: got {}, expected \"l2\", \"cosine\" or \"dot\"", shown(value))))?;
        Ok(Self(name.parse()?))
    }
}

pub fn shown(value: Borrowed<'_, '_, PyAny>) -> String {
    let text = value.py().import("builtins").and_then(|b| b.call_method1("ascii", (value,))).and_then(|t| t.extract::<String>());
    let kind = value.get_type().name().map(|name| name.to_string()).unwrap_or_default();
    format!("{} ({kind})", text.map_or("?".into(), |text| text.chars().take(80).collect::<String>()))
}

fn whole(name: &str, value: Borrowed<'_, '_, PyAny>) -> PyResult<u64> {
    let number = if value.is_instance_of::<PyBool>() { None } else { value.extract::<u64>().ok() };
    number.ok_or_else(|| Error::invalid(format!("{name}: got {}, expected a whole number from 0 to {}", shown(value), u64::MAX)).into())
}

/// Whole numbers that are called by their name where they are refused.
macro_rules! whole_numbers {
    ($($kind:ident $name:literal),* $(,)?) => {$(
        pub struct $kind(pub u64);

        impl<'a, 'py> FromPyObject<'a, 'py> for $kind {
            type Error = PyErr;

            fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
                whole($name, value).map(Self)
            }
        }

        impl From<$kind> for usize {
            fn from(number: $kind) -> Self {
                Self::try_from(number.0).unwrap_or(Self::MAX)
            }
        }
    )*};
}

whole_numbers! {
    NumPartitions "num_partitions",
    CodeWidth "pq_code_width",
    NumBuckets "num_buckets",
    MemoryLimit "memory_limit",
    ExpectedRows "expected_rows",
    FormatVersion "format_version",
    RowsSeen "rows_seen",
    PartitionId "partition",
    NumSubVectors "num_sub_vectors",
    TargetPartitionSize "target_partition_size",
    SampleRate "sample_rate",
    MaxIters "max_iters",
}

fn flag(name: &str, value: &Bound<'_, PyAny>) -> PyResult<bool> {
    // Also numpy's.
    value
        .extract::<bool>()
        .map_err(|_| Error::invalid(format!("{name}: got {}, expected True or False", shown(value.as_borrowed()))).into())
}

pub fn overwrite(value: &Bound<'_, PyAny>) -> PyResult<bool> {
    flag("overwrite", value)
}

pub fn sync(value: &Bound<'_, PyAny>) -> PyResult<bool> {
    flag("sync", value)
}

/// Rows dropped, by reason.
pub struct RowsDropped(pub BTreeMap<String, u64>);

impl<'a, 'py> FromPyObject<'a, 'py> for RowsDropped {
    type Error = PyErr;

    fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let refused = || Error::invalid(format!("rows_dropped: got {}, expected a dict of reasons and numbers of rows", shown(value)));
        let mut dropped = BTreeMap::new();
        for (reason, rows) in value.cast::<PyDict>().map_err(|_| refused())?.iter() {
            let reason = reason.extract::<String>().map_err(|_| refused())?;
            dropped.insert(reason, whole("rows_dropped", rows.as_borrowed())?);
        }
        Ok(Self(dropped))
    }
}

/// A path or a URI.
pub struct UriArg(pub String);

impl<'a, 'py> FromPyObject<'a, 'py> for UriArg {
    type Error = PyErr;

    fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let path = value.py().import("os")?.call_method1("fspath", (value,)).and_then(|path| path.extract::<String>());
        match path {
            Ok(path) if !path.contains('\0') => Ok(Self(path)),
            _ => Err(Error::invalid(format!(
                "uri: got {}, expected a path or URI (str or os.PathLike, valid Unicode without NUL characters)",
                shown(value)
            ))
            .into()),
        }
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

/// The array of an argument of a name, which an error begins with.
fn list_of(name: &str, value: &Bound<'_, PyAny>) -> PyResult<FixedSizeListArg> {
    value.extract::<FixedSizeListArg>().map_err(|error| {
        let (py, said) = (value.py(), format!("{name}: {}", error.value(value.py())));
        if is_theirs(py, &error) {
            return Error::invalid(said).into();
        }
        let ours = py.import("lance_artifact.exceptions").and_then(|module| module.getattr("InvalidInputError"));
        match ours {
            // Of the same type, which may be one of a TypeError too.
            Ok(kind) if error.value(py).is_instance(&kind).unwrap_or(false) => {
                error.get_type(py).call1((said,)).map_or(error, PyErr::from_value)
            }
            _ => error,
        }
    })
}

pub fn ivf_centroids(value: &Bound<'_, PyAny>) -> PyResult<FixedSizeListArg> {
    list_of("ivf_centroids", value)
}

pub fn pq_codebook(value: &Bound<'_, PyAny>) -> PyResult<FixedSizeListArg> {
    list_of("pq_codebook", value)
}

pub fn vectors(value: &Bound<'_, PyAny>) -> PyResult<FixedSizeListArg> {
    list_of("vectors", value)
}

/// Record batches of any object with `__arrow_c_array__` (a struct array) or `__arrow_c_stream__`.
pub fn record_batches(data: &Bound<'_, PyAny>) -> PyResult<Box<dyn Iterator<Item = PyResult<RecordBatch>>>> {
    let has = |name: &str| data.hasattr(name).unwrap_or(false);
    if has("__arrow_c_array__") {
        let (array, _) = data.extract::<PyArray>().map_err(|error| unreadable(data.py(), error))?.into_inner();
        return Ok(Box::new(std::iter::once(Ok(batch_of(&array)?))));
    }
    if has("__arrow_c_stream__") {
        let stream = data.extract::<PyArrayReader>().and_then(PyArrayReader::into_reader);
        let arrays = stream.map_err(|error| unreadable(data.py(), error))?;
        return Ok(Box::new(arrays.map(|array| {
            let array = array.map_err(|e| Error::invalid(format!("append_batch: the Arrow stream failed: {e}")))?;
            Ok(batch_of(&array)?)
        })));
    }
    Err(Error::invalid(format!(
        "append_batch: got {}, expected an object with __arrow_c_array__ or __arrow_c_stream__, such as a pyarrow RecordBatch",
        shown(data.as_borrowed())
    ))
    .into())
}

/// A struct array as a batch. pyo3-arrow panics where a row is null as a whole, and of a stream takes what lies below it.
fn batch_of(array: &ArrayRef) -> Result<RecordBatch> {
    let Some(rows) = array.as_struct_opt() else {
        return Err(Error::invalid(format!("append_batch: got an Arrow array of {}, expected a struct of columns", array.data_type())));
    };
    if rows.null_count() > 0 {
        return Err(Error::invalid(format!("append_batch: {} rows are null as a whole; drop them before encoding", rows.null_count())));
    }
    let options = RecordBatchOptions::new().with_row_count(Some(rows.len()));
    RecordBatch::try_new_with_options(Arc::new(Schema::new(rows.fields().clone())), rows.columns().to_vec(), &options)
        .map_err(|e| Error::invalid(format!("append_batch: {e}")))
}

/// Whether an error is pyo3-arrow's, about an object that hands over something else than it says, and no error of ours.
fn is_theirs(py: Python<'_>, error: &PyErr) -> bool {
    let ours = py.import("lance_artifact.exceptions").and_then(|module| module.getattr("LanceArtifactError"));
    let is_ours = ours.is_ok_and(|kind| error.value(py).is_instance(&kind).unwrap_or(false));
    let kinds = error.is_instance_of::<PyValueError>(py) || error.is_instance_of::<PyTypeError>(py);
    !is_ours && (kinds || error.is_instance_of::<PyIndexError>(py))
}

/// Such an error as ours. What an object's own methods raise stays what it is.
fn unreadable(py: Python<'_>, error: PyErr) -> PyErr {
    if is_theirs(py, &error) {
        Error::invalid(format!("append_batch: the Arrow data cannot be read: {}", error.value(py))).into()
    } else {
        error
    }
}

/// Where rows come from, as a dictionary with the manifest's keys.
pub struct SourceArg(pub Source);

impl<'a, 'py> FromPyObject<'a, 'py> for SourceArg {
    type Error = PyErr;

    fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let dumped = value.py().import("json")?.call_method1("dumps", (value,)).and_then(|json| json.extract::<String>());
        let json = dumped
            .map_err(|_| Error::invalid(format!("source: got {}, expected the dictionary that describe_source() gives", shown(value))))?;
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
