//! Claims: the files by which an attempt says that it is there, and whose it is.
//!
//! Each attempt to write an artifact has a tag, and leaves one claim as long as it lasts. Tagged names belong to one attempt for
//! ever, so its claim only tells others whose files they are. Plain names are shared by all attempts: whoever creates or deletes
//! one must hold [`CLAIM_FILE`], which one attempt at a time can.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::artifact::format::{CLAIM_FILE, claim_file};
use crate::error::{Error, Result};
use crate::io::{Condition, Owner, Seen, Store};
use crate::sync::locked;

/// The longest that a claim of which nothing was heard is looked for.
const UNHEARD: Duration = Duration::from_secs(10);

/// Tags of attempts of this process that are over, and whose claims it could not remove, or may not have: the process is alive, they are
/// not.
static OVER: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// What a claim says.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Marks {
    /// The attempt's tag.
    pub attempt: String,
    pub owner: Owner,
}

impl Marks {
    /// `None` where it cannot be known whose a claim is, as with those of earlier releases.
    pub fn parse(claim: &[u8]) -> Option<Self> {
        serde_json::from_slice(claim).ok()
    }

    /// Whether the attempt is certainly over. False where that cannot be known from here.
    pub fn is_over(&self) -> bool {
        self.owner.is_gone() || (self.owner.is_this() && locked(&OVER).contains(&self.attempt))
    }

    /// Whether the attempt may certainly go on, and be its process stopped. False where that cannot be known from here.
    pub fn is_alive(&self) -> bool {
        self.owner.is_alive() && !self.is_over()
    }
}

/// A claim that this attempt holds.
#[derive(Debug)]
pub struct Claim {
    attempt: String,
    file: String,
    content: Bytes,
}

impl Claim {
    fn new(tag: &str, plain: bool) -> Result<Self> {
        let marks = Marks { attempt: tag.to_string(), owner: Owner::this() };
        let content = serde_json::to_vec(&marks).map_err(|e| Error::internal(format!("claim: {e}")))?;
        locked(&OVER).remove(tag);
        Ok(Self { attempt: tag.to_string(), file: claim_file((!plain).then_some(tag)), content: content.into() })
    }

    /// Claim the tag itself, or the plain names; `None` where somebody else holds them.
    pub async fn take(store: &Store, tag: &str, plain: bool) -> Result<Option<Self>> {
        let claim = Self::new(tag, plain)?;
        let put = async {
            let taken = store.put_if(&claim.file, claim.content.clone(), Condition::Absent, false).await?;
            // An answer may be lost, and the client's next try then finds its own claim.
            Ok(taken || claim.is_held(store).await?)
        };
        let taken = put.await;
        claim.if_taken(taken, store).await
    }

    /// Take over the plain names of an attempt that is over; `None` where somebody else was faster.
    pub async fn take_over(store: &Store, tag: &str, left: &Seen) -> Result<Option<Self>> {
        let claim = Self::new(tag, true)?;
        let put = async {
            let taken = store.put_if(CLAIM_FILE, claim.content.clone(), Condition::Unchanged(left), false).await?;
            Ok(taken || claim.is_held(store).await?)
        };
        let taken = put.await;
        claim.if_taken(taken, store).await
    }

    async fn if_taken(self, taken: Result<bool>, store: &Store) -> Result<Option<Self>> {
        if taken.is_err() {
            // It may be there all the same, or come later. Whoever asks does not wait for it long.
            let _ = tokio::time::timeout(UNHEARD, self.release(store)).await;
            self.give_up();
        }
        Ok(taken?.then_some(self))
    }

    /// Whether it is still this attempt's: another one may have taken it for abandoned.
    pub async fn is_held(&self, store: &Store) -> Result<bool> {
        Ok(store.read(&self.file).await?.is_some_and(|there| there == self.content))
    }

    /// Give it up. One that became another's stays.
    pub async fn release(&self, store: &Store) -> Result<()> {
        let released = store.delete_if(&self.file, &self.content).await;
        if released.is_err() {
            self.give_up();
        }
        released.map(|_| ())
    }

    /// Let others of this process know that the attempt is over, should its claim still be there.
    fn give_up(&self) {
        locked(&OVER).insert(self.attempt.clone());
    }

    /// Make sure that the store keeps the conditions on which everything here depends: some ignore them without a word.
    pub async fn check_conditions(&self, store: &Store, replacing: bool) -> Result<()> {
        if let Some(root) = store.local_root() {
            if replacing {
                let root = root.to_path_buf();
                let lock = tokio::task::spawn_blocking(move || crate::io::Lock::take(&root).map(drop)).await?;
                lock.map_err(|e| match e.kind() {
                    std::io::ErrorKind::Unsupported => Error::invalid(format!(
                        "{}: this disk has no file locks ({e}), without which overwrite=True could destroy another writer's artifact; \
                         choose a new artifact_uri",
                        store.uri()
                    )),
                    _ => Error::from(e).context(format!("locking {}", store.uri())),
                })?;
            }
            return Ok(());
        }
        let ignored = |what: &str| {
            Error::invalid(format!(
                "{}: the store ignores {what}, so two writers could destroy each other's artifact; use another store",
                store.uri()
            ))
        };
        if store.put_if(&self.file, self.content.clone(), Condition::Absent, false).await? {
            return Err(ignored("put-if-absent"));
        }
        if replacing {
            let never = Seen::never();
            let put = store.put_if(&self.file, self.content.clone(), Condition::Unchanged(&never), false).await;
            let put = put.map_err(|e| match e {
                Error::InvalidInput(m) => Error::invalid(format!("overwrite=True: {m}; choose a new artifact_uri")),
                other => other,
            });
            if put? {
                return Err(ignored("conditions of overwriting puts"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::unfinished::unfinished_at;
    use super::*;
    use crate::lance::LanceStore;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_claim_that_could_not_be_given_up_is_no_attempts() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("a");
        let store = LanceStore::open(root.to_str().unwrap(), None).await.unwrap();
        for plain in [true, false] {
            let claim = Claim::take(&store, "0caaaa01", plain).await.unwrap().unwrap();
            let found = unfinished_at(&store, false).await.unwrap();
            assert!(found.is_busy && found.files.is_empty(), "{found:?}");
            // No folder, so that nothing in it can be looked at.
            let moved = folder.path().join("moved");
            std::fs::rename(&root, &moved).unwrap();
            std::fs::write(&root, "").unwrap();
            claim.release(&store).await.unwrap_err();
            std::fs::remove_file(&root).unwrap();
            std::fs::rename(&moved, &root).unwrap();
            let found = unfinished_at(&store, false).await.unwrap();
            assert_eq!((found.is_busy, found.files.len()), (false, 1), "{found:?}");
            // Another attempt of the same tag, at another place or later.
            std::fs::remove_file(root.join(claim_file((!plain).then_some("0caaaa01")))).unwrap();
            let again = Claim::take(&store, "0caaaa01", plain).await.unwrap().unwrap();
            assert!(unfinished_at(&store, false).await.unwrap().is_busy);
            again.release(&store).await.unwrap();
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_claim_that_was_taken_over_without_an_answer_is_no_attempts() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("a");
        let store = LanceStore::open(root.to_str().unwrap(), None).await.unwrap();
        let first = Claim::take(&store, "0caaaa02", true).await.unwrap().unwrap();
        let left = store.see(CLAIM_FILE).await.unwrap().unwrap();
        let claim = Claim::new("0caaaa03", true).unwrap();
        // It has come, and nobody was told.
        std::fs::write(root.join(CLAIM_FILE), &claim.content).unwrap();
        let lost = Claim { attempt: claim.attempt.clone(), file: claim.file.clone(), content: claim.content.clone() };
        let moved = folder.path().join("moved");
        std::fs::rename(&root, &moved).unwrap();
        std::fs::write(&root, "").unwrap();
        lost.if_taken(Err(Error::Storage("no answer".into())), &store).await.unwrap_err();
        std::fs::remove_file(&root).unwrap();
        std::fs::rename(&moved, &root).unwrap();
        assert!(!unfinished_at(&store, false).await.unwrap().is_busy);
        assert!(Claim::take_over(&store, "0caaaa04", &left).await.unwrap().is_none(), "it is another by now");
        first.release(&store).await.unwrap();
    }
}
