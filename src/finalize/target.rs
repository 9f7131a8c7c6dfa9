//! Where a segment goes, and in which form.

use crate::lance::dataset::{Dataset, VectorColumn};
use crate::lance::segment::IndexType;

/// What is to be written, and where.
pub struct SegmentTarget<'a> {
    pub dataset: &'a Dataset,
    pub column: &'a VectorColumn,
    /// Names the folder of the segment.
    pub uuid: &'a str,
    pub index_type: IndexType,
    /// Codes of a partition byte by byte, as searches want them.
    pub transposed: bool,
    /// Wait until the files are on the local disk.
    pub sync: bool,
    /// What the caller said, if anything.
    pub memory_limit: Option<u64>,
}
