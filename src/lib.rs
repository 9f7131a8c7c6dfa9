//! Build IVF_PQ vector indexes for stock Lance from rows that something else encoded.
//!
//! A row's journey: [`encode`] reads vectors and encodes them, [`artifact`] lays the encoded rows out by partition and reads
//! them back, [`finalize`] makes an index segment of them. Below them [`lance`] is the only room that knows Lance, [`io`] knows bytes,
//! and [`model`] is what all share. Imports go down this list only, and `scripts/house` checks it.
#![recursion_limit = "512"]
#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]
#![cfg_attr(not(test), warn(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::todo, clippy::unimplemented))]

pub mod artifact;
pub mod budget;
pub mod encode;
pub mod error;
pub mod finalize;
pub mod io;
pub mod lance;
pub mod model;
pub mod numbers;
pub mod progress;
#[cfg(feature = "python")]
mod python;
pub mod sync;

pub use error::{Error, Result};
pub use model::{ElementType, IvfPqModel, Metric, Training};
