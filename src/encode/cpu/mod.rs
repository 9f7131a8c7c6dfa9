//! The embedded CPU backend.

mod encoder;
mod train;

pub use encoder::CpuEncoder;
pub use train::train;
