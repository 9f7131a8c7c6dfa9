//! What a builder is asked for.

use std::sync::Arc;

use crate::artifact::format::Source;
use crate::error::{Error, Result};
use crate::lance::StorageOptions;
use crate::model::IvfPqModel;

/// What is encoded: a model, or just the shape that the codes have.
#[derive(Debug, Clone)]
pub enum Encoding {
    Model(Arc<IvfPqModel>),
    Shape { num_partitions: usize, pq_code_width: usize },
}

impl Encoding {
    /// Partitions, and bytes of a code.
    pub fn shape(&self) -> (usize, usize) {
        match self {
            Self::Model(model) => (model.num_partitions(), model.code_width()),
            Self::Shape { num_partitions, pq_code_width } => (*num_partitions, *pq_code_width),
        }
    }

    /// Refuse a shape that no artifact can have.
    pub fn check(&self) -> Result<()> {
        let (num_partitions, code_width) = self.shape();
        if num_partitions == 0 || u32::try_from(num_partitions).is_err() {
            return Err(Error::invalid(format!("num_partitions: got {num_partitions}, expected 1 to {}", u32::MAX)));
        }
        if code_width == 0 || code_width > i32::MAX as usize {
            return Err(Error::invalid(format!("pq_code_width: got {code_width}, expected the bytes of one code, at least 1")));
        }
        Ok(())
    }
}

impl From<IvfPqModel> for Encoding {
    fn from(model: IvfPqModel) -> Self {
        Self::Model(Arc::new(model))
    }
}

/// Options of a [`PartitionArtifactBuilder`](super::PartitionArtifactBuilder); the default is what users get.
#[derive(Debug, Clone)]
pub struct BuilderOptions {
    /// Files of the artifact; `min(num_partitions, 256)`, fewer where few rows are expected, an object store's upload buffers would not fit the limit on
    /// memory, or open files the process's limit.
    pub num_buckets: Option<usize>,
    /// Bytes; 1 GiB or a quarter of the machine's memory, whichever is less.
    pub memory_limit: Option<u64>,
    /// Bytes that others hold of the limit that a caller gave, for messages.
    pub held: u64,
    /// Rows that will be appended, about: for the parts of uploads, which there may be 10,000 of in a file, and for what is
    /// reserved at the start. More may come as long as they fit; without it parts are as large as a share of the limit allows.
    pub expected_rows: Option<u64>,
    /// Replace an artifact that is there already. It stays whole until the new one is published.
    pub overwrite: bool,
    pub storage_options: Option<StorageOptions>,
    /// Where the rows come from, for the finalizer's checks.
    pub source: Option<Source>,
    /// 1 or 2; by default 1 unless there are so many ranges that a manifest is no place for them.
    pub format_version: Option<u32>,
    /// Let `finish` wait until the files are on the local disk, so that a crash of the machine cannot lose them. Not needed for
    /// an artifact that does not outlive its build.
    pub sync: bool,
}

impl Default for BuilderOptions {
    fn default() -> Self {
        Self {
            num_buckets: None,
            memory_limit: None,
            held: 0,
            expected_rows: None,
            overwrite: false,
            storage_options: None,
            source: None,
            format_version: None,
            sync: true,
        }
    }
}
