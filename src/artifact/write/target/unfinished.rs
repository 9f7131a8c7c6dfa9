//! What attempts that came to nothing left at a place, for somebody who wants to clean up without writing there.

use std::collections::BTreeMap;
use std::time::SystemTime;

use super::claim::Marks;
use super::leftovers::{Fate, fate, list};
use crate::artifact::format::{CLAIM_FILE, MANIFEST_FILE, Manifest, Ours, claim_file, ours};
use crate::error::Result;
use crate::lance::{LanceStore, StorageOptions};

/// Files of attempts that are over, and whether an attempt is at work there.
#[derive(Debug, Default)]
pub struct Unfinished {
    /// In the order in which they may be deleted.
    pub files: Vec<String>,
    pub is_busy: bool,
}

/// Look at a place; nothing is changed. Attempts of which it cannot be known from here whether they go on are taken for over if
/// `unknown_too`, and for busy otherwise.
pub async fn unfinished_files(uri: &str, storage_options: Option<&StorageOptions>, unknown_too: bool) -> Result<Unfinished> {
    let store = LanceStore::open(uri, storage_options).await?;
    let names = match store.read(MANIFEST_FILE).await? {
        Some(json) => Manifest::parse(&json).map_err(|e| e.context(store.uri()))?.names(),
        None => Default::default(),
    };
    // By tag, the plain names under none: newest file, and files.
    let mut attempts: BTreeMap<Option<String>, (SystemTime, Vec<String>)> = BTreeMap::new();
    for entry in list(&store, &names).await?.into_iter().filter(|entry| !entry.is_folder && !names.contains(&entry.path)) {
        let tag = match ours(&entry.path) {
            Some(Ours::Data(tag) | Ours::Claim(tag) | Ours::Temporary(tag)) => tag.map(str::to_string),
            _ => continue,
        };
        let (newest, files) = attempts.entry(tag).or_insert((entry.modified, Vec::new()));
        *newest = entry.modified.max(*newest);
        files.push(entry.path);
    }
    let plain = store.read(CLAIM_FILE).await?.as_deref().and_then(Marks::parse);
    let mut found = Unfinished::default();
    for (tag, (newest, files)) in attempts {
        let marks = match &tag {
            Some(tag) if plain.as_ref().is_none_or(|marks| marks.attempt != *tag) => {
                store.read(&claim_file(Some(tag))).await?.as_deref().and_then(Marks::parse)
            }
            _ => plain.clone(),
        };
        let alive = marks.as_ref().is_some_and(|marks| marks.owner.is_alive());
        if fate(marks.as_ref(), newest, SystemTime::now()) == Fate::Over || (unknown_too && !alive) {
            found.files.extend(files);
        } else {
            found.is_busy = true;
        }
    }
    // Claims last, so that it is known whose a file is as long as there is one to delete.
    found.files.sort_by_cached_key(|name| (matches!(ours(name), Some(Ours::Claim(_))), name.clone()));
    Ok(found)
}
