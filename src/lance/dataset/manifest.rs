//! What a version of a dataset says of itself.

use lance_table::format::{Fragment, Manifest, pb};
use prost::Message;

use crate::error::{Error, Result};

/// The manifest of one version.
#[derive(Debug, Clone)]
pub struct DatasetManifest(pub(super) Manifest);

impl DatasetManifest {
    /// As pylance serializes it.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let bad = |e: &dyn std::error::Error| Error::invalid(format!("dataset: the handle's manifest cannot be read: {e}"));
        let manifest = pb::Manifest::decode(bytes).map_err(|e| bad(&e))?;
        Manifest::try_from(manifest).map(Self).map_err(|e| bad(&e))
    }

    pub fn version(&self) -> u64 {
        self.0.version
    }

    /// `None` for main.
    pub fn branch(&self) -> Option<&str> {
        self.0.branch.as_deref()
    }

    /// In what two manifests that ought to be one differ. Each commit has a transaction of its own, and each file a name of its own.
    pub fn difference(&self, found: &Self) -> Option<String> {
        let (handle, found) = (&self.0, &found.0);
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
}

/// The path of a file, and where that is, if it is another place than the dataset's own.
pub(super) type FileName<'a> = (&'a str, Option<u32>);

fn identity(fragment: &Fragment) -> (u64, Vec<FileName<'_>>, Option<(u64, u64)>) {
    let files = fragment.files.iter().chain(fragment.overlays.iter().map(|o| &o.data_file));
    let deletion = fragment.deletion_file.as_ref().map(|d| (d.read_version, d.id));
    (fragment.id, files.map(|f| (f.path.as_str(), f.base_id)).collect(), deletion)
}
