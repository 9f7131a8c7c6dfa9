//! Row ids as they are read: each must be a row of the fragments being indexed, and none may come twice.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use lance::Dataset;

use crate::error::{Error, Result};

/// One bit per row, set from any thread.
struct Bits {
    len: u64,
    words: Vec<AtomicU64>,
}

impl Bits {
    fn new(len: u64) -> Self {
        Self { len, words: (0..len.div_ceil(64)).map(|_| AtomicU64::new(0)).collect() }
    }

    /// `None` outside, else whether the bit was clear.
    fn set(&self, index: u64) -> Option<bool> {
        if index >= self.len {
            return None;
        }
        let word = self.words.get((index / 64) as usize)?;
        let bit = 1 << (index % 64);
        Some(word.fetch_or(bit, Ordering::Relaxed) & bit == 0)
    }
}

/// The rows an index may hold, at one bit each.
pub struct RowIdCheck {
    space: Space,
}

enum Space {
    /// Row addresses: the fragment in the upper half, the row in the lower.
    Addresses(HashMap<u32, Bits>),
    /// Stable ids count up over the whole dataset.
    Stable(Bits),
}

impl RowIdCheck {
    pub async fn try_new(dataset: &Dataset, fragment_ids: &[u32]) -> Result<Self> {
        let manifest = dataset.manifest();
        if manifest.uses_stable_row_ids() {
            return Ok(Self { space: Space::Stable(Bits::new(manifest.next_row_id)) });
        }
        let mut fragments = HashMap::new();
        for id in fragment_ids {
            let fragment = dataset
                .get_fragment(*id as usize)
                .ok_or_else(|| Error::mismatch(format!("fragment {id} is not in the dataset at version {}", dataset.version().version)))?;
            fragments.insert(*id, Bits::new(fragment.physical_rows().await? as u64));
        }
        Ok(Self { space: Space::Addresses(fragments) })
    }

    /// Mark rows as indexed.
    pub fn check(&self, row_ids: &[u64]) -> Result<()> {
        // Neighbours are mostly of one fragment: it is looked up once for a run of them.
        let mut last: Option<(u32, &Bits)> = None;
        for row_id in row_ids {
            let fresh = match &self.space {
                Space::Stable(bits) => bits.set(*row_id),
                Space::Addresses(fragments) => {
                    let fragment = (row_id >> 32) as u32;
                    if last.is_none_or(|(id, _)| id != fragment) {
                        last = fragments.get(&fragment).map(|bits| (fragment, bits));
                    }
                    last.and_then(|(_, bits)| bits.set(row_id & u64::from(u32::MAX)))
                }
            };
            match fresh {
                Some(true) => {}
                Some(false) => {
                    return Err(Error::corrupt(format!(
                        "row id {row_id} is in the artifacts twice; every row must be encoded exactly once"
                    )));
                }
                None => return Err(self.outside(*row_id)),
            }
        }
        Ok(())
    }

    fn outside(&self, row_id: u64) -> Error {
        Error::mismatch(match &self.space {
            Space::Stable(bits) => {
                format!(
                    "row id {row_id} is not a row of the dataset, whose stable row ids are below {}; was it encoded from another dataset?",
                    bits.len
                )
            }
            Space::Addresses(fragments) => {
                let mut ids: Vec<&u32> = fragments.keys().collect();
                ids.sort_unstable();
                format!(
                    "row id {row_id} (fragment {}, row {}) is not a row of the fragments being indexed ({} of them, from {:?} to {:?}); was it encoded from another dataset, version or fragment?",
                    row_id >> 32,
                    row_id & u64::from(u32::MAX),
                    ids.len(),
                    ids.first(),
                    ids.last()
                )
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_duplicates_and_strangers() {
        let check = RowIdCheck { space: Space::Addresses(HashMap::from([(3, Bits::new(70))])) };
        let address = |row: u64| (3 << 32) | row;
        check.check(&[address(0), address(69), address(64)]).unwrap();
        assert!(matches!(check.check(&[address(70)]), Err(Error::ArtifactMismatch(_))));
        assert!(matches!(check.check(&[1]), Err(Error::ArtifactMismatch(_))));
        assert!(matches!(check.check(&[address(64)]), Err(Error::CorruptArtifact(_))));
        let stable = RowIdCheck { space: Space::Stable(Bits::new(10)) };
        stable.check(&[9, 0]).unwrap();
        assert!(matches!(stable.check(&[10]), Err(Error::ArtifactMismatch(_))));
        assert!(matches!(stable.check(&[9]), Err(Error::CorruptArtifact(_))));
    }
}
