//! `verify`: every promise of a manifest against the files.

use std::collections::BTreeMap;
use std::ops::Range;

use roaring::RoaringTreemap;

use super::artifact::Artifact;
use super::partition_reader::{PartitionReader, SLICE_BYTES};
use super::rows::PartitionRows;
use crate::error::{Error, Result};

/// Bytes of rows and codes read at once.
const WINDOW_BYTES: u64 = 64 << 20;
/// Problems spelled out; more are only counted.
const MAX_PROBLEMS: usize = 100;

/// What `verify` found.
#[derive(Debug, Clone, Default)]
pub struct VerifyReport {
    pub num_rows: u64,
    pub num_partitions: usize,
    pub num_files: usize,
    pub num_ranges: u64,
    /// Whether the content was checked against checksums; other writers may have left none.
    pub checksums_checked: bool,
    /// Whether the partition id of each row was checked; other writers may have left none.
    pub part_ids_checked: bool,
    pub duplicate_row_ids: u64,
    pub num_problems: u64,
    /// The first hundred.
    pub problems: Vec<String>,
}

impl VerifyReport {
    pub fn ok(&self) -> bool {
        self.num_problems == 0
    }

    fn add(&mut self, problem: impl Into<String>) {
        self.num_problems += 1;
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(problem.into());
        }
    }

    /// Keep a finding; pass on what is none (a store that cannot be reached).
    fn note(&mut self, error: Error) -> Result<()> {
        match error {
            Error::CorruptArtifact(message) => {
                self.add(message);
                Ok(())
            }
            other => Err(other),
        }
    }
}

impl Artifact {
    /// Check rows, ranges, gaps, partition ids, checksums and duplicate row ids by reading the whole artifact. `progress` gets
    /// the rows checked so far and is asked between windows.
    pub async fn verify(&self, mut progress: impl FnMut(u64) + Send) -> Result<VerifyReport> {
        let mut report = VerifyReport {
            num_rows: self.num_rows(),
            num_partitions: self.num_partitions(),
            num_ranges: self.manifest().partitions.num_ranges(),
            checksums_checked: self.has_checksums(),
            part_ids_checked: true,
            ..Default::default()
        };
        let mut rows_by_file: BTreeMap<&str, u64> = BTreeMap::new();
        for partition in self.manifest().partitions.iter() {
            if let Some(path) = partition.path() {
                *rows_by_file.entry(path).or_default() += partition.num_rows();
            }
        }
        for (path, claimed) in rows_by_file {
            let mut rows = Some(0u64);
            for file in self.files().files_of(path) {
                report.num_files += 1;
                let found = self.verify_file(file, &mut report).await?;
                rows = rows.zip(found).map(|(rows, found)| rows + found);
            }
            // Ranges do not overlap (checked when the manifest was read), so a sum tells of a gap.
            if let Some(rows) = rows.filter(|rows| *rows != claimed) {
                report.add(format!("{path} has {rows} rows, the manifest's ranges cover {claimed}"));
            }
        }
        let mut seen = RoaringTreemap::new();
        let mut rows = 0;
        for window in self.windows(WINDOW_BYTES) {
            if window.len() == 1 && self.row_bytes(window.start) > WINDOW_BYTES {
                rows = self.verify_partition(window.start, rows, &mut progress, &mut seen, &mut report).await?;
                continue;
            }
            match self.read_checked(window.clone(), true).await {
                Ok(rows) => collect_row_ids(&rows, &mut seen, &mut report),
                // One bad partition must not hide the others of its window.
                Err(Error::CorruptArtifact(_)) => {
                    for partition in window.clone() {
                        match self.read_checked(partition..partition + 1, true).await {
                            Ok(rows) => collect_row_ids(&rows, &mut seen, &mut report),
                            Err(error) => report.note(error)?,
                        }
                    }
                }
                Err(error) => return Err(error),
            }
            rows += window.map(|p| self.partition_rows(p)).sum::<u64>();
            progress(rows);
        }
        if report.duplicate_row_ids > 0 {
            report.add(format!("{} row ids occur more than once", report.duplicate_row_ids));
        }
        Ok(report)
    }

    /// Whether a file is as the manifest says; its rows, where it can be opened.
    async fn verify_file(&self, path: &str, report: &mut VerifyReport) -> Result<Option<u64>> {
        let described = self.manifest().files.as_ref().and_then(|files| files.get(path));
        match (self.files().store().size(path).await?, described) {
            (None, _) => {
                report.add(format!("{path} is missing"));
                return Ok(None);
            }
            (Some(size), Some(described)) if described.size_bytes != size => {
                report.add(format!("{path} has {size} bytes, the manifest says {}", described.size_bytes));
            }
            _ => {}
        }
        let file = match self.files().bucket(path).await {
            Ok(file) => file,
            Err(error) => {
                report.note(error)?;
                return Ok(None);
            }
        };
        report.part_ids_checked &= file.has_part_ids;
        if let Some(described) = described
            && described.num_rows != file.num_rows()
        {
            report.add(format!("{path} has {} rows, the manifest says {}", file.num_rows(), described.num_rows));
        }
        Ok(Some(file.num_rows()))
    }

    /// A partition that is larger than a window, slice by slice. Returns the rows checked so far.
    async fn verify_partition(
        &self,
        partition: usize,
        before: u64,
        progress: &mut (impl FnMut(u64) + Send),
        seen: &mut RoaringTreemap,
        report: &mut VerifyReport,
    ) -> Result<u64> {
        let mut reader = PartitionReader::new(self, partition, SLICE_BYTES, true);
        let mut rows = before;
        loop {
            match reader.next().await {
                Ok(Some(slice)) => {
                    rows += slice.num_rows(0) as u64;
                    collect_row_ids(&slice, seen, report);
                    progress(rows);
                }
                Ok(None) => return Ok(before + self.partition_rows(partition)),
                Err(error) => {
                    report.note(error)?;
                    return Ok(before + self.partition_rows(partition));
                }
            }
        }
    }

    /// Bytes of a partition's rows and codes.
    fn row_bytes(&self, partition: usize) -> u64 {
        self.partition_rows(partition).saturating_mul(12 + self.pq_code_width() as u64)
    }

    /// Consecutive partitions of at most `bytes` of rows and codes, or single ones that are larger.
    pub fn windows(&self, bytes: u64) -> Vec<Range<usize>> {
        let mut windows = Vec::new();
        let (mut start, mut held) = (0, 0);
        for partition in 0..self.num_partitions() {
            let size = self.row_bytes(partition);
            if partition > start && size.saturating_add(held) > bytes {
                windows.push(start..partition);
                (start, held) = (partition, 0);
            }
            held = size.saturating_add(held);
        }
        windows.push(start..self.num_partitions());
        windows
    }
}

fn collect_row_ids(rows: &PartitionRows, seen: &mut RoaringTreemap, report: &mut VerifyReport) {
    for row_ids in rows.row_ids() {
        report.duplicate_row_ids += row_ids.iter().filter(|id| !seen.insert(**id)).count() as u64;
    }
}
