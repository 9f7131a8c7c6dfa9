//! What became of a dataset's rows between two versions.

use std::collections::{HashMap, HashSet};

use arrow_schema::DataType;
use lance::dataset::transaction::Operation;
use lance_table::format::Fragment;
use xxhash_rust::xxh3::Xxh3;

use super::manifest::FileName;
use super::version::Dataset;
use crate::error::Result;

/// What decides the values of a column in one fragment, and its row ids. Equal where neither was written anew.
#[derive(Debug, PartialEq)]
pub struct ColumnFiles {
    files: Vec<(String, Option<u32>)>,
    row_ids: Option<lance_table::format::RowIdMeta>,
}

/// The files that decide the values of a field in a fragment: those that hold it, then overlays in their order.
fn column_files(fragment: &Fragment, field_id: i32) -> Vec<FileName<'_>> {
    let holds = |fields: &[i32]| fields.contains(&field_id);
    let files = fragment.files.iter().filter(|file| holds(&file.fields));
    let overlays = fragment.overlays.iter().map(|overlay| &overlay.data_file).filter(|file| holds(&file.fields));
    files.chain(overlays).map(|file| (file.path.as_str(), file.base_id)).collect()
}

impl Dataset {
    /// The type of a field, or `None` where there is none.
    pub fn field_type(&self, field_id: i32) -> Option<DataType> {
        self.0.schema().field_by_id(field_id).map(|field| field.data_type())
    }

    /// The path of a field in this version.
    pub fn field_path(&self, field_id: i32) -> Result<String> {
        Ok(self.0.schema().field_path(field_id)?)
    }

    /// The field of a path.
    pub fn field_id(&self, path: &str) -> Option<i32> {
        self.0.schema().field(path).map(|field| field.id)
    }

    /// By fragment.
    pub fn column_files(&self, field_id: i32) -> HashMap<u32, ColumnFiles> {
        let of_fragment = |fragment: &Fragment| {
            let files = column_files(fragment, field_id).into_iter().map(|(path, base)| (path.to_string(), base)).collect();
            (fragment.id as u32, ColumnFiles { files, row_ids: fragment.row_id_meta.clone() })
        };
        self.0.manifest().fragments.iter().map(of_fragment).collect()
    }

    /// A fragment among some in which an overlay that is newer than a version gives rows other values of a field, and its version.
    pub fn overlaid_since(&self, field_id: i32, fragment_ids: &[u32], version: u64) -> Option<(u64, u64)> {
        let wanted: HashSet<u64> = fragment_ids.iter().map(|id| u64::from(*id)).collect();
        let fragments = self.0.manifest().fragments.iter().filter(|fragment| wanted.contains(&fragment.id));
        fragments
            .flat_map(|fragment| fragment.overlays.iter().map(|overlay| (fragment.id, overlay)))
            .find(|(_, overlay)| overlay.committed_version > version && overlay.data_file.fields.contains(&field_id))
            .map(|(id, overlay)| (id, overlay.committed_version))
    }

    /// A fingerprint over the names of the files that hold the column in some fragments. Names are unique to a write, and stay
    /// the same where a dataset is moved or copied.
    pub fn column_fingerprint(&self, fragment_ids: &[u32], field_id: i32) -> String {
        let chosen: HashSet<u64> = fragment_ids.iter().map(|id| u64::from(*id)).collect();
        let mut hash = Xxh3::new();
        for fragment in self.0.manifest().fragments.iter().filter(|f| chosen.contains(&f.id)) {
            for (path, _) in column_files(fragment, field_id) {
                hash.update(format!("{}:{path}\n", fragment.id).as_bytes());
            }
        }
        format!("{:032x}", hash.digest128())
    }

    /// Whether a row of a fragment that was deleted in an earlier version is live in this one.
    pub async fn rows_came_back(&self, then: &Self, fragment_id: u32) -> Result<bool> {
        let (Some(before), Some(after)) = (then.0.get_fragment(fragment_id as usize), self.0.get_fragment(fragment_id as usize)) else {
            return Ok(false);
        };
        let Some(file) = &before.metadata().deletion_file else { return Ok(false) };
        if after.metadata().deletion_file.as_ref().is_some_and(|now| (now.read_version, now.id) == (file.read_version, file.id)) {
            return Ok(false);
        }
        let Some(deleted) = before.get_deletion_vector().await? else { return Ok(false) };
        let now = after.get_deletion_vector().await?;
        Ok(deleted.iter().any(|row| !now.as_ref().is_some_and(|now| now.contains(row))))
    }

    /// Fragments that went because their rows were deleted, or updated and so moved, after a version. Those of which the history
    /// says nothing, or nothing any more, are not among them.
    pub async fn emptied_since(&self, version: u64) -> HashSet<u32> {
        let mut emptied = HashSet::new();
        for version in version + 1..=self.version() {
            match self.0.read_transaction_by_version(version).await.ok().flatten().map(|transaction| transaction.operation) {
                Some(Operation::Delete { deleted_fragment_ids, .. }) => emptied.extend(deleted_fragment_ids.iter().map(|id| *id as u32)),
                Some(Operation::Update { removed_fragment_ids, .. }) => emptied.extend(removed_fragment_ids.iter().map(|id| *id as u32)),
                _ => {}
            }
        }
        emptied
    }
}
