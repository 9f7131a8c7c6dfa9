//! Claims: the files by which an attempt says that it is there, and whose it is.
//!
//! Each attempt to write an artifact has a tag, and leaves one claim as long as it lasts. Tagged names belong to one attempt for
//! ever, so its claim only tells others whose files they are. Plain names are shared by all attempts: whoever creates or deletes
//! one must hold [`CLAIM_FILE`], which one attempt at a time can.

use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::artifact::format::{CLAIM_FILE, claim_file};
use crate::error::{Error, Result};
use crate::io::{Condition, Owner, Seen, Store};

/// The longest that a claim of which nothing was heard is looked for.
const UNHEARD: Duration = Duration::from_secs(10);

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
}

/// A claim that this attempt holds.
#[derive(Debug)]
pub struct Claim {
    file: String,
    content: Bytes,
}

impl Claim {
    fn new(tag: &str, plain: bool) -> Result<Self> {
        let marks = Marks { attempt: tag.to_string(), owner: Owner::this() };
        let content = serde_json::to_vec(&marks).map_err(|e| Error::internal(format!("claim: {e}")))?;
        Ok(Self { file: claim_file((!plain).then_some(tag)), content: content.into() })
    }

    /// Claim the tag itself, or the plain names; `None` where somebody else holds them.
    pub async fn take(store: &Store, tag: &str, plain: bool) -> Result<Option<Self>> {
        let claim = Self::new(tag, plain)?;
        let put = async {
            let taken = store.put_if(&claim.file, claim.content.clone(), Condition::Absent, false).await?;
            // An answer may be lost, and the client's next try then finds its own claim.
            Ok(taken || claim.is_held(store).await?)
        };
        let taken: Result<bool> = put.await;
        if taken.is_err() {
            // It may be there all the same, and would be this process's for as long as that lives. Whoever asks does not wait for it long.
            let _ = tokio::time::timeout(UNHEARD, claim.release(store)).await;
        }
        Ok(taken?.then_some(claim))
    }

    /// Take over the plain names of an attempt that is over; `None` where somebody else was faster.
    pub async fn take_over(store: &Store, tag: &str, left: &Seen) -> Result<Option<Self>> {
        let claim = Self::new(tag, true)?;
        let taken = store.put_if(CLAIM_FILE, claim.content.clone(), Condition::Unchanged(left), false).await?;
        Ok((taken || claim.is_held(store).await?).then_some(claim))
    }

    /// Whether it is still this attempt's: another one may have taken it for abandoned.
    pub async fn is_held(&self, store: &Store) -> Result<bool> {
        Ok(store.read(&self.file).await?.is_some_and(|there| there == self.content))
    }

    /// Give it up. One that became another's stays.
    pub async fn release(&self, store: &Store) -> Result<()> {
        store.delete_if(&self.file, &self.content).await.map(|_| ())
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
