//! Which rows a version of a dataset has.

use std::collections::HashSet;
use std::ops::Range;

use arrow_array::{Array, FixedSizeListArray};
use lance::dataset::ProjectionRequest;
use lance::dataset::rowids::load_row_id_sequence;
use lance_core::utils::deletion::DeletionVector;

use super::column::VectorColumn;
use super::version::Dataset;
use crate::error::{Error, Result};

impl Dataset {
    /// Live rows of some fragments.
    pub async fn count_rows(&self, fragment_ids: &[u32]) -> Result<u64> {
        self.counted(fragment_ids).await.map_err(|e| self.named(e))
    }

    async fn counted(&self, fragment_ids: &[u32]) -> Result<u64> {
        let chosen: HashSet<u32> = fragment_ids.iter().copied().collect();
        let mut rows = 0;
        for fragment in self.0.get_fragments().into_iter().filter(|f| chosen.contains(&(f.id() as u32))) {
            rows += fragment.count_rows(None).await? as u64;
        }
        Ok(rows)
    }

    /// The row ids of the live rows of a fragment, as runs of consecutive ones.
    pub async fn live_row_ids(&self, fragment_id: u32, each: impl FnMut(Range<u64>)) -> Result<()> {
        self.each_live_run(fragment_id, each).await.map_err(|e| self.named(e))
    }

    async fn each_live_run(&self, fragment_id: u32, mut each: impl FnMut(Range<u64>)) -> Result<()> {
        let fragment = self
            .0
            .get_fragment(fragment_id as usize)
            .ok_or_else(|| Error::mismatch(format!("fragment {fragment_id} is not in the dataset at version {}", self.version())))?;
        let deleted = fragment.get_deletion_vector().await?;
        if !self.has_stable_row_ids() {
            let end = fragment.physical_rows().await? as u64;
            let first = u64::from(fragment_id) << 32;
            let mut start = 0;
            for gone in deleted.iter().flat_map(|deleted| deleted.to_sorted_iter()).map(u64::from).take_while(|gone| *gone < end) {
                each(first + start..first + gone);
                start = gone + 1;
            }
            each(first + start..first + end);
            return Ok(());
        }
        let ids = load_row_id_sequence(&self.0, fragment.metadata()).await?;
        let is_live = |offset: u32| !deleted.as_deref().is_some_and(|deleted: &DeletionVector| deleted.contains(offset));
        let mut run = 0..0;
        for (_, id) in (0u32..).zip(ids.iter()).filter(|(offset, _)| is_live(*offset)) {
            if id != run.end {
                each(std::mem::replace(&mut run, id..id));
            }
            run.end = id + 1;
        }
        each(run);
        Ok(())
    }

    /// The vectors of rows, by their row ids.
    pub async fn take_rows(&self, row_ids: &[u64], column: &VectorColumn) -> Result<FixedSizeListArray> {
        let projection = ProjectionRequest::from_columns([column.path.as_str()], self.0.schema());
        let vectors = column.extract(&self.0.take_rows(row_ids, projection).await.map_err(|e| self.named(e))?)?;
        if vectors.len() != row_ids.len() {
            return Err(Error::internal(format!("{} rows were read, {} were asked for", vectors.len(), row_ids.len())));
        }
        Ok(vectors)
    }

    /// The vectors of rows, by their places among the live rows of some fragments, in order.
    pub async fn take(&self, places: &[u64], column: &VectorColumn, fragment_ids: &[u32]) -> Result<FixedSizeListArray> {
        self.taken(places, column, fragment_ids).await.map_err(|e| self.named(e))
    }

    async fn taken(&self, places: &[u64], column: &VectorColumn, fragment_ids: &[u32]) -> Result<FixedSizeListArray> {
        let projection = ProjectionRequest::from_columns([column.path.as_str()], self.0.schema());
        let fragments = self.0.get_fragments();
        if fragment_ids.len() == fragments.len() {
            return column.extract(&self.0.take(places, projection).await?);
        }
        // A place among some fragments is a place in the dataset, shifted by the rows of the fragments left out.
        let chosen: HashSet<u32> = fragment_ids.iter().copied().collect();
        let mut shifted = Vec::with_capacity(places.len());
        let (mut dataset_start, mut chosen_start, mut next) = (0u64, 0u64, 0usize);
        for fragment in fragments {
            let rows = fragment.count_rows(None).await? as u64;
            if chosen.contains(&(fragment.id() as u32)) {
                while next < places.len() && places[next] < chosen_start + rows {
                    shifted.push(places[next] - chosen_start + dataset_start);
                    next += 1;
                }
                chosen_start += rows;
            }
            dataset_start += rows;
        }
        column.extract(&self.0.take(&shifted, projection).await?)
    }
}
