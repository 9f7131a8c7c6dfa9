//! Where an artifact's bytes live: one object store and one root, and nothing outside that root.

use std::collections::HashMap;
use std::path::{Path as FsPath, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use bytes::Bytes;
use futures::TryStreamExt;
use lance_io::object_store::{ObjectStore, ObjectStoreParams, ObjectStoreRegistry, StorageOptionsAccessor};
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutMode, PutOptions, PutPayload};

use super::layout::check_relative_path;
use crate::error::{Error, Result};

/// `storage_options` as pylance takes them.
pub type StorageOptions = HashMap<String, String>;

static REGISTRY: LazyLock<Arc<ObjectStoreRegistry>> = LazyLock::new(Default::default);

/// `memory://` has no place of its own: one store for the process, alive as long as it is.
static MEMORY: LazyLock<Mutex<Option<Arc<ObjectStore>>>> = LazyLock::new(Default::default);

/// An object store and the root below which an artifact's files are.
#[derive(Debug, Clone)]
pub struct ArtifactStore {
    store: Arc<ObjectStore>,
    root: Path,
    uri: String,
    local_root: Option<PathBuf>,
}

/// A URI without user, password and query, for messages and manifests.
pub fn without_credentials(uri: &str) -> String {
    match url::Url::parse(uri) {
        Ok(mut url) if uri.contains("://") => {
            let _ = url.set_username("");
            let _ = url.set_password(None);
            url.set_query(None);
            url.set_fragment(None);
            url.to_string()
        }
        _ => uri.to_string(),
    }
}

impl ArtifactStore {
    /// Resolve `uri`: a local path or anything Lance's object store takes (`s3://`, `gs://`, `az://`, `memory://`, `file://`).
    pub async fn open(uri: &str, storage_options: Option<&StorageOptions>) -> Result<Self> {
        if uri.is_empty() {
            return Err(Error::invalid("artifact_uri: got an empty string, expected a path or a URI"));
        }
        let params = ObjectStoreParams {
            storage_options_accessor: storage_options
                .filter(|options| !options.is_empty())
                .map(|options| Arc::new(StorageOptionsAccessor::with_static_options(options.clone()))),
            ..Default::default()
        };
        let shown = without_credentials(uri);
        let (store, root) = ObjectStore::from_uri_and_params(REGISTRY.clone(), uri, &params)
            .await
            .map_err(|e| Error::from(e).context(format!("artifact_uri {shown:?}")))?;
        let store = if store.scheme() == "memory" {
            MEMORY.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(store).clone()
        } else {
            store
        };
        let local_root = store.is_local().then(|| PathBuf::from(format!("/{root}")));
        Ok(Self { store, root, uri: shown, local_root })
    }

    /// The URI without credentials.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    pub fn object_store(&self) -> &Arc<ObjectStore> {
        &self.store
    }

    /// The root folder where the artifact is on this machine's disk.
    pub fn local_root(&self) -> Option<&FsPath> {
        self.local_root.as_deref()
    }

    /// The full path of `relative`, which must stay below the root, symbolic links included.
    pub fn path(&self, relative: &str) -> Result<Path> {
        check_relative_path(relative)?;
        if let Some(root) = &self.local_root
            && let (Ok(real_root), Ok(real)) = (root.canonicalize(), root.join(relative).canonicalize())
            && !real.starts_with(&real_root)
        {
            return Err(Error::corrupt(format!("{}: {relative} is a link to a place outside the artifact; links are refused", self.uri)));
        }
        Ok(relative.split('/').fold(self.root.clone(), |path, part| path.join(part)))
    }

    /// The content of a file, or `None` where it does not exist.
    pub async fn read(&self, relative: &str) -> Result<Option<Bytes>> {
        match self.store.inner.get(&self.path(relative)?).await {
            Ok(found) => Ok(Some(found.bytes().await?)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(Error::from(e).context(format!("reading {relative} of {}", self.uri))),
        }
    }

    pub async fn exists(&self, relative: &str) -> Result<bool> {
        Ok(self.size(relative).await?.is_some())
    }

    /// Bytes of a file, or `None` where it does not exist.
    pub async fn size(&self, relative: &str) -> Result<Option<u64>> {
        match self.store.inner.head(&self.path(relative)?).await {
            Ok(found) => Ok(Some(found.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(Error::from(e).context(format!("looking for {relative} of {}", self.uri))),
        }
    }

    /// Publish `content` in one step: readers see the whole of it or nothing. With `replace` unset an existing file wins and
    /// the answer is `false`. `sync` makes it durable on a local disk.
    pub async fn publish(&self, relative: &str, content: Vec<u8>, replace: bool, sync: bool) -> Result<bool> {
        let path = self.path(relative)?;
        if let Some(root) = self.local_root.clone() {
            let target = root.join(relative);
            return tokio::task::spawn_blocking(move || publish_local(&target, &content, replace, sync))
                .await?
                .map_err(|e| Error::from(e).context(format!("publishing {relative} of {}", self.uri)));
        }
        let mode = if replace { PutMode::Overwrite } else { PutMode::Create };
        match self.store.inner.put_opts(&path, PutPayload::from(content), PutOptions { mode, ..Default::default() }).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => Ok(false),
            Err(e) => Err(Error::from(e).context(format!("publishing {relative} of {}", self.uri))),
        }
    }

    /// Delete files, those already gone included. Every file is tried; the first failure is the answer.
    pub async fn delete(&self, relative: &[String]) -> Result<()> {
        let mut first = Ok(());
        for file in relative {
            match self.store.inner.delete(&self.path(file)?).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
                Err(e) if first.is_ok() => first = Err(Error::from(e).context(format!("deleting {file} of {}", self.uri))),
                Err(_) => {}
            }
        }
        first
    }

    /// Remove what is left of local folders once their files are gone; a folder that holds anything stays.
    pub fn remove_empty_dirs(&self, relative: &[&str]) {
        if let Some(root) = &self.local_root {
            for dir in relative {
                let _ = std::fs::remove_dir(root.join(dir));
            }
        }
    }

    /// Make the names of published files durable on a local disk.
    pub fn sync_dirs(&self, relative: &[&str]) -> Result<()> {
        if let Some(root) = &self.local_root {
            for dir in relative {
                match std::fs::File::open(root.join(dir)) {
                    Ok(dir) => dir.sync_all()?,
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                    Err(e) => return Err(e.into()),
                }
            }
        }
        Ok(())
    }

    /// Files below the root, relative to it.
    pub async fn list(&self) -> Result<Vec<String>> {
        let prefix = self.root.clone();
        let skip = prefix.as_ref().len() + usize::from(!prefix.as_ref().is_empty());
        let found: Vec<_> = self.store.inner.list(Some(&prefix)).try_collect().await?;
        Ok(found.into_iter().map(|meta| meta.location.as_ref().get(skip..).unwrap_or_default().to_string()).collect())
    }
}

fn publish_local(target: &FsPath, content: &[u8], replace: bool, sync: bool) -> std::io::Result<bool> {
    use std::io::Write;
    let parent = target.parent().unwrap_or_else(|| FsPath::new("/"));
    std::fs::create_dir_all(parent)?;
    let mut file = new_temporary_file(parent)?;
    file.write_all(content)?;
    if sync {
        file.as_file().sync_all()?;
    }
    let published = if replace {
        file.persist(target).map(|_| true).map_err(|e| e.error)?
    } else {
        match file.persist_noclobber(target) {
            Ok(_) => true,
            Err(e) if e.error.kind() == std::io::ErrorKind::AlreadyExists => false,
            Err(e) => return Err(e.error),
        }
    };
    if sync {
        std::fs::File::open(parent)?.sync_all()?;
    }
    Ok(published)
}

/// A file that disappears when dropped, with the permissions of ordinary files.
pub(crate) fn new_temporary_file(parent: &FsPath) -> std::io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".lance-artifact-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // NamedTempFile is private to the user; what is published must follow the user's umask like any other file.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(parent)
}
