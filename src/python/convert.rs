//! Arguments parsed once, so that function bodies see only valid values.

use std::collections::BTreeMap;

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, FixedSizeListArray};
use arrow_schema::DataType;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict};
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

/// Record batches of any object with `__arrow_c_array__` (a struct array) or `__arrow_c_stream__`.
pub fn record_batches(data: &Bound<'_, PyAny>) -> PyResult<Box<dyn Iterator<Item = PyResult<arrow_array::RecordBatch>>>> {
    let arrow = ["__arrow_c_array__", "__arrow_c_stream__"].iter().any(|name| data.hasattr(*name).unwrap_or(false));
    if !arrow {
        return Err(Error::invalid(format!(
            "append_batch: got {}, expected an object with __arrow_c_array__ or __arrow_c_stream__, such as a pyarrow RecordBatch",
            shown(data.as_borrowed())
        ))
        .into());
    }
    let data: AnyRecordBatch = data.extract()?;
    let reader = data.into_reader()?;
    Ok(Box::new(reader.map(|batch| batch.map_err(|e| Error::invalid(format!("append_batch: the Arrow stream failed: {e}")).into()))))
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
