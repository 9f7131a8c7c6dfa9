//! The Python exceptions: one class per error, each also the built-in that fits, made in Python so that they pickle.

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

use crate::error::Error;

static MODULE: PyOnceLock<Py<PyModule>> = PyOnceLock::new();

fn class_name(error: &Error) -> &'static str {
    match error {
        Error::InvalidInput(_) => "InvalidInputError",
        Error::ArtifactNotFound(_) => "ArtifactNotFoundError",
        Error::ArtifactExists(_) => "ArtifactExistsError",
        Error::CorruptArtifact(_) => "CorruptArtifactError",
        Error::ArtifactMismatch(_) => "ArtifactMismatchError",
        Error::CommitConflict(_) => "CommitConflictError",
        Error::Storage(_) => "StorageError",
        Error::Device(_) => "DeviceError",
        Error::DeviceMemory(_) => "DeviceMemoryError",
        Error::Interrupted(_) | Error::Internal(_) => "LanceArtifactError",
    }
}

/// The exceptions' module. Whoever asks first gives the GIL away for a moment.
pub fn module(py: Python<'_>) -> PyResult<&Py<PyModule>> {
    MODULE.get_or_try_init(py, || py.import("lance_artifact.exceptions").map(Bound::unbind))
}

fn exception(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    let class = module(py)?.bind(py).getattr(class_name(error))?.cast_into::<PyType>()?;
    Ok(PyErr::from_type(class, (error.to_string(),)))
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        Python::attach(|py| exception(py, &error).unwrap_or_else(|import_failed| import_failed))
    }
}
