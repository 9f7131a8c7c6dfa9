//! What attempts have left at a target, and who may delete it: see [`attempt`](super::attempt).

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use super::claim::{Claim, Marks};
use crate::artifact::format::{CLAIM_FILE, MANIFEST_FILE, Manifest, Ours, PARTITIONS_DIR, claim_file, ours};
use crate::error::Result;
use crate::io::{Entry, Lock, Seen, Store, outside};

/// An attempt of which nothing was written for so long is taken for abandoned, where it cannot be known whether its process is
/// still there.
pub const ABANDONED_AFTER: Duration = Duration::from_secs(7 * 24 * 3600);

/// The folders of an artifact, `""` first and each after the one it is in.
pub fn folders(names: &BTreeSet<String>) -> BTreeSet<String> {
    let mut folders = BTreeSet::from([String::new(), PARTITIONS_DIR.to_string()]);
    for name in names {
        folders.extend(name.match_indices('/').map(|(at, _)| name[..at].to_string()));
    }
    folders
}

/// What is in these folders; nothing else of the target is looked at.
pub async fn list(store: &Store, names: &BTreeSet<String>) -> Result<Vec<Entry>> {
    let mut entries: Vec<Entry> = Vec::new();
    for folder in folders(names) {
        if folder.is_empty() || entries.iter().any(|entry| entry.is_folder && entry.path == folder) {
            entries.extend(store.list_folder(&folder).await?);
        }
    }
    Ok(entries)
}

/// What became of the process that an attempt was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It is certainly gone, or nothing was heard of it for very long.
    Over,
    /// It may still be there.
    Unknown,
}

pub fn fate(marks: Option<&Marks>, newest: SystemTime, now: SystemTime) -> Fate {
    let old = now.duration_since(newest).is_ok_and(|age| age > ABANDONED_AFTER);
    match marks {
        Some(marks) if marks.is_over() => Fate::Over,
        Some(marks) if marks.is_alive() => Fate::Unknown,
        _ if old => Fate::Over,
        _ => Fate::Unknown,
    }
}

/// Deletes waste for an attempt that has just published.
pub struct Cleaner<'a> {
    pub store: &'a Store,
    pub tag: &'a str,
    pub plain: bool,
    /// The manifest that it has published, and the files that this one names.
    pub json: &'a Bytes,
    pub names: &'a BTreeSet<String>,
    /// The files of the artifact that it replaced.
    pub replaced: &'a BTreeSet<String>,
}

/// What was found at the target.
struct Found {
    /// By tag: newest file, and files, claims among them.
    tagged: BTreeMap<String, (SystemTime, Vec<String>)>,
    plain: Vec<Entry>,
    plain_claim: Option<(SystemTime, Seen)>,
    /// Temporary files of earlier releases.
    untagged: Vec<Entry>,
    has_lock: bool,
}

impl Cleaner<'_> {
    pub async fn run(&self) -> Result<()> {
        let now = outside::now();
        let found = self.find().await?;
        let plain_marks = found.plain_claim.as_ref().and_then(|(_, seen)| Marks::parse(&seen.content));
        let mut doomed: Vec<String> = Vec::new();
        let mut plain_newest = found.plain_claim.as_ref().map_or(SystemTime::UNIX_EPOCH, |(modified, _)| *modified);
        plain_newest = found.plain.iter().map(|entry| entry.modified).fold(plain_newest, SystemTime::max);
        if let Some((newest, _)) = plain_marks.as_ref().and_then(|marks| found.tagged.get(&marks.attempt)) {
            plain_newest = plain_newest.max(*newest);
        }
        let plain_fate = fate(plain_marks.as_ref(), plain_newest, now);
        for (tag, (newest, files)) in &found.tagged {
            let over = match &plain_marks {
                Some(marks) if marks.attempt == *tag => plain_fate == Fate::Over,
                _ => {
                    let marks = match self.store.read(&claim_file(Some(tag))).await? {
                        Some(claim) => Marks::parse(&claim),
                        None => None,
                    };
                    fate(marks.as_ref(), *newest, now) == Fate::Over
                }
            };
            if over {
                doomed.extend(files.iter().filter(|file| !self.names.contains(*file)).cloned());
            }
        }
        doomed.extend(found.untagged.iter().filter(|e| fate(None, e.modified, now) == Fate::Over).map(|e| e.path.clone()));
        let replaced: Vec<&String> = self.replaced.difference(self.names).collect();
        doomed.extend(replaced.iter().filter(|name| ours(name) != Some(Ours::Data(None))).map(|name| (*name).clone()));
        // Claims last, so that it is known whose a file is as long as there is one to delete.
        doomed.sort_by_cached_key(|name| (matches!(ours(name), Some(Ours::Claim(_))), name.clone()));
        doomed.dedup();
        // Who is gone was found out first: nobody who was gone then can have published since. If another one has, and replaced
        // this artifact, then cleaning up is its business.
        if self.store.read(MANIFEST_FILE).await?.is_none_or(|there| there != self.json) {
            return Ok(());
        }
        let deleted = self.store.delete(&doomed).await;
        let waste: Vec<String> = found
            .plain
            .iter()
            .filter(|entry| !self.names.contains(&entry.path))
            .filter(|entry| match &found.plain_claim {
                Some(_) => plain_fate == Fate::Over,
                None => self.replaced.contains(&entry.path) || fate(None, entry.modified, now) == Fate::Over,
            })
            .map(|entry| entry.path.clone())
            .collect();
        let plain = match &found.plain_claim {
            // This attempt's own claim: the target was fresh.
            _ if self.plain => Ok(()),
            Some((_, left)) if plain_fate == Fate::Over => match Claim::take_over(self.store, self.tag, left).await? {
                Some(claim) => delete_plain(self.store, &claim, &waste).await,
                None => Ok(()),
            },
            None if !waste.is_empty() => match Claim::take(self.store, self.tag, true).await? {
                Some(claim) => delete_plain(self.store, &claim, &waste).await,
                None => Ok(()),
            },
            _ => Ok(()),
        };
        if found.has_lock
            && let Some(root) = self.store.local_root().map(std::path::Path::to_path_buf)
        {
            // Taking it removes it, unless it is somebody's.
            let _ = tokio::task::spawn_blocking(move || Lock::take(&root).map(drop)).await?;
        }
        remove_folders(self.store, &replaced);
        deleted.and(plain)
    }

    async fn find(&self) -> Result<Found> {
        let mut found = Found { tagged: BTreeMap::new(), plain: Vec::new(), plain_claim: None, untagged: Vec::new(), has_lock: false };
        let mut entries = list(self.store, self.names).await?;
        let mut claim = None;
        if !self.plain && entries.iter().any(|entry| ours(&entry.path) == Some(Ours::Claim(None))) {
            // Before the files: a claim that is put after this is not taken for as old as the one that was there.
            claim = self.store.see(CLAIM_FILE).await?;
            entries = list(self.store, self.names).await?;
        }
        for entry in entries.into_iter().filter(|entry| !entry.is_folder) {
            match ours(&entry.path) {
                Some(Ours::Data(Some(tag)) | Ours::Claim(Some(tag)) | Ours::Temporary(Some(tag))) if tag != self.tag => {
                    let (newest, files) = found.tagged.entry(tag.to_string()).or_insert((entry.modified, Vec::new()));
                    *newest = entry.modified.max(*newest);
                    files.push(entry.path);
                }
                Some(Ours::Data(None)) => found.plain.push(entry),
                Some(Ours::Claim(None)) => found.plain_claim = claim.take().map(|seen| (entry.modified, seen)),
                Some(Ours::Temporary(None)) => found.untagged.push(entry),
                Some(Ours::Lock) => found.has_lock = true,
                _ => {}
            }
        }
        Ok(found)
    }
}

/// Delete files of plain names, and give up the claim on them.
///
/// They were seen before the claim was taken: others may have deleted them since, and somebody used their names anew and published. From
/// the claim on nobody uses them, so what the manifest that is there now does not name is waste.
pub async fn delete_plain(store: &Store, claim: &Claim, files: &[String]) -> Result<()> {
    let deleted = async {
        let named = match store.read(MANIFEST_FILE).await? {
            Some(json) => Manifest::parse(&json)?.names(),
            None => BTreeSet::new(),
        };
        store.delete(&files.iter().filter(|file| !named.contains(*file)).cloned().collect::<Vec<_>>()).await
    };
    let deleted = deleted.await;
    deleted.and(claim.release(store).await)
}

/// Remove the folders of deleted files where nothing is left in them.
pub fn remove_folders(store: &Store, deleted: &[&String]) {
    let names = deleted.iter().map(|name| (*name).clone()).collect();
    let folders = folders(&names);
    let deepest_first: Vec<&str> = folders.iter().rev().map(String::as_str).filter(|folder| !folder.is_empty()).collect();
    store.remove_empty_dirs(&deepest_first);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_come_before_what_is_in_them() {
        let names = BTreeSet::from(["x/y/z.lance".to_string(), "metadata.lance".to_string()]);
        assert_eq!(folders(&names).into_iter().collect::<Vec<_>>(), ["", "partitions", "x", "x/y"]);
    }

    #[test]
    fn only_the_old_and_the_gone_are_over() {
        let now = SystemTime::now();
        let old = now - ABANDONED_AFTER - Duration::from_secs(1);
        let marks = |json: &str| Marks::parse(format!(r#"{{"attempt": "0a1b2c3d", "owner": {json}}}"#).as_bytes());
        let this = marks(&crate::io::Owner::this().to_json());
        let elsewhere = marks(r#"{"host": "elsewhere", "pid": 1, "started": "1"}"#);
        assert!(this.is_some() && elsewhere.is_some());
        assert_eq!(fate(this.as_ref(), old, now), Fate::Unknown);
        for unknown in [elsewhere, None] {
            assert_eq!(fate(unknown.as_ref(), now, now), Fate::Unknown);
            assert_eq!(fate(unknown.as_ref(), now + Duration::from_secs(60), now), Fate::Unknown);
            assert_eq!(fate(unknown.as_ref(), old, now), Fate::Over);
        }
    }
}
