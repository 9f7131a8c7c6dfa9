//! Device memory, and tensors in it.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::model::ElementType;

/// Memory on a device, as an address for those who compute there.
pub trait DeviceMemory: Send + Sync + 'static {
    fn address(&self) -> usize;
}

/// The element type of a tensor on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorElement {
    Float16,
    Float32,
    UInt8,
    UInt32,
}

impl TensorElement {
    pub fn byte_width(self) -> usize {
        match self {
            Self::Float16 => 2,
            Self::Float32 | Self::UInt32 => 4,
            Self::UInt8 => 1,
        }
    }

    /// What vectors are computed in: their own type or, for float64 columns, float32.
    pub fn of_vectors(name: &str, column: ElementType) -> Result<Self> {
        match (name, column) {
            ("float16", ElementType::Float16) => Ok(Self::Float16),
            ("float32", _) => Ok(Self::Float32),
            _ => Err(Error::invalid(format!(
                "the encoder takes {name}, the column is {column}; expected float32, or float16 for a float16 column"
            ))),
        }
    }
}

/// Contiguous rows in device memory, which stays allocated as long as the tensor is there.
#[derive(Debug)]
pub struct Tensor<M> {
    pub memory: Arc<M>,
    /// Bytes into the memory.
    pub offset: usize,
    pub rows: usize,
    /// Rows that there is memory for from here on; what those beyond `rows` hold means nothing.
    pub room: usize,
    /// `None`: a vector of `rows`.
    pub columns: Option<usize>,
    pub element: TensorElement,
}

impl<M> Clone for Tensor<M> {
    fn clone(&self) -> Self {
        Self { memory: self.memory.clone(), ..*self }
    }
}

impl<M: DeviceMemory> Tensor<M> {
    pub fn address(&self) -> usize {
        self.memory.address() + self.offset
    }

    /// `rows` rows from `first` on.
    pub fn slice(&self, first: usize, rows: usize) -> Self {
        let row_bytes = self.columns.unwrap_or(1) * self.element.byte_width();
        Self { offset: self.offset + first * row_bytes, rows, room: self.room.saturating_sub(first).max(rows), ..self.clone() }
    }

    /// With more rows, where there is room for so many.
    pub fn widened(&self, rows: usize) -> Option<Self> {
        (self.rows <= rows && rows <= self.room).then(|| Self { rows, ..self.clone() })
    }
}
