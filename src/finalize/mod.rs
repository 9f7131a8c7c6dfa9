//! Artifacts and a dataset in, an index segment out. The only place that touches Lance's index builder.

mod checks;
mod commit;
mod coverage;
mod details;
mod ivf_pq;
mod leftovers;
mod segment;
mod shuffle_reader;
mod transpose;

pub use commit::{CommitBase, Previous, changed_since, check_commit, missing_files};
pub use segment::{IndexType, Segment, SegmentRequest, build_segment, discard_segment, open_artifacts};
pub use shuffle_reader::{ArtifactShuffler, PartitionArtifactShuffleReader};
