//! Unfinished segments: whose they are, and what a killed build left.
//!
//! A segment's folder holds the marks of the process that builds it until right before the commit, which lists the folder. The
//! next build removes folders whose builder is certainly gone; those without marks, or of processes elsewhere, are left to
//! Lance's own cleanup, which takes them after seven days.

use std::collections::HashSet;
use std::sync::Arc;

use lance::Dataset;
use lance::index::DatasetIndexExt;
use lance_io::object_store::ObjectStore;
use object_store::path::Path;

use crate::error::{Error, Result};
use crate::owner::Owner;

const OWNER_FILE: &str = ".lance-artifact-owner";

fn owner_file(folder: &Path) -> Path {
    folder.clone().join(OWNER_FILE)
}

/// Leave marks in the folder of a segment that is about to be written.
pub async fn mark(store: &ObjectStore, folder: &Path) -> Result<()> {
    if store.has_direct_local_paths() {
        // On this thread: a write that goes on elsewhere would make the folder again after a cancelled build has removed it.
        let folder = std::path::PathBuf::from(lance_io::local::to_local_path(folder));
        std::fs::create_dir_all(&folder)?;
        return Ok(std::fs::write(folder.join(OWNER_FILE), Owner::this().to_json())?);
    }
    store.put(&owner_file(folder), Owner::this().to_json().as_bytes()).await?;
    Ok(())
}

/// Take the marks away: what is in the folder now is the segment.
pub async fn unmark(store: &ObjectStore, folder: &Path) -> Result<()> {
    match store.delete(&owner_file(folder)).await {
        Ok(()) | Err(lance_core::Error::NotFound { .. }) => Ok(()),
        Err(e) => Err(Error::from(e).context("removing the marks of an unfinished segment")),
    }
}

/// Remove the segments that killed builds left in a dataset; how many there were. Nothing depends on it: what cannot be listed
/// or removed stays.
pub async fn remove_leftovers(dataset: &Dataset) -> usize {
    let Ok(store) = dataset.object_store(None).await else { return 0 };
    let indices = dataset.indices_dir();
    let Ok(folders) = store.read_dir(indices.clone()).await else { return 0 };
    let Ok(committed) = dataset.load_indices().await else { return 0 };
    let committed: HashSet<String> = committed.iter().map(|index| index.uuid.to_string()).collect();
    let mut removed = 0;
    for folder in folders.iter().filter(|name| uuid::Uuid::parse_str(name).is_ok() && !committed.contains(*name)) {
        removed += usize::from(remove_if_gone(&store, indices.clone().join(folder.as_str())).await);
    }
    removed
}

async fn remove_if_gone(store: &Arc<ObjectStore>, folder: Path) -> bool {
    let Ok(marks) = store.read_one_all(&owner_file(&folder)).await else { return false };
    Owner::parse(&marks).is_some_and(|owner| owner.is_gone()) && store.remove_dir_all(folder).await.is_ok()
}
