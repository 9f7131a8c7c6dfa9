//! Index segments: their folders, their two files, and what an index says of itself in the dataset's manifest.

mod committed;
mod details;
mod folder;
mod model;
mod reader;
mod writer;

pub use committed::CommittedSegment;
pub use details::{Graphs, IndexType, index_details};
pub use folder::SegmentFolder;
pub use model::model_of_segments;
pub use reader::{RowIdRemapper, SegmentReader, sizes_of_index};
pub use writer::{EncodedColumn, PageEncoder, SegmentWriter};
