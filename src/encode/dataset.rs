//! A user's dataset, opened a second time. What is read must be what the user's handle *is*: neither another branch, nor
//! another dataset that was put in its place, nor one of the same name in another folder.

use std::collections::HashMap;
use std::sync::Arc;

use lance::Dataset;
use lance::dataset::builder::DatasetBuilder;
use lance_io::object_store::{ObjectStoreParams, StorageOptionsAccessor};
use lance_table::format::{Fragment, Manifest, pb};
use prost::Message;
use xxhash_rust::xxh3::Xxh3;

use crate::artifact::{StorageOptions, without_credentials};
use crate::error::{Error, Result};

/// The dataset of a caller's handle.
#[derive(Debug, Clone)]
pub struct DatasetHandle {
    /// Where the handle's branch is: absolute, credentials included.
    uri: String,
    /// What the handle shows.
    manifest: Manifest,
    options: Option<StorageOptions>,
    /// Of other places that hold files of the dataset, by their URI.
    base_options: HashMap<String, HashMap<String, String>>,
}

impl DatasetHandle {
    /// `uri`: of the dataset, or of the branch that the handle is on. `manifest`: the handle's, serialized by pylance.
    pub fn try_new(
        uri: &str,
        manifest: &[u8],
        options: Option<StorageOptions>,
        base_options: HashMap<String, HashMap<String, String>>,
    ) -> Result<Self> {
        let manifest = parse_manifest(manifest)?;
        let uri = match &manifest.branch {
            Some(branch) => branch_uri(uri, branch),
            None => uri.to_string(),
        };
        Ok(Self { uri, manifest, options, base_options })
    }

    /// The same place at another version.
    pub fn at(&self, manifest: Manifest) -> Self {
        Self { manifest, ..self.clone() }
    }

    /// Without credentials.
    pub fn shown_uri(&self) -> String {
        without_credentials(&self.uri)
    }

    pub fn version(&self) -> u64 {
        self.manifest.version
    }

    pub fn branch(&self) -> Option<&str> {
        self.manifest.branch.as_deref()
    }

    /// Open what the handle shows, or refuse what is not that.
    pub async fn open(&self) -> Result<Dataset> {
        let version = self.manifest.version;
        let dataset = self.load(Some(version)).await.map_err(|e| {
            e.context(format!(
                "dataset {}: version {version}, which the handle shows, cannot be opened again; it was cleaned up, or the dataset was \
                 moved or removed: open a new handle",
                self.place()
            ))
        })?;
        match difference(&self.manifest, dataset.manifest()) {
            None => Ok(dataset),
            Some(what) => Err(self.replaced(version, &what)),
        }
    }

    /// Open the latest version of the handle's branch, as it is in the store now, past every cache.
    pub async fn open_latest(&self) -> Result<Dataset> {
        let latest = self.load(None).await.map_err(|e| e.context(format!("dataset {}: its latest version", self.place())))?;
        if latest.manifest().branch != self.manifest.branch {
            return Err(self.replaced(latest.manifest().version, "branch"));
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
        match &self.manifest.branch {
            Some(branch) => format!("{} (branch {branch:?})", self.shown_uri()),
            None => self.shown_uri(),
        }
    }

    async fn load(&self, version: Option<u64>) -> Result<Dataset> {
        let mut builder = DatasetBuilder::from_uri(&self.uri);
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
        Ok(builder.load().await?)
    }
}

pub fn parse_manifest(bytes: &[u8]) -> Result<Manifest> {
    let bad = |e: &dyn std::error::Error| Error::invalid(format!("dataset: the handle's manifest cannot be read: {e}"));
    Manifest::try_from(pb::Manifest::decode(bytes).map_err(|e| bad(&e))?).map_err(|e| bad(&e))
}

/// Where a branch is. A handle on a branch has the dataset's own URI, or the branch's, depending on how it came about.
fn branch_uri(uri: &str, branch: &str) -> String {
    let (path, query) = uri.split_once('?').map_or((uri, None), |(path, query)| (path, Some(query)));
    let path = path.trim_end_matches('/');
    let suffix = format!("/tree/{branch}");
    let path = if path.ends_with(&suffix) { path.to_string() } else { format!("{path}{suffix}") };
    query.map_or(path.clone(), |query| format!("{path}?{query}"))
}

/// In what two manifests that ought to be one differ. Each commit has a transaction of its own, and each file a name of its own.
pub fn difference(handle: &Manifest, found: &Manifest) -> Option<String> {
    let fragments_differ = !handle.fragments.iter().map(identity).eq(found.fragments.iter().map(identity));
    let differences = [
        ("branch", handle.branch != found.branch),
        ("version", handle.version != found.version),
        ("transaction", handle.transaction_file != found.transaction_file),
        ("time", handle.timestamp_nanos != found.timestamp_nanos),
        ("row ids", handle.uses_stable_row_ids() != found.uses_stable_row_ids() || handle.next_row_id != found.next_row_id),
        ("fragments", fragments_differ),
    ];
    differences.into_iter().find_map(|(what, differs)| differs.then(|| what.to_string()))
}

type FileName<'a> = (&'a str, Option<u32>);

fn identity(fragment: &Fragment) -> (u64, Vec<FileName<'_>>, Option<(u64, u64)>) {
    let files = fragment.files.iter().chain(fragment.overlays.iter().map(|o| &o.data_file));
    let deletion = fragment.deletion_file.as_ref().map(|d| (d.read_version, d.id));
    (fragment.id, files.map(|f| (f.path.as_str(), f.base_id)).collect(), deletion)
}

/// The files that decide the values of a field in a fragment: those that hold it, then overlays in their order.
pub fn column_files(fragment: &Fragment, field_id: i32) -> Vec<FileName<'_>> {
    let holds = |fields: &[i32]| fields.contains(&field_id);
    let files = fragment.files.iter().filter(|file| holds(&file.fields));
    let overlays = fragment.overlays.iter().map(|overlay| &overlay.data_file).filter(|file| holds(&file.fields));
    files.chain(overlays).map(|file| (file.path.as_str(), file.base_id)).collect()
}

/// A fingerprint over the names of the files that hold the column in some fragments. Names are unique to a write, and stay
/// the same where a dataset is moved or copied.
pub fn data_files(dataset: &Dataset, fragment_ids: &[u32], field_id: i32) -> String {
    let chosen: std::collections::HashSet<u32> = fragment_ids.iter().copied().collect();
    let mut hash = Xxh3::new();
    for fragment in dataset.manifest().fragments.iter().filter(|f| chosen.contains(&(f.id as u32))) {
        for (path, _) in column_files(fragment, field_id) {
            hash.update(format!("{}:{path}\n", fragment.id).as_bytes());
        }
    }
    format!("{:032x}", hash.digest128())
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
