//! Stores as Lance opens them: with its storage options, its schemes and its credentials.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, Weak};

use async_trait::async_trait;
use lance_io::object_store::{ObjectStore, ObjectStoreParams, ObjectStoreRegistry, StorageOptionsAccessor, StorageOptionsProvider};
use lance_io::scheduler::{ScanScheduler, SchedulerConfig};
use tokio::runtime::Handle;

use crate::error::{Error, Result};
use crate::io::{Store, has_scheme, without_credentials, without_quoted_credentials};
use crate::sync::locked;

/// `storage_options` as pylance takes them, and where they are renewed when they end.
pub type StorageOptions = Arc<StorageOptionsAccessor>;

/// Gives storage options anew when those that it gave end (`expires_at_millis`).
#[async_trait]
pub trait OptionsSource: Send + Sync {
    async fn fetch(&self) -> Result<Option<HashMap<String, String>>>;
}

struct Provider {
    source: Box<dyn OptionsSource>,
    /// Stores are shared by those whose providers have the same name.
    id: String,
}

impl std::fmt::Debug for Provider {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Provider")
    }
}

#[async_trait]
impl StorageOptionsProvider for Provider {
    async fn fetch_storage_options(&self) -> lance_core::Result<Option<HashMap<String, String>>> {
        Ok(self.source.fetch().await?)
    }

    fn provider_id(&self) -> String {
        self.id.clone()
    }
}

/// Options that do not end.
pub fn static_options(options: HashMap<String, String>) -> StorageOptions {
    Arc::new(StorageOptionsAccessor::with_static_options(options))
}

/// Options as they are now, and where others come from when they end.
pub fn renewed_options(options: HashMap<String, String>, source: Box<dyn OptionsSource>) -> StorageOptions {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let id = format!("lance-artifact-{}", NEXT.fetch_add(1, Ordering::Relaxed));
    Arc::new(StorageOptionsAccessor::with_initial_and_provider(options, Arc::new(Provider { source, id })))
}

static REGISTRY: LazyLock<Arc<ObjectStoreRegistry>> = LazyLock::new(Default::default);

/// `memory://` has no place of its own: one store for the process, alive as long as it is.
static MEMORY: LazyLock<Mutex<Option<Arc<ObjectStore>>>> = LazyLock::new(Default::default);

/// A folder of a store, and the store as Lance's readers want it.
#[derive(Debug, Clone)]
pub struct LanceStore {
    pub files: Store,
    pub(super) store: Arc<ObjectStore>,
}

/// One scheduler for each store that is open, so that what is read at once is bounded however many artifacts are read. It lives on the
/// runtime that made it.
type Schedulers = HashMap<(tokio::runtime::Id, usize), Weak<ScanScheduler>>;

static SCHEDULERS: LazyLock<Mutex<Schedulers>> = LazyLock::new(Default::default);

impl std::ops::Deref for LanceStore {
    type Target = Store;

    fn deref(&self) -> &Store {
        &self.files
    }
}

impl LanceStore {
    /// Resolve `uri`: a local path or anything Lance's object store takes (`s3://`, `gs://`, `az://`, `memory://`, `file://`).
    pub async fn open(uri: &str, storage_options: Option<&StorageOptions>) -> Result<Self> {
        if uri.is_empty() {
            return Err(Error::invalid("artifact_uri: got an empty string, expected a path or a URI"));
        }
        // Lance takes what is no URL for a path.
        if let Err(error) = url::Url::parse(uri)
            && has_scheme(uri)
        {
            let shown = without_credentials(uri);
            return Err(Error::invalid(format!("artifact_uri: {shown:?} is neither a path nor a URI ({error})")));
        }
        let params = ObjectStoreParams { storage_options_accessor: storage_options.cloned(), ..Default::default() };
        let shown = without_credentials(uri);
        let (store, root) = ObjectStore::from_uri_and_params(REGISTRY.clone(), uri, &params).await.map_err(|e| {
            let error = match Error::from(e) {
                known @ (Error::InvalidInput(_) | Error::Storage(_)) => known,
                other => Error::Internal(other.to_string()),
            };
            error.reworded(|message| without_quoted_credentials(&message, uri)).context(format!("artifact_uri {shown:?}"))
        })?;
        // Options that are renewed are others each time: what nobody has any more would stay in it, with its credentials.
        drop(REGISTRY.active_stores());
        let store = if store.scheme() == "memory" { locked(&MEMORY).get_or_insert(store).clone() } else { store };
        let local_root = store.is_local().then(|| PathBuf::from(format!("/{root}")));
        // A path is resolved once: the working directory may be another one when the artifact is opened again.
        let true_uri = match &local_root {
            Some(root) if url::Url::parse(uri).is_err() => root.display().to_string(),
            _ => uri.to_string(),
        };
        Ok(Self { files: Store::new(store.inner.clone(), root, true_uri, local_root), store })
    }

    /// A folder of a store that a test stands in for; nothing can be read of it by Lance.
    #[cfg(test)]
    pub fn standing_in(store: Arc<dyn object_store::ObjectStore>, root: &str) -> Self {
        static NONE: LazyLock<Arc<ObjectStore>> = LazyLock::new(|| Arc::new(ObjectStore::memory()));
        Self { files: Store::new(store, root.into(), format!("test://{root}"), None), store: NONE.clone() }
    }

    /// What reads of this store go through. Call within a Tokio runtime.
    pub(super) fn scheduler(&self) -> Arc<ScanScheduler> {
        // The scheduler keeps its store, so that no other one can be at its address.
        let key = (Handle::current().id(), Arc::as_ptr(&self.store).addr());
        let mut schedulers = locked(&SCHEDULERS);
        if let Some(scheduler) = schedulers.get(&key).and_then(Weak::upgrade) {
            return scheduler;
        }
        let scheduler = ScanScheduler::new(self.store.clone(), SchedulerConfig::max_bandwidth(&self.store));
        schedulers.retain(|_, scheduler| scheduler.strong_count() > 0);
        schedulers.insert(key, Arc::downgrade(&scheduler));
        scheduler
    }

    /// The same place, with temporary files whose names begin otherwise.
    pub fn with_temporary_prefix(&self, temporary_prefix: String) -> Self {
        Self { files: self.files.with_temporary_prefix(temporary_prefix), store: self.store.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tells by its count whether it is kept.
    struct Kept {
        _by: Arc<()>,
    }

    #[async_trait]
    impl OptionsSource for Kept {
        async fn fetch(&self) -> Result<Option<HashMap<String, String>>> {
            Ok(None)
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn options_are_kept_no_longer_than_their_store() {
        let folder = tempfile::tempdir().unwrap();
        let open = async |kept: &Arc<()>| {
            let options = renewed_options(HashMap::new(), Box::new(Kept { _by: kept.clone() }));
            LanceStore::open(folder.path().to_str().unwrap(), Some(&options)).await.unwrap()
        };
        let (first, second) = (Arc::new(()), Arc::new(()));
        drop(open(&first).await);
        let held = open(&second).await;
        assert_eq!((Arc::strong_count(&first), Arc::strong_count(&second) > 1), (1, true));
        drop(held);
    }
}
