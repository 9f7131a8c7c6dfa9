//! K-means on float32: seeded, and the same for any number of threads.
//!
//! [`lloyd`] compares each vector with all centroids. [`partitions`] finds many centroids with a few such iterations on a part of
//! the sample, and goes on among [`neighbours`] only; [`rebalance`] takes centroids from small clusters to large ones. What does not
//! fit memory comes in parts ([`streamed`]).

mod lloyd;
mod means;
mod members;
mod neighbours;
mod partitions;
mod passes;
mod points;
mod rebalance;
mod rough;
mod streamed;
#[cfg(test)]
mod testing;

pub use lloyd::{Lloyd, assign};
pub use means::Means;
pub use members::Members;
pub use partitions::partitions;
pub use passes::{OF_CODEWORDS, progressive};
pub use points::Points;
pub use streamed::Streamed;
