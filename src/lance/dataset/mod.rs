//! Datasets: opened at the version and branch that a caller's handle shows, and what an index build asks of them: the vector column,
//! its rows, which of them are live, and what became of them in later versions.

mod column;
mod handle;
mod history;
mod manifest;
mod plain;
mod rows;
mod scan;
mod scanned;
mod version;

pub use column::VectorColumn;
pub use handle::DatasetHandle;
pub use history::ColumnFiles;
pub use manifest::DatasetManifest;
pub use scan::ScanOptions;
pub use scanned::ScannedRows;
pub use version::Dataset;
