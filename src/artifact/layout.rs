//! Every name and schema of the partition artifact, spelled in one place.

use std::sync::Arc;

use arrow_schema::{DataType, Field, Schema, SchemaRef};

use crate::error::{Error, Result};
use crate::model::item_field;

/// The version of the format that this crate writes, and the only one there is.
pub const FORMAT_VERSION: u32 = 1;
pub const MANIFEST_FILE: &str = "manifest.json";
pub const METADATA_FILE: &str = "metadata.lance";
pub const PARTITIONS_DIR: &str = "partitions";

pub const ROW_ID_COLUMN: &str = "_rowid";
pub const PART_ID_COLUMN: &str = "__ivf_part_id";
pub const PQ_CODE_COLUMN: &str = "__pq_code";

/// Buckets by default, where there are at least as many partitions.
pub const DEFAULT_MAX_BUCKETS: usize = 256;

/// `partitions/bucket-00005.lance`, or with an attempt's tag where an artifact is being replaced, so that the old one
/// stays whole until the new manifest is published.
pub fn bucket_path(bucket: usize, tag: Option<&str>) -> String {
    match tag {
        None => format!("{PARTITIONS_DIR}/bucket-{bucket:05}.lance"),
        Some(tag) => format!("{PARTITIONS_DIR}/bucket-{bucket:05}-{tag}.lance"),
    }
}

/// `metadata.lance`, tagged like [`bucket_path`].
pub fn metadata_path(tag: Option<&str>) -> String {
    match tag {
        None => METADATA_FILE.to_string(),
        Some(tag) => format!("metadata-{tag}.lance"),
    }
}

/// The type of a PQ code column. Lance's index builder needs the inner field nullable and named `item`.
pub fn pq_code_type(code_width: usize) -> DataType {
    DataType::FixedSizeList(item_field(DataType::UInt8), code_width as i32)
}

/// What a writer holds while it builds: plain names are its own, any other writer of that target tags its files.
pub const CLAIM_FILE: &str = ".lance-artifact-claim";

/// Whether a file of an artifact's folder is one that this crate's writer makes; everything else is left alone.
pub fn is_ours(path: &str) -> bool {
    let numbered = |name: &str, prefix: &str| {
        let Some(middle) = name.strip_prefix(prefix).and_then(|rest| rest.strip_suffix(".lance")) else {
            return false;
        };
        let (number, tag) = middle.split_once('-').map_or((middle, None), |(number, tag)| (number, Some(tag)));
        let digits = number.bytes().all(|b| b.is_ascii_digit());
        let tagged = tag.is_none_or(|tag| tag.len() == 8 && tag.bytes().all(|b| b.is_ascii_hexdigit()));
        digits && tagged && (prefix != "bucket-" || number.len() >= 5)
    };
    match path.split_once('/') {
        Some((PARTITIONS_DIR, name)) => !name.contains('/') && (numbered(name, "bucket-") || name.starts_with(".lance-artifact-")),
        Some(_) => false,
        None => path == METADATA_FILE || numbered(path, "metadata") || path.starts_with(".lance-artifact-"),
    }
}

/// The schema of a bucket file.
pub fn bucket_schema(code_width: usize) -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new(ROW_ID_COLUMN, DataType::UInt64, false),
        Field::new(PART_ID_COLUMN, DataType::UInt32, false),
        Field::new(PQ_CODE_COLUMN, pq_code_type(code_width), false),
    ]))
}

/// The schema of a partition as it is read back.
pub fn partition_schema(code_width: usize) -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new(ROW_ID_COLUMN, DataType::UInt64, false),
        Field::new(PQ_CODE_COLUMN, pq_code_type(code_width), false),
    ]))
}

/// Refuse a path of a manifest that could name anything outside the artifact.
pub fn check_relative_path(path: &str) -> Result<()> {
    let bad = path.is_empty()
        || path.starts_with('/')
        || path.contains('\\')
        || path.contains(':')
        || path.contains('%')
        || path.chars().any(char::is_control)
        || path.split('/').any(|part| part.is_empty() || part == "." || part == "..");
    if bad {
        return Err(Error::corrupt(format!(
            "manifest: file path {path:?} is refused: expected a relative path below the artifact, without '..', ':', '%' or '\\'"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_names_are_ours() {
        for ours in [bucket_path(7, None), bucket_path(123_456, Some("0a1b2c3d")), metadata_path(None), metadata_path(Some("0a1b2c3d"))] {
            assert!(is_ours(&ours), "{ours}");
        }
        assert!(is_ours("partitions/.lance-artifact-x1") && is_ours(CLAIM_FILE));
        for other in [
            "partitions_old/bucket-00007.lance",
            "partitions/bucket-00007.parquet",
            "partitions/x/bucket-00007.lance",
            "partitions/bucket-7.lance",
            "metadata_mine.lance",
            "metadata.lance.bak",
            "manifest.json",
            "notes.txt",
        ] {
            assert!(!is_ours(other), "{other}");
        }
    }

    #[test]
    fn paths_stay_below_the_artifact() {
        assert!(check_relative_path("partitions/bucket-00001.lance").is_ok());
        for bad in ["", "/a", "../a", "a/../b", "a//b", "./a", "s3://a/b", "a\\b", "a%2e%2e/b", "a\nb"] {
            assert!(check_relative_path(bad).is_err(), "{bad:?}");
        }
    }
}
