//! Where an artifact is laid out for one execution: a folder of the local disk beside another one that nobody may open, or memory.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use lance_artifact::lance::LanceStore;
use object_store::{ObjectStoreExt, PutPayload};
use tokio::runtime::Runtime;

/// Files of an artifact by their relative paths.
pub type Files = BTreeMap<String, Vec<u8>>;

/// The folder beside the artifact that no call may open.
const OUTSIDE: &str = "outside";
const MEMORY: &str = "memory://fuzz/artifact";

/// The place of an artifact.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Where {
    Disk,
    /// On the disk, and `partitions` is a link to the folder outside.
    Linked,
    Memory,
}

impl Where {
    pub fn of(number: u8) -> Self {
        match number % 4 {
            1 => Self::Memory,
            2 => Self::Linked,
            _ => Self::Disk,
        }
    }
}

/// What all executions of a target share: the runtime, the folders, and what lies in them.
pub struct Ground {
    pub runtime: Runtime,
    dir: PathBuf,
    watch: Watch,
    laid: [Files; 3],
}

impl Ground {
    /// `outside`: files of the folder that nobody may open.
    pub fn new(outside: &Files) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let parent = std::env::var_os("FUZZ_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let dir = tempfile::Builder::new().prefix("fuzz-").tempdir_in(parent).unwrap().keep().canonicalize().unwrap();
        fs::create_dir(dir.join(OUTSIDE)).unwrap();
        for (name, bytes) in outside {
            fs::write(dir.join(OUTSIDE).join(name.rsplit('/').next().unwrap()), bytes).unwrap();
        }
        fs::create_dir(dir.join(OUTSIDE).join("empty")).unwrap();
        let watch = Watch::of(&dir.join(OUTSIDE));
        let ground = Self { runtime, dir, watch, laid: Default::default() };
        ground.make_folders();
        ground
    }

    fn make_folders(&self) {
        for place in [Where::Disk, Where::Linked] {
            let root = self.root(place);
            fs::create_dir_all(&root).unwrap();
            symlink("../outside", root.join("link")).unwrap();
            symlink("../outside/bucket-00000.lance", root.join("linked.lance")).unwrap();
        }
        symlink("../outside", self.root(Where::Linked).join("partitions")).unwrap();
    }

    /// Where a folder of the disk is.
    pub fn root(&self, place: Where) -> PathBuf {
        self.dir.join(if place == Where::Linked { "linked" } else { "root" })
    }

    /// A folder beside the others, for what a target keeps itself.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// Lay files out; the URI of the folder. What lies there from the execution before and is the same stays.
    pub fn lay(&mut self, files: &Files, place: Where) -> String {
        let laid = std::mem::take(&mut self.laid[place as usize]);
        let uri = match place {
            Where::Memory => {
                self.runtime.block_on(lay_in_memory(&laid, files));
                MEMORY.to_string()
            }
            _ => {
                let root = self.root(place);
                lay_on_disk(&root, &laid, files, place == Where::Linked);
                root.to_str().unwrap().to_string()
            }
        };
        self.laid[place as usize] = files.clone();
        uri
    }

    /// Nobody has opened, changed or listed the folder outside. Who it was the system does not say.
    pub fn assert_stayed_inside(&self) {
        assert!(
            !self.watch.saw_any(),
            "a file or folder outside the artifact was opened or changed; where the input alone does not do it again, another program looked through the folders"
        );
    }
}

/// Below a folder that is a link nothing is written: it would be outside.
fn lay_on_disk(root: &Path, laid: &Files, files: &Files, is_linked: bool) {
    let here = |name: &str| !(is_linked && name.starts_with("partitions/"));
    for name in laid.keys().filter(|name| here(name) && !files.contains_key(*name)) {
        let _ = fs::remove_file(root.join(name));
    }
    for (name, bytes) in files.iter().filter(|(name, bytes)| here(name) && laid.get(*name) != Some(bytes)) {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

async fn lay_in_memory(laid: &Files, files: &Files) {
    let store = LanceStore::open(MEMORY, None).await.unwrap();
    for name in laid.keys().filter(|name| !files.contains_key(*name)) {
        let _ = store.object_store().delete(&store.path(name).unwrap()).await;
    }
    for (name, bytes) in files.iter().filter(|(name, bytes)| laid.get(*name) != Some(bytes)) {
        store.object_store().put(&store.path(name).unwrap(), PutPayload::from(bytes.clone())).await.unwrap();
    }
}

/// Tells whether a folder, or a file in it, was opened or changed.
struct Watch(OwnedFd);

impl Watch {
    fn of(folder: &Path) -> Self {
        let path = std::ffi::CString::new(folder.as_os_str().as_bytes()).unwrap();
        // SAFETY: the call takes numbers and gives a file descriptor or -1.
        let descriptor = unsafe { libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC) };
        assert!(descriptor >= 0, "inotify cannot be had");
        // SAFETY: the descriptor was just made, and is nobody else's.
        let watch = Self(unsafe { OwnedFd::from_raw_fd(descriptor) });
        let events =
            libc::IN_OPEN | libc::IN_ACCESS | libc::IN_MODIFY | libc::IN_CREATE | libc::IN_DELETE | libc::IN_MOVE | libc::IN_ATTRIB;
        // SAFETY: `path` ends with a zero and lives as long as the call.
        let added = unsafe { libc::inotify_add_watch(descriptor, path.as_ptr(), events) };
        assert!(added >= 0, "{} cannot be watched", folder.display());
        watch
    }

    fn saw_any(&self) -> bool {
        use std::os::fd::AsRawFd;
        let mut events = [0u8; 4096];
        // SAFETY: the call writes at most as many bytes as `events` has.
        let read = unsafe { libc::read(self.0.as_raw_fd(), events.as_mut_ptr().cast(), events.len()) };
        read > 0
    }
}
