//! A user's dataset, opened a second time. What is read must be what the user's handle *is*: neither another branch, nor
//! another dataset that was put in its place, nor one of the same name in another folder.

use std::collections::HashMap;
use std::sync::Arc;

use lance::dataset::builder::DatasetBuilder;
use lance_io::object_store::{ObjectStoreParams, StorageOptionsAccessor};

use super::manifest::DatasetManifest;
use super::version::Dataset;
use crate::error::{Error, Result};
use crate::io::{without_credentials, without_quoted_credentials};
use crate::lance::StorageOptions;

/// The dataset of a caller's handle.
#[derive(Debug, Clone)]
pub struct DatasetHandle {
    /// Where the handle's branch is: absolute, credentials included.
    uri: String,
    /// What the handle shows.
    manifest: DatasetManifest,
    options: Option<StorageOptions>,
    /// Of other places that hold files of the dataset, by their URI.
    base_options: HashMap<String, HashMap<String, String>>,
}

/// Of small things, such as the details of fragments that were compacted.
const INDEX_CACHE_BYTES: usize = 16 << 20;

impl DatasetHandle {
    /// `uri`: of the dataset, or of the branch that the handle is on. `manifest`: the handle's, serialized by pylance.
    pub fn try_new(
        uri: &str,
        manifest: &[u8],
        options: Option<StorageOptions>,
        base_options: HashMap<String, HashMap<String, String>>,
    ) -> Result<Self> {
        let manifest = DatasetManifest::parse(manifest)?;
        let uri = match manifest.branch() {
            Some(branch) => branch_uri(uri, branch),
            None => uri.to_string(),
        };
        Ok(Self { uri, manifest, options, base_options })
    }

    /// The same place at another version.
    pub fn at(&self, manifest: DatasetManifest) -> Self {
        Self { manifest, ..self.clone() }
    }

    /// Without credentials.
    pub fn shown_uri(&self) -> String {
        without_credentials(&self.uri)
    }

    pub fn version(&self) -> u64 {
        self.manifest.version()
    }

    pub fn branch(&self) -> Option<&str> {
        self.manifest.branch()
    }

    /// Open what the handle shows, or refuse what is not that.
    pub async fn open(&self) -> Result<Dataset> {
        let version = self.manifest.version();
        let dataset = self.load(Some(version)).await.map_err(|e| {
            e.context(format!(
                "dataset {}: version {version}, which the handle shows, cannot be opened again; it was cleaned up, or the dataset was \
                 moved or removed: open a new handle",
                self.place()
            ))
        })?;
        match self.manifest.difference(dataset.manifest()) {
            None => Ok(dataset),
            Some(what) => Err(self.replaced(version, &what)),
        }
    }

    /// Open the latest version of the handle's branch, as it is in the store now, past every cache.
    pub async fn open_latest(&self) -> Result<Dataset> {
        let latest = self.load(None).await.map_err(|e| e.context(format!("dataset {}: its latest version", self.place())))?;
        if latest.branch() != self.manifest.branch() {
            return Err(self.replaced(latest.version(), "branch"));
        }
        Ok(latest)
    }

    fn replaced(&self, version: u64, what: &str) -> Error {
        Error::CommitConflict(format!(
            "dataset {}: version {version} is not the one that the handle shows ({what} differs); it was removed and written anew, or a \
             relative path now leads elsewhere: nothing was changed; open a new handle",
            self.place()
        ))
    }

    fn place(&self) -> String {
        match self.manifest.branch() {
            Some(branch) => format!("{} (branch {branch:?})", self.shown_uri()),
            None => self.shown_uri(),
        }
    }

    async fn load(&self, version: Option<u64>) -> Result<Dataset> {
        // Indexes are opened once for their models, which are the caller's then: none is to stay beside its `memory_limit`.
        let mut builder = DatasetBuilder::from_uri(&self.uri).with_index_cache_size_bytes(INDEX_CACHE_BYTES);
        if let Some(version) = version {
            builder = builder.with_version(version);
        }
        if let Some(options) = &self.options {
            builder = builder.with_storage_options_accessor(options.clone());
        }
        for (base, options) in &self.base_options {
            let accessor = Arc::new(StorageOptionsAccessor::with_static_options(options.clone()));
            builder =
                builder.with_base_store_params(base, ObjectStoreParams { storage_options_accessor: Some(accessor), ..Default::default() });
        }
        let loaded = builder.load().await.map_err(|e| Error::from(e).reworded(|message| without_quoted_credentials(&message, &self.uri)));
        Ok(Dataset::new(loaded?))
    }
}

/// Where a branch is. A handle on a branch has the dataset's own URI, or the branch's, depending on how it came about.
fn branch_uri(uri: &str, branch: &str) -> String {
    let (path, query) = uri.split_once('?').map_or((uri, None), |(path, query)| (path, Some(query)));
    let path = path.trim_end_matches('/');
    let suffix = format!("/tree/{branch}");
    let path = if path.ends_with(&suffix) { path.to_string() } else { format!("{path}{suffix}") };
    query.map_or(path.clone(), |query| format!("{path}?{query}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_branch_is_found_from_either_uri() {
        for uri in ["/data/t.lance", "/data/t.lance/", "/data/t.lance/tree/exp"] {
            assert_eq!(branch_uri(uri, "exp"), "/data/t.lance/tree/exp");
        }
        assert_eq!(branch_uri("s3+ddb://b/t.lance?ddbTableName=x", "a/b"), "s3+ddb://b/t.lance/tree/a/b?ddbTableName=x");
    }
}
