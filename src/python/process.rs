//! This process and its machine: marks, for what the Python layer leaves in temporary folders, and memory.

use pyo3::prelude::*;

use crate::budget::default_limit;
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

/// Bytes that a call may hold where nobody says: half of what this machine, or its container, has free.
#[pyfunction]
pub fn default_memory_limit() -> u64 {
    default_limit()
}
