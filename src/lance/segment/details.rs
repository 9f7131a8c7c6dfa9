//! What an index says of itself in the manifest: all that stock Lance writes there, because it goes by it later. A plain
//! `optimize_indices` of an index without its target partition size, for one, puts new rows into ever larger partitions.

use std::collections::HashMap;

use lance_index::pb;
use lance_index::pb::vector_index_details::{Compression, ProductQuantization};
use lance_index::vector::hnsw::builder::HnswBuildParams;
use lance_index::vector::ivf::IvfBuildParams;
use lance_index::vector::pq::PQBuildParams;

use crate::error::{Error, Result};
use crate::model::{IvfPqModel, Metric, Training};

/// The index types that one artifact can become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IndexType {
    IvfPq,
    /// With an HNSW graph over each partition's codes.
    IvfHnswPq(Graphs),
}

/// How graphs are built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Graphs {
    /// Edges per node.
    pub m: usize,
    /// Candidates kept while building.
    pub ef_construction: usize,
    /// Levels at most.
    pub max_level: u16,
}

impl Graphs {
    /// As Lance's builder takes them.
    pub fn params(self) -> HnswBuildParams {
        HnswBuildParams::default().num_edges(self.m).ef_construction(self.ef_construction).max_level(self.max_level)
    }

    pub fn check(self) -> Result<()> {
        let Self { m, ef_construction, max_level } = self;
        if !((4..=1024).contains(&m) && (m..=65_536).contains(&ef_construction)) {
            return Err(Error::invalid(format!(
                "m and ef_construction: got {m} and {ef_construction}, expected m from 4 to 1024 and ef_construction from m to 65536"
            )));
        }
        if !(1..=64).contains(&max_level) {
            return Err(Error::invalid(format!("max_level: got {max_level}, expected 1 to 64")));
        }
        Ok(())
    }
}

impl IndexType {
    /// The version of its format.
    pub fn version(self) -> i32 {
        match self {
            Self::IvfPq => lance_index::IndexType::IvfPq.version(),
            Self::IvfHnswPq(_) => lance_index::IndexType::IvfHnswPq.version(),
        }
    }
}

/// The details of an index of `model`: type URL and bytes. `hints` is provenance beside what stock has.
pub fn index_details(
    model: &IvfPqModel,
    training: Option<Training>,
    index_type: IndexType,
    transposed: bool,
    mut hints: HashMap<String, String>,
) -> Result<(String, Vec<u8>)> {
    let metric = match model.metric() {
        Metric::L2 => pb::VectorMetricType::L2,
        Metric::Cosine => pb::VectorMetricType::Cosine,
        Metric::Dot => pb::VectorMetricType::Dot,
    };
    let training = training.unwrap_or_default();
    let (ivf, pq) = (IvfBuildParams::default(), PQBuildParams::default());
    let mut hint = |key: &str, value: String| {
        hints.entry(format!("lance.{key}")).or_insert(value);
    };
    if let Some(max_iters) = training.max_iters {
        hint("ivf.max_iters", max_iters.to_string());
        hint("pq.max_iters", max_iters.to_string());
    }
    if let Some(sample_rate) = training.sample_rate {
        hint("ivf.sample_rate", sample_rate.to_string());
        hint("pq.sample_rate", sample_rate.to_string());
    }
    hint("ivf.shuffle_partition_batches", ivf.shuffle_partition_batches.to_string());
    hint("ivf.shuffle_partition_concurrency", ivf.shuffle_partition_concurrency.to_string());
    hint("pq.kmeans_redos", pq.kmeans_redos.to_string());
    hint("skip_transpose", (!transposed).to_string());
    let hnsw = match index_type {
        IndexType::IvfPq => None,
        IndexType::IvfHnswPq(graphs) => {
            let params = graphs.params();
            hint("hnsw.prefetch_distance", params.prefetch_distance.map_or("none".into(), |distance| distance.to_string()));
            Some((&params).into())
        }
    };
    let details = pb::VectorIndexDetails {
        metric_type: metric.into(),
        target_partition_size: training.target_partition_size.unwrap_or_default(),
        hnsw_index_config: hnsw,
        compression: Some(Compression::Pq(ProductQuantization {
            num_bits: model.num_bits(),
            num_sub_vectors: model.num_sub_vectors() as u32,
        })),
        runtime_hints: hints,
    };
    let details = prost_types::Any::from_msg(&details).map_err(|e| Error::internal(format!("index details: {e}")))?;
    Ok((details.type_url, details.value))
}
