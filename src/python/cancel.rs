//! How background work is told to stop.

use std::sync::Arc;

use tokio::sync::watch;

use crate::error::{Error, Result};

/// Tells background work to stop.
#[derive(Clone)]
pub struct Cancel(Arc<watch::Sender<bool>>);

impl Cancel {
    pub fn new() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }

    pub fn is_set(&self) -> bool {
        *self.0.borrow()
    }

    pub fn set(&self) {
        self.0.send_replace(true);
    }

    /// For work that has to wind up in order: true once it is cancelled.
    pub fn subscribe(&self) -> watch::Receiver<bool> {
        self.0.subscribe()
    }

    /// Run `work` until it ends or is cancelled; then it is dropped where it waits.
    pub async fn race<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let mut cancelled = self.0.subscribe();
        tokio::select! {
            result = work => result,
            _ = cancelled.wait_for(|set| *set) => Err(Error::Interrupted("interrupted".into())),
        }
    }
}
