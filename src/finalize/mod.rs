//! Artifacts and a dataset in, an index segment out.
//!
//! What may enter: what must agree before a build (`agree`, `coverage`) and before a commit (`commit`), the partitions on their way
//! into a segment (`partitions`, `windows`, `transpose`), and `seam`, the only place outside `lance` that names Lance.

mod agree;
mod build;
mod commit;
mod coverage;
mod large;
mod live;
mod merge;
mod partitions;
mod seam;
mod segment;
mod target;
mod transpose;
mod windows;

pub use commit::{CommitBase, changed_since, check_commit, missing_files};
pub use merge::{MergeRequest, Merged, merge_segments};
pub use segment::{IndexShape, Segment, SegmentRequest, build_segment, least_memory};
