//! What Lance's own builds need of their surroundings: its threads, and somebody to tell of its progress.

use std::sync::Arc;

use async_trait::async_trait;
use lance_core::utils::tokio::{get_num_compute_intensive_cpus, spawn_cpu};
use lance_index::progress::IndexBuildProgress;

use crate::error::{Error, Result};
use crate::progress::Progress;

/// The stage of a build that writes partitions. Lance's training and shuffling do nothing in a finalizer and are not shown.
pub const MERGE_STAGE: &str = "merge_partitions";

/// Start the threads on which Lance computes. Afterwards a refused thread would be a panic, or work that waits for ever.
pub async fn start_threads() -> Result<()> {
    spawn_cpu(|| Ok::<_, Error>(())).await
}

/// Threads on which Lance computes.
pub fn compute_threads() -> usize {
    get_num_compute_intensive_cpus().max(1)
}

/// Passes on what Lance's index builder reports.
pub struct BuildProgress(pub Arc<dyn Progress>);

impl std::fmt::Debug for BuildProgress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BuildProgress")
    }
}

#[async_trait]
impl IndexBuildProgress for BuildProgress {
    async fn stage_start(&self, stage: &str, total: Option<u64>, unit: &str) -> lance_core::Result<()> {
        if stage == MERGE_STAGE {
            self.0.start(stage, total, unit);
        }
        Ok(())
    }

    async fn stage_progress(&self, stage: &str, completed: u64) -> lance_core::Result<()> {
        if stage == MERGE_STAGE {
            self.0.advance(stage, completed);
        }
        Ok(())
    }

    async fn stage_complete(&self, stage: &str) -> lance_core::Result<()> {
        if stage == MERGE_STAGE {
            self.0.complete(stage);
        }
        Ok(())
    }
}
