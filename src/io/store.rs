//! A folder of files: one object store and one root in it, and nothing outside that root.

use std::io::ErrorKind;
use std::path::{Path as FsPath, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use object_store::path::{Path, PathPart};
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, UpdateVersion};

use super::local::{self, HIDDEN_PREFIX, Put};
use super::uri::without_credentials;
use crate::error::{Error, Result};

/// The most bytes of a file that is read as a whole: claims, and what a run keeps of its plan and model. What a hostile one says that it
/// has would be asked of the allocator, which ends the process where that is not to be had.
const WHOLE_BYTES: u64 = 4 << 30;

/// An object store and the root below which its files are.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    root: Path,
    true_uri: String,
    shown_uri: String,
    local_root: Option<PathBuf>,
    temporary_prefix: String,
}

/// A file as it was when it was looked at, for a write that depends on nobody having changed it since.
#[derive(Debug, Clone)]
pub struct Seen {
    pub content: Bytes,
    version: UpdateVersion,
}

impl Seen {
    /// What no file is or was; a write that depends on it must be refused.
    pub fn never() -> Self {
        let version = UpdateVersion { e_tag: Some("\"00000000000000000000000000000000\"".into()), version: Some("1".into()) };
        Self { content: Bytes::from_static(b"never"), version }
    }
}

/// On what a write depends.
pub enum Condition<'a> {
    Absent,
    Unchanged(&'a Seen),
}

/// A file or a folder of a folder.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Relative to the root.
    pub path: String,
    pub size: u64,
    pub modified: SystemTime,
    pub is_folder: bool,
}

impl Store {
    /// A root in a store that is open already. `uri` opens it again, from any working directory.
    pub fn new(inner: Arc<dyn ObjectStore>, root: Path, uri: String, local_root: Option<PathBuf>) -> Self {
        let shown_uri = without_credentials(&uri);
        Self { inner, root, true_uri: uri, shown_uri, local_root, temporary_prefix: HIDDEN_PREFIX.to_string() }
    }

    /// The URI as it may be shown: without passwords, signatures and tokens.
    pub fn uri(&self) -> &str {
        &self.shown_uri
    }

    /// The URI that opens this place again, from any working directory.
    pub fn true_uri(&self) -> &str {
        &self.true_uri
    }

    /// The same place, with temporary files whose names begin otherwise: they say whose they are.
    pub fn with_temporary_prefix(&self, temporary_prefix: String) -> Self {
        Self { temporary_prefix, ..self.clone() }
    }

    /// What begins the names of temporary files.
    pub fn temporary_prefix(&self) -> &str {
        &self.temporary_prefix
    }

    pub fn object_store(&self) -> &Arc<dyn ObjectStore> {
        &self.inner
    }

    /// The root folder where the artifact is on this machine's disk.
    pub fn local_root(&self) -> Option<&FsPath> {
        self.local_root.as_deref()
    }

    /// The full path of `relative`, which must stay below the root, symbolic links included, and be a file or a folder where it is there.
    pub fn path(&self, relative: &str) -> Result<Path> {
        check_relative_path(relative)?;
        // Of what is not there, the folder that it would be in.
        if let Some(root) = &self.local_root
            && let Ok(real_root) = root.canonicalize()
            && let Some(real) = root.join(relative).ancestors().find_map(|there| there.canonicalize().ok())
        {
            if !real.starts_with(&real_root) {
                return Err(Error::corrupt(format!(
                    "{}: {relative} is a link to a place outside the artifact; links are refused",
                    self.shown_uri
                )));
            }
            // To open a pipe is to wait for its other end.
            if std::fs::metadata(&real).is_ok_and(|found| !found.is_file() && !found.is_dir()) {
                return Err(Error::corrupt(format!("{}: {relative} is a pipe, a socket or a device, and no file", self.shown_uri)));
            }
        }
        // Parsed, not made: of a name with a `#` or an `é` in it a store would look for another one, in which those are encoded.
        relative.split('/').try_fold(self.root.clone(), |path, name| match PathPart::parse(name) {
            Ok(part) => Ok(path.join(part)),
            Err(e) => Err(Error::corrupt(format!("{}: file path {relative:?} is refused: {e}", self.shown_uri))),
        })
    }

    /// The content of a file, or `None` where it does not exist.
    pub async fn read(&self, relative: &str) -> Result<Option<Bytes>> {
        Ok(self.see(relative).await?.map(|seen| seen.content))
    }

    /// The same, to be changed or deleted only if it is still that.
    pub async fn see(&self, relative: &str) -> Result<Option<Seen>> {
        self.see_at_most(relative, WHOLE_BYTES).await
    }

    /// The same of a file that may have `most` bytes.
    pub async fn see_at_most(&self, relative: &str, most: u64) -> Result<Option<Seen>> {
        let reading = |e: object_store::Error| Error::from(e).context(format!("reading {relative} of {}", self.shown_uri));
        match self.inner.get(&self.path(relative)?).await {
            Ok(found) if found.meta.size > most => Err(Error::corrupt(format!(
                "{relative} of {} has {} bytes, and is read as a whole only up to {most}",
                self.shown_uri, found.meta.size
            ))),
            Ok(found) => {
                let version = UpdateVersion { e_tag: found.meta.e_tag.clone(), version: found.meta.version.clone() };
                Ok(Some(Seen { content: found.bytes().await.map_err(reading)?, version }))
            }
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(reading(e)),
        }
    }

    pub async fn exists(&self, relative: &str) -> Result<bool> {
        Ok(self.size(relative).await?.is_some())
    }

    /// Bytes of a file, or `None` where it does not exist.
    pub async fn size(&self, relative: &str) -> Result<Option<u64>> {
        match self.inner.head(&self.path(relative)?).await {
            Ok(found) => Ok(Some(found.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(Error::from(e).context(format!("looking for {relative} of {}", self.shown_uri))),
        }
    }

    /// Put a file in one step, so that readers see the whole of it or nothing, if `condition` holds; the answer is whether it
    /// did. `sync` makes it durable on a local disk.
    pub async fn put_if(&self, relative: &str, content: Bytes, condition: Condition<'_>, sync: bool) -> Result<bool> {
        let putting = |e: Error| e.context(format!("publishing {relative} of {}", self.shown_uri));
        let path = self.path(relative)?;
        if let Some(root) = self.local_root.clone() {
            let temporary_prefix = self.temporary_prefix.clone();
            let put = Put { root, relative: relative.to_string(), content: content.to_vec(), temporary_prefix, sync };
            let seen = match condition {
                Condition::Absent => None,
                Condition::Unchanged(seen) => Some(seen.content.clone()),
            };
            let put = tokio::task::spawn_blocking(move || match seen {
                None => put.if_absent(),
                Some(seen) => put.if_unchanged(&seen),
            });
            return put.await?.map_err(|e| match e.kind() {
                ErrorKind::Unsupported => self.unconditional(&e.to_string()),
                _ => putting(Error::from(e)),
            });
        }
        let mode = match condition {
            Condition::Absent => PutMode::Create,
            Condition::Unchanged(seen) => PutMode::Update(seen.version.clone()),
        };
        match self.inner.put_opts(&path, PutPayload::from(content), PutOptions { mode, ..Default::default() }).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => Ok(false),
            Err(e @ object_store::Error::NotImplemented { .. }) => Err(self.unconditional(&e.to_string())),
            Err(e) => Err(putting(Error::from(e))),
        }
    }

    /// What a store cannot do, a writer must not pretend.
    fn unconditional(&self, why: &str) -> Error {
        Error::invalid(format!(
            "{}: this place has no conditional writes ({why}), without which two writers could destroy each other's artifact",
            self.shown_uri
        ))
    }

    /// Delete a file whose content is `seen`; false where it is not any more. Exact on a local disk; elsewhere the file is
    /// looked at right before.
    pub async fn delete_if(&self, relative: &str, seen: &Bytes) -> Result<bool> {
        if let Some(root) = self.local_root.clone() {
            let (file, seen) = (relative.to_string(), seen.clone());
            let removed = tokio::task::spawn_blocking(move || local::remove_if_unchanged(&root, &file, &seen));
            return removed.await?.map_err(|e| Error::from(e).context(format!("deleting {relative} of {}", self.shown_uri)));
        }
        let same = self.read(relative).await?.is_some_and(|there| there == seen);
        if same {
            self.delete(&[relative.to_string()]).await?;
        }
        Ok(same)
    }

    /// Delete files, those already gone included. Every file is tried; the first failure is the answer.
    pub async fn delete(&self, relative: &[String]) -> Result<()> {
        let mut first = Ok(());
        for file in relative {
            let deleted = match self.path(file) {
                Ok(path) => match self.inner.delete(&path).await {
                    Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
                    Err(e) => Err(Error::from(e).context(format!("deleting {file} of {}", self.shown_uri))),
                },
                refused => refused.map(|_| ()),
            };
            first = first.and(deleted);
        }
        first
    }

    /// Remove what is left of local folders once their files are gone; a folder that holds anything stays, and one that a link leads to.
    pub fn remove_empty_dirs(&self, relative: &[&str]) {
        if let Some(root) = &self.local_root {
            for dir in relative.iter().filter(|dir| dir.is_empty() || self.path(dir).is_ok()) {
                let _ = std::fs::remove_dir(root.join(dir));
            }
        }
    }

    /// Make the names of published files durable on a local disk.
    pub fn sync_dirs(&self, relative: &[&str]) -> Result<()> {
        if let Some(root) = &self.local_root {
            for dir in relative {
                let dir = root.join(dir);
                match std::fs::File::open(&dir).and_then(|opened| opened.sync_all()) {
                    Ok(()) => {}
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                    Err(e) => return Err(Error::from(e).context(format!("waiting for {} to be on the disk", dir.display()))),
                }
            }
        }
        Ok(())
    }

    /// The files and folders of one folder (`""` is the root), nothing below them; none where it does not exist.
    pub async fn list_folder(&self, folder: &str) -> Result<Vec<Entry>> {
        let listing = |e: Error| e.context(format!("listing {folder:?} of {}", self.shown_uri));
        // A folder that is a link to a place outside is not looked into.
        let prefix = if folder.is_empty() { self.root.clone() } else { self.path(folder)? };
        if let Some(root) = &self.local_root {
            let (dir, folder) = (root.join(folder), folder.to_string());
            return tokio::task::spawn_blocking(move || local_entries(&dir, &folder)).await?.map_err(|e| listing(Error::from(e)));
        }
        let found = self.inner.list_with_delimiter(Some(&prefix)).await.map_err(|e| listing(Error::from(e)))?;
        let named = |path: &Path| path.filename().map(|name| below(folder, name)).unwrap_or_default();
        // A folder made by hand in a store's console is an empty object named like the folder.
        let files = found.objects.into_iter().filter(|meta| meta.location != prefix);
        let files =
            files.map(|meta| Entry { path: named(&meta.location), size: meta.size, modified: meta.last_modified.into(), is_folder: false });
        let folders = found.common_prefixes.iter();
        let folders = folders.map(|path| Entry { path: named(path), size: 0, modified: SystemTime::now(), is_folder: true });
        Ok(files.chain(folders).collect())
    }

    /// Whether the root itself is a file.
    pub async fn root_is_file(&self) -> Result<bool> {
        if let Some(root) = &self.local_root {
            return Ok(root.is_file());
        }
        if self.root.as_ref().is_empty() {
            return Ok(false);
        }
        match self.inner.head(&self.root).await {
            // Of an empty one nobody knows whether it is a file: some stores have objects for folders.
            Ok(found) => Ok(found.size > 0),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(e) => Err(Error::from(e).context(format!("looking for {}", self.shown_uri))),
        }
    }
}

/// Refuse a path that could name anything outside the root.
pub fn check_relative_path(path: &str) -> Result<()> {
    let bad = path.is_empty()
        || path.starts_with('/')
        || path.contains('\\')
        || path.contains(':')
        || path.contains('%')
        || path.chars().any(char::is_control)
        || path.split('/').any(|part| part.is_empty() || part == "." || part == "..");
    if bad {
        return Err(Error::corrupt(format!(
            "manifest: file path {path:?} is refused: expected a relative path below the artifact, without '..', ':', '%' or '\\'"
        )));
    }
    Ok(())
}

fn below(folder: &str, name: &str) -> String {
    if folder.is_empty() { name.to_string() } else { format!("{folder}/{name}") }
}

fn local_entries(dir: &FsPath, folder: &str) -> std::io::Result<Vec<Entry>> {
    let found = match std::fs::read_dir(dir) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        found => found?,
    };
    let mut entries = Vec::new();
    for entry in found {
        let entry = entry?;
        match entry.metadata() {
            Ok(meta) => entries.push(Entry {
                path: below(folder, &entry.file_name().to_string_lossy()),
                size: meta.len(),
                modified: meta.modified()?,
                is_folder: meta.is_dir(),
            }),
            // Gone meanwhile.
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use object_store::local::LocalFileSystem;

    use super::*;

    fn local(root: &FsPath) -> Store {
        let path = Path::from_absolute_path(root).unwrap();
        Store::new(Arc::new(LocalFileSystem::new()), path, root.display().to_string(), Some(root.to_path_buf()))
    }

    #[tokio::test]
    async fn a_name_is_the_same_to_the_store_and_to_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let store = local(&root);
        std::fs::create_dir(root.join("ordner é")).unwrap();
        for name in ["a", "~", "a#b.lance", "büket.lance", "ordner é/a b", "x?y*z", "[1]{2}|<3>^`\"", "a.", "=&+"] {
            std::fs::write(root.join(name), name).unwrap();
            assert_eq!(store.read(name).await.unwrap().as_deref(), Some(name.as_bytes()));
            assert_eq!(store.size(name).await.unwrap(), Some(name.len() as u64));
            store.delete(&[name.to_string()]).await.unwrap();
            assert!(!root.join(name).exists(), "{name}");
        }
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn files_behind_one_that_is_refused_are_deleted_too() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::NamedTempFile::new().unwrap());
        let root = dir.path().canonicalize().unwrap();
        std::os::unix::fs::symlink(outside.path(), root.join("link")).unwrap();
        for name in ["a", "z"] {
            std::fs::write(root.join(name), "").unwrap();
        }
        let deleted = local(&root).delete(&["a", "link", "z"].map(String::from)).await;
        assert!(matches!(&deleted, Err(Error::CorruptArtifact(m)) if m.contains("link")), "{deleted:?}");
        assert!(!root.join("a").exists() && !root.join("z").exists() && outside.path().exists());
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn nothing_is_reached_through_a_link_to_another_place() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let root = dir.path().canonicalize().unwrap();
        std::fs::create_dir(outside.path().join("empty")).unwrap();
        std::os::unix::fs::symlink(outside.path(), root.join("link")).unwrap();
        let store = local(&root);
        for name in ["link", "link/empty", "link/not there", "link/empty/not/there"] {
            assert!(matches!(store.path(name), Err(Error::CorruptArtifact(_))), "{name}");
        }
        store.remove_empty_dirs(&["link/empty", "link"]);
        assert!(outside.path().join("empty").exists());
        assert!(store.path("not/there").is_ok() && store.read("not/there").await.unwrap().is_none());
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn a_folder_that_is_a_link_to_another_place_is_not_listed() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let root = dir.path().canonicalize().unwrap();
        std::fs::write(outside.path().join("theirs"), "").unwrap();
        std::os::unix::fs::symlink(outside.path(), root.join("partitions")).unwrap();
        let listed = local(&root).list_folder("partitions").await;
        assert!(matches!(&listed, Err(Error::CorruptArtifact(m)) if m.contains("link")), "{listed:?}");
    }
}
