//! What an index will cover, row by row: every live row of its fragments is in the artifacts exactly once, or is one that an
//! index does not hold.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::artifact::Artifact;
use crate::encode::prepare;
use crate::error::{Error, Result};
use crate::lance::dataset::{Dataset, VectorColumn};
use crate::model::Metric;
use arrow_array::UInt64Array;

/// Row ids are looked up by their upper half (the fragment of an address), then by blocks of 65,536.
const BLOCK_BITS: u32 = 16;
const BLOCK_WORDS: usize = 1 << (BLOCK_BITS - 6);
/// Bytes of vectors read at once to see why they are missing.
const READ_BYTES: usize = 16 << 20;
/// Row ids spelled out in a message.
const SHOWN: usize = 5;

/// One bit per live row that has not been seen yet, cleared from any thread.
type Block = Box<[AtomicU64]>;

#[derive(Default)]
struct RowSet {
    blocks: HashMap<u32, Vec<Option<Block>>>,
    len: u64,
}

fn place(row_id: u64) -> (u32, usize, usize, u64) {
    let low = row_id & u64::from(u32::MAX);
    let row = low & ((1 << BLOCK_BITS) - 1);
    ((row_id >> 32) as u32, (low >> BLOCK_BITS) as usize, (row / 64) as usize, 1 << (row % 64))
}

impl RowSet {
    /// Put consecutive rows in, 64 at a time.
    fn insert(&mut self, rows: Range<u64>) {
        let mut row = rows.start;
        while row < rows.end {
            let (upper, block, word, _) = place(row);
            let blocks = self.blocks.entry(upper).or_default();
            if blocks.len() <= block {
                blocks.resize_with(block + 1, || None);
            }
            let words = blocks[block].get_or_insert_with(|| (0..BLOCK_WORDS).map(|_| AtomicU64::new(0)).collect());
            for word in &mut words[word..] {
                let first = row % 64;
                let count = (64 - first).min(rows.end - row);
                let bits = (u64::MAX >> (64 - count)) << first;
                self.len += u64::from((bits & !*word.get_mut()).count_ones());
                *word.get_mut() |= bits;
                row += count;
                if row == rows.end {
                    return;
                }
            }
        }
    }

    /// Rows that were not taken out.
    fn left(&self) -> u64 {
        let words = self.blocks.values().flatten().flatten().flat_map(|words| words.iter());
        words.map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum()
    }

    fn contains(&self, row_id: u64) -> bool {
        let (upper, block, word, bit) = place(row_id);
        let words = self.blocks.get(&upper).and_then(|blocks| blocks.get(block)).and_then(Option::as_ref);
        words.is_some_and(|words| words[word].load(Ordering::Relaxed) & bit != 0)
    }

    /// The words of rows in their order, each with the bit of its row.
    fn words<'a>(&'a self, row_ids: &'a [u64]) -> impl Iterator<Item = (Option<&'a AtomicU64>, u64)> {
        // Neighbours are mostly of one fragment: it is looked up once for a run of them.
        let mut last: Option<(u32, &[Option<Block>])> = None;
        row_ids.iter().map(move |row_id| {
            let (upper, block, word, bit) = place(*row_id);
            let blocks = match last {
                Some((id, blocks)) if id == upper => blocks,
                _ => self.blocks.get(&upper).map(Vec::as_slice).unwrap_or_default(),
            };
            last = Some((upper, blocks));
            (blocks.get(block).and_then(Option::as_ref).and_then(|words| words.get(word)), bit)
        })
    }

    /// Take rows out: whether each of them was in it.
    fn remove<'a>(&'a self, row_ids: &'a [u64]) -> impl Iterator<Item = bool> {
        self.words(row_ids).map(|(word, bit)| word.is_some_and(|word| word.fetch_and(!bit, Ordering::Relaxed) & bit != 0))
    }

    /// Take rows out; the first one that is not in it is the error.
    fn remove_all(&self, row_ids: &[u64]) -> std::result::Result<(), u64> {
        self.remove(row_ids).position(|there| !there).map_or(Ok(()), |place| Err(row_ids[place]))
    }

    /// How many of these are in it.
    fn count(&self, row_ids: &[u64]) -> u64 {
        self.words(row_ids).filter(|(word, bit)| word.is_some_and(|word| word.load(Ordering::Relaxed) & bit != 0)).count() as u64
    }

    fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        let mut uppers: Vec<&u32> = self.blocks.keys().collect();
        uppers.sort_unstable();
        uppers.into_iter().flat_map(move |upper| {
            let blocks = self.blocks.get(upper).map(Vec::as_slice).unwrap_or_default();
            blocks.iter().enumerate().filter_map(|(at, block)| Some((at, block.as_ref()?))).flat_map(move |(at, words)| {
                words.iter().enumerate().flat_map(move |(word, bits)| {
                    let bits = bits.load(Ordering::Relaxed);
                    let first = (u64::from(*upper) << 32) | ((at as u64) << BLOCK_BITS) | (word as u64 * 64);
                    (0..64).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| first + bit)
                })
            })
        })
    }
}

/// The live rows of the fragments to be indexed, at one bit each, and which of them have been seen.
pub struct Coverage {
    dataset: Dataset,
    fragment_ids: Vec<u32>,
    rows: RowSet,
}

impl Coverage {
    /// The fragments must be the dataset's.
    pub async fn try_new(dataset: &Dataset, fragment_ids: &[u32]) -> Result<Self> {
        let mut rows = RowSet::default();
        for id in fragment_ids {
            dataset.live_row_ids(*id, |run| rows.insert(run)).await?;
        }
        Ok(Self { dataset: dataset.clone(), fragment_ids: fragment_ids.to_vec(), rows })
    }

    pub fn fragment_ids(&self) -> &[u32] {
        &self.fragment_ids
    }

    /// Bytes of memory.
    pub fn held_bytes(&self) -> u64 {
        let blocks = self.rows.blocks.values().flatten().flatten().count() as u64;
        blocks * (BLOCK_WORDS * size_of::<u64>()) as u64
    }

    /// Live rows of the fragments.
    pub fn live_rows(&self) -> u64 {
        self.rows.len
    }

    /// Rows that have not been seen yet.
    pub fn rows_left(&self) -> u64 {
        self.rows.left()
    }

    /// How many of these are live rows of the fragments that have not been seen yet.
    pub fn count(&self, row_ids: &[u64]) -> u64 {
        self.rows.count(row_ids)
    }

    /// Mark rows as seen: whether each is a live row of the fragments, and came for the first time.
    pub fn take(&self, row_ids: &[u64]) -> Vec<bool> {
        self.rows.remove(row_ids).collect()
    }

    /// Mark rows as indexed: each must be a live row of the fragments, and come for the first time.
    pub async fn check(&self, row_ids: &[u64]) -> Result<()> {
        match self.rows.remove_all(row_ids) {
            Ok(()) => Ok(()),
            Err(row_id) => Err(self.explain(row_id).await?),
        }
    }

    async fn explain(&self, row_id: u64) -> Result<Error> {
        let mut live = false;
        for id in &self.fragment_ids {
            self.dataset.live_row_ids(*id, |run| live |= run.contains(&row_id)).await?;
        }
        if live {
            return Ok(Error::corrupt(format!("row id {row_id} is in the artifacts twice; every row must be encoded exactly once")));
        }
        let version = self.dataset.version();
        let fragments = shown(&self.fragment_ids);
        Ok(Error::mismatch(if self.dataset.has_stable_row_ids() {
            format!(
                "stable row id {row_id} is not a row of the fragments being indexed ({fragments}) that is live at version {version}; was it \
                 encoded from another dataset, version or fragment?"
            )
        } else {
            format!(
                "row id {row_id} (fragment {}, row {}) is not a row of the fragments being indexed ({fragments}) that is live at version \
                 {version}; was it encoded from another dataset, version or fragment?",
                row_id >> 32,
                row_id & u64::from(u32::MAX)
            )
        }))
    }

    /// Once all rows were read: the live rows that were not among them are rows that an index does not hold.
    ///
    /// Where every artifact counts what its encoder dropped, the counts have been compared, and with no row twice the number
    /// of missing rows is right. Where one does not count, and for fragments of which no row came at all, the vectors of the
    /// missing rows are read: each must be null, not finite or (cosine) of zero norm.
    pub async fn check_missing(&self, column: &VectorColumn, metric: Metric, artifacts: &[Arc<Artifact>]) -> Result<()> {
        if self.rows.left() == 0 {
            return Ok(());
        }
        let counted = artifacts.iter().all(|artifact| artifact.manifest().rows.is_some());
        let mut usable = 0u64;
        let mut examples: Vec<u64> = Vec::new();
        let row_bytes = column.dimension * column.element_type.byte_width();
        let step = (READ_BYTES / row_bytes.max(1)).clamp(1, 1 << 16);
        let missing: Box<dyn Iterator<Item = u64> + Send> =
            if counted { Box::new(self.missing_fragments().await?.into_iter()) } else { Box::new(self.rows.iter()) };
        let mut missing = missing.peekable();
        while missing.peek().is_some() {
            let ids: Vec<u64> = missing.by_ref().take(step).collect();
            let vectors = self.dataset.take_rows(&ids, column).await?;
            let kept = prepare(&UInt64Array::from(ids), &vectors, metric)?.row_ids;
            usable += kept.len() as u64;
            examples.extend(kept.values().iter().take(SHOWN.saturating_sub(examples.len())));
        }
        if usable == 0 {
            return Ok(());
        }
        Err(Error::mismatch(format!(
            "{usable} rows of the fragments being indexed ({}) have a vector and are in no artifact, such as row ids {examples:?}; searches \
             would never find them. Pass fragment_ids= of what was encoded, or encode the rest",
            shown(&self.fragment_ids)
        )))
    }

    /// The live rows of fragments none of whose rows were seen.
    async fn missing_fragments(&self) -> Result<Vec<u64>> {
        let mut missing = Vec::new();
        for id in &self.fragment_ids {
            let mut of_fragment = Vec::new();
            let mut seen = false;
            self.dataset
                .live_row_ids(*id, |run| {
                    if !seen {
                        seen = run.clone().any(|row_id| !self.rows.contains(row_id));
                        of_fragment.extend(run);
                    }
                })
                .await?;
            if !seen {
                missing.append(&mut of_fragment);
            }
        }
        Ok(missing)
    }
}

fn shown(fragment_ids: &[u32]) -> String {
    match fragment_ids {
        [] => "none".into(),
        ids if ids.len() <= SHOWN => format!("{ids:?}"),
        [first, .., last] => format!("{} of them, from {first} to {last}", fragment_ids.len()),
        [one] => format!("[{one}]"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_comes_once() {
        let mut rows = RowSet::default();
        let ids: Vec<u64> = [0, 1, 63, 64, 65_535, 65_536, (3 << 32) | 7, (3 << 32) | 70_000, u64::MAX - 1].to_vec();
        ids.iter().for_each(|id| rows.insert(*id..*id + 1));
        rows.insert(64..65);
        assert_eq!(rows.len, ids.len() as u64);
        assert_eq!(rows.iter().collect::<Vec<_>>(), ids);
        assert_eq!(rows.remove_all(&[64, (3 << 32) | 7, u64::MAX - 1]), Ok(()));
        assert_eq!(rows.remove_all(&[0, 64]), Err(64), "twice");
        assert_eq!(rows.remove_all(&[2]), Err(2));
        assert_eq!(rows.remove_all(&[(9 << 32) | 7]), Err((9 << 32) | 7));
        assert_eq!(rows.iter().collect::<Vec<_>>(), [1, 63, 65_535, 65_536, (3 << 32) | 70_000]);
    }

    #[test]
    fn runs_of_any_length_and_place() {
        for (start, end) in [(0, 1), (0, 64), (5, 9), (60, 70), (63, 65_537), (65_500, 200_000), ((7 << 32) - 3, (7 << 32) + 200)] {
            let mut rows = RowSet::default();
            rows.insert(start..end);
            rows.insert(start..start);
            assert_eq!(rows.len, end - start);
            assert_eq!(rows.left(), end - start);
            assert!(rows.iter().eq(start..end));
            assert!(rows.contains(start) && !rows.contains(end));
            rows.insert(start..end + 10);
            assert_eq!(rows.len, end - start + 10);
        }
    }
}
