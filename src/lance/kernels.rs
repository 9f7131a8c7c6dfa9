//! Arithmetic as Lance rounds it: what decides where our own kernels cannot tell, so that codes come out as Lance's build has them.

use arrow_array::FixedSizeListArray;
use arrow_array::cast::AsArray;
use lance_index::vector::kmeans::compute_partitions_arrow_array;
use lance_index::vector::pq::ProductQuantizer;
use lance_index::vector::quantizer::Quantization;
use lance_linalg::distance::DistanceType;

use crate::error::{Error, Result};
use crate::model::{IvfPqModel, Metric};

pub use lance_linalg::kernels::{Normalizable, normalize};

/// The distance that searches of an index of this metric compute.
pub fn distance_type(metric: Metric) -> DistanceType {
    match metric {
        Metric::L2 => DistanceType::L2,
        Metric::Cosine => DistanceType::Cosine,
        Metric::Dot => DistanceType::Dot,
    }
}

/// The partition of each vector, by Lance's exhaustive search. Cosine vectors are of unit norm and compared by L2.
pub fn assign(centroids: &FixedSizeListArray, vectors: &FixedSizeListArray, metric: Metric) -> Result<Vec<u32>> {
    let distance = if metric == Metric::Dot { DistanceType::Dot } else { DistanceType::L2 };
    let (part_ids, _) = compute_partitions_arrow_array(centroids, vectors, distance)?;
    let far = || {
        Error::invalid(
            "a vector is so far from every centroid that all its distances overflow to infinity; scale the column or remove the vector",
        )
    };
    part_ids.into_iter().map(|id| id.ok_or_else(far)).collect()
}

/// Lance's quantizer of a model's codebook. Codes are the L2-nearest codewords for every metric, as in Lance's own build.
pub fn product_quantizer(model: &IvfPqModel) -> ProductQuantizer {
    ProductQuantizer::new(model.num_sub_vectors(), model.num_bits(), model.dimension(), model.codebook().clone(), DistanceType::L2)
}

/// The same, for encoders.
pub struct Quantizer(ProductQuantizer);

impl Quantizer {
    pub fn new(model: &IvfPqModel) -> Self {
        Self(product_quantizer(model))
    }

    /// Codes of residuals (of vectors for dot), as rows of bytes.
    pub fn quantize(&self, vectors: &FixedSizeListArray) -> Result<FixedSizeListArray> {
        Ok(self.0.quantize(vectors)?.as_fixed_size_list().clone())
    }
}

/// Lance's float32 distances to one codebook, which ours must equal bit by bit.
#[cfg(test)]
pub struct ReferenceDistances(lance_linalg::distance::l2::L2Prepared);

#[cfg(test)]
impl ReferenceDistances {
    pub fn new(codewords: &[f32], dimension: usize) -> Self {
        Self(lance_linalg::distance::l2::L2Prepared::new(codewords, dimension))
    }

    /// The nearest codeword, and the distance to each.
    pub fn of(&self, vector: &[f32]) -> (Option<u32>, Vec<f32>) {
        (self.0.nearest(vector), self.0.distances(vector))
    }
}
