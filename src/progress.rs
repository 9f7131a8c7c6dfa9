//! Progress of work, told to whoever watches it.

use crate::error::Result;

/// Told of the stages of work as it goes on; `check` may end it.
pub trait Progress: Send + Sync {
    fn start(&self, stage: &str, total: Option<u64>, unit: &str);
    fn advance(&self, stage: &str, completed: u64);
    fn complete(&self, stage: &str);
    fn check(&self) -> Result<()> {
        Ok(())
    }
}
