//! Few codewords of few numbers, as those of a sub-vector are: there finding out which distance is the smallest costs as much as the
//! distances. So the lowest bits of each distance are replaced by the number of its register, and the smallest has its index with it.

use super::super::simd::{Plain, Vector};
use super::{Codewords, DOUBT, Form, Isa, Nearest};

/// Codewords whose index a distance has room for, beside its lane.
const MOST: usize = 256;
/// Bytes of codewords that stay in the first-level cache beside the vectors.
const SMALL: usize = 24 << 10;

/// Distances beyond which an index would make them no number.
const MOST_DISTANCE: f32 = 1e37;

impl Codewords {
    /// Whether [`Self::only_nearest_tagged`] and its like may be asked.
    pub fn can_tag(&self) -> bool {
        self.form == Form::L2 && self.count <= MOST && self.panels.len() * size_of::<f32>() <= SMALL
    }

    /// As [`DOUBT`], for distances that have lost some of their bits to an index.
    pub fn doubt_tagged(&self) -> f32 {
        let lanes = match self.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => 16,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => 4,
            _ => 8,
        };
        // The nearest may be blurred by as many units in the last place as there are tags, and so may the second.
        DOUBT + 2.0 * (MOST / lanes) as f32 * f32::EPSILON
    }

    /// Whether the distances to a vector of some length are numbers that can be tagged.
    #[inline]
    pub fn tags(&self, length: f32) -> bool {
        self.magnitude(length) < MOST_DISTANCE
    }

    /// As [`Codewords::only_nearest`], for vectors that [`Self::tags`] holds of; of nearly equal distances any.
    pub fn only_nearest_tagged(&self, vectors: &[f32], out: &mut [Nearest]) {
        self.run_tagged::<false>(vectors, self.dimension, out);
    }

    /// As [`Codewords::nearest_of_parts`]; of nearly equal distances any. Where [`Self::tags`] does not hold nothing can be said.
    pub fn nearest_of_parts_tagged(&self, vectors: &[f32], stride: usize, out: &mut [Nearest]) {
        self.run_tagged::<true>(vectors, stride, out);
    }

    fn run_tagged<const SECOND: bool>(&self, vectors: &[f32], stride: usize, out: &mut [Nearest]) {
        assert!(self.can_tag(), "{} codewords of {}", self.count, self.dimension);
        if out.is_empty() {
            return;
        }
        self.check_rows(vectors, stride, out.len());
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: detected, or chosen by a test that detected it.
            Isa::Avx512 => unsafe { avx512::<SECOND>(self, vectors, stride, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { avx2::<SECOND>(self, vectors, stride, out) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: part of the architecture.
            Isa::Neon => unsafe { rows::<std::arch::aarch64::float32x4_t, 4, 4, SECOND>(self, vectors, stride, out) },
            // SAFETY: needs no instructions of its own.
            Isa::Plain => unsafe { rows::<Plain, 2, 4, SECOND>(self, vectors, stride, out) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512<const SECOND: bool>(codewords: &Codewords, vectors: &[f32], stride: usize, out: &mut [Nearest]) {
    // SAFETY: compiled for the instructions that the caller promises.
    unsafe { rows::<std::arch::x86_64::__m512, 4, 4, SECOND>(codewords, vectors, stride, out) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<const SECOND: bool>(codewords: &Codewords, vectors: &[f32], stride: usize, out: &mut [Nearest]) {
    // SAFETY: as above. As many vectors as leave all in registers.
    unsafe {
        if SECOND {
            rows::<std::arch::x86_64::__m256, 2, 3, SECOND>(codewords, vectors, stride, out);
        } else {
            rows::<std::arch::x86_64::__m256, 2, 4, SECOND>(codewords, vectors, stride, out);
        }
    }
}

#[inline(always)]
unsafe fn rows<V: Vector, const R: usize, const S: usize, const SECOND: bool>(
    codewords: &Codewords,
    vectors: &[f32],
    stride: usize,
    out: &mut [Nearest],
) {
    let mut row = 0;
    while row < out.len() {
        // SAFETY: the rows were checked; the instructions are the caller's promise.
        unsafe {
            let from = vectors.as_ptr().add(row * stride);
            if row + S <= out.len() {
                tile::<V, R, S, SECOND>(codewords, from, stride, &mut out[row..row + S]);
                row += S;
            } else {
                tile::<V, R, 1, SECOND>(codewords, from, stride, &mut out[row..row + 1]);
                row += 1;
            }
        }
    }
}

/// `S` vectors against all panels of `R` registers.
#[allow(clippy::needless_range_loop)] // indices that the compiler unrolls, for registers
#[inline(always)]
unsafe fn tile<V: Vector, const R: usize, const S: usize, const SECOND: bool>(
    codewords: &Codewords,
    vectors: *const f32,
    stride: usize,
    out: &mut [Nearest],
) {
    let (dimension, width) = (codewords.dimension, R * V::LANES);
    let mask = !((MOST / V::LANES) as u32 - 1);
    // SAFETY: the caller's: the vectors are there, and the instructions too.
    unsafe {
        let mut rows = [vectors; S];
        for s in 0..S {
            rows[s] = vectors.add(s * stride);
        }
        let mut at = codewords.panels.as_ptr();
        let mut best = [V::splat(f32::INFINITY); S];
        let mut second = [V::splat(f32::INFINITY); S];
        for panel in 0..codewords.starts.len() / width {
            let starts = codewords.starts.as_ptr().add(panel * width);
            let mut row = [V::splat(0.0); R];
            for r in 0..R {
                // Those that fill up the last panel: infinite with an index would be no number.
                row[r] = V::load(starts.add(r * V::LANES)).min(V::splat(f32::MAX));
            }
            let mut sums = [row; S];
            for d in 0..dimension {
                for r in 0..R {
                    row[r] = V::load(at.add(r * V::LANES));
                }
                for s in 0..S {
                    let x = V::splat(*rows[s].add(d));
                    for r in 0..R {
                        sums[s][r] = sums[s][r].add_product(x, row[r]);
                    }
                }
                at = at.add(width);
            }
            for r in 0..R {
                let register = V::index((panel * R + r) as u32);
                for s in 0..S {
                    let tagged = sums[s][r].tagged(mask, register);
                    if SECOND {
                        second[s] = second[s].min(best[s].max(tagged));
                    }
                    // Of what is no number, and a number, the second.
                    best[s] = tagged.min(best[s]);
                }
            }
        }
        for s in 0..S {
            let (distance, lane) = best[s].least();
            let index = (distance.to_bits() & !mask) * V::LANES as u32 + lane;
            // The lane of the best one has its own second; of the others it is their best.
            let second = if SECOND { best[s].with_lane_of(lane, second[s]).least().0 } else { f32::INFINITY };
            let index = if (index as usize) < codewords.count { index } else { u32::MAX };
            out[s] = Nearest { index, distance, second };
        }
    }
}
