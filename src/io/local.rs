//! Local disks: temporary files, files that appear in one step, locks, and what makes names durable.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What begins the names of files beside an artifact that are no part of it.
pub const HIDDEN_PREFIX: &str = ".lance-artifact-";

/// Locked while a file is compared and then replaced or removed; gone afterwards.
pub const LOCK_FILE: &str = ".lance-artifact-lock";

/// How long to wait for a lock, which is held for a moment unless its holder was stopped in it.
const LOCK_WAIT: Duration = Duration::from_secs(5);
const LOCK_POLL: Duration = Duration::from_millis(10);

/// A file that disappears when dropped, with the permissions of ordinary files and a name that says whose it is.
pub(crate) fn new_temporary_file(parent: &Path, prefix: &str) -> io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // NamedTempFile is private to the user; what is published must follow the user's umask like any other file.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(parent)
}

/// Where a file goes, and how.
pub struct Put {
    pub root: PathBuf,
    pub relative: String,
    pub content: Vec<u8>,
    pub temporary_prefix: String,
    pub sync: bool,
}

impl Put {
    fn write(&self) -> io::Result<(PathBuf, tempfile::NamedTempFile)> {
        let target = self.root.join(&self.relative);
        let parent = target.parent().unwrap_or(&self.root);
        std::fs::create_dir_all(parent)?;
        let mut file = new_temporary_file(parent, &self.temporary_prefix)?;
        file.write_all(&self.content)?;
        if self.sync {
            file.as_file().sync_all()?;
        }
        Ok((target, file))
    }

    fn written(&self, target: &Path) -> io::Result<()> {
        if self.sync { sync_dir(target.parent().unwrap_or(&self.root)) } else { Ok(()) }
    }

    /// False where a file of that name is there.
    pub fn if_absent(&self) -> io::Result<bool> {
        let (target, file) = self.write()?;
        match file.persist_noclobber(&target) {
            Ok(_) => self.written(&target).map(|()| true),
            Err(e) if e.error.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(e) => Err(e.error),
        }
    }

    /// False where the file's content is not `seen` any more.
    pub fn if_unchanged(&self, seen: &[u8]) -> io::Result<bool> {
        let (target, file) = self.write()?;
        let lock = Lock::take(&self.root)?;
        let same = holds(&target, seen)?;
        if same {
            file.persist(&target).map_err(|e| e.error)?;
            self.written(&target)?;
        }
        drop(lock);
        Ok(same)
    }
}

/// Remove a file whose content is `seen`; false where it is not any more.
pub fn remove_if_unchanged(root: &Path, relative: &str, seen: &[u8]) -> io::Result<bool> {
    let target = root.join(relative);
    let lock = match Lock::take(root) {
        Ok(lock) => Some(lock),
        // The folder is gone, and the file with it.
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
        // Nobody can replace a file on such a disk (that takes the lock), so nobody can have put another one here.
        Err(e) if e.kind() == ErrorKind::Unsupported => None,
        Err(e) => return Err(e),
    };
    let same = holds(&target, seen)?;
    if same {
        std::fs::remove_file(&target)?;
    }
    drop(lock);
    Ok(same)
}

fn holds(path: &Path, content: &[u8]) -> io::Result<bool> {
    match std::fs::read(path) {
        Ok(there) => Ok(there == content),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// An exclusive lock on the files of an artifact's folder that more than one attempt may replace. The system releases it when
/// its holder dies; the lock file that is left then is taken like any other.
pub struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    pub fn take(root: &Path) -> io::Result<Self> {
        let path = root.join(LOCK_FILE);
        let start = Instant::now();
        loop {
            let file = open_lock(&path)?;
            match file.try_lock() {
                // The last holder removes the file: a lock on one that is gone locks nothing.
                Ok(()) if is_at(&file, &path)? => return Ok(Self { file, path }),
                Ok(()) if start.elapsed() < LOCK_WAIT => {}
                Err(TryLockError::WouldBlock) if start.elapsed() < LOCK_WAIT => std::thread::sleep(LOCK_POLL),
                Ok(()) | Err(TryLockError::WouldBlock) => {
                    let message = format!(
                        "another process has held the lock {} for {} s; if it is stopped, let it go on or end it",
                        path.display(),
                        LOCK_WAIT.as_secs()
                    );
                    return Err(io::Error::new(ErrorKind::TimedOut, message));
                }
                Err(TryLockError::Error(e)) => {
                    let _ = std::fs::remove_file(&path);
                    return Err(e);
                }
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Removed while it is locked, so that it is nobody else's. Where files have no identity to compare, it stays.
        #[cfg(unix)]
        let _ = std::fs::remove_file(&self.path);
        let _ = self.file.unlock();
    }
}

/// A file of ours, and not what somebody has put there to be opened: a link elsewhere, or a pipe.
fn open_lock(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOFOLLOW | libc::O_NONBLOCK);
    options.open(path)
}

#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let ours = file.metadata()?;
    match std::fs::symlink_metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino())),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(not(unix))]
fn is_at(_: &File, _: &Path) -> io::Result<bool> {
    Ok(true)
}

/// Make the names in a folder durable.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// The folders that get a new entry when `root` is made: its parent, and that of every folder above it that is not there.
pub fn parents_of_new(root: &Path) -> Vec<PathBuf> {
    root.ancestors().take_while(|folder| !folder.exists()).filter_map(|folder| folder.parent().map(Path::to_path_buf)).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn a_lock_is_one_threads_at_a_time_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let inside = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let lock = Lock::take(dir.path()).unwrap();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(lock);
                    }
                });
            }
        });
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    #[cfg(unix)]
    fn a_lock_that_leads_elsewhere_is_refused() {
        let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for target in [elsewhere.path().join("there"), elsewhere.path().join("new")] {
            if target.ends_with("there") {
                std::fs::write(&target, "mine").unwrap();
            }
            std::os::unix::fs::symlink(&target, dir.path().join(LOCK_FILE)).unwrap();
            assert!(Lock::take(dir.path()).is_err());
            std::fs::remove_file(dir.path().join(LOCK_FILE)).unwrap();
        }
        assert_eq!(std::fs::read_dir(elsewhere.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_lock_file_that_was_left_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(LOCK_FILE), "").unwrap();
        drop(Lock::take(dir.path()).unwrap());
        assert!(!dir.path().join(LOCK_FILE).exists());
    }

    #[test]
    fn replacing_needs_what_was_seen() {
        let dir = tempfile::tempdir().unwrap();
        let put = |content: &str| Put {
            root: dir.path().join("a"),
            relative: "f".into(),
            content: content.into(),
            temporary_prefix: ".t-".into(),
            sync: true,
        };
        assert!(put("1").if_absent().unwrap());
        assert!(!put("2").if_absent().unwrap());
        assert!(!put("2").if_unchanged(b"0").unwrap());
        assert!(put("2").if_unchanged(b"1").unwrap());
        assert!(!remove_if_unchanged(&dir.path().join("a"), "f", b"1").unwrap());
        assert_eq!(std::fs::read(dir.path().join("a/f")).unwrap(), b"2");
        assert_eq!(std::fs::read_dir(dir.path().join("a")).unwrap().count(), 1);
        assert!(remove_if_unchanged(&dir.path().join("a"), "f", b"2").unwrap());
        assert!(!remove_if_unchanged(&dir.path().join("b"), "f", b"2").unwrap());
    }

    #[test]
    fn new_folders_have_parents_to_sync() {
        let dir = tempfile::tempdir().unwrap();
        assert!(parents_of_new(dir.path()).is_empty());
        let expected = [dir.path().join("a/b"), dir.path().join("a"), dir.path().to_path_buf()];
        assert_eq!(parents_of_new(&dir.path().join("a/b/c")), expected);
    }
}
