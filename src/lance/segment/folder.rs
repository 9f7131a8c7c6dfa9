//! The folder of a segment: whose an unfinished one is, and what a killed build left.
//!
//! The folder holds the marks of the process that builds it until right before the commit, which lists the folder. The next build
//! removes folders whose builder is certainly gone; those without marks, or of processes elsewhere, are left to Lance's own cleanup,
//! which takes them after seven days.

use std::collections::{BTreeSet, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use lance::index::DatasetIndexExt;
use lance_core::cache::LanceCache;
use lance_encoding::decoder::DecoderPlugins;
use lance_file::reader::{FileReader, FileReaderOptions};
use lance_io::object_store::ObjectStore;
use lance_io::scheduler::{ScanScheduler, SchedulerConfig};
use lance_io::traits::Writer;
use object_store::path::Path;

use super::committed::CommittedSegment;
use crate::error::{Error, Result};
use crate::io::{Owner, Store, Uploads, without_credentials};
use crate::lance::LanceStore;
use crate::lance::dataset::Dataset;
use crate::lance::file::index_file;
use crate::sync::locked;

const OWNER_FILE: &str = ".lance-artifact-owner";

/// Folders of builds of this process that are over, and which could not be removed: the process is alive, they are not.
static OVER: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Where the files of one segment are, or are about to be.
#[derive(Debug, Clone)]
pub struct SegmentFolder {
    store: Arc<ObjectStore>,
    files: Store,
    path: Path,
    uuid: String,
}

impl SegmentFolder {
    pub async fn of(dataset: &Dataset, uuid: &str) -> Result<Self> {
        let store = dataset.0.object_store(None).await?;
        let path = dataset.0.indices_dir().join(uuid);
        Ok(Self::at(store, path, format!("{}/_indices/{uuid}", dataset.shown_uri()), uuid))
    }

    /// Of a committed segment, whose files may be at another base path of the dataset.
    pub async fn committed(dataset: &Dataset, segment: &CommittedSegment) -> Result<Self> {
        let Some(base_id) = segment.base_id else { return Self::of(dataset, &segment.uuid).await };
        let base = dataset.0.manifest().base_paths.get(&base_id);
        let base = base.ok_or_else(|| {
            Error::corrupt(format!("index segment {} is at base path {base_id}, of which the dataset knows nothing", segment.uuid))
        })?;
        let path = base.extract_path(dataset.0.session().store_registry())?;
        let path = if base.is_dataset_root { path.join("_indices") } else { path }.join(segment.uuid.as_str());
        let shown = format!("{}/{}", without_credentials(&base.path), segment.uuid);
        Ok(Self::at(dataset.0.object_store(Some(base_id)).await?, path, shown, &segment.uuid))
    }

    fn at(store: Arc<ObjectStore>, path: Path, shown_uri: String, uuid: &str) -> Self {
        let local = store.has_direct_local_paths().then(|| lance_io::local::to_local_path(&path).into());
        let files = Store::new(store.inner.clone(), path.clone(), shown_uri, local);
        Self { store, files, path, uuid: uuid.to_string() }
    }

    /// The place of its files.
    pub fn as_store(&self) -> LanceStore {
        LanceStore { files: self.files.clone(), store: self.store.clone() }
    }

    /// As Lance's index builder wants it.
    pub fn as_lance(&self) -> Path {
        self.path.clone()
    }

    /// Where it is on this machine's disk.
    pub fn local(&self) -> Option<PathBuf> {
        self.files.local_root().map(PathBuf::from)
    }

    fn owner_file(&self) -> Path {
        self.path.clone().join(OWNER_FILE)
    }

    /// Leave marks before anything is written.
    pub async fn mark(&self) -> Result<()> {
        locked(&OVER).remove(self.files.uri());
        if let Some(folder) = self.local() {
            // On this thread: a write that goes on elsewhere would make the folder again after a cancelled build has removed it.
            let marked = std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(folder.join(OWNER_FILE), Owner::this().to_json()));
            return marked.map_err(|e| Error::from(e).context(format!("beginning the index segment {}", folder.display())));
        }
        let put = self.store.put(&self.owner_file(), Owner::this().to_json().as_bytes()).await;
        put.map(drop).map_err(|e| Error::from(e).context(format!("beginning the index segment {}", self.files.uri())))
    }

    /// Take the marks away: what is in the folder now is the segment.
    pub async fn unmark(&self) -> Result<()> {
        match self.store.delete(&self.owner_file()).await {
            Ok(()) | Err(lance_core::Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(Error::from(e).context(format!("removing the marks of the unfinished index segment {}", self.files.uri()))),
        }
    }

    /// Bytes of a file, or `None` where it is not there.
    pub async fn size(&self, name: &str) -> Result<Option<u64>> {
        match self.store.size(&self.path.clone().join(name)).await {
            Ok(size) => Ok(Some(size)),
            Err(lance_core::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(Error::from(e).context(format!("looking for {name} of the index segment {}", self.files.uri()))),
        }
    }

    /// Rows that the file of codes says it has.
    pub async fn stored_rows(&self) -> Result<u64> {
        self.told_rows().await.map_err(|e| e.context(format!("looking at the index segment {}", self.files.uri())))
    }

    async fn told_rows(&self) -> Result<u64> {
        let path = self.path.clone().join(lance_index::INDEX_AUXILIARY_FILE_NAME);
        let scheduler = ScanScheduler::new(self.store.clone(), SchedulerConfig::max_bandwidth(&self.store));
        let file = scheduler.open_file(&path, &lance_io::utils::CachedFileSize::unknown()).await?;
        let (plugins, cache) = (Arc::<DecoderPlugins>::default(), LanceCache::no_cache());
        Ok(FileReader::try_open(file, None, plugins, &cache, FileReaderOptions::default()).await?.num_rows())
    }

    /// Delete what is in it, if anything is.
    pub async fn remove(&self) -> Result<()> {
        match self.store.remove_dir_all(self.path.clone()).await {
            Ok(()) | Err(lance_core::Error::NotFound { .. }) => Ok(()),
            Err(e) => {
                locked(&OVER).insert(self.files.uri().to_string());
                Err(Error::from(e).context(format!("removing the unfinished index segment {}", self.files.uri())))
            }
        }
    }

    pub(super) fn create(&self, name: &str, uploads: &Uploads) -> Result<Box<dyn Writer>> {
        index_file(&self.files, uploads, name)
    }

    /// Remove the segments that killed builds left in a dataset; how many there were. Nothing depends on it: what cannot be listed
    /// or removed stays.
    pub async fn remove_leftovers(dataset: &Dataset) -> usize {
        let mut removed = 0;
        for folder in Self::uncommitted(dataset).await.unwrap_or_default() {
            removed += usize::from(folder.is_abandoned().await && folder.remove().await.is_ok());
        }
        removed
    }

    /// The segments that builds of ours, whose processes are certainly gone, left unfinished: their UUIDs.
    pub async fn leftovers(dataset: &Dataset) -> Result<Vec<String>> {
        let mut left = Vec::new();
        for folder in Self::uncommitted(dataset).await? {
            if folder.is_abandoned().await {
                left.push(folder.uuid);
            }
        }
        Ok(left)
    }

    /// Folders of segments that no index of this version names: those of other versions and other builds too.
    async fn uncommitted(dataset: &Dataset) -> Result<Vec<Self>> {
        let store = dataset.0.object_store(None).await?;
        let names = match store.read_dir(dataset.0.indices_dir()).await {
            Err(lance_core::Error::NotFound { .. }) => return Ok(Vec::new()),
            names => names?,
        };
        let committed: HashSet<String> = dataset.0.load_indices().await?.iter().map(|index| index.uuid.to_string()).collect();
        let mut folders = Vec::new();
        for uuid in names.into_iter().filter(|name| uuid::Uuid::parse_str(name).is_ok() && !committed.contains(name)) {
            folders.push(Self::of(dataset, &uuid).await?);
        }
        Ok(folders)
    }

    /// Whether the marks of an unfinished segment are in it, and their process is certainly gone, or done with it.
    async fn is_abandoned(&self) -> bool {
        let Ok(marks) = self.store.read_one_all(&self.owner_file()).await else { return false };
        let is_over = |owner: &Owner| owner.is_this() && locked(&OVER).contains(self.files.uri());
        Owner::parse(&marks).is_some_and(|owner| owner.is_gone() || is_over(&owner))
    }
}
