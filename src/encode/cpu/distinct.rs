//! Codewords of which no two are equal in the column's type.

use std::borrow::Cow;
use std::collections::HashSet;

use super::nearest::Nearest;

/// Those codewords that are the first of their kind in the column's type, and which they are; no indices where all are.
pub fn distinct<'a>(values: &'a [f32], bytes: &[u8], dimension: usize) -> (Cow<'a, [f32]>, Vec<u32>) {
    let count = values.len() / dimension;
    let mut seen = HashSet::with_capacity(count);
    let first: Vec<u32> = (0u32..).zip(bytes.chunks_exact(bytes.len() / count)).filter(|(_, b)| seen.insert(*b)).map(|(i, _)| i).collect();
    if first.len() == count {
        return (Cow::Borrowed(values), Vec::new());
    }
    let kept: Vec<f32> = first.iter().flat_map(|i| &values[*i as usize * dimension..][..dimension]).copied().collect();
    (Cow::Owned(kept), first)
}

/// Indices among distinct codewords as indices among all.
pub fn among_all(first: &[u32], found: &mut [Nearest]) {
    if !first.is_empty() {
        for found in found {
            found.index = first.get(found.index as usize).copied().unwrap_or(u32::MAX);
        }
    }
}
