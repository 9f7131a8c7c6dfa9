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
/// Row ids of a fragment that are listed at once.
const MISSING_AT_ONCE: usize = 1 << 20;
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
        let mut missing = Missing { dataset: &self.dataset, column, metric, usable: 0, examples: Vec::new() };
        if artifacts.iter().all(|artifact| artifact.manifest().rows.is_some()) {
            for id in &self.fragment_ids {
                if !self.any_seen(*id).await? {
                    self.look_at_fragment(*id, &mut missing).await?;
                }
            }
        } else {
            let mut rows = self.rows.iter().peekable();
            while rows.peek().is_some() {
                missing.look_at(rows.by_ref().take(missing.at_once()).collect()).await?;
            }
        }
        let Missing { usable, examples, .. } = missing;
        if usable == 0 {
            return Ok(());
        }
        Err(Error::mismatch(format!(
            "{usable} rows of the fragments being indexed ({}) have a vector and are in no artifact, such as row ids {examples:?}; searches \
             would never find them. Pass fragment_ids= of what was encoded, or encode the rest",
            shown(&self.fragment_ids)
        )))
    }

    /// Whether any live row of a fragment was seen.
    async fn any_seen(&self, fragment_id: u32) -> Result<bool> {
        let mut seen = false;
        self.dataset.live_row_ids(fragment_id, |run| seen = seen || run.clone().any(|row_id| !self.rows.contains(row_id))).await?;
        Ok(seen)
    }

    /// A fragment may have any number of rows: some of them at a time.
    async fn look_at_fragment(&self, fragment_id: u32, missing: &mut Missing<'_>) -> Result<()> {
        let mut looked_at = 0;
        loop {
            let mut some = Page::new(looked_at, MISSING_AT_ONCE);
            self.dataset.live_row_ids(fragment_id, |run| some.add(run)).await?;
            if some.rows.is_empty() {
                return Ok(());
            }
            looked_at += some.rows.len() as u64;
            for row_ids in some.rows.chunks(missing.at_once()) {
                missing.look_at(row_ids.to_vec()).await?;
            }
        }
    }
}

/// Of runs of rows, one after the other, those behind the first `skipped`, and at most so many.
struct Page {
    skipped: u64,
    most: usize,
    rows: Vec<u64>,
}

impl Page {
    fn new(skipped: u64, most: usize) -> Self {
        Self { skipped, most, rows: Vec::new() }
    }

    fn add(&mut self, run: Range<u64>) {
        let skipped = self.skipped.min(run.end - run.start);
        self.skipped -= skipped;
        let first = run.start + skipped;
        let room = (self.most - self.rows.len()) as u64;
        self.rows.extend(first..run.end.min(first.saturating_add(room)));
    }
}

/// What becomes of rows that are in no artifact.
struct Missing<'a> {
    dataset: &'a Dataset,
    column: &'a VectorColumn,
    metric: Metric,
    /// Rows that an index would hold, and some of them.
    usable: u64,
    examples: Vec<u64>,
}

impl Missing<'_> {
    /// Rows whose vectors are read at once.
    fn at_once(&self) -> usize {
        let row_bytes = self.column.dimension * self.column.element_type.byte_width();
        (READ_BYTES / row_bytes.max(1)).clamp(1, 1 << 16)
    }

    async fn look_at(&mut self, row_ids: Vec<u64>) -> Result<()> {
        let vectors = self.dataset.take_rows(&row_ids, self.column).await?;
        let kept = prepare(&UInt64Array::from(row_ids), &vectors, self.metric)?.row_ids;
        self.usable += kept.len() as u64;
        self.examples.extend(kept.values().iter().take(SHOWN.saturating_sub(self.examples.len())));
        Ok(())
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
    fn pages_of_runs_are_all_rows_once() {
        let runs = [0..10, 100..105, 7 << 32..(7 << 32) + 1, 5..5, u64::MAX - 3..u64::MAX];
        let all: Vec<u64> = runs.iter().cloned().flatten().collect();
        for most in [1, 2, 4, 18, 19, 50] {
            let mut found: Vec<u64> = Vec::new();
            loop {
                let mut page = Page::new(found.len() as u64, most);
                runs.iter().cloned().for_each(|run| page.add(run));
                assert!(page.rows.len() <= most);
                if page.rows.is_empty() {
                    break;
                }
                found.extend(page.rows);
            }
            assert_eq!(found, all);
        }
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
