//! Artifacts and a dataset in, an index segment out. The only place that touches Lance's index builder.

mod checks;
mod ivf_pq;
mod row_ids;
mod segment;
mod shuffle_reader;
mod transpose;

pub use segment::{IndexType, Segment, SegmentRequest, build_segment, discard_segment, open_artifacts};
pub use shuffle_reader::{ArtifactShuffler, PartitionArtifactShuffleReader};
