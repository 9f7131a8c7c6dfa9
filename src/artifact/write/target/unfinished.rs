//! What attempts that came to nothing left at a place, for somebody who wants to clean up without writing there.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use super::claim::{Claim, Marks};
use super::leftovers::{Fate, delete_plain, fate, list};
use crate::artifact::format::{CLAIM_FILE, MANIFEST_FILE, Manifest, Ours, PARTITIONS_DIR, claim_file, new_tag, ours};
use crate::error::{Error, Result};
use crate::io::{Entry, Seen, Store, outside};
use crate::lance::{LanceStore, StorageOptions};

/// Files of attempts that are over, and whether an attempt is at work there.
#[derive(Debug, Default)]
pub struct Unfinished {
    /// In the order in which they may be deleted.
    pub files: Vec<String>,
    pub is_busy: bool,
    /// The claim on plain names as it was.
    plain_claim: Option<Seen>,
}

/// Look at a place; nothing is changed. Attempts of which it cannot be known from here whether they go on are taken for over if
/// `unknown_too`, and for busy otherwise.
pub async fn unfinished_files(uri: &str, storage_options: Option<&StorageOptions>, unknown_too: bool) -> Result<Unfinished> {
    let store = LanceStore::open(uri, storage_options).await?;
    unfinished_at(&store, unknown_too).await
}

/// Delete what is unfinished there, and local folders that are empty then.
pub async fn delete_unfinished(uri: &str, storage_options: Option<&StorageOptions>, unknown_too: bool) -> Result<()> {
    let store = LanceStore::open(uri, storage_options).await?;
    delete_unfinished_at(&store, unknown_too).await
}

pub async fn delete_unfinished_at(store: &Store, unknown_too: bool) -> Result<()> {
    let found = unfinished_at(store, unknown_too).await?;
    let is_plain = |name: &String| matches!(ours(name), Some(Ours::Data(None) | Ours::Claim(None)));
    let (plain, tagged): (Vec<String>, Vec<String>) = found.files.into_iter().partition(is_plain);
    let mut deleted = store.delete(&tagged).await;
    if !plain.is_empty() {
        // Somebody else may be faster, and use these names before this one comes to delete them.
        let tag = new_tag();
        let claim = match &found.plain_claim {
            Some(left) => match Claim::take_over(store, &tag, left).await {
                // Without locks nobody takes a claim over: it is removed, and free for the first who comes.
                Err(Error::InvalidInput(_)) if store.delete_if(CLAIM_FILE, &left.content).await? => Claim::take(store, &tag, true).await?,
                taken => taken?,
            },
            None => Claim::take(store, &tag, true).await?,
        };
        if let Some(claim) = claim {
            let files: Vec<String> = plain.into_iter().filter(|name| name != CLAIM_FILE).collect();
            deleted = deleted.and(delete_plain(store, &claim, &files).await);
        }
    }
    store.remove_empty_dirs(&[PARTITIONS_DIR, ""]);
    deleted
}

pub async fn unfinished_at(store: &Store, unknown_too: bool) -> Result<Unfinished> {
    // What is young when it is looked at does not get old by that, however long this takes.
    let now = outside::now();
    // Before the files: a claim that is put after this is not taken for as old as what others left under its names.
    let plain_claim = store.see(CLAIM_FILE).await?;
    let plain = plain_claim.as_ref().and_then(|seen| Marks::parse(&seen.content));
    // By tag, the plain names under none.
    let mut attempts: BTreeMap<Option<String>, Vec<Entry>> = BTreeMap::new();
    let mut published = SystemTime::UNIX_EPOCH;
    for entry in list(store, &BTreeSet::new()).await?.into_iter().filter(|entry| !entry.is_folder) {
        if let Some(Ours::Data(tag) | Ours::Claim(tag) | Ours::Temporary(tag)) = ours(&entry.path) {
            attempts.entry(tag.map(str::to_string)).or_default().push(entry);
        } else if entry.path == MANIFEST_FILE {
            published = entry.modified;
        }
    }
    let mut all_marks = Vec::new();
    for tag in attempts.keys() {
        all_marks.push(match tag {
            Some(tag) if plain.as_ref().is_none_or(|marks| marks.attempt != *tag) => {
                store.read(&claim_file(Some(tag))).await?.as_deref().and_then(Marks::parse)
            }
            _ => plain.clone(),
        });
    }
    // Last: who had given up his claim before has published, or never will.
    let names = match store.read(MANIFEST_FILE).await? {
        Some(json) => Manifest::parse(&json).map_err(|e| e.context(store.uri()))?.names(),
        None => BTreeSet::new(),
    };
    // Who holds the plain names is one attempt with its tag. Under plain names without a claim files may be anybody's.
    let attempt_of = |tag: &Option<String>| tag.clone().or_else(|| plain.as_ref().map(|marks| marks.attempt.clone()));
    let mut heard: BTreeMap<Option<String>, SystemTime> = BTreeMap::new();
    for (tag, entries) in &attempts {
        let attempt = attempt_of(tag);
        for entry in entries {
            let modified = match names.contains(&entry.path) {
                true if attempt.is_none() => continue,
                true => entry.modified.max(published),
                false => entry.modified,
            };
            let newest = heard.entry(attempt.clone()).or_insert(modified);
            *newest = modified.max(*newest);
        }
    }
    let mut found = Unfinished { plain_claim, ..Default::default() };
    for ((tag, mut entries), marks) in attempts.into_iter().zip(all_marks) {
        entries.retain(|entry| !names.contains(&entry.path));
        let Some(newest) = heard.get(&attempt_of(&tag)).filter(|_| !entries.is_empty()) else { continue };
        let alive = marks.as_ref().is_some_and(Marks::is_alive);
        if fate(marks.as_ref(), *newest, now) == Fate::Over || (unknown_too && !alive) {
            found.files.extend(entries.into_iter().map(|entry| entry.path));
        } else {
            found.is_busy = true;
        }
    }
    // Claims last, so that it is known whose a file is as long as there is one to delete.
    found.files.sort_by_cached_key(|name| (matches!(ours(name), Some(Ours::Claim(_))), name.clone()));
    Ok(found)
}
