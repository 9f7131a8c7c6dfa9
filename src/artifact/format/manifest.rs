//! `manifest.json`: what it says and the checks that need no other file.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::assignment::Assignment;
use super::checksum::to_hex;
use super::layout::{LISTED, MANIFEST_FILE, METADATA_FILE, TABLED, check_path};
use super::partitions::PartitionTable;
use crate::error::{Error, Result};
use crate::io::HIDDEN_PREFIX;
use crate::lance::file::Written;
use crate::model::{IvfPqModel, Training};

/// How `checksum` values are computed; readers that do not know the name skip them.
pub const CHECKSUM_KIND: &str = "xxh3-64-row-sum";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    pub num_rows: u64,
    pub size_bytes: u64,
    /// Bytes at the end of the file that `tail_checksum` is over: its metadata.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tail_bytes: Option<u64>,
    /// xxh3-64, 16 hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tail_checksum: Option<String>,
}

impl FileEntry {
    /// Of a file that was just written.
    pub fn of(written: Written) -> Self {
        let (tail_checksum, tail_bytes) = written.tail.map(|(checksum, bytes)| (to_hex(checksum), bytes)).unzip();
        Self { num_rows: written.num_rows, size_bytes: written.size_bytes, tail_bytes, tail_checksum }
    }
}

/// Rows seen by the encoder, written to the artifact, and dropped by reason.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowCounts {
    pub seen: u64,
    pub written: u64,
    #[serde(default)]
    pub dropped: BTreeMap<String, u64>,
}

/// Where the rows came from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Without credentials.
    pub dataset_uri: String,
    pub version: u64,
    /// Of the dataset; absent for main.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
    pub column: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field_id: Option<i32>,
    pub fragment_ids: Vec<u32>,
    pub stable_row_ids: bool,
    /// Over the names of the column's data files: tells a dataset from another one, wherever it was moved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_files: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelSummary {
    pub metric: String,
    pub dtype: String,
    pub dimension: usize,
    pub num_sub_vectors: usize,
    pub num_bits: u32,
    pub fingerprint: String,
}

impl From<&IvfPqModel> for ModelSummary {
    fn from(model: &IvfPqModel) -> Self {
        Self {
            metric: model.metric().to_string(),
            dtype: model.element_type().to_string(),
            dimension: model.dimension(),
            num_sub_vectors: model.num_sub_vectors(),
            num_bits: model.num_bits(),
            fingerprint: model.fingerprint().to_string(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriterInfo {
    pub name: String,
    pub version: String,
}

fn default_metadata_file() -> Option<String> {
    Some(METADATA_FILE.to_string())
}

/// The parsed manifest. Only `version`, `num_partitions` and `partitions` are required of other writers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    pub version: u32,
    pub num_partitions: usize,
    #[serde(default)]
    pub num_buckets: Option<usize>,
    /// The model's file; `null` says that there is none, and a manifest that says nothing means [`METADATA_FILE`].
    #[serde(default = "default_metadata_file")]
    pub metadata_file: Option<String>,
    #[serde(default)]
    pub total_loss: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pq_code_width: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum_kind: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelSummary>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training: Option<Training>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assignment: Option<Assignment>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<RowCounts>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writer: Option<WriterInfo>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<BTreeMap<String, FileEntry>>,
    /// Version 2: the file that holds the partitions, and the bucket files that it counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partitions_file: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bucket_files: Vec<String>,
    /// Version 1: in the manifest itself. Version 2: empty until they are read.
    #[serde(default, skip_serializing_if = "PartitionTable::is_empty")]
    pub partitions: PartitionTable,
}

impl Manifest {
    /// Parse and check everything that can be checked without opening another file.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        // The version first: a later format may differ in every other key.
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let version: Version =
            serde_json::from_slice(bytes).map_err(|e| Error::corrupt(format!("manifest: not the JSON of a partition artifact: {e}")))?;
        if ![LISTED, TABLED].contains(&version.version) {
            return Err(Error::corrupt(format!(
                "manifest: format version {} is not known, expected {LISTED} or {TABLED}; upgrade lance-artifact if it is newer",
                version.version
            )));
        }
        let manifest: Self = serde_json::from_slice(bytes)
            .map_err(|e| Error::corrupt(format!("manifest: not the JSON of a version {} artifact: {e}", version.version)))?;
        manifest.check()?;
        if manifest.version == LISTED {
            manifest.check_partitions()?;
        }
        Ok(manifest)
    }

    /// One that was made, as if it had been parsed.
    pub fn checked(self) -> Result<Self> {
        self.check()?;
        self.check_partitions()?;
        Ok(self)
    }

    /// The file from which partitions are still to be read.
    pub fn unread_partitions(&self) -> Option<&str> {
        self.partitions_file.as_deref().filter(|_| self.partitions.is_empty())
    }

    /// The same, with the partitions that were read.
    pub fn with_partitions(self, partitions: PartitionTable) -> Result<Self> {
        let manifest = Self { partitions, ..self };
        manifest.check_partitions()?;
        Ok(manifest)
    }

    /// The model's file, or `None` where the artifact holds none, whatever may lie beside it.
    pub fn metadata_file(&self) -> Option<&str> {
        self.metadata_file.as_deref()
    }

    /// Every file of the artifact but the manifest. No manifest can name the files that hold a target's state.
    pub fn names(&self) -> BTreeSet<String> {
        let partitions = self.partitions.files().chain(self.bucket_files.iter().map(String::as_str));
        let described = self.files.iter().flat_map(|files| files.keys().map(String::as_str));
        let hidden = |name: &str| name.rsplit('/').next().is_some_and(|last| last.to_ascii_lowercase().starts_with(HIDDEN_PREFIX));
        let names = partitions.chain(described).chain(self.metadata_file()).chain(self.partitions_file.as_deref());
        names.filter(|name| !name.eq_ignore_ascii_case(MANIFEST_FILE) && !hidden(name)).map(str::to_string).collect()
    }

    /// All but the list of partitions, which may be long.
    pub fn without_partitions(&self) -> Self {
        Self {
            version: self.version,
            num_partitions: self.num_partitions,
            num_buckets: self.num_buckets,
            metadata_file: self.metadata_file.clone(),
            total_loss: self.total_loss,
            pq_code_width: self.pq_code_width,
            checksum_kind: self.checksum_kind.clone(),
            model: self.model.clone(),
            training: self.training,
            assignment: self.assignment.clone(),
            rows: self.rows.clone(),
            source: self.source.clone(),
            writer: self.writer.clone(),
            files: self.files.clone(),
            partitions_file: self.partitions_file.clone(),
            bucket_files: self.bucket_files.clone(),
            partitions: PartitionTable::default(),
        }
    }

    /// Bytes of memory, about.
    pub fn held_bytes(&self) -> u64 {
        let files = self.files.iter().flatten().map(|(name, _)| name.len() + 2 * size_of::<FileEntry>()).sum::<usize>();
        self.partitions.held_bytes() + files as u64
    }

    pub fn num_rows(&self) -> u64 {
        self.partitions.num_rows()
    }

    fn check(&self) -> Result<()> {
        if self.num_partitions == 0 {
            return Err(Error::corrupt("manifest: num_partitions is 0"));
        }
        match (self.version, &self.partitions_file) {
            (LISTED, None) if self.bucket_files.is_empty() => {}
            (TABLED, Some(file)) if self.partitions.is_empty() => check_path(file)?,
            _ => {
                return Err(Error::corrupt(
                    "manifest: version 1 lists its partitions, version 2 names partitions_file and bucket_files instead",
                ));
            }
        }
        for file in &self.bucket_files {
            check_path(file)?;
        }
        if self.pq_code_width.is_some_and(|width| width == 0 || i32::try_from(width).is_err()) {
            return Err(Error::corrupt(format!("manifest: pq_code_width is {:?}, expected 1 to {}", self.pq_code_width, i32::MAX)));
        }
        if let Some(file) = self.metadata_file() {
            check_path(file)?;
        } else if self.model.is_some() {
            return Err(Error::corrupt("manifest: it describes a model, and its metadata_file is null"));
        }
        for path in self.files.iter().flatten().map(|(path, _)| path) {
            check_path(path)?;
        }
        Ok(())
    }

    /// What the partitions claim, of each other and of the rest.
    fn check_partitions(&self) -> Result<()> {
        if self.partitions.len() != self.num_partitions {
            return Err(Error::corrupt(format!(
                "manifest: {} entries in partitions, expected num_partitions = {}",
                self.partitions.len(),
                self.num_partitions
            )));
        }
        if let Some((id, what)) = self.partitions.unchecked()
            && self.checksum_kind.as_deref() == Some(CHECKSUM_KIND)
        {
            return Err(Error::corrupt(format!("manifest: partition {id} has {what}, but checksum_kind is {CHECKSUM_KIND}")));
        }
        let total = self.num_rows();
        if let Some(counts) = &self.rows {
            if counts.written != total {
                return Err(Error::corrupt(format!("manifest: rows.written is {}, the partitions hold {total}", counts.written)));
            }
            let accounted = counts.dropped.values().try_fold(counts.written, |sum, rows| sum.checked_add(*rows));
            if accounted != Some(counts.seen) {
                return Err(Error::corrupt(format!(
                    "manifest: rows.seen is {}, expected the {} written and the dropped ones ({:?}); rows that a writer leaves out must be \
                     counted, or \"rows\" left out",
                    counts.seen, counts.written, counts.dropped
                )));
            }
        }
        self.check_overlaps()
    }

    /// No row of a file may be claimed twice. Gaps are reported by `verify`.
    fn check_overlaps(&self) -> Result<()> {
        self.partitions.for_each_file(|path, ranges| {
            for pair in ranges.windows(2) {
                if let [before, after] = pair
                    && before.offset + before.num_rows > after.offset
                {
                    return Err(Error::corrupt(format!(
                        "manifest: ranges of partitions {} and {} overlap in {path} (rows {}..{} and from {})",
                        before.partition,
                        after.partition,
                        before.offset,
                        before.offset + before.num_rows,
                        after.offset
                    )));
                }
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(more: &str) -> Result<Manifest> {
        let entry = r#"{"path": "partitions/x.lance", "num_rows": 1, "ranges": [{"offset": 0, "num_rows": 1}]}"#;
        Manifest::parse(format!(r#"{{"version": 1, "num_partitions": 1, "partitions": [{entry}]{more}}}"#).as_bytes())
    }

    #[test]
    fn no_model_is_said() {
        assert_eq!(parse("").unwrap().metadata_file(), Some(METADATA_FILE));
        assert_eq!(parse(r#", "metadata_file": null"#).unwrap().metadata_file(), None);
        assert_eq!(parse(r#", "metadata_file": "m.lance""#).unwrap().metadata_file(), Some("m.lance"));
        let model =
            r#""model": {"metric": "l2", "dtype": "float32", "dimension": 4, "num_sub_vectors": 2, "num_bits": 8, "fingerprint": ""}"#;
        assert!(matches!(parse(&format!(r#", "metadata_file": null, {model}"#)), Err(Error::CorruptArtifact(_))));
        let none = parse(r#", "metadata_file": null"#).unwrap();
        let again = Manifest::parse(&serde_json::to_vec(&none).unwrap()).unwrap();
        assert_eq!(again.metadata_file(), None);
    }

    #[test]
    fn names_are_those_of_files_that_may_be_deleted() {
        let files = r#", "files": {"b.lance": {"num_rows": 1, "size_bytes": 1}, "manifest.json": {"num_rows": 1, "size_bytes": 1},
            ".lance-artifact-claim": {"num_rows": 1, "size_bytes": 1}}"#;
        let names: Vec<String> = parse(files).unwrap().names().into_iter().collect();
        assert_eq!(names, ["b.lance", METADATA_FILE, "partitions/x.lance"]);
        assert!(!parse(r#", "metadata_file": null"#).unwrap().names().contains(METADATA_FILE));
    }
}
