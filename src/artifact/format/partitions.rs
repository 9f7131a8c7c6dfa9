//! Where the rows of each partition are, in memory: a few bytes for each range, because a long build with many partitions makes tens
//! of millions of them.

use std::collections::HashMap;
use std::fmt::Formatter;

use serde::de::{SeqAccess, Visitor};
use serde::ser::SerializeSeq;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::checksum::{from_hex, to_hex};
use crate::error::{Error, Result};

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
        self.table.files.get(self.entry().file as usize).map(String::as_str)
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
        let gap = take_number(&mut self.bytes)?;
        let num_rows = take_number(&mut self.bytes)?;
        let offset = self.end.wrapping_add_signed(((gap >> 1) as i64) ^ -((gap & 1) as i64));
        self.end = offset.wrapping_add(num_rows);
        Some(RowRange { offset, num_rows })
    }
}

fn push_number(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn take_number(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
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
        self.files.iter().map(String::as_str)
    }

    /// Bytes of memory.
    pub fn held_bytes(&self) -> u64 {
        let files: usize = self.files.iter().map(|file| file.capacity() + size_of::<String>()).sum();
        (self.entries.capacity() * size_of::<Entry>() + self.bytes.capacity() + files) as u64
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
            let Some(next) = range.offset.checked_add(range.num_rows).filter(|_| range.num_rows > 0 && range.offset < 1 << 62) else {
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
        let mut by_file: Vec<(u32, u32)> = (0u32..).zip(&self.entries).map(|(id, entry)| (entry.file, id)).collect();
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

/// A partition that is written: its file, its ranges in the order of its rows, and the checksum over them.
#[derive(Debug)]
pub struct WrittenPartition {
    pub path: String,
    pub ranges: Vec<RowRange>,
    pub checksum: u64,
}

impl PartitionTable {
    /// Of partitions that were written, in their order; `None` has no rows.
    pub fn of_written(partitions: impl Iterator<Item = Option<WrittenPartition>>) -> Result<Self> {
        let (mut table, mut known) = (Self::default(), HashMap::new());
        for partition in partitions {
            let partition = partition.map_or_else(JsonPartition::default, |written| JsonPartition {
                num_rows: written.ranges.iter().map(|range| range.num_rows).sum(),
                path: Some(written.path),
                ranges: written.ranges,
                checksum: Some(to_hex(written.checksum)),
            });
            table.push(&mut known, partition)?;
        }
        Ok(table)
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
                table.entries.shrink_to_fit();
                table.bytes.shrink_to_fit();
                Ok(table)
            }
        }
        deserializer.deserialize_seq(List)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_come_back_in_a_few_bytes_each() {
        let ranges = |seed: u64| -> Vec<RowRange> {
            (0..100).map(|i| RowRange { offset: i * 12_000 + seed * 40 + i % 7, num_rows: 40 + seed % 9 }).collect()
        };
        let partition = |id: u64| {
            let written = WrittenPartition { path: format!("partitions/{}.lance", id % 3), ranges: ranges(id), checksum: id << 40 };
            (!id.is_multiple_of(5)).then_some(written)
        };
        let table = PartitionTable::of_written((0..200).map(partition)).unwrap();
        let json = serde_json::to_vec(&table).unwrap();
        let again: PartitionTable = serde_json::from_slice(&json).unwrap();
        assert_eq!((again.len(), again.num_ranges(), again.num_rows()), (200, 16_000, table.num_rows()));
        for table in [&table, &again] {
            for id in 0..200 {
                let (found, expected) = (table.get(id as usize).unwrap(), partition(id));
                assert_eq!(found.path(), expected.as_ref().map(|p| p.path.as_str()));
                assert!(found.ranges().eq(expected.iter().flat_map(|p| p.ranges.clone())));
                assert_eq!(found.checksum(), expected.map_or(0, |p| p.checksum));
            }
            assert!(table.get(200).is_none() && table.unchecked().is_none());
        }
        assert!(again.held_bytes() < 16_000 * 5, "{}", again.held_bytes());
        assert!(json.len() > 16_000 * 30);
    }

    #[test]
    fn ranges_in_any_order_and_by_file() {
        let ranges = vec![RowRange { offset: 900, num_rows: 5 }, RowRange { offset: 0, num_rows: 3 }, RowRange { offset: 10, num_rows: 1 }];
        let written = WrittenPartition { path: "b.lance".into(), ranges: ranges.clone(), checksum: 1 };
        let table = PartitionTable::of_written([None, Some(written)].into_iter()).unwrap();
        assert!(table.get(1).unwrap().ranges().eq(ranges));
        let mut seen = Vec::new();
        table
            .for_each_file(|path, ranges| {
                seen.push((path.to_string(), ranges.iter().map(|r| (r.offset, r.num_rows, r.partition)).collect::<Vec<_>>()));
                Ok(())
            })
            .unwrap();
        assert_eq!(seen, [("b.lance".to_string(), vec![(0, 3, 1), (10, 1, 1), (900, 5, 1)])]);
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
