//! DLPack: an array handed to another package by its address, kept alive until that package lets go of it.
//! <https://dmlc.github.io/dlpack/latest/c_api.html>

use std::any::Any;
use std::ffi::{CStr, c_void};
use std::sync::Arc;

use pyo3::ffi;
use pyo3::prelude::*;

use crate::encode::device::TensorElement;

pub const CUDA: i32 = 2;
const UNSIGNED: u8 = 1;
const FLOAT: u8 = 2;

const NAME: &CStr = c"dltensor";

/// Code and bits.
pub fn dtype(element: TensorElement) -> (u8, u8) {
    let code = match element {
        TensorElement::Float16 | TensorElement::Float32 => FLOAT,
        TensorElement::UInt8 | TensorElement::UInt32 => UNSIGNED,
    };
    (code, 8 * element.byte_width() as u8)
}

#[repr(C)]
struct DlDevice {
    device_type: i32,
    device_id: i32,
}

#[repr(C)]
struct DlDataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device: DlDevice,
    ndim: i32,
    dtype: DlDataType,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

/// An array as C libraries take it, managed by whom it is.
#[repr(C)]
pub struct DlManagedTensor {
    tensor: DlTensor,
    manager: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut DlManagedTensor)>,
}

/// A contiguous array on a CUDA device that stays its owner's, for a call. `dtype` is (code, bits).
pub struct Borrowed {
    tensor: DlManagedTensor,
    /// What the tensor points to, which does not move with this.
    _shape: Box<[i64]>,
}

impl Borrowed {
    pub fn new(address: usize, device: usize, dtype: (u8, u8), shape: &[usize]) -> Self {
        let mut shape: Box<[i64]> = shape.iter().map(|n| *n as i64).collect();
        let tensor = DlTensor {
            data: address as *mut c_void,
            device: DlDevice { device_type: CUDA, device_id: device as i32 },
            ndim: shape.len() as i32,
            dtype: DlDataType { code: dtype.0, bits: dtype.1, lanes: 1 },
            shape: shape.as_mut_ptr(),
            strides: std::ptr::null_mut(),
            byte_offset: 0,
        };
        Self { tensor: DlManagedTensor { tensor, manager: std::ptr::null_mut(), deleter: None }, _shape: shape }
    }

    pub fn as_mut_ptr(&mut self) -> *mut DlManagedTensor {
        &raw mut self.tensor
    }
}

/// What a tensor refers to.
struct Manager {
    shape: Vec<i64>,
    _memory: Arc<dyn Any + Send + Sync>,
}

unsafe extern "C" fn delete(tensor: *mut DlManagedTensor) {
    // SAFETY: both boxes were leaked in `capsule`, and the consumer calls this once.
    unsafe {
        let tensor = Box::from_raw(tensor);
        drop(Box::from_raw(tensor.manager.cast::<Manager>()));
    }
}

/// A capsule that nobody consumed still owns its tensor; a consumer renames it.
unsafe extern "C" fn destroy(capsule: *mut ffi::PyObject) {
    // SAFETY: called by Python with the capsule, under the GIL.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, NAME.as_ptr()) == 1 {
            delete(ffi::PyCapsule_GetPointer(capsule, NAME.as_ptr()).cast());
        }
    }
}

/// A capsule `dltensor` of a contiguous array on a CUDA device; `dtype` is (code, bits).
pub fn capsule<'py>(
    py: Python<'py>,
    address: usize,
    device: usize,
    dtype: (u8, u8),
    shape: Vec<usize>,
    memory: Arc<dyn Any + Send + Sync>,
) -> PyResult<Bound<'py, PyAny>> {
    let mut manager = Box::new(Manager { shape: shape.into_iter().map(|n| n as i64).collect(), _memory: memory });
    let tensor = Box::new(DlManagedTensor {
        tensor: DlTensor {
            data: address as *mut c_void,
            device: DlDevice { device_type: CUDA, device_id: device as i32 },
            ndim: manager.shape.len() as i32,
            dtype: DlDataType { code: dtype.0, bits: dtype.1, lanes: 1 },
            shape: manager.shape.as_mut_ptr(),
            strides: std::ptr::null_mut(),
            byte_offset: 0,
        },
        manager: Box::into_raw(manager).cast(),
        deleter: Some(delete),
    });
    let tensor = Box::into_raw(tensor);
    // SAFETY: a new capsule, which owns the tensor; where it cannot be made, the tensor is deleted here.
    unsafe {
        let capsule = ffi::PyCapsule_New(tensor.cast(), NAME.as_ptr(), Some(destroy));
        if capsule.is_null() {
            delete(tensor);
        }
        Bound::from_owned_ptr_or_err(py, capsule)
    }
}
