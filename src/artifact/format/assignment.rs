//! What an artifact says of how its rows were given their partitions.

use serde::{Deserialize, Serialize};

/// Every row was compared with all centroids, or decided as Lance decides.
pub const EXACT: &str = "exact";
/// Rows were compared with the centroids of the groups nearest to them.
pub const GROUPS: &str = "groups";

/// How rows were given their partitions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Assignment {
    /// [`EXACT`], [`GROUPS`], or what another writer says.
    pub method: String,
    #[serde(flatten)]
    pub groups: Option<Groups>,
}

/// Groups of centroids, and how often the nearest centroid was not in those that were looked at.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Groups {
    pub groups: usize,
    /// By a row, on the average of some of the sample.
    pub looked_at: f64,
    /// Rows of the sample that `looked_at` was chosen by, and those of them that are not with their nearest centroid.
    pub sampled: u64,
    pub sampled_missed: u64,
    /// Encoded rows that were also compared with all centroids, and those of them that are not with their nearest.
    #[serde(default)]
    pub checked: u64,
    #[serde(default)]
    pub missed: u64,
}

impl Assignment {
    pub fn exact() -> Self {
        Self { method: EXACT.into(), groups: None }
    }

    pub fn by_groups(groups: Groups) -> Self {
        Self { method: GROUPS.into(), groups: Some(groups) }
    }
}
