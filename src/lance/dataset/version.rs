//! One version of a dataset.

use std::sync::Arc;

use object_store::path::Path;

use super::manifest::DatasetManifest;
use crate::error::{Error, Result};
use crate::io::without_credentials;

/// One version of a dataset, open. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Dataset(pub(in crate::lance) Arc<lance::Dataset>, DatasetManifest);

impl Dataset {
    pub(super) fn new(dataset: lance::Dataset) -> Self {
        let manifest = DatasetManifest(dataset.manifest().clone());
        Self(Arc::new(dataset), manifest)
    }

    /// As Lance has it, for the one place that hands it to Lance's index builder.
    pub fn as_lance(&self) -> &lance::Dataset {
        &self.0
    }

    pub fn manifest(&self) -> &DatasetManifest {
        &self.1
    }

    /// Without credentials.
    pub fn shown_uri(&self) -> String {
        without_credentials(self.0.uri())
    }

    /// An error with the dataset's place in front where it names none: many of Lance's do not.
    pub(in crate::lance) fn named(&self, error: impl Into<Error>) -> Error {
        let (error, uri) = (error.into(), self.shown_uri());
        if error.to_string().contains(&uri) { error } else { error.context(format!("reading dataset {uri}")) }
    }

    pub fn version(&self) -> u64 {
        self.1.version()
    }

    /// `None` for main.
    pub fn branch(&self) -> Option<&str> {
        self.1.branch()
    }

    /// Where a data file lies in the dataset's store.
    pub(super) fn data_file(&self, name: &str) -> Path {
        self.0.data_dir().join(name)
    }

    /// Whether row ids are numbers of their own rather than addresses.
    pub fn has_stable_row_ids(&self) -> bool {
        self.0.manifest().uses_stable_row_ids()
    }

    /// In order.
    pub fn fragment_ids(&self) -> Vec<u32> {
        self.0.manifest().fragments.iter().map(|f| f.id as u32).collect()
    }

    /// Fragments that were named, in the order of the dataset; all if `None`.
    pub fn select_fragments(&self, fragment_ids: Option<&[u32]>) -> Result<Vec<u32>> {
        let all = self.fragment_ids();
        let Some(ids) = fragment_ids else {
            return Ok(all);
        };
        let wanted: std::collections::BTreeSet<u32> = ids.iter().copied().collect();
        if wanted.is_empty() {
            return Err(Error::invalid("fragment_ids: got an empty list; expected at least one fragment id, or None for all"));
        }
        let found: Vec<u32> = all.into_iter().filter(|id| wanted.contains(id)).collect();
        if found.len() != wanted.len() {
            let missing: Vec<u32> = wanted.into_iter().filter(|id| !found.contains(id)).collect();
            return Err(Error::invalid(format!(
                "fragment_ids: fragments {missing:?} are not in {} at version {}",
                self.shown_uri(),
                self.version()
            )));
        }
        Ok(found)
    }
}
