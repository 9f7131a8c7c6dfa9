//! Encoding on the CPU: exact assignment at any number of partitions, residuals, PQ codes.
//!
//! The kernels compute in float32 and in their own order of sums. Where two candidates are nearer to each other than that
//! could tell, equally near ones included, Lance's own functions decide, in the column's type, so that codes come out as Lance's
//! build has them. Only candidates that are equal bit by bit in that type need no decision: of those the first one is taken.

use std::borrow::Cow;
use std::collections::HashSet;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float16Type, Float32Type, Float64Type, UInt8Type};
use arrow_array::{Array, FixedSizeListArray, UInt32Array};
use arrow_buffer::{Buffer, ScalarBuffer};
use arrow_schema::DataType;
use half::f16;
use rayon::prelude::*;

use super::nearest::{Codewords, Form, Nearest};
use super::search::Search;
use super::simd::{dot, square, square_between};
use crate::encode::encoder::{Encoded, Encoder};
use crate::error::{Error, Result};
use crate::lance::kernels::{Quantizer, assign};
use crate::model::{ElementType, IvfPqModel, Metric, fixed_size_list, flat_values};

/// Rows encoded by one thread at a time: they and their residuals stay in its cache.
const BLOCK_BYTES: usize = 512 << 10;
/// Two distances that differ by less than this part of the numbers they are summed of may be out of order.
const DOUBT: f32 = 4e-6;
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
    codewords: Vec<Distinct>,
}

/// The centroids, of which no two are equal in the column's type: searched in full, or pruned where they are many.
struct Partitions {
    search: Search,
    /// The index that each has among all; empty where all are distinct.
    first: Vec<u32>,
}

impl Partitions {
    /// `bytes`: the same centroids in the column's type.
    fn new(values: &[f32], bytes: &[u8], dimension: usize, form: Form) -> Self {
        let (kept, first) = distinct(values, bytes, dimension);
        let search = Search::new(&kept, dimension, form);
        Self { search, first }
    }

    fn count(&self) -> usize {
        self.search.count()
    }

    /// See [`Codewords::magnitude`].
    fn magnitude(&self, length: f32) -> f32 {
        self.search.magnitude(length)
    }

    /// The nearest of all centroids; the nearest but one at least where it is within `doubt` of a vector's length.
    fn nearest(&self, vectors: &[f32], dimension: usize, doubt: impl Fn(f32) -> f32, out: &mut [Nearest]) {
        self.search.nearest(vectors, dimension, doubt, out);
        among_all(&self.first, out);
    }
}

/// Those codewords that are the first of their kind in the column's type, and which they are; no indices where all are.
fn distinct<'a>(values: &'a [f32], bytes: &[u8], dimension: usize) -> (Cow<'a, [f32]>, Vec<u32>) {
    let count = values.len() / dimension;
    let mut seen = HashSet::with_capacity(count);
    let first: Vec<u32> = (0u32..).zip(bytes.chunks_exact(bytes.len() / count)).filter(|(_, b)| seen.insert(*b)).map(|(i, _)| i).collect();
    if first.len() == count {
        return (Cow::Borrowed(values), Vec::new());
    }
    let kept: Vec<f32> = first.iter().flat_map(|i| &values[*i as usize * dimension..][..dimension]).copied().collect();
    (Cow::Owned(kept), first)
}

/// Indices among distinct codewords as indices among all.
fn among_all(first: &[u32], found: &mut [Nearest]) {
    if !first.is_empty() {
        for found in found {
            found.index = first.get(found.index as usize).copied().unwrap_or(u32::MAX);
        }
    }
}

/// The codewords of a sub-vector, of which no two are equal in the column's type.
struct Distinct {
    /// Ranked by one multiplication and addition for each number; where that is close, as Lance computes it, by three operations.
    ranked: Codewords,
    exact: Codewords,
    /// What `ranked` leaves out is the squared distance to this.
    center: Vec<f32>,
    /// The index that each has among all; empty where all are distinct.
    first: Vec<u32>,
}

impl Distinct {
    /// `bytes`: the same codewords in the column's type.
    fn new(values: &[f32], bytes: &[u8], dimension: usize) -> Self {
        let (kept, first) = distinct(values, bytes, dimension);
        let ranked = Codewords::new(&kept, dimension, Form::L2);
        let center = ranked.center().iter().map(|v| *v as f32).collect();
        Self { ranked, exact: Codewords::new(&kept, dimension, Form::Exact), center, first }
    }

    /// The code of the sub-vector that begins each of `rows (n, stride)`, which `tell` gets, and whether it is certain. `beyond` of
    /// length and distance: by how much another type than float32 blurs that distance.
    fn codes(
        &self,
        rows: &[f32],
        stride: usize,
        found: &mut [Nearest],
        beyond: impl Fn(f32, f32) -> f32,
        mut tell: impl FnMut(usize, u32, bool),
    ) {
        let width = self.center.len();
        self.ranked.nearest_of_parts(rows, stride, found);
        for (row, found) in found.iter_mut().enumerate() {
            let sub_vector = &rows[row * stride..][..width];
            let length = square(sub_vector).sqrt();
            let second = found.second + square_between(sub_vector, &self.center);
            let blur = DOUBT * (self.ranked.magnitude(length) + second) + beyond(length, second);
            let mut certain = found.second - found.distance > blur;
            if !certain {
                self.exact.nearest_of_parts(sub_vector, width, std::slice::from_mut(found));
                // Lance's kernel gives the same bits for codebooks of this form; others are summed in another order, or type.
                let blur = DOUBT * found.second + beyond(length, found.second);
                certain = found.second - found.distance > blur || found.second == f32::INFINITY;
                certain &= found.index != u32::MAX;
            }
            tell(row, self.first.get(found.index as usize).copied().unwrap_or(found.index), certain);
        }
    }
}

/// The bytes of a list's values.
fn value_bytes(list: &FixedSizeListArray) -> Buffer {
    let values = flat_values(list).to_data();
    let width = list.value_type().primitive_width().unwrap_or(1);
    values.buffers()[0].slice_with_length(values.offset() * width, values.len() * width)
}

impl CpuEncoder {
    pub fn new(model: &IvfPqModel) -> Self {
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
            .map(|(values, bytes)| Distinct::new(values, bytes, width))
            .collect();
        let partitions = Partitions::new(&centroids, &value_bytes(model.centroids()), dimension, form);
        Self { model: model.clone(), quantizer, partitions, centroids, codewords }
    }

    fn encode_block(&self, vectors: &FixedSizeListArray) -> Result<Encoded> {
        let float32 = as_float32(vectors);
        let part_ids = self.assign(vectors, &float32)?;
        let (loss, residuals) = if self.model.metric().encodes_residuals() {
            let residuals: ScalarBuffer<f32> = self.residuals(vectors, &float32, &part_ids).into();
            (residuals.chunks_exact(self.model.dimension()).map(|r| f64::from(square(r))).sum(), residuals)
        } else {
            (self.dot_loss(&float32, &part_ids), float32)
        };
        let codes = self.quantize(vectors, &residuals, &part_ids)?;
        Ok(Encoded { part_ids, codes, loss })
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
    fn assign(&self, vectors: &FixedSizeListArray, float32: &[f32]) -> Result<Vec<u32>> {
        let dimension = self.model.dimension();
        let mut found = vec![NONE; vectors.len()];
        // Lance compares `1 - dot`, whose rounding is a part of 1.
        let offset = if self.model.metric() == Metric::Dot { 1.0 } else { 0.0 };
        let doubt = |length: f32| self.doubt() * (offset + self.partitions.magnitude(length));
        self.partitions.nearest(float32, dimension, doubt, &mut found);
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
        Ok(part_ids)
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
        let rounded = self.model.element_type() == ElementType::Float16;
        for (vector, part_id) in float32.chunks_exact(dimension).zip(part_ids) {
            let differences = vector.iter().zip(&self.centroids[rows(part_id)]).map(|(v, c)| v - c);
            if rounded {
                out.extend(differences.map(|d| f16::from_f32(d).to_f32()));
            } else {
                out.extend(differences);
            }
        }
        out
    }

    /// Codes of residuals (of vectors for dot). Lance decides where it is close.
    fn quantize(&self, vectors: &FixedSizeListArray, residuals: &[f32], part_ids: &[u32]) -> Result<Vec<u8>> {
        let (rows, dimension, code_width) = (part_ids.len(), self.model.dimension(), self.model.code_width());
        let width = dimension / self.model.num_sub_vectors();
        let mut codes = vec![0u8; rows * code_width];
        let mut found = vec![NONE; rows];
        let mut doubtful = vec![false; rows];
        let rounded = self.model.element_type() == ElementType::Float64;
        let four_bits = self.model.num_bits() == 4;
        for (m, codewords) in self.codewords.iter().enumerate() {
            let largest = codewords.exact.largest_length();
            let beyond = |length: f32, second: f32| {
                // Of both distances, each between two points that were moved by a part of their lengths, and not of the distance.
                let moved = if rounded { ROUNDING * (length + largest) } else { 0.0 };
                4.0 * moved * (second.max(0.0).sqrt() + moved)
            };
            codewords.codes(&residuals[m * width..], dimension, &mut found, beyond, |row, index, certain| {
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
        let block = (BLOCK_BYTES / 4 / self.model.dimension()).clamp(64, 2048);
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
        };
        for block in blocks {
            all.part_ids.extend_from_slice(&block.part_ids);
            all.codes.extend_from_slice(&block.codes);
            all.loss += block.loss;
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
