//! Deleting an artifact.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;

use super::claim::Claim;
use super::leftovers::{delete_plain, remove_folders};
use crate::artifact::format::{CLAIM_FILE, MANIFEST_FILE, Manifest, Ours, new_tag, ours};
use crate::artifact::read::read_manifest;
use crate::error::{Error, Result};
use crate::io::{Store, outside};
use crate::lance::{LanceStore, StorageOptions};

/// Delete an artifact: the manifest first, so that what is left at any moment is not an artifact any more. One that another
/// writer has put in its place meanwhile stays.
pub async fn delete_artifact(uri: &str, storage_options: Option<&StorageOptions>) -> Result<()> {
    delete_at(&LanceStore::open(uri, storage_options).await?).await
}

pub async fn delete_at(store: &LanceStore) -> Result<()> {
    let json = read_manifest(store).await?;
    let manifest = Manifest::parse(&json).map_err(|e| e.context(store.uri()))?;
    let names = manifest.names();
    // What is refused, as a link to another place is, is refused before anything is gone.
    names.iter().try_for_each(|name| store.path(name).map(|_| ()))?;
    delete_files(store, &json, &names).await
}

/// Delete the artifact whose manifest is `json`, which goes first, so that what is left at any moment is no artifact any more.
async fn delete_files(store: &Store, json: &Bytes, names: &BTreeSet<String>) -> Result<()> {
    const TRIES: usize = 20;
    const WAIT: Duration = Duration::from_millis(100);
    if !store.delete_if(MANIFEST_FILE, json).await? {
        return Err(Error::CommitConflict(format!("{}: another writer has replaced or deleted this artifact meanwhile", store.uri())));
    }
    let (plain, tagged): (Vec<String>, Vec<String>) = names.iter().cloned().partition(|name| ours(name) == Some(Ours::Data(None)));
    let deleted = store.delete(&tagged).await;
    let mut plain_deleted = Ok(());
    if !plain.is_empty() {
        let tag = new_tag();
        let mut claim = None;
        for _ in 0..TRIES {
            claim = Claim::take(store, &tag, true).await?;
            if claim.is_some() {
                break;
            }
            outside::sleep(WAIT).await;
        }
        plain_deleted = match claim {
            Some(claim) => delete_plain(store, &claim, &plain).await,
            None => Err(Error::Storage(format!(
                "{}: the artifact is deleted, but {} of its files are left: another build holds {CLAIM_FILE}",
                store.uri(),
                plain.len()
            ))),
        };
    }
    remove_folders(store, &names.iter().collect::<Vec<_>>());
    store.remove_empty_dirs(&[""]);
    deleted.and(plain_deleted)
}
