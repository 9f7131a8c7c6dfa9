//! Encoding on the CPU: exact assignment at any number of partitions, residuals, PQ codes.

use arrow_array::cast::AsArray;
use arrow_array::types::{Float16Type, Float32Type, Float64Type, UInt8Type};
use arrow_array::{Array, ArrayRef, ArrowPrimitiveType, FixedSizeListArray, PrimitiveArray};
use arrow_schema::DataType;
use lance_index::vector::kmeans::compute_partitions_arrow_array;
use lance_index::vector::pq::ProductQuantizer;
use lance_index::vector::quantizer::Quantization;
use lance_linalg::distance::DistanceType;
use rayon::prelude::*;

use crate::encode::{Encoded, Encoder};
use crate::error::{Error, Result};
use crate::model::{IvfPqModel, fixed_size_list, flat_values};

/// Rows encoded by one thread at a time: the codebook stays in its cache, the residuals too.
const BLOCK_ROWS: usize = 2048;

/// The embedded encoder, and the oracle for the others.
pub struct CpuEncoder {
    model: IvfPqModel,
    quantizer: ProductQuantizer,
}

impl CpuEncoder {
    pub fn new(model: &IvfPqModel) -> Self {
        // Codes are the L2-nearest codewords for every metric, as in Lance's own build.
        let quantizer =
            ProductQuantizer::new(model.num_sub_vectors(), model.num_bits(), model.dimension(), model.codebook().clone(), DistanceType::L2);
        Self { model: model.clone(), quantizer }
    }

    fn encode_block(&self, vectors: &FixedSizeListArray) -> Result<Encoded> {
        let part_ids = assign(self.model.centroids(), vectors, self.model.metric().assignment())?;
        let input = if self.model.metric().encodes_residuals() {
            residuals(self.model.centroids(), vectors, &part_ids)?
        } else {
            fixed_size_list(flat_values(vectors), self.model.dimension())?
        };
        let codes = self.quantizer.quantize(&input)?;
        let codes = flat_values(codes.as_fixed_size_list()).as_primitive::<UInt8Type>().values().to_vec();
        Ok(Encoded { part_ids, codes })
    }
}

impl Encoder for CpuEncoder {
    fn code_width(&self) -> usize {
        self.model.code_width()
    }

    fn encode(&self, vectors: &FixedSizeListArray) -> Result<Encoded> {
        if vectors.value_length() as usize != self.model.dimension() || vectors.value_type() != self.model.element_type().data_type() {
            return Err(Error::mismatch(format!(
                "encode: got {}[{}], expected {}[{}] as the model has",
                vectors.value_type(),
                vectors.value_length(),
                self.model.element_type().data_type(),
                self.model.dimension()
            )));
        }
        let blocks = (0..vectors.len())
            .step_by(BLOCK_ROWS)
            .collect::<Vec<_>>()
            .into_par_iter()
            .map(|start| self.encode_block(&vectors.slice(start, BLOCK_ROWS.min(vectors.len() - start))))
            .collect::<Result<Vec<_>>>()?;
        let mut all =
            Encoded { part_ids: Vec::with_capacity(vectors.len()), codes: Vec::with_capacity(vectors.len() * self.model.code_width()) };
        for block in blocks {
            all.part_ids.extend_from_slice(&block.part_ids);
            all.codes.extend_from_slice(&block.codes);
        }
        Ok(all)
    }
}

/// The nearest centroid of each vector, by exhaustive search.
pub fn assign(centroids: &FixedSizeListArray, vectors: &FixedSizeListArray, distance: DistanceType) -> Result<Vec<u32>> {
    let vectors = fixed_size_list(flat_values(vectors), vectors.value_length() as usize)?;
    let (part_ids, _) = compute_partitions_arrow_array(centroids, &vectors, distance)?;
    part_ids
        .into_iter()
        .map(|id| {
            id.ok_or_else(|| {
                Error::invalid(
                    "a vector is so far from every centroid that all its distances overflow to infinity; scale the column or remove the vector",
                )
            })
        })
        .collect()
}

/// `vector - centroid`, in the element type of both, as searches compute it.
pub fn residuals(centroids: &FixedSizeListArray, vectors: &FixedSizeListArray, part_ids: &[u32]) -> Result<FixedSizeListArray> {
    fn run<T: ArrowPrimitiveType>(centroids: &FixedSizeListArray, vectors: &FixedSizeListArray, part_ids: &[u32]) -> ArrayRef
    where
        T::Native: std::ops::Sub<Output = T::Native>,
        PrimitiveArray<T>: From<Vec<T::Native>>,
    {
        let dimension = centroids.value_length() as usize;
        let centroid_values = flat_values(centroids);
        let centroid_values = centroid_values.as_primitive::<T>().values();
        let values = flat_values(vectors);
        let mut out = Vec::with_capacity(values.len());
        for (vector, part_id) in values.as_primitive::<T>().values().chunks_exact(dimension).zip(part_ids) {
            let first = *part_id as usize * dimension;
            out.extend(vector.iter().zip(&centroid_values[first..first + dimension]).map(|(v, c)| *v - *c));
        }
        std::sync::Arc::new(PrimitiveArray::<T>::from(out))
    }
    let values = match vectors.value_type() {
        DataType::Float16 => run::<Float16Type>(centroids, vectors, part_ids),
        DataType::Float32 => run::<Float32Type>(centroids, vectors, part_ids),
        _ => run::<Float64Type>(centroids, vectors, part_ids),
    };
    fixed_size_list(values, vectors.value_length() as usize)
}
