//! A target: the place where an attempt publishes an artifact, which others may be writing to at the same time.
//!
//! The protocol is *look, claim, publish, clean up*:
//!
//! 1. `look`: refuse what is no place for an artifact, and remember the manifest that is to be replaced, if there is one.
//! 2. `claim`: take a tag, and the plain names where the target is fresh (see [`claim`](super::claim)).
//! 3. `publish`: put the manifest on condition that the one that was seen is still there, or none is.
//! 4. `clean_up` (see [`leftovers`](super::leftovers)) or `abandon`.
//!
//! A file's name belongs to one attempt, so nothing that an attempt does before it publishes can be seen by readers of the
//! artifact, and an attempt that was stopped for days and wakes up finds that its manifest is not wanted any more.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use rand::Rng;

use super::claim::Claim;
use super::leftovers::{self, Cleaner};
use crate::artifact::format::{FileEntry, MANIFEST_FILE, Manifest, Ours, PARTITIONS_DIR, new_tag, ours, temporary_prefix};
use crate::error::{Error, Result};
use crate::io::{Condition, Entry, Seen, outside, parents_of_new, sync_dir};
use crate::lance::LanceStore;

/// How often a small request is tried before the caller is told, and how long to wait after the first time; then twice as long.
const TRIES: u32 = 6;
const FIRST_WAIT: Duration = Duration::from_millis(200);
/// How often a wait looks whether it is still wanted.
const WAIT_POLL: Duration = Duration::from_millis(50);
/// How often a claim is tried where others come and go.
const CLAIM_TRIES: usize = 10;
/// Other things of a folder that a refusal names.
const MAX_NAMED: usize = 5;

/// An artifact that is to be replaced.
#[derive(Debug)]
struct Replaced {
    seen: Seen,
    names: BTreeSet<String>,
}

/// What was at the target when the attempt looked.
struct Look {
    replaced: Option<Replaced>,
    /// Files of plain names are there, whosoever they are.
    has_plain: bool,
}

/// The place that one attempt has claimed.
pub struct Target {
    store: LanceStore,
    tag: String,
    /// Its files have plain names; otherwise they carry the tag.
    plain: bool,
    claim: Claim,
    replaced: Option<Replaced>,
    /// A local folder that was there before stays.
    had_root: bool,
    /// Folders that get an entry for a folder that this attempt makes.
    parents: Vec<PathBuf>,
    /// Publishing was tried, so the manifest may be there, whatever the answer was.
    tried: AtomicBool,
}

impl Target {
    /// Refuse a target that holds an artifact (unless it is to be replaced) or anything else, then claim it. Nothing but the claim
    /// is put there.
    ///
    /// With `sync` it is known from then on that what it takes to make the files durable can be had.
    pub async fn claim(store: &LanceStore, overwrite: bool, sync: bool) -> Result<Self> {
        let had_root = store.local_root().is_some_and(Path::exists);
        let parents = store.local_root().map(parents_of_new).unwrap_or_default();
        if let Some(parent) = parents.last().filter(|parent| sync && parent.is_dir()) {
            std::fs::File::open(parent).map_err(|e| {
                let what = format!("{}: the folder {} cannot be synced; pass sync=False", store.uri(), parent.display());
                Error::from(e).context(what)
            })?;
        }
        for _ in 0..CLAIM_TRIES {
            let look = look(store, overwrite).await?;
            let tag = new_tag();
            let store = store.with_temporary_prefix(temporary_prefix(&tag));
            let mut plain = None;
            if look.replaced.is_none() && !look.has_plain {
                plain = Claim::take(&store, &tag, true).await?;
            }
            let is_plain = plain.is_some();
            let Some(claim) = (match plain {
                Some(claim) => Some(claim),
                None => Claim::take(&store, &tag, false).await?,
            }) else {
                // The tag is another's.
                continue;
            };
            let checked = async {
                claim.check_conditions(&store, look.replaced.is_some()).await?;
                // Between the look and the claim of the plain names another attempt may have used them and published.
                Ok(!is_plain || is_fresh(&store).await?)
            };
            match checked.await {
                Ok(true) => {
                    return Ok(Self {
                        store,
                        tag,
                        plain: is_plain,
                        claim,
                        replaced: look.replaced,
                        had_root,
                        parents,
                        tried: AtomicBool::new(false),
                    });
                }
                Ok(false) => claim.release(&store).await?,
                Err(error) => {
                    let _ = claim.release(&store).await;
                    remove_dirs(&store, had_root).await;
                    return Err(error);
                }
            }
        }
        Err(Error::Storage(format!("{}: other writers claim this place and leave it all the time; try again", store.uri())))
    }

    /// The place, for this attempt's files.
    pub fn store(&self) -> &LanceStore {
        &self.store
    }

    /// What the names of this attempt's files carry.
    pub fn file_tag(&self) -> Option<&str> {
        (!self.plain).then_some(self.tag.as_str())
    }

    /// Before files appear under their names: the artifact is still wanted, and the names are still this attempt's.
    pub async fn check(&self, stopped: impl Fn() -> bool + Send + Sync) -> Result<()> {
        let check = || async {
            self.expected(self.store.see(MANIFEST_FILE).await?)?;
            self.check_claim().await
        };
        retry(&stopped, check).await
    }

    async fn check_claim(&self) -> Result<()> {
        if self.plain && !self.claim.is_held(&self.store).await? {
            return Err(Error::CommitConflict(format!(
                "{}: this build's claim is gone: its files were removed, or another build took it for abandoned; nothing was \
                 published, build again",
                self.store.uri()
            )));
        }
        Ok(())
    }

    /// The manifest that is there, if it is still what this attempt may replace.
    fn expected(&self, there: Option<Seen>) -> Result<Option<Seen>> {
        match (there, &self.replaced) {
            (None, _) => Ok(None),
            (Some(there), Some(replaced)) if there.content == replaced.seen.content => Ok(Some(there)),
            (Some(_), Some(_)) => Err(Error::ArtifactExists(format!(
                "{} holds another artifact than the one that was to be replaced: another writer published meanwhile, and its \
                 artifact stays; build again to replace that one",
                self.store.uri()
            ))),
            (Some(_), None) => Err(already_exists(&self.store, "was published by another writer while this one was being written")),
        }
    }

    /// Make the names of what was written so far durable, those of new folders included.
    pub fn sync(&self) -> Result<()> {
        self.store.sync_dirs(&["", PARTITIONS_DIR])?;
        for parent in &self.parents {
            sync_dir(parent).map_err(|e| Error::from(e).context(format!("syncing the folder {}", parent.display())))?;
        }
        Ok(())
    }

    /// Publish the manifest: put it, look what is there, and after a failure wait and try again, because an answer may be lost on
    /// its way. After a [`Error::Storage`] this may be called again.
    pub async fn publish(
        &self,
        json: &Bytes,
        files: &BTreeMap<String, FileEntry>,
        sync: bool,
        stopped: impl Fn() -> bool + Send + Sync,
    ) -> Result<()> {
        let message = match retry(&stopped, || self.try_publish(json, files, sync)).await {
            Err(Error::Storage(message)) => message,
            done => return done,
        };
        // The last put may have arrived all the same.
        let known = match self.store.read(MANIFEST_FILE).await {
            Ok(Some(there)) if there == json => return Ok(()),
            Ok(_) => "it is not published",
            Err(_) => "it is not known whether it is published",
        };
        Err(Error::Storage(format!(
            "publishing the artifact failed {TRIES} times, and {known}: {message}; its files are complete: call finish() again to \
             publish it, or abort() to remove them"
        )))
    }

    async fn try_publish(&self, json: &Bytes, files: &BTreeMap<String, FileEntry>, sync: bool) -> Result<()> {
        let there = self.store.see(MANIFEST_FILE).await?;
        if there.as_ref().is_some_and(|there| there.content == json) {
            return Ok(());
        }
        let expected = self.expected(there)?;
        self.check_claim().await?;
        self.check_files(files).await?;
        let condition = expected.as_ref().map_or(Condition::Absent, Condition::Unchanged);
        self.tried.store(true, Ordering::Relaxed);
        if self.store.put_if(MANIFEST_FILE, json.clone(), condition, sync).await? {
            return Ok(());
        }
        let there = self.store.see(MANIFEST_FILE).await?;
        if there.as_ref().is_some_and(|there| there.content == json) {
            return Ok(());
        }
        self.expected(there)?;
        Err(Error::Storage(format!("{}: {MANIFEST_FILE} is being changed by others", self.store.uri())))
    }

    /// Nobody touched this attempt's closed files.
    async fn check_files(&self, files: &BTreeMap<String, FileEntry>) -> Result<()> {
        if files.is_empty() {
            return Ok(());
        }
        let mut sizes: BTreeMap<String, u64> = BTreeMap::new();
        for folder in ["", PARTITIONS_DIR] {
            sizes.extend(self.store.list_folder(folder).await?.into_iter().filter(|e| !e.is_folder).map(|e| (e.path, e.size)));
        }
        for (name, entry) in files {
            // A listing may be late where a request for the file itself is not.
            let size = match sizes.get(name) {
                Some(size) if *size == entry.size_bytes => continue,
                _ => self.store.size(name).await?,
            };
            if size != Some(entry.size_bytes) {
                return Err(Error::CommitConflict(format!(
                    "{}: {name} {}: somebody else changed this build's files; nothing was published, build again",
                    self.store.uri(),
                    size.map_or("is gone".into(), |size| format!("has {size} bytes, {} were written", entry.size_bytes))
                )));
            }
        }
        Ok(())
    }

    /// After publishing: delete what is only waste now, and give up the claim. What cannot be deleted is waste and no error, and is told.
    pub async fn clean_up(&self, json: &Bytes, names: &BTreeSet<String>) {
        let nothing = BTreeSet::new();
        let replaced = self.replaced.as_ref().map_or(&nothing, |replaced| &replaced.names);
        let cleaner = Cleaner { store: &self.store, tag: &self.tag, plain: self.plain, json, names, replaced };
        let cleaned = cleaner.run().await;
        if let Err(error) = cleaned.and(self.claim.release(&self.store).await) {
            log::warn!(
                target: "lance_artifact",
                "{}: the artifact is published, but not all that it replaced, or that others left, could be deleted; a later overwrite there does \
                 so: {error}",
                self.store.uri()
            );
        }
    }

    /// Remove this attempt's closed `files` and its claim, unless its manifest is published, or may be. After an error it may be called again.
    pub async fn abandon(&self, files: &[String], json: Option<&Bytes>) -> Result<Abandoned> {
        if let Some(json) = json.filter(|_| self.tried.load(Ordering::Relaxed)) {
            match self.store.read(MANIFEST_FILE).await {
                Ok(Some(there)) if there == json => return Ok(Abandoned::Published),
                Ok(_) => {}
                Err(e) => {
                    let what = "it is not known whether the artifact was published, so its files are kept; abort() again to remove them";
                    return Ok(Abandoned::Unknown(e.context(what)));
                }
            }
        }
        // Plain names of an attempt that was taken for abandoned may be another's by now.
        let mine = files.is_empty() || !self.plain || self.claim.is_held(&self.store).await?;
        if mine {
            // Where that fails the claim stays, which says whose the files are: the next attempt deletes them once this process is gone.
            self.store.delete(files).await?;
        }
        let released = self.claim.release(&self.store).await;
        remove_dirs(&self.store, self.had_root).await;
        released.map(|()| Abandoned::Removed)
    }
}

/// What became of an attempt that was given up.
pub enum Abandoned {
    Removed,
    /// It had been published before, although the answer was lost; everything stays.
    Published,
    /// It cannot be known; everything stays.
    Unknown(Error),
}

/// Remove local folders without files that an attempt has made.
async fn remove_dirs(store: &LanceStore, had_root: bool) {
    // Another attempt may be about to write into them.
    let others = store.list_folder("").await.is_ok_and(|entries| entries.iter().any(|e| matches!(ours(&e.path), Some(Ours::Claim(_)))));
    if !others {
        store.remove_empty_dirs(if had_root { &[PARTITIONS_DIR] } else { &[PARTITIONS_DIR, ""] });
    }
}

/// Do what may fail because a store or a network does, until it succeeds, is not wanted any more, or failed too often.
async fn retry<T, F: Future<Output = Result<T>>>(stopped: &(impl Fn() -> bool + Sync), mut work: impl FnMut() -> F) -> Result<T> {
    let mut wait = FIRST_WAIT;
    let mut left = TRIES;
    loop {
        if stopped() {
            return Err(Error::Interrupted("the builder was aborted".into()));
        }
        left -= 1;
        match work().await {
            Err(Error::Storage(_)) if left > 0 => {
                // Others that wait for the same store must not all come back at one moment.
                let time = wait.mul_f64(rand::rng().random_range(0.75..1.25));
                pause(time, stopped).await;
                wait *= 2;
            }
            done => return done,
        }
    }
}

async fn pause(time: Duration, stopped: &(impl Fn() -> bool + Sync)) {
    let mut left = time;
    while !stopped() && !left.is_zero() {
        let step = left.min(WAIT_POLL);
        outside::sleep(step).await;
        left -= step;
    }
}

fn already_exists(store: &LanceStore, how: &str) -> Error {
    Error::ArtifactExists(format!(
        "{} already holds an artifact, which {how}; choose another artifact_uri, or build again with overwrite=True",
        store.uri()
    ))
}

async fn is_fresh(store: &LanceStore) -> Result<bool> {
    Ok(store.see(MANIFEST_FILE).await?.is_none() && !has_plain(&leftovers::list(store, &BTreeSet::new()).await?))
}

fn has_plain(entries: &[Entry]) -> bool {
    entries.iter().any(|entry| ours(&entry.path) == Some(Ours::Data(None)))
}

/// Refuse what is no place for an artifact. Nothing is changed.
async fn look(store: &LanceStore, overwrite: bool) -> Result<Look> {
    let refuse = |what: String| Err(Error::invalid(format!("artifact_uri {}: {what}; nothing was changed", store.uri())));
    if store.root_is_file().await? {
        return refuse("this is a file; choose a new or empty folder".into());
    }
    if let Some(dataset) = store.local_root().and_then(dataset_around) {
        let dataset = dataset.display();
        return refuse(format!("this is the Lance dataset {dataset}, or lies inside it; choose a folder of its own"));
    }
    let seen = store.see(MANIFEST_FILE).await?;
    if seen.is_some() && !overwrite {
        return Err(already_exists(store, "would be lost"));
    }
    let replaced = match seen {
        None => None,
        Some(seen) => match Manifest::parse(&seen.content) {
            Ok(manifest) => Some(Replaced { seen, names: manifest.names() }),
            Err(error) => {
                return refuse(format!(
                    "{MANIFEST_FILE} is not of an artifact that could be replaced ({error}); remove it, or choose a new or empty folder"
                ));
            }
        },
    };
    let nothing = BTreeSet::new();
    let names = replaced.as_ref().map_or(&nothing, |replaced| &replaced.names);
    let entries = leftovers::list(store, names).await?;
    let folders = leftovers::folders(names);
    let known = |entry: &Entry| match entry.is_folder {
        true => folders.contains(&entry.path),
        false => entry.path == MANIFEST_FILE || names.contains(&entry.path) || ours(&entry.path).is_some() || is_system(&entry.path),
    };
    let mut other: Vec<String> =
        entries.iter().filter(|e| !known(e)).map(|e| e.path.clone() + if e.is_folder { "/" } else { "" }).collect();
    other.sort_unstable();
    if other.iter().any(|name| name == "_versions/") {
        return refuse("this is a Lance dataset; choose a folder of its own for the artifact".into());
    }
    if !other.is_empty() {
        let more = other.len().saturating_sub(MAX_NAMED);
        let named = other[..other.len() - more].join(", ");
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        return refuse(format!("the folder holds other things ({named}{more}); choose a new or empty folder"));
    }
    Ok(Look { has_plain: has_plain(&entries), replaced })
}

/// Files that a network file system makes of deleted ones that are still open.
fn is_system(path: &str) -> bool {
    path.rsplit('/').next().is_some_and(|name| name.starts_with(".nfs"))
}

/// The Lance dataset that a local folder is, or lies in, links included.
fn dataset_around(root: &Path) -> Option<PathBuf> {
    let is_dataset = |folder: &&Path| folder.join("_versions").is_dir() && (*folder == root || folder.join("data").is_dir());
    if let Some(found) = root.ancestors().find(&is_dataset) {
        return Some(found.to_path_buf());
    }
    let real = root.ancestors().find_map(|folder| folder.canonicalize().ok())?;
    real.ancestors().find(is_dataset).map(Path::to_path_buf)
}
