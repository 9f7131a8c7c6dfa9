//! Devices for Python: the probe, arrays on a device, and the pipeline with an encoder written in Python.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::{PyKeyboardInterrupt, PyMemoryError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::build::PyVectorSource;
use super::builder::PyPartitionArtifactBuilder;
use super::convert::to_python;
use super::dlpack;
use super::exit::{self, Entry};
use super::model::PyIvfPqModel;
use super::runtime::run;
use super::without::WithoutPython;
use crate::encode::device::{Cuda, CurrentContext, Device, DeviceEncoder, DeviceEncoding, Tensor, TensorElement, encode_on_devices};
use crate::error::{Error, Result};
use crate::progress::Progress;

/// What of CUDA is on this machine, asked of the driver itself. Starts no device unless `free_memory`.
#[pyfunction]
#[pyo3(signature = (*, free_memory = false))]
pub fn cuda_devices<'py>(py: Python<'py>, free_memory: bool) -> PyResult<Bound<'py, PyDict>> {
    let found = exit::enter(Entry::Work(None))?.detach(py, || crate::encode::device::cuda_devices(free_memory));
    let result = PyDict::new(py);
    result.set_item("driver", found.driver)?;
    result.set_item("error", found.error)?;
    let mut devices = Vec::new();
    for device in found.devices {
        let entry = PyDict::new(py);
        entry.set_item("index", device.index)?;
        entry.set_item("name", device.name)?;
        entry.set_item("compute_capability", device.compute_capability)?;
        entry.set_item("total_memory", device.total_memory)?;
        entry.set_item("free_memory", device.free_memory)?;
        devices.push(entry);
    }
    result.set_item("devices", devices)?;
    Ok(result)
}

/// Wait for all work on the calling thread's device.
#[pyfunction]
pub fn synchronize(py: Python<'_>) -> PyResult<()> {
    Ok(exit::enter(Entry::Work(None))?.detach(py, crate::encode::device::synchronize)?)
}

/// Bytes a second of copies between page-locked memory and a device: (to it, from it).
#[pyfunction]
#[pyo3(signature = (device, *, size = 67_108_864, repeats = 20))]
pub fn measure_copy(py: Python<'_>, device: usize, size: usize, repeats: usize) -> PyResult<(f64, f64)> {
    Ok(exit::enter(Entry::Work(None))?.detach(py, || crate::encode::device::measure_copy(device, size, repeats))?)
}

/// A device made the calling thread's own for a `with` block, so that CUDA packages compute there.
#[pyclass(name = "_CudaDevice", module = "lance_artifact._lance_artifact", frozen)]
pub struct PyCudaDevice {
    index: usize,
    entered: Mutex<Vec<(Cuda, CurrentContext)>>,
    kept: Mutex<Option<Cuda>>,
}

#[pymethods]
impl PyCudaDevice {
    #[new]
    fn new(index: usize) -> Self {
        Self { index, entered: Mutex::default(), kept: Mutex::default() }
    }

    /// Keep the device's context, whoever else leaves it, as long as this object is there.
    fn keep(&self, py: Python<'_>) -> PyResult<()> {
        let before = CurrentContext::get();
        let opened = exit::enter(Entry::Work(None))?.detach(py, || Cuda::open(self.index));
        before.restore();
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(opened?);
        Ok(())
    }

    fn __enter__(slf: Py<Self>, py: Python<'_>) -> PyResult<Py<Self>> {
        let this = slf.get();
        let before = CurrentContext::get();
        let cuda = exit::enter(Entry::Work(None))?.detach(py, || Cuda::open(this.index))?;
        this.entered.lock().unwrap_or_else(PoisonError::into_inner).push((cuda, before));
        Ok(slf)
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, _exception: &Bound<'_, PyTuple>) {
        if let Some((cuda, before)) = self.entered.lock().unwrap_or_else(PoisonError::into_inner).pop() {
            before.restore();
            drop(cuda);
        }
    }

    /// Bytes that can be allocated now. Inside the `with` block.
    fn free_memory(&self) -> PyResult<usize> {
        let entered = self.entered.lock().unwrap_or_else(PoisonError::into_inner);
        let (cuda, _) = entered.last().ok_or_else(|| Error::invalid("free_memory: the device is not entered; use it in a with block"))?;
        cuda.make_current()?;
        Ok(cuda.free_bytes()?)
    }
}

/// An array on a CUDA device, contiguous: ``__cuda_array_interface__`` (version 3) and DLPack, without a copy.
///
/// The memory stays allocated as long as the array is there, but its content is only valid during the call that gave it.
#[pyclass(name = "DeviceArray", module = "lance_artifact", frozen)]
pub struct PyDeviceArray {
    tensor: Tensor<<Cuda as Device>::Memory>,
    device: usize,
    stream: usize,
}

impl PyDeviceArray {
    fn shape_vec(&self) -> Vec<usize> {
        std::iter::once(self.tensor.rows).chain(self.tensor.columns).collect()
    }
}

#[pymethods]
impl PyDeviceArray {
    /// (rows,) or (rows, columns).
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.shape_vec())
    }

    /// "float16", "float32", "uint8" or "uint32".
    #[getter]
    fn dtype(&self) -> &'static str {
        match self.tensor.element {
            TensorElement::Float16 => "float16",
            TensorElement::Float32 => "float32",
            TensorElement::UInt8 => "uint8",
            TensorElement::UInt32 => "uint32",
        }
    }

    /// With more rows, where its memory has room for so many; what those hold means nothing. For cuVS, which computes few rows
    /// less exactly.
    fn _widened(&self, rows: usize) -> Option<Self> {
        self.tensor.widened(rows).map(|tensor| Self { tensor, device: self.device, stream: self.stream })
    }

    /// Index of the device among the visible ones.
    #[getter]
    fn device(&self) -> usize {
        self.device
    }

    #[getter(__cuda_array_interface__)]
    fn cuda_array_interface<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let typestr = match self.tensor.element {
            TensorElement::Float16 => "<f2",
            TensorElement::Float32 => "<f4",
            TensorElement::UInt8 => "|u1",
            TensorElement::UInt32 => "<u4",
        };
        let interface = PyDict::new(py);
        interface.set_item("shape", self.shape(py)?)?;
        interface.set_item("typestr", typestr)?;
        interface.set_item("data", (self.tensor.address(), false))?;
        interface.set_item("strides", py.None())?;
        interface.set_item("version", 3)?;
        // Whoever uses the array on another stream waits for this one first.
        interface.set_item("stream", self.stream)?;
        Ok(interface)
    }

    /// (kDLCUDA, device).
    fn __dlpack_device__(&self) -> (i32, usize) {
        (dlpack::CUDA, self.device)
    }

    /// A DLPack capsule. What the array holds is there already, on any ``stream``.
    #[pyo3(signature = (*, stream = None, max_version = None, dl_device = None, copy = None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<isize>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, usize)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let _ = (stream, max_version);
        if copy == Some(true) || dl_device.is_some_and(|wanted| wanted != self.__dlpack_device__()) {
            return Err(pyo3::exceptions::PyBufferError::new_err("the array is shared without a copy, on its own device"));
        }
        let dtype = dlpack::dtype(self.tensor.element);
        dlpack::capsule(py, self.tensor.address(), self.device, dtype, self.shape_vec(), self.tensor.memory.clone())
    }
}

/// What the frames of an exception hold (arrays, indexes of the backend) goes now, while its stream is there.
fn release_frames(py: Python<'_>, error: &PyErr) {
    let Ok(clear) = py.import("traceback").and_then(|traceback| traceback.getattr("clear_frames")) else { return };
    let mut error = Some(error.clone_ref(py));
    while let Some(one) = error {
        if let Some(traceback) = one.traceback(py) {
            let _ = clear.call1((traceback,));
        }
        error = one.cause(py);
    }
}

/// The first exception of an encoder in Python, to be raised as it was.
type Raised = Arc<Mutex<Option<PyErr>>>;

/// An encoder in Python, on one device.
struct PythonEncoder {
    encoder: Py<PyAny>,
    index: usize,
    stream: usize,
    session: Option<Py<PyAny>>,
    /// What encodes without the interpreter, from the last time that it was asked for.
    without: Option<WithoutPython>,
    raised: Raised,
}

impl PythonEncoder {
    /// In Python.
    fn encode_in(&self, py: Python<'_>, [vectors, part_ids, codes]: [Tensor<<Cuda as Device>::Memory>; 3]) -> Result<()> {
        let session = self.session.as_ref().ok_or_else(|| Error::internal("an encoder that is not open"))?;
        let array = |tensor| PyDeviceArray { tensor, device: self.index, stream: self.stream };
        session.call_method1(py, "encode", (array(vectors), array(part_ids), array(codes))).map_err(|e| self.failed(py, e))?;
        Ok(())
    }

    fn failed(&self, py: Python<'_>, error: PyErr) -> Error {
        let message = error.to_string();
        release_frames(py, &error);
        if error.is_instance_of::<PyMemoryError>(py) {
            return Error::DeviceMemory(message);
        }
        self.raised.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        Error::Device(format!("CUDA device {}: {message}", self.index))
    }
}

impl DeviceEncoder<Cuda> for PythonEncoder {
    fn open(&mut self, _: &Cuda, stream: &<Cuda as Device>::Stream) -> Result<()> {
        self.stream = stream.address();
        exit::attach(|py| {
            let session = self.encoder.call_method1(py, "open", (self.index, self.stream)).map_err(|e| self.failed(py, e))?;
            self.session = Some(session);
            Ok(())
        })
    }

    fn encode(
        &mut self,
        vectors: Tensor<<Cuda as Device>::Memory>,
        part_ids: Tensor<<Cuda as Device>::Memory>,
        codes: Tensor<<Cuda as Device>::Memory>,
    ) -> Result<()> {
        let batch = [vectors, part_ids, codes];
        if self.without.as_ref().is_some_and(|without| without.encode(&batch)) {
            return Ok(());
        }
        // The first time, or where it fails: Python does it, or says why not. Afterwards it may be done otherwise.
        self.without = None;
        let rows = batch[0].room;
        exit::attach(|py| {
            self.encode_in(py, batch)?;
            let session = self.session.as_ref().map(|session| session.bind(py));
            let asked = session.map(|session| WithoutPython::of(session, rows, self.index)).transpose();
            self.without = asked.map_err(|e| self.failed(py, e))?.flatten();
            Ok(())
        })
    }

    fn close(&mut self) {
        self.without = None;
        if let Some(session) = self.session.take() {
            let _ = exit::attach(|py| {
                if let Err(error) = session.call_method0(py, "close") {
                    let _ = self.failed(py, error);
                }
                drop(session);
                Ok(())
            });
        }
    }
}

/// Encode all rows of a source into an open builder on CUDA devices, with a Python encoder (`DeviceEncoder`). Returns the
/// rows seen, those dropped by reason, and a report for each device.
#[pyfunction]
#[pyo3(signature = (source, model, builder, encoder, devices, *, batch_rows = None, device_memory_limit = None, progress = None))]
#[allow(clippy::too_many_arguments)]
pub fn encode_on_device<'py>(
    py: Python<'py>,
    source: &Bound<'py, PyVectorSource>,
    model: PyIvfPqModel,
    builder: &Bound<'py, PyPartitionArtifactBuilder>,
    encoder: Bound<'py, PyAny>,
    devices: Vec<usize>,
    batch_rows: Option<usize>,
    device_memory_limit: Option<usize>,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<(u64, BTreeMap<String, u64>, Bound<'py, PyAny>)> {
    let (source, builder) = (source.get().0.clone(), builder.get().builder.clone());
    if devices.is_empty() || batch_rows == Some(0) {
        return Err(Error::invalid("devices and batch_rows: expected at least one device, and at least one row").into());
    }
    let dtype: String = encoder.getattr("input_dtype")?.extract()?;
    let plan = DeviceEncoding {
        metric: model.0.metric(),
        dimension: model.0.dimension(),
        element: TensorElement::of_vectors(&dtype, source.column.element_type)?,
        code_width: model.0.code_width(),
        batch_rows,
        memory: device_memory_limit.unwrap_or(usize::MAX),
    };
    let raised = Raised::default();
    let found = exit::enter(Entry::Work(None))?.detach(py, || {
        let before = CurrentContext::get();
        let found: Result<Vec<_>> = devices.iter().map(|index| Cuda::open(*index)).collect();
        before.restore();
        found
    })?;
    let opened = found
        .into_iter()
        .zip(&devices)
        .map(|(cuda, index)| {
            let encoder = encoder.clone().unbind();
            let python = PythonEncoder { encoder, index: *index, stream: 0, session: None, without: None, raised: raised.clone() };
            (cuda, Box::new(python) as Box<dyn DeviceEncoder<Cuda>>)
        })
        .collect();
    let result = run(py, progress, |reporter, cancel| async move {
        reporter.start("shuffle", Some(source.count_rows().await?), "rows");
        let told = reporter.clone();
        let encoded =
            encode_on_devices(&source, plan, opened, builder, cancel.subscribe(), move |rows| told.advance("shuffle", rows)).await?;
        reporter.complete("shuffle");
        Ok(encoded)
    });
    // What the encoder itself raised says more than that it failed.
    let raised = raised.lock().unwrap_or_else(PoisonError::into_inner).take();
    let (counts, reports) = match (result, raised) {
        (Ok(done), None) => done,
        (Ok(_), Some(raised)) => return Err(raised),
        (Err(error), None) => return Err(error),
        (Err(error), Some(_)) if error.is_instance_of::<PyKeyboardInterrupt>(py) => return Err(error),
        (Err(error), Some(raised)) => {
            let ours = py.import("lance_artifact.exceptions")?.getattr("LanceArtifactError")?;
            if raised.is_instance(py, &ours) {
                return Err(raised);
            }
            error.set_cause(py, Some(raised));
            return Err(error);
        }
    };
    Ok((counts.seen, counts.dropped, to_python(py, &reports)?))
}
