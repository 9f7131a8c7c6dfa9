//! The one seam to Lance's index builder, for indexes that only it can make: those with a graph. It is handed the partitions of
//! artifacts at the point where it would shuffle rows of its own. Beside `src/lance` this is the only place that names Lance.

mod hnsw;
mod shuffle_reader;

pub use hnsw::build_hnsw;
