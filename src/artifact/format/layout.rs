//! Every name and schema of the partition artifact, spelled in one place.

use std::sync::Arc;

use arrow_schema::{DataType, Field, Schema, SchemaRef};

use crate::error::Result;
use crate::io::{HIDDEN_PREFIX, check_relative_path, outside};
use crate::model::item_field;

/// The version whose manifest lists the partitions itself. Other writers and readers know it.
pub const LISTED: u32 = 1;
/// The version whose partitions are in a file of their own, for so many ranges that JSON is no place for them.
pub const TABLED: u32 = 2;
pub const MANIFEST_FILE: &str = "manifest.json";
/// Of the first format: with so many ranges that JSON takes more, partitions are in a file of their own.
pub const MAX_MANIFEST_BYTES: u64 = 1 << 30;
pub const METADATA_FILE: &str = "metadata.lance";
pub const PARTITIONS_FILE: &str = "partitions.lance";
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

/// `partitions.lance`, tagged like [`bucket_path`].
pub fn partitions_path(tag: Option<&str>) -> String {
    match tag {
        None => PARTITIONS_FILE.to_string(),
        Some(tag) => format!("partitions-{tag}.lance"),
    }
}

/// The type of a PQ code column. Lance's index builder needs the inner field nullable and named `item`.
pub fn pq_code_type(code_width: usize) -> DataType {
    DataType::FixedSizeList(item_field(DataType::UInt8), code_width as i32)
}

/// Whoever creates or deletes a file of a plain name holds this one: plain names are the only ones that two attempts could share.
pub const CLAIM_FILE: &str = ".lance-artifact-claim";

/// The file that says whose an attempt is: [`CLAIM_FILE`] for plain names, or one with its tag.
pub fn claim_file(tag: Option<&str>) -> String {
    tag.map_or_else(|| CLAIM_FILE.to_string(), |tag| format!("{CLAIM_FILE}-{tag}"))
}

/// What begins the names of an attempt's temporary local files; random characters follow.
pub fn temporary_prefix(tag: &str) -> String {
    format!("{HIDDEN_PREFIX}{tag}-")
}

/// Refuse a path of a manifest that could name anything outside the artifact.
pub fn check_path(path: &str) -> Result<()> {
    check_relative_path(path)
}

/// A name that this crate's writer gives, and the attempt it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ours<'a> {
    /// A bucket file or a model.
    Data(Option<&'a str>),
    Claim(Option<&'a str>),
    /// Those of earlier releases had no tag.
    Temporary(Option<&'a str>),
    Lock,
}

/// Whether a file of an artifact's folder has one of our names, exactly; everything else is left alone.
pub fn ours(path: &str) -> Option<Ours<'_>> {
    let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
    if !folder.is_empty() && folder != PARTITIONS_DIR {
        return None;
    }
    if let Some(hidden) = name.strip_prefix(HIDDEN_PREFIX) {
        let random = |text: &str| text.len() == 6 && text.bytes().all(|b| b.is_ascii_alphanumeric());
        return match (hidden, hidden.split_once('-')) {
            ("claim", _) if folder.is_empty() => Some(Ours::Claim(None)),
            ("lock", _) if folder.is_empty() => Some(Ours::Lock),
            (_, Some(("claim", tag))) if folder.is_empty() && is_tag(tag) => Some(Ours::Claim(Some(tag))),
            (_, Some((tag, rest))) if is_tag(tag) && random(rest) => Some(Ours::Temporary(Some(tag))),
            (_, None) if random(hidden) => Some(Ours::Temporary(None)),
            _ => None,
        };
    }
    let stem = name.strip_suffix(".lance")?;
    if folder.is_empty() {
        let rest = stem.strip_prefix("metadata").or_else(|| stem.strip_prefix("partitions"))?;
        if rest.is_empty() {
            return Some(Ours::Data(None));
        }
        return rest.strip_prefix('-').filter(|tag| is_tag(tag)).map(|tag| Ours::Data(Some(tag)));
    }
    let rest = stem.strip_prefix("bucket-")?;
    let (number, tag) = rest.split_once('-').map_or((rest, None), |(number, tag)| (number, Some(tag)));
    (number.len() >= 5 && number.bytes().all(|b| b.is_ascii_digit()) && tag.is_none_or(is_tag)).then_some(Ours::Data(tag))
}

/// Eight hexadecimal digits, as [`new_tag`] makes them.
fn is_tag(text: &str) -> bool {
    text.len() == 8 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// A tag for an attempt.
pub fn new_tag() -> String {
    outside::unique()[..8].to_string()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::LOCK_FILE;

    #[test]
    fn only_our_own_names_are_ours() {
        let tag = new_tag();
        let of = Some(tag.as_str());
        assert!(is_tag(&tag));
        for (name, expected) in [
            (bucket_path(7, None), Ours::Data(None)),
            (bucket_path(123_456, of), Ours::Data(of)),
            (metadata_path(None), Ours::Data(None)),
            (metadata_path(of), Ours::Data(of)),
            (partitions_path(None), Ours::Data(None)),
            (partitions_path(of), Ours::Data(of)),
            (claim_file(None), Ours::Claim(None)),
            (claim_file(of), Ours::Claim(of)),
            (LOCK_FILE.to_string(), Ours::Lock),
            (format!("{}aB3xY9", temporary_prefix(&tag)), Ours::Temporary(of)),
            (format!("partitions/{}aB3xY9", temporary_prefix(&tag)), Ours::Temporary(of)),
            ("partitions/.lance-artifact-aB3xY9".to_string(), Ours::Temporary(None)),
        ] {
            assert_eq!(ours(&name), Some(expected), "{name}");
        }
        for other in [
            "partitions_old/bucket-00007.lance",
            "partitions/bucket-00007.parquet",
            "partitions/x/bucket-00007.lance",
            "partitions/bucket-7.lance",
            "partitions/bucket-00007-.lance",
            "partitions/bucket-00007-mine.lance",
            "partitions/bucket-00007-0A1B2C3D.lance",
            "partitions/metadata.lance",
            "partitions/.lance-artifact-claim",
            "bucket-00007.lance",
            "metadata2024.lance",
            "partitions2.lance",
            "metadata-2024.lance",
            "metadata_mine.lance",
            "metadata.lance.bak",
            "manifest.json",
            "notes.txt",
            ".lance-artifact-notes.txt",
            ".lance-artifact-claim-mine",
            ".lance-artifact-",
            "",
        ] {
            assert_eq!(ours(other), None, "{other}");
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
