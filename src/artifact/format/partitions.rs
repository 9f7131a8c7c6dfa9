//! Where the rows of each partition are, in memory: a few bytes for each range, because a long build with many partitions makes tens
//! of millions of them.

use std::collections::HashMap;
use std::fmt::Formatter;

use serde::de::{SeqAccess, Visitor};
use serde::ser::SerializeSeq;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::checksum::{from_hex, to_hex};
use crate::error::{Error, Result};
use crate::numbers::{push_number, take_number};

/// A run of one partition's rows in a bucket file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowRange {
    /// First row, counted from the start of the file.
    pub offset: u64,
    pub num_rows: u64,
}

/// A partition as the JSON of a manifest has it.
#[derive(Debug, Default, Serialize, Deserialize)]
struct JsonPartition {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    num_rows: u64,
    #[serde(default)]
    ranges: Vec<RowRange>,
    /// 16 hexadecimal digits; see [`CHECKSUM_KIND`](super::CHECKSUM_KIND).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    checksum: Option<String>,
}

/// A range, and whose it is. In the order of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PartitionRange {
    pub offset: u64,
    pub num_rows: u64,
    pub partition: usize,
}

/// No file: a partition without rows.
const NO_FILE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Entry {
    /// Where its ranges begin among the bytes.
    start: u64,
    checksum: u64,
    num_rows: u32,
    file: u32,
}

/// The partitions of an artifact: file, rows, ranges and checksum of each.
#[derive(Debug, Clone, Default)]
pub struct PartitionTable {
    files: Vec<String>,
    entries: Vec<Entry>,
    /// For each range the rows between the one before and it, zigzag, and its own, as LEB128.
    bytes: Vec<u8>,
    num_rows: u64,
    num_ranges: u64,
    /// The first partition whose checksum is none of ours, or that has rows and no checksum.
    unchecked: Option<(usize, String)>,
}

/// One of them.
#[derive(Debug, Clone, Copy)]
pub struct Partition<'a> {
    table: &'a PartitionTable,
    index: usize,
}

impl<'a> Partition<'a> {
    /// The bucket file that holds it, or `None` where it has no rows.
    pub fn path(self) -> Option<&'a str> {
        let Entry { file, num_rows, .. } = self.entry();
        self.table.files.get(file as usize).filter(|_| num_rows > 0).map(String::as_str)
    }

    pub fn num_rows(self) -> u64 {
        u64::from(self.entry().num_rows)
    }

    pub fn checksum(self) -> u64 {
        self.entry().checksum
    }

    /// In the order of the partition's rows.
    pub fn ranges(self) -> impl Iterator<Item = RowRange> + Clone + use<'a> {
        let end = self.table.entries.get(self.index + 1).map_or(self.table.bytes.len(), |next| next.start as usize);
        Ranges { bytes: &self.table.bytes[self.entry().start as usize..end], end: 0 }
    }

    fn entry(self) -> Entry {
        self.table.entries[self.index]
    }
}

#[derive(Debug, Clone)]
struct Ranges<'a> {
    bytes: &'a [u8],
    /// Of the range before.
    end: u64,
}

impl Iterator for Ranges<'_> {
    type Item = RowRange;

    fn next(&mut self) -> Option<RowRange> {
        // What is no whole range stays, for those who look whether anything is left.
        let mut bytes = self.bytes;
        let gap = take_number(&mut bytes)?;
        let num_rows = take_number(&mut bytes)?;
        self.bytes = bytes;
        let offset = self.end.wrapping_add_signed(((gap >> 1) as i64) ^ -((gap & 1) as i64));
        self.end = offset.wrapping_add(num_rows);
        Some(RowRange { offset, num_rows })
    }
}

impl PartitionTable {
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Rows of all partitions.
    pub fn num_rows(&self) -> u64 {
        self.num_rows
    }

    /// Ranges of all partitions.
    pub fn num_ranges(&self) -> u64 {
        self.num_ranges
    }

    pub fn get(&self, partition: usize) -> Option<Partition<'_>> {
        (partition < self.len()).then_some(Partition { table: self, index: partition })
    }

    pub fn iter(&self) -> impl Iterator<Item = Partition<'_>> {
        (0..self.len()).map(|index| Partition { table: self, index })
    }

    /// Consecutive ones.
    pub fn range(&self, partitions: std::ops::Range<usize>) -> impl Iterator<Item = Partition<'_>> {
        partitions.filter(|index| *index < self.len()).map(|index| Partition { table: self, index })
    }

    /// The files that hold rows, each once.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        let mut used = vec![false; self.files.len()];
        for entry in self.entries.iter().filter(|entry| entry.num_rows > 0) {
            used[entry.file as usize] = true;
        }
        self.files.iter().zip(used).filter(|(_, used)| *used).map(|(file, _)| file.as_str())
    }

    /// Bytes of memory.
    pub fn held_bytes(&self) -> u64 {
        let files: usize = self.files.iter().map(|file| file.capacity() + size_of::<String>()).sum();
        (self.entries.capacity() * size_of::<Entry>() + self.bytes.capacity() + files) as u64
    }

    /// Give back memory that no partition needs.
    pub fn shrink(&mut self) {
        self.entries.shrink_to_fit();
        self.bytes.shrink_to_fit();
    }

    /// Why the checksums cannot be checked: a partition, and what is wrong there.
    pub fn unchecked(&self) -> Option<(usize, &str)> {
        self.unchecked.as_ref().map(|(partition, what)| (*partition, what.as_str()))
    }

    /// Add the next partition. The same `file` must be known by the same string, which `known` remembers.
    fn push(&mut self, known: &mut HashMap<String, u32>, partition: JsonPartition) -> Result<()> {
        let id = self.len();
        let JsonPartition { path, num_rows, ranges, checksum } = partition;
        let start = self.bytes.len() as u64;
        let (mut end, mut rows) = (0u64, 0u64);
        for range in &ranges {
            // Gaps between ranges are signed.
            let fits = |end: &u64| range.num_rows > 0 && range.offset < 1 << 62 && *end < 1 << 63;
            let Some(next) = range.offset.checked_add(range.num_rows).filter(fits) else {
                return Err(Error::corrupt(format!("partition {id} has an empty or overflowing range {range:?}")));
            };
            let gap = range.offset as i64 - end as i64;
            push_number(&mut self.bytes, ((gap << 1) ^ (gap >> 63)) as u64);
            push_number(&mut self.bytes, range.num_rows);
            end = next;
            rows = rows.checked_add(range.num_rows).ok_or_else(|| Error::corrupt(format!("the rows of partition {id} overflow")))?;
        }
        if rows != num_rows {
            return Err(Error::corrupt(format!("partition {id} says {num_rows} rows, its ranges hold {rows}")));
        }
        // Lance counts the rows of a partition in 32 bits.
        let Ok(num_rows) = u32::try_from(rows) else {
            return Err(Error::corrupt(format!("partition {id} has {rows} rows, more than an index partition can hold ({})", u32::MAX)));
        };
        let file = match path {
            None if rows > 0 => return Err(Error::corrupt(format!("partition {id} has {rows} rows and no path"))),
            None => NO_FILE,
            Some(path) => match known.get(&path) {
                Some(file) => *file,
                None => {
                    super::layout::check_path(&path)?;
                    let file = self.files.len() as u32;
                    self.files.push(path.clone());
                    known.insert(path, file);
                    file
                }
            },
        };
        let parsed = checksum.as_deref().and_then(from_hex);
        if rows > 0 && parsed.is_none() && self.unchecked.is_none() {
            let what = checksum.map_or("no checksum".to_string(), |text| format!("the checksum {text:?}, which is none"));
            self.unchecked = Some((id, what));
        }
        self.entries.push(Entry { start, checksum: parsed.unwrap_or(0), num_rows, file });
        self.num_rows += rows;
        self.num_ranges += ranges.len() as u64;
        Ok(())
    }

    /// The ranges of each file, one file after the other, sorted. Those of one are held at a time.
    pub fn for_each_file(&self, mut each: impl FnMut(&str, &[PartitionRange]) -> Result<()>) -> Result<()> {
        let mut by_file: Vec<(u32, u32)> =
            (0u32..).zip(&self.entries).filter(|(_, entry)| entry.num_rows > 0).map(|(id, entry)| (entry.file, id)).collect();
        by_file.sort_unstable();
        let mut ranges: Vec<PartitionRange> = Vec::new();
        for of_file in by_file.chunk_by(|a, b| a.0 == b.0) {
            let Some(path) = of_file.first().and_then(|(file, _)| self.files.get(*file as usize)) else { continue };
            ranges.clear();
            for (_, id) in of_file {
                let partition = *id as usize;
                let of_partition = Partition { table: self, index: partition }.ranges();
                ranges.extend(of_partition.map(|r| PartitionRange { offset: r.offset, num_rows: r.num_rows, partition }));
            }
            ranges.sort_unstable();
            each(path, &ranges)?;
        }
        Ok(())
    }
}

/// The ranges of one partition as they are kept, in the order of its rows.
#[derive(Debug, Clone, Default)]
pub struct EncodedRanges {
    bytes: Vec<u8>,
    /// The last one, which the next one may make longer.
    last: Option<RowRange>,
    end: u64,
}

impl EncodedRanges {
    /// Add rows of the file.
    pub fn push(&mut self, range: RowRange) {
        match &mut self.last {
            Some(last) if last.offset + last.num_rows == range.offset => last.num_rows += range.num_rows,
            _ => {
                self.write_last();
                self.last = Some(range);
            }
        }
    }

    fn write_last(&mut self) {
        if let Some(RowRange { offset, num_rows }) = self.last.take() {
            let gap = offset as i64 - self.end as i64;
            push_number(&mut self.bytes, ((gap << 1) ^ (gap >> 63)) as u64);
            push_number(&mut self.bytes, num_rows);
            self.end = offset + num_rows;
        }
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.write_last();
        self.bytes.shrink_to_fit();
        self.bytes
    }
}

impl PartitionTable {
    /// Without checksums, in one file.
    pub fn of_one_file(file: &str, partitions: Vec<EncodedRanges>) -> Result<Self> {
        let (mut table, mut known) = (Self::default(), HashMap::new());
        for encoded in partitions {
            let bytes = encoded.finish();
            let ranges: Vec<RowRange> = Ranges { bytes: &bytes, end: 0 }.collect();
            let num_rows = ranges.iter().map(|range| range.num_rows).sum();
            let path = (num_rows > 0).then(|| file.to_string());
            table.push(&mut known, JsonPartition { path, num_rows, ranges, checksum: None })?;
        }
        table.shrink();
        Ok(table)
    }

    /// None yet, in these files.
    pub fn in_files(files: Vec<String>) -> Self {
        Self { files, ..Self::default() }
    }

    /// Add the next partition: rows in a file (by its number), and its ranges as [`EncodedRanges`] makes them.
    pub fn push_encoded(&mut self, file: Option<u32>, num_rows: u32, checksum: u64, ranges: &[u8]) -> Result<()> {
        let id = self.len();
        let start = self.bytes.len() as u64;
        self.bytes.extend_from_slice(ranges);
        let (mut rows, mut count, mut reader) = (0u64, 0u64, Ranges { bytes: ranges, end: 0 });
        for range in &mut reader {
            if range.num_rows == 0 || range.offset >= 1 << 62 || range.num_rows > u64::from(u32::MAX) {
                return Err(Error::corrupt(format!("partition {id} has an empty or overflowing range {range:?}")));
            }
            rows += range.num_rows;
            count += 1;
        }
        if !reader.bytes.is_empty() || rows != u64::from(num_rows) {
            return Err(Error::corrupt(format!("partition {id} says {num_rows} rows, its ranges hold {rows}")));
        }
        let file = match file {
            Some(file) if (file as usize) < self.files.len() => file,
            None if rows == 0 => NO_FILE,
            other => return Err(Error::corrupt(format!("partition {id} has {rows} rows in file {other:?} of {}", self.files.len()))),
        };
        self.entries.push(Entry { start, checksum, num_rows, file });
        self.num_rows += rows;
        self.num_ranges += count;
        Ok(())
    }
}

impl Serialize for PartitionTable {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.len()))?;
        for partition in self.iter() {
            let path = partition.path().map(str::to_string);
            list.serialize_element(&JsonPartition {
                num_rows: partition.num_rows(),
                ranges: partition.ranges().collect(),
                checksum: path.as_ref().map(|_| to_hex(partition.checksum())),
                path,
            })?;
        }
        list.end()
    }
}

impl<'de> Deserialize<'de> for PartitionTable {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = PartitionTable;

            fn expecting(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
                f.write_str("a list of partitions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<PartitionTable, A::Error> {
                let (mut table, mut known) = (PartitionTable::default(), HashMap::new());
                while let Some(partition) = list.next_element::<JsonPartition>()? {
                    table.push(&mut known, partition).map_err(serde::de::Error::custom)?;
                }
                table.shrink();
                Ok(table)
            }
        }
        deserializer.deserialize_seq(List)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(ranges: &[RowRange]) -> Vec<u8> {
        let mut encoded = EncodedRanges::default();
        ranges.iter().for_each(|range| encoded.push(*range));
        encoded.finish()
    }

    #[test]
    fn ranges_come_back_in_a_few_bytes_each() {
        let ranges = |seed: u64| -> Vec<RowRange> {
            (0..100).map(|i| RowRange { offset: i * 12_000 + seed * 40 + i % 7, num_rows: 40 + seed % 9 }).collect()
        };
        let mut table = PartitionTable::in_files((0..3).map(|n| format!("partitions/{n}.lance")).collect());
        for id in 0..200u64 {
            let rows = ranges(id).iter().map(|range| range.num_rows).sum::<u64>() as u32;
            match id % 5 {
                0 => table.push_encoded(None, 0, 0, &[]).unwrap(),
                _ => table.push_encoded(Some((id % 3) as u32), rows, id << 40, &encoded(&ranges(id))).unwrap(),
            }
        }
        let json = serde_json::to_vec(&table).unwrap();
        let again: PartitionTable = serde_json::from_slice(&json).unwrap();
        assert_eq!((again.len(), again.num_ranges(), again.num_rows()), (200, 16_000, table.num_rows()));
        for table in [&table, &again] {
            for id in 0..200u64 {
                let (found, empty) = (table.get(id as usize).unwrap(), id.is_multiple_of(5));
                assert_eq!(found.path(), (!empty).then(|| format!("partitions/{}.lance", id % 3)).as_deref());
                assert!(found.ranges().eq(if empty { Vec::new() } else { ranges(id) }));
                assert_eq!(found.checksum(), if empty { 0 } else { id << 40 });
            }
            assert!(table.get(200).is_none() && table.unchecked().is_none());
        }
        assert!(again.held_bytes() < 16_000 * 5, "{}", again.held_bytes());
        assert!(json.len() > 16_000 * 30);
    }

    #[test]
    fn ranges_in_any_order_and_by_file() {
        let ranges = [RowRange { offset: 900, num_rows: 5 }, RowRange { offset: 0, num_rows: 3 }, RowRange { offset: 10, num_rows: 1 }];
        let mut table = PartitionTable::in_files(vec!["a.lance".into(), "b.lance".into()]);
        table.push_encoded(None, 0, 0, &[]).unwrap();
        table.push_encoded(Some(1), 9, 7, &encoded(&ranges)).unwrap();
        assert!(table.get(1).unwrap().ranges().eq(ranges));
        // Of no rows, in a file that need not be there.
        table.push_encoded(Some(0), 0, 0, &[]).unwrap();
        assert_eq!(table.get(2).unwrap().path(), None);
        let mut seen = Vec::new();
        table
            .for_each_file(|path, ranges| {
                seen.push((path.to_string(), ranges.iter().map(|r| (r.offset, r.num_rows, r.partition)).collect::<Vec<_>>()));
                Ok(())
            })
            .unwrap();
        assert_eq!(seen, [("b.lance".to_string(), vec![(0, 3, 1), (10, 1, 1), (900, 5, 1)])]);
        assert_eq!(table.files().collect::<Vec<_>>(), ["b.lance"]);
    }

    #[test]
    fn rows_that_follow_make_one_range() {
        let ranges = [(0, 3), (3, 4), (9, 1), (10, 2)].map(|(offset, num_rows)| RowRange { offset, num_rows });
        let mut table = PartitionTable::in_files(vec!["a".into()]);
        table.push_encoded(Some(0), 10, 0, &encoded(&ranges)).unwrap();
        let expected = [(0, 7), (9, 3)].map(|(offset, num_rows)| RowRange { offset, num_rows });
        assert!(table.get(0).unwrap().ranges().eq(expected));
    }

    #[test]
    fn damaged_ranges_are_refused() {
        let good = encoded(&[RowRange { offset: 5, num_rows: 3 }]);
        let push = |file, rows, bytes: &[u8]| PartitionTable::in_files(vec!["a".into()]).push_encoded(file, rows, 0, bytes);
        assert!(push(Some(0), 3, &good).is_ok());
        for (file, rows, bytes) in [
            (Some(1), 3, good.clone()),
            (None, 3, good.clone()),
            (Some(0), 4, good.clone()),
            (Some(0), 3, good[..1].to_vec()),
            (Some(0), 3, [good.as_slice(), &[0x80]].concat()),
            (Some(0), 0, vec![2, 0]),
            (Some(0), 1, vec![0xff; 30]),
        ] {
            assert!(matches!(push(file, rows, &bytes), Err(Error::CorruptArtifact(_))), "{file:?} {rows} {bytes:?}");
        }
    }

    #[test]
    fn a_checksum_that_is_none_is_remembered() {
        let parse = |checksum: &str| {
            let text = format!(r#"[{{"path": "a", "num_rows": 1, "ranges": [{{"offset": 0, "num_rows": 1}}]{checksum}}}]"#);
            serde_json::from_str::<PartitionTable>(&text).unwrap()
        };
        assert!(parse("").unchecked().is_some());
        assert!(parse(r#", "checksum": "xyz""#).unchecked().unwrap().1.contains("xyz"));
        assert!(parse(r#", "checksum": "00000000000000ff""#).unchecked().is_none());
    }
}
