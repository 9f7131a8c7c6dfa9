//! Segments that are committed.

use lance::index::DatasetIndexExt;
use lance_table::format::IndexMetadata;

use crate::error::Result;
use crate::lance::dataset::Dataset;

/// A committed segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommittedSegment {
    pub uuid: String,
    pub fields: Vec<i32>,
    pub dataset_version: u64,
    pub fragment_ids: Vec<u32>,
    /// False where its index does not say what it covers, as those of old releases; then there are no `fragment_ids`.
    pub says_coverage: bool,
    pub index_version: i32,
    /// Of the base path where its files are, if that is another one.
    pub base_id: Option<u32>,
    /// Type URL and bytes, where there are any.
    pub details: Option<(String, Vec<u8>)>,
}

impl CommittedSegment {
    /// The segments of the index of a name.
    pub async fn of_index(dataset: &Dataset, name: &str) -> Result<Vec<Self>> {
        Ok(dataset.0.load_indices_by_name(name).await?.into_iter().map(Self::from).collect())
    }

    /// Whether its details hold a text, which protobuf stores as it is.
    pub fn details_hold(&self, text: &str) -> bool {
        let wanted = text.as_bytes();
        self.details.as_ref().is_some_and(|(_, details)| details.windows(wanted.len().max(1)).any(|found| found == wanted))
    }
}

impl From<IndexMetadata> for CommittedSegment {
    fn from(index: IndexMetadata) -> Self {
        Self {
            uuid: index.uuid.to_string(),
            fields: index.fields,
            dataset_version: index.dataset_version,
            says_coverage: index.fragment_bitmap.is_some(),
            fragment_ids: index.fragment_bitmap.map(|bitmap| bitmap.iter().collect()).unwrap_or_default(),
            index_version: index.index_version,
            base_id: index.base_id,
            details: index.index_details.map(|details| (details.type_url.clone(), details.value.clone())),
        }
    }
}
