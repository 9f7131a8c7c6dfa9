//! Encoding on the CPU: assignment to the nearest of all centroids, or of those of the nearest groups; residuals; PQ codes.
//!
//! The kernels compute in float32 and in their own order of sums. Where two candidates are nearer to each other than that
//! could tell, equally near ones included, Lance's own functions decide, in the column's type, so that codes come out as Lance's
//! build has them. Only candidates that are equal bit by bit in that type need no decision: of those the first one is taken.

use arrow_array::cast::AsArray;
use arrow_array::types::{Float16Type, Float32Type, Float64Type, UInt8Type};
use arrow_array::{Array, FixedSizeListArray, UInt32Array};
use arrow_buffer::{Buffer, ScalarBuffer};
use arrow_schema::DataType;
use half::f16;
use rayon::prelude::*;

use super::nearest::{DOUBT, Form, Nearest};
use super::partitions::Partitions;
use super::simd::{difference, dot, square};
use super::sub_vectors::SubVectorCodewords;
use crate::artifact::{Assignment, Groups};
use crate::encode::encoder::{Checked, Encoded, Encoder};
use crate::error::{Error, Result};
use crate::lance::kernels::{Quantizer, assign};
use crate::model::{ElementType, IvfPqModel, Metric, fixed_size_list, flat_values};

/// Rows encoded by one thread at a time: they and their residuals stay in its cache.
const BLOCK_BYTES: usize = 512 << 10;
/// So many at least where they meet groups of centroids, which then stay in it.
const LEAST_GROUPED: usize = 512;
/// For float16, whose distances Lance sums with less precision.
const DOUBT_FLOAT16: f32 = 4e-3;
/// What rounding a float64 to float32 changes at most, as a part of it.
const ROUNDING: f32 = 6e-8;

/// The embedded encoder, and the oracle for the others.
pub struct CpuEncoder {
    model: IvfPqModel,
    quantizer: Quantizer,
    centroids: ScalarBuffer<f32>,
    partitions: Partitions,
    /// One for each sub-vector.
    codewords: Vec<SubVectorCodewords>,
}

/// The bytes of a list's values.
fn value_bytes(list: &FixedSizeListArray) -> Buffer {
    let values = flat_values(list).to_data();
    let width = list.value_type().primitive_width().unwrap_or(1);
    values.buffers()[0].slice_with_length(values.offset() * width, values.len() * width)
}

impl CpuEncoder {
    /// Every vector goes to the nearest of all centroids.
    pub fn new(model: &IvfPqModel) -> Result<Self> {
        Self::made(model, None)
    }

    /// Vectors go to the nearest of the centroids of the groups nearest to them. In how many groups to look is found from `sample`,
    /// prepared vectors of those that will be encoded: so many that with confidence at most one in a thousand is not with its nearest
    /// centroid. Where that is not worth it, or the sample is too small to tell, as [`Self::new`].
    pub fn fast(model: &IvfPqModel, sample: &FixedSizeListArray) -> Result<Self> {
        Self::made(model, Some(&as_float32(sample)))
    }

    fn made(model: &IvfPqModel, sample: Option<&[f32]>) -> Result<Self> {
        let quantizer = Quantizer::new(model);
        let dimension = model.dimension();
        let centroids = as_float32(model.centroids());
        let form = if model.metric() == Metric::Dot { Form::Dot } else { Form::L2 };
        let width = dimension / model.num_sub_vectors();
        let codebook = as_float32(model.codebook());
        let bytes = value_bytes(model.codebook());
        let of_sub_vector = bytes.len() / model.num_sub_vectors();
        let codewords = codebook
            .chunks_exact(width << model.num_bits())
            .zip(bytes.chunks_exact(of_sub_vector))
            .map(|(values, bytes)| SubVectorCodewords::new(values, bytes, width))
            .collect();
        let partitions = Partitions::new(&centroids, &value_bytes(model.centroids()), dimension, form, sample)?;
        Ok(Self { model: model.clone(), quantizer, partitions, centroids, codewords })
    }

    fn encode_block(&self, vectors: &FixedSizeListArray) -> Result<Encoded> {
        let float32 = as_float32(vectors);
        let (part_ids, checked) = self.assign(vectors, &float32)?;
        let residual = self.model.metric().encodes_residuals();
        let encoded = if residual { self.residuals(vectors, &float32, &part_ids).into() } else { float32.clone() };
        let squares: Vec<f32> = encoded.chunks_exact(self.model.dimension()).map(square).collect();
        let codes = self.quantize(vectors, &encoded, &squares, &part_ids)?;
        let loss = if residual { squares.iter().map(|s| f64::from(*s)).sum() } else { self.dot_loss(&float32, &part_ids) };
        Ok(Encoded { part_ids, codes, loss, checked })
    }

    /// The sum of Lance's dot distances to the centroids.
    fn dot_loss(&self, float32: &[f32], part_ids: &[u32]) -> f64 {
        let dimension = self.model.dimension();
        let dot = |vector: &[f32], part_id: &u32| dot(vector, &self.centroids[*part_id as usize * dimension..][..dimension]);
        float32.chunks_exact(dimension).zip(part_ids).map(|(vector, part_id)| f64::from(1.0 - dot(vector, part_id))).sum()
    }

    fn doubt(&self) -> f32 {
        if self.model.element_type() == ElementType::Float16 { DOUBT_FLOAT16 } else { DOUBT }
    }

    /// The partition of each vector. Lance decides where it is close.
    fn assign(&self, vectors: &FixedSizeListArray, float32: &[f32]) -> Result<(Vec<u32>, Checked)> {
        let dimension = self.model.dimension();
        let mut found = vec![NONE; vectors.len()];
        // Lance compares `1 - dot`, whose rounding is a part of 1.
        let offset = if self.model.metric() == Metric::Dot { 1.0 } else { 0.0 };
        let doubt = |length: f32| self.doubt() * (offset + self.partitions.magnitude(length));
        let checked = self.partitions.nearest(float32, dimension, doubt, &mut found);
        let mut doubtful = Vec::new();
        for ((row, found), vector) in (0u32..).zip(&found).zip(float32.chunks_exact(dimension)) {
            let length = square(vector).sqrt();
            // Where one of them is infinite or NaN nothing is certain.
            let gap = found.second - found.distance;
            let certain = gap > doubt(length);
            if (!certain && self.partitions.count() > 1) || found.index == u32::MAX {
                doubtful.push(row);
            }
        }
        let mut part_ids: Vec<u32> = found.iter().map(|n| n.index).collect();
        if !doubtful.is_empty() {
            let rows = take(vectors, &doubtful)?;
            let decided = assign(self.model.centroids(), &rows, self.model.metric())?;
            for (row, part_id) in doubtful.iter().zip(decided) {
                part_ids[*row as usize] = part_id;
            }
        }
        Ok((part_ids, checked))
    }

    /// `vector - centroid` in the column's type, as searches compute it, as float32.
    fn residuals(&self, vectors: &FixedSizeListArray, float32: &[f32], part_ids: &[u32]) -> Vec<f32> {
        let dimension = self.model.dimension();
        let rows = |part_id: &u32| *part_id as usize * dimension..(*part_id as usize + 1) * dimension;
        let mut out = Vec::with_capacity(float32.len());
        if self.model.element_type() == ElementType::Float64 {
            let (values, centroids) = (flat_values(vectors), flat_values(self.model.centroids()));
            let (values, centroids) = (values.as_primitive::<Float64Type>().values(), centroids.as_primitive::<Float64Type>().values());
            for (vector, part_id) in values.chunks_exact(dimension).zip(part_ids) {
                out.extend(vector.iter().zip(&centroids[rows(part_id)]).map(|(v, c)| (v - c) as f32));
            }
            return out;
        }
        out.resize(float32.len(), 0.0);
        for ((vector, part_id), out) in float32.chunks_exact(dimension).zip(part_ids).zip(out.chunks_exact_mut(dimension)) {
            difference(vector, &self.centroids[rows(part_id)], out);
        }
        if self.model.element_type() == ElementType::Float16 {
            out.iter_mut().for_each(|d| *d = f16::from_f32(*d).to_f32());
        }
        out
    }

    /// Codes of residuals (of vectors for dot), of which the squared lengths are given. Lance decides where it is close.
    fn quantize(&self, vectors: &FixedSizeListArray, residuals: &[f32], squares: &[f32], part_ids: &[u32]) -> Result<Vec<u8>> {
        let (rows, dimension, code_width) = (part_ids.len(), self.model.dimension(), self.model.code_width());
        let width = dimension / self.model.num_sub_vectors();
        let mut codes = vec![0u8; rows * code_width];
        let lengths: Vec<f32> = squares.iter().map(|square| square.sqrt()).collect();
        let mut found = vec![NONE; rows];
        let mut doubtful = vec![false; rows];
        let rounded = self.model.element_type() == ElementType::Float64;
        let four_bits = self.model.num_bits() == 4;
        for (m, codewords) in self.codewords.iter().enumerate() {
            let largest = codewords.largest_length();
            let beyond = |length: f32, second: f32| {
                // Of both distances, each between two points that were moved by a part of their lengths, and not of the distance.
                let moved = if rounded { ROUNDING * (length + largest) } else { 0.0 };
                4.0 * moved * (second.max(0.0).sqrt() + moved)
            };
            codewords.codes(&residuals[m * width..], dimension, &lengths, &mut found, beyond, |row, index, certain| {
                doubtful[row] |= !certain;
                let code = index as u8;
                if four_bits {
                    codes[row * code_width + m / 2] |= (code & 15) << (4 * (m % 2));
                } else {
                    codes[row * code_width + m] = code;
                }
            });
        }
        let doubtful: Vec<u32> = (0u32..).zip(doubtful).filter_map(|(row, doubtful)| doubtful.then_some(row)).collect();
        if !doubtful.is_empty() {
            let chosen = take(vectors, &doubtful)?;
            let input = if self.model.metric().encodes_residuals() {
                let ids: Vec<u32> = doubtful.iter().map(|row| part_ids[*row as usize]).collect();
                residuals_in_type(self.model.centroids(), &chosen, &ids)?
            } else {
                chosen
            };
            let decided = self.quantizer.quantize(&input)?;
            let decided = flat_values(&decided);
            for (row, code) in doubtful.iter().zip(decided.as_primitive::<UInt8Type>().values().chunks_exact(code_width)) {
                codes[*row as usize * code_width..][..code_width].copy_from_slice(code);
            }
        }
        Ok(codes)
    }
}

const NONE: Nearest = Nearest { index: u32::MAX, distance: f32::INFINITY, second: f32::INFINITY };

impl Encoder for CpuEncoder {
    fn code_width(&self) -> usize {
        self.model.code_width()
    }

    fn assignment(&self, checked: Checked) -> Assignment {
        let told = |groups| Groups { checked: checked.rows, missed: checked.missed, ..groups };
        self.partitions.groups().map_or_else(Assignment::exact, |groups| Assignment::by_groups(told(groups)))
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
        let least = if self.partitions.groups().is_some() { LEAST_GROUPED } else { 64 };
        let block = (BLOCK_BYTES / 4 / self.model.dimension()).clamp(least, 2048);
        let blocks = (0..vectors.len())
            .step_by(block)
            .collect::<Vec<_>>()
            .into_par_iter()
            .map(|start| self.encode_block(&vectors.slice(start, block.min(vectors.len() - start))))
            .collect::<Result<Vec<_>>>()?;
        let mut all = Encoded {
            part_ids: Vec::with_capacity(vectors.len()),
            codes: Vec::with_capacity(vectors.len() * self.model.code_width()),
            loss: 0.0,
            checked: Checked::default(),
        };
        for block in blocks {
            all.part_ids.extend_from_slice(&block.part_ids);
            all.codes.extend_from_slice(&block.codes);
            all.loss += block.loss;
            all.checked.add(block.checked);
        }
        Ok(all)
    }
}

/// The values of a list as float32, without a copy where they are; those of float64 are rounded, to infinity where they are
/// beyond.
pub fn as_float32(vectors: &FixedSizeListArray) -> ScalarBuffer<f32> {
    let values = flat_values(vectors);
    match vectors.value_type() {
        DataType::Float32 => values.as_primitive::<Float32Type>().values().clone(),
        DataType::Float16 => values.as_primitive::<Float16Type>().values().iter().map(|v| v.to_f32()).collect::<Vec<_>>().into(),
        _ => values.as_primitive::<Float64Type>().values().iter().map(|v| *v as f32).collect::<Vec<_>>().into(),
    }
}

fn take(vectors: &FixedSizeListArray, rows: &[u32]) -> Result<FixedSizeListArray> {
    let taken = arrow_select::take::take(vectors, &UInt32Array::from(rows.to_vec()), None)?;
    fixed_size_list(flat_values(taken.as_fixed_size_list()), vectors.value_length() as usize)
}

/// `vector - centroid`, in the element type of both.
fn residuals_in_type(centroids: &FixedSizeListArray, vectors: &FixedSizeListArray, part_ids: &[u32]) -> Result<FixedSizeListArray> {
    let nearest = take(centroids, part_ids)?;
    let values = arrow_arith::numeric::sub(&flat_values(vectors), &flat_values(&nearest))?;
    fixed_size_list(values, vectors.value_length() as usize)
}
