//! Build IVF_PQ vector indexes for stock Lance from rows that something else encoded.
//!
//! A row's journey: [`encode`] reads vectors and encodes them, [`artifact`] lays the encoded rows out by partition and reads
//! them back, [`finalize`] makes an index segment of them. [`model`] is what they share.
#![recursion_limit = "512"]
#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]
#![cfg_attr(not(test), warn(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::todo, clippy::unimplemented))]

pub mod artifact;
pub mod encode;
pub mod error;
pub mod finalize;
pub mod model;
pub mod owner;
#[cfg(feature = "python")]
mod python;
pub(crate) mod threads;

pub use error::{Error, Result};
pub use model::{ElementType, IvfPqModel, Metric, Training};
