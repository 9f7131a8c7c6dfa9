//! The codes of sub-vectors.

use super::distinct::distinct;
use super::nearest::{Codewords, DOUBT, Form, Nearest};
use super::simd::{square, square_between};

/// By more than rounding a sum of squares makes a length shorter.
const LONGER: f32 = 1.0 + 1e-3;

/// The codewords of a sub-vector, of which no two are equal in the column's type.
pub struct SubVectorCodewords {
    /// Ranked by one multiplication and addition for each number; where that is close, as Lance computes it, by three operations.
    ranked: Codewords,
    exact: Codewords,
    /// What `ranked` leaves out is the squared distance to this.
    center: Vec<f32>,
    /// How long that is, or a little longer.
    center_length: f32,
    /// The index that each has among all; empty where all are distinct.
    first: Vec<u32>,
}

impl SubVectorCodewords {
    /// `bytes`: the same codewords in the column's type.
    pub fn new(values: &[f32], bytes: &[u8], dimension: usize) -> Self {
        let (kept, first) = distinct(values, bytes, dimension);
        let ranked = Codewords::new(&kept, dimension, Form::L2);
        let center: Vec<f32> = ranked.center().iter().map(|v| *v as f32).collect();
        let center_length = square(&center).sqrt() * LONGER;
        Self { ranked, exact: Codewords::new(&kept, dimension, Form::Exact), center, center_length, first }
    }

    /// The code of the sub-vector that begins each of `rows (n, stride)`, which `tell` gets, and whether it is certain. `beyond` of
    /// length and distance: by how much another type than float32 blurs that distance; it grows with both. `lengths`: of each row's
    /// vector, of which none of its sub-vectors is longer.
    pub fn codes(
        &self,
        rows: &[f32],
        stride: usize,
        lengths: &[f32],
        found: &mut [Nearest],
        beyond: impl Fn(f32, f32) -> f32,
        mut tell: impl FnMut(usize, u32, bool),
    ) {
        let width = self.center.len();
        let tagged = self.ranked.can_tag();
        let doubt = if tagged {
            self.ranked.nearest_of_parts_tagged(rows, stride, found);
            self.ranked.doubt_tagged()
        } else {
            self.ranked.nearest_of_parts(rows, stride, found);
            DOUBT
        };
        for (row, (found, length)) in found.iter_mut().zip(lengths).enumerate() {
            // Nearly always the whole vector's length tells already that its part is certain.
            let longest = length * LONGER;
            let furthest = found.second + (longest + self.center_length) * (longest + self.center_length);
            let blur = doubt * (self.ranked.magnitude(longest) + furthest) + beyond(longest, furthest);
            if found.second - found.distance > blur && (!tagged || self.ranked.tags(longest)) {
                tell(row, self.index(found.index), true);
                continue;
            }
            let sub_vector = &rows[row * stride..][..width];
            let length = square(sub_vector).sqrt();
            let second = found.second + square_between(sub_vector, &self.center);
            let blur = doubt * (self.ranked.magnitude(length) + second) + beyond(length, second);
            let mut certain = found.second - found.distance > blur && (!tagged || self.ranked.tags(length));
            if !certain {
                self.exact.nearest_of_parts(sub_vector, width, std::slice::from_mut(found));
                // Lance's kernel gives the same bits for codebooks of this form; others are summed in another order, or type.
                let blur = DOUBT * found.second + beyond(length, found.second);
                certain = found.second - found.distance > blur || found.second == f32::INFINITY;
                certain &= found.index != u32::MAX;
            }
            tell(row, self.index(found.index), certain);
        }
    }

    #[inline]
    fn index(&self, of_distinct: u32) -> u32 {
        self.first.get(of_distinct as usize).copied().unwrap_or(of_distinct)
    }

    /// The length of the longest.
    pub fn largest_length(&self) -> f32 {
        self.exact.largest_length()
    }
}
