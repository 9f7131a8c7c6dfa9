//! Marks of processes, for what the Python layer leaves in temporary folders.

use pyo3::prelude::*;

use crate::io::Owner;

/// The marks of this process, as JSON.
#[pyfunction]
pub fn owner_marks() -> String {
    Owner::this().to_json()
}

/// Whether the process that made these marks is certainly gone; False where that cannot be known from here.
#[pyfunction]
pub fn owner_is_gone(marks: &str) -> bool {
    Owner::parse(marks.as_bytes()).is_some_and(|owner| owner.is_gone())
}
