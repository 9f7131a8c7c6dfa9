//! The nearest of many centroids, without a full look at most of them.
//!
//! Centroids and vectors are rounded to whole numbers of 7 and 6 bits, whose products are summed faster than those of float32.
//! How far a distance can be from the true one is bounded by the lengths of what was rounded off (Cauchy-Schwarz): a centroid
//! whose distance is at least the upper bound of another's is not the nearest. Of the few that are left, distances are computed in
//! float32. So the answer is that of a search through all of them.

use super::nearest::{Form, Nearest};

/// Dimensions whose products are summed in 16 bits: `16 * 63 * 63 / 2` is below their limit for each of two sums.
const CHUNK: usize = 16;
/// Codewords of one register.
const LANES: usize = 8;
/// Registers of a panel.
const REGISTERS: usize = 2;
const PANEL: usize = LANES * REGISTERS;
/// Vectors that meet a panel at once.
const TILE: usize = 3;
/// Vectors whose candidates are kept while panels pass by.
const BLOCK: usize = 96;
/// The largest rounded number of a codeword, and of a vector, which is stored with `ZERO` added.
const MOST_CODE: f32 = 63.0;
const MOST_VALUE: f32 = 31.0;
const ZERO: f32 = 32.0;
/// What bounds that are computed in float32 may be too small by, as a part.
const LOOSE: f32 = 1.0 + 1e-5;
/// What is computed in float32 may be off by this part of the numbers it is summed of.
const ROUNDING: f32 = 4e-6;

/// Of fewer codewords a full search is as quick.
pub const PRUNED_FROM: usize = 4096;

/// Whether this processor has the instructions, and there are so many codewords that it pays.
pub fn pays(count: usize, dimension: usize) -> bool {
    #[cfg(target_arch = "x86_64")]
    return count >= PRUNED_FROM && dimension >= CHUNK && std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (count, dimension);
        false
    }
}

/// What is known of each codeword, one after the other, filled up to whole panels.
#[derive(Default)]
struct Known {
    /// `|c'|^2`, or zero for dot; infinite where there is none.
    base: Vec<f32>,
    /// What a rounded number stands for.
    scale: Vec<f32>,
    /// The sum of the rounded numbers, times `ZERO`.
    zero: Vec<i32>,
    /// `|c'|`.
    length: Vec<f32>,
    /// The length of what was rounded off.
    error: Vec<f32>,
}

/// Codewords, rounded and as they are.
pub struct Pruned {
    dimension: usize,
    chunks: usize,
    count: usize,
    /// 2 for L2, 1 for dot: what a product counts for.
    factor: f32,
    /// For each panel, and four dimensions after the other: four bytes of each codeword.
    codes: Vec<i8>,
    known: Known,
    /// `c'`, and what each distance starts from, as [`super::nearest::Codewords`] has them.
    rows: Vec<f32>,
    starts: Vec<f32>,
    center: Vec<f64>,
    largest: (f32, f32),
}

/// A vector, rounded.
#[derive(Clone, Copy, Default)]
struct Rounded {
    scale: f32,
    /// Its length when rounded, and that of what was rounded off.
    length: f32,
    error: f32,
    /// What lies between two distances that are the same as far as can be told.
    slack: f32,
}

impl Pruned {
    /// `codewords (count, dimension)`, of [`Form::L2`] or [`Form::Dot`].
    pub fn new(codewords: &[f32], dimension: usize, form: Form) -> Self {
        let count = codewords.len() / dimension.max(1);
        let chunks = dimension.div_ceil(CHUNK);
        let mut center = vec![0f64; dimension];
        if form == Form::L2 {
            for codeword in codewords.chunks_exact(dimension) {
                center.iter_mut().zip(codeword).for_each(|(c, v)| *c += f64::from(*v) / count as f64);
            }
        }
        let padded = count.div_ceil(PANEL) * PANEL;
        let mut made = Self {
            dimension,
            chunks,
            count,
            factor: if form == Form::L2 { 2.0 } else { 1.0 },
            codes: vec![0; padded * chunks * CHUNK],
            known: Known {
                base: vec![f32::INFINITY; padded],
                scale: vec![0.0; padded],
                zero: vec![0; padded],
                length: vec![0.0; padded],
                error: vec![0.0; padded],
            },
            rows: Vec::with_capacity(codewords.len()),
            starts: Vec::with_capacity(count),
            center,
            largest: (0.0, 0.0),
        };
        for (i, codeword) in codewords.chunks_exact(dimension).enumerate() {
            made.push(i, codeword, form);
        }
        made
    }

    fn push(&mut self, i: usize, codeword: &[f32], form: Form) {
        let (mut square, mut start, mut most) = (0f64, 0f64, 0f32);
        let begin = self.rows.len();
        for (value, center) in codeword.iter().zip(&self.center) {
            let packed = if form == Form::L2 { (f64::from(*value) - center) as f32 } else { *value };
            self.rows.push(packed);
            most = most.max(packed.abs());
            let packed = f64::from(packed);
            square += packed * packed;
            start += packed * (packed + 2.0 * center);
        }
        let scale = if most > 0.0 { most / MOST_CODE } else { 1.0 };
        let (panel, place) = (i / PANEL, i % PANEL);
        let (mut sum, mut off) = (0i32, 0f64);
        for (d, value) in self.rows[begin..].iter().enumerate() {
            let code = (value / scale).round().clamp(-MOST_CODE, MOST_CODE);
            let at = (panel * self.chunks * CHUNK + d / 4 * 4) * PANEL + place * 4 + d % 4;
            self.codes[at] = code as i8;
            sum += code as i32;
            off += f64::from(value - code * scale).powi(2);
        }
        let start = if form == Form::L2 { start as f32 } else { 0.0 };
        self.starts.push(start);
        self.known.base[i] = if form == Form::L2 { square as f32 } else { 0.0 };
        self.known.scale[i] = scale;
        self.known.zero[i] = sum * ZERO as i32;
        self.known.length[i] = square.sqrt() as f32 * LOOSE;
        self.known.error[i] = off.sqrt() as f32 * LOOSE;
        self.largest = (self.largest.0.max(start.abs()), self.largest.1.max(square.sqrt() as f32));
    }

    pub fn count(&self) -> usize {
        self.count
    }

    /// As [`super::nearest::Codewords::magnitude`].
    pub fn magnitude(&self, length: f32) -> f32 {
        self.largest.0 + 2.0 * length * self.largest.1
    }

    /// The nearest codeword to each of `vectors (n, dimension)`, and the nearest but one of those that are no further from it than
    /// `doubt(length of the vector)`; where there is none, `second` is just beyond that. Where distances are infinite or NaN the
    /// index is `u32::MAX`.
    pub fn nearest(&self, vectors: &[f32], doubt: impl Fn(f32) -> f32, out: &mut [Nearest]) {
        let width = self.chunks * CHUNK;
        let mut bytes = vec![ZERO as u8; BLOCK * width];
        let mut rounded = [Rounded::default(); BLOCK];
        let mut candidates: Vec<Vec<(f32, u32)>> = vec![Vec::new(); BLOCK];
        for (vectors, out) in vectors.chunks(BLOCK * self.dimension).zip(out.chunks_mut(BLOCK)) {
            for (row, vector) in vectors.chunks_exact(self.dimension).enumerate() {
                rounded[row] = self.round(vector, &doubt, &mut bytes[row * width..][..width]);
                candidates[row].clear();
            }
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `pays` has detected the instructions; bytes and rows of a block are there.
            unsafe {
                self.panels(&bytes, &rounded[..out.len()], &mut candidates);
            }
            for (row, vector) in vectors.chunks_exact(self.dimension).enumerate() {
                out[row] = self.decide(vector, rounded[row].slack, &mut candidates[row]);
            }
        }
    }

    fn round(&self, vector: &[f32], doubt: &impl Fn(f32) -> f32, bytes: &mut [u8]) -> Rounded {
        let (mut most, mut square) = (0f32, 0f32);
        for (value, center) in vector.iter().zip(&self.center) {
            most = most.max((f64::from(*value) - center).abs() as f32);
            square += value * value;
        }
        let scale = if most > 0.0 { most / MOST_VALUE } else { 1.0 };
        let (mut length, mut off, mut own) = (0f32, 0f32, 0f32);
        for ((value, center), byte) in vector.iter().zip(&self.center).zip(bytes) {
            let y = (f64::from(*value) - center) as f32;
            let whole = (y / scale).round_ties_even().clamp(-MOST_VALUE, MOST_VALUE);
            *byte = (whole + ZERO) as u8;
            length += whole * whole;
            off += (y - whole * scale) * (y - whole * scale);
            own += y * y;
        }
        let largest = self.largest.1;
        // Of the bounds, whose parts are computed in float32, and of the distances that are compared in the end.
        let rounding = ROUNDING * (largest * largest + self.factor * own.sqrt() * largest);
        Rounded { scale, length: length.sqrt() * scale * LOOSE, error: off.sqrt() * LOOSE, slack: doubt(square.sqrt()) + 2.0 * rounding }
    }

    /// All panels past a block of vectors: what may be nearest is put to the candidates, with its lower bound.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn panels(&self, bytes: &[u8], rounded: &[Rounded], candidates: &mut [Vec<(f32, u32)>]) {
        let width = self.chunks * CHUNK;
        let mut upper = [f32::INFINITY; BLOCK];
        for panel in 0..self.known.base.len() / PANEL {
            let mut row = 0;
            while row + TILE <= rounded.len() {
                // SAFETY: a tile of rows, and a panel, that are there.
                unsafe { self.tile::<TILE>(panel, &bytes[row * width..], row, rounded, &mut upper, candidates) };
                row += TILE;
            }
            while row < rounded.len() {
                // SAFETY: as above.
                unsafe { self.tile::<1>(panel, &bytes[row * width..], row, rounded, &mut upper, candidates) };
                row += 1;
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[allow(clippy::needless_range_loop)] // indices that the compiler unrolls, for registers
    #[target_feature(enable = "avx2,fma")]
    unsafe fn tile<const S: usize>(
        &self,
        panel: usize,
        bytes: &[u8],
        row: usize,
        rounded: &[Rounded],
        upper: &mut [f32; BLOCK],
        candidates: &mut [Vec<(f32, u32)>],
    ) {
        use std::arch::x86_64::*;
        let width = self.chunks * CHUNK;
        // SAFETY: the caller's: `S` rows of `width` bytes, and a panel of as many codes for each of its codewords.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let mut sums = [[_mm256_setzero_si256(); REGISTERS]; S];
            let mut codes = self.codes.as_ptr().add(panel * width * PANEL).cast::<__m256i>();
            let mut value = bytes.as_ptr();
            for _ in 0..self.chunks {
                // In 16 bits for four dimensions at a time, whose codes are in registers for all vectors.
                let mut short = [[_mm256_setzero_si256(); REGISTERS]; S];
                for g in 0..CHUNK / 4 {
                    let mut code = [_mm256_setzero_si256(); REGISTERS];
                    for r in 0..REGISTERS {
                        code[r] = _mm256_loadu_si256(codes.add(g * REGISTERS + r));
                    }
                    for s in 0..S {
                        let x = _mm256_set1_epi32(value.add(s * width + 4 * g).cast::<i32>().read_unaligned());
                        for r in 0..REGISTERS {
                            short[s][r] = _mm256_add_epi16(short[s][r], _mm256_maddubs_epi16(x, code[r]));
                        }
                    }
                }
                for s in 0..S {
                    for r in 0..REGISTERS {
                        sums[s][r] = _mm256_add_epi32(sums[s][r], _mm256_madd_epi16(short[s][r], ones));
                    }
                }
                codes = codes.add(CHUNK / 4 * REGISTERS);
                value = value.add(CHUNK);
            }
            for s in 0..S {
                let x = &rounded[row + s];
                let factor = _mm256_set1_ps(self.factor * x.scale);
                let error = _mm256_set1_ps(self.factor * x.error);
                let length = _mm256_set1_ps(self.factor * x.length);
                let mut lower = [_mm256_setzero_ps(); REGISTERS];
                let mut least = _mm256_set1_ps(f32::INFINITY);
                for r in 0..REGISTERS {
                    let at = panel * PANEL + r * LANES;
                    let product = _mm256_sub_epi32(sums[s][r], _mm256_loadu_si256(self.known.zero.as_ptr().add(at).cast()));
                    let product = _mm256_mul_ps(_mm256_cvtepi32_ps(product), _mm256_loadu_ps(self.known.scale.as_ptr().add(at)));
                    let about = _mm256_fnmadd_ps(product, factor, _mm256_loadu_ps(self.known.base.as_ptr().add(at)));
                    let off = _mm256_fmadd_ps(
                        _mm256_loadu_ps(self.known.length.as_ptr().add(at)),
                        error,
                        _mm256_mul_ps(_mm256_loadu_ps(self.known.error.as_ptr().add(at)), length),
                    );
                    lower[r] = _mm256_sub_ps(about, off);
                    least = _mm256_min_ps(_mm256_add_ps(about, off), least);
                }
                let halves = _mm_min_ps(_mm256_castps256_ps128(least), _mm256_extractf128_ps::<1>(least));
                let halves = _mm_min_ps(halves, _mm_movehl_ps(halves, halves));
                let least = _mm_cvtss_f32(_mm_min_ss(halves, _mm_shuffle_ps::<1>(halves, halves)));
                let upper = &mut upper[row + s];
                *upper = upper.min(least);
                let limit = _mm256_set1_ps(*upper + x.slack);
                for r in 0..REGISTERS {
                    let mut passed = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_LE_OQ>(lower[r], limit)) as u32;
                    if passed != 0 {
                        let mut bounds = [0f32; LANES];
                        _mm256_storeu_ps(bounds.as_mut_ptr(), lower[r]);
                        while passed != 0 {
                            let lane = passed.trailing_zeros() as usize;
                            candidates[row + s].push((bounds[lane], (panel * PANEL + r * LANES + lane) as u32));
                            passed &= passed - 1;
                        }
                    }
                }
            }
        }
    }

    /// Of the candidates those that can still be nearest, in float32.
    fn decide(&self, vector: &[f32], slack: f32, candidates: &mut [(f32, u32)]) -> Nearest {
        let mut found = Nearest { index: u32::MAX, distance: f32::INFINITY, second: f32::INFINITY };
        let Some(first) = (0..candidates.len()).min_by(|a, b| candidates[*a].0.total_cmp(&candidates[*b].0)) else { return found };
        candidates.swap(0, first);
        for (bound, index) in candidates.iter() {
            // Where no bound is finite, what fills up the last panel is no further away.
            if *index as usize >= self.count || *bound > found.distance + slack {
                continue;
            }
            let distance = self.distance(vector, *index as usize);
            // Of several equally near ones the first.
            if distance < found.distance || (distance == found.distance && *index < found.index) {
                found = Nearest { index: *index, distance, second: found.distance };
            } else {
                found.second = found.second.min(distance);
            }
        }
        if !found.distance.is_finite() {
            found.index = u32::MAX;
        }
        // Whatever was not looked at is further away than this.
        found.second = found.second.min(found.distance + slack);
        found
    }

    fn distance(&self, vector: &[f32], index: usize) -> f32 {
        let row = &self.rows[index * self.dimension..][..self.dimension];
        let mut sums = [0f32; 32];
        let (vectors, rows) = (vector.chunks_exact(32), row.chunks_exact(32));
        let mut sum: f32 = vectors.remainder().iter().zip(rows.remainder()).map(|(v, r)| v * r).sum();
        for (v, r) in vectors.zip(rows) {
            for i in 0..32 {
                sums[i] = v[i].mul_add(r[i], sums[i]);
            }
        }
        sum += sums.iter().sum::<f32>();
        self.starts[index] - self.factor * sum
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::super::nearest::Codewords;
    use super::*;

    fn numbers(rng: &mut SmallRng, count: usize, offset: f32) -> Vec<f32> {
        (0..count).map(|_| offset + (0..4).map(|_| rng.random_range(-1.0f32..1.0)).sum::<f32>()).collect()
    }

    /// Whatever the numbers are, the answer is that of a search through all of them, or the gap says that it is not certain.
    fn agrees(codewords: &[f32], vectors: &[f32], dimension: usize, form: Form) -> usize {
        let (full, pruned) = (Codewords::new(codewords, dimension, form), Pruned::new(codewords, dimension, form));
        let none = Nearest { index: 7, distance: 0.0, second: 0.0 };
        let (mut expected, mut found) = (vec![none; vectors.len() / dimension], vec![none; vectors.len() / dimension]);
        full.nearest(vectors, &mut expected);
        let doubt = |length: f32| 4e-6 * full.magnitude(length);
        pruned.nearest(vectors, doubt, &mut found);
        let mut uncertain = 0;
        for (row, (expected, found)) in expected.iter().zip(&found).enumerate() {
            let length = vectors[row * dimension..][..dimension].iter().map(|v| v * v).sum::<f32>().sqrt();
            let certain = |n: &Nearest| n.second - n.distance > doubt(length);
            assert_eq!(certain(expected), certain(found), "row {row}: {expected:?} {found:?}");
            if certain(expected) {
                assert_eq!(expected.index, found.index, "row {row}: {expected:?} {found:?}");
            } else {
                uncertain += 1;
            }
        }
        uncertain
    }

    #[test]
    fn the_answer_is_that_of_a_full_search() {
        if !pays(1 << 20, 128) {
            return;
        }
        let mut rng = SmallRng::seed_from_u64(5);
        for form in [Form::L2, Form::Dot] {
            for (count, dimension, rows, offset) in [
                (1000, 16, 400, 0.0),
                (513, 100, 301, 3.0),
                (2000, 128, 97, 0.0),
                (700, 33, 250, -50.0),
                (640, 768, 98, 0.5),
                (512, 17, 1, 0.0),
            ] {
                let (codewords, vectors) = (numbers(&mut rng, count * dimension, offset), numbers(&mut rng, rows * dimension, offset));
                assert!(agrees(&codewords, &vectors, dimension, form) < rows / 20 + 1);
            }
        }
    }

    #[test]
    fn equal_and_nearly_equal_codewords() {
        if !pays(1 << 20, 128) {
            return;
        }
        let mut rng = SmallRng::seed_from_u64(6);
        let (count, dimension) = (600, 32);
        let mut codewords = numbers(&mut rng, count * dimension, 0.0);
        for i in (0..count).step_by(3) {
            let (a, b) = (i * dimension, (i + 1) * dimension);
            codewords.copy_within(a..b, b);
            codewords[b] += if i % 2 == 0 { 0.0 } else { 1e-7 };
        }
        let vectors: Vec<f32> = codewords.iter().map(|v| v + rng.random_range(-0.05f32..0.05)).collect();
        assert!(agrees(&codewords, &vectors, dimension, Form::L2) > 100);
        // Vectors that are codewords, and the middle of all.
        agrees(&codewords, &codewords, dimension, Form::L2);
        agrees(&codewords, &vec![0.0; dimension * 5], dimension, Form::L2);
    }

    #[test]
    fn numbers_of_all_sizes() {
        if !pays(1 << 20, 128) {
            return;
        }
        let mut rng = SmallRng::seed_from_u64(7);
        let (count, dimension) = (530, 48);
        for scale in [1e-30f32, 1e-12, 1e6, 1e15] {
            let codewords: Vec<f32> = numbers(&mut rng, count * dimension, 0.0).iter().map(|v| v * scale).collect();
            let vectors: Vec<f32> = numbers(&mut rng, 50 * dimension, 0.0).iter().map(|v| v * scale).collect();
            if scale > 1e-20 {
                agrees(&codewords, &vectors, dimension, Form::L2);
            }
            // Codewords of very different lengths.
            let uneven: Vec<f32> = codewords
                .chunks_exact(dimension)
                .enumerate()
                .flat_map(|(i, c)| c.iter().map(move |v| v * (1.0 + (i % 50) as f32)))
                .collect();
            if scale > 1e-20 {
                agrees(&uneven, &vectors, dimension, Form::L2);
                agrees(&uneven, &vectors, dimension, Form::Dot);
            }
        }
        // What cannot be computed in float32 is nobody's.
        let codewords = vec![3e38f32; count * dimension];
        let pruned = Pruned::new(&codewords, dimension, Form::Dot);
        let mut found = [Nearest { index: 7, distance: 0.0, second: 0.0 }; 2];
        pruned.nearest(&vec![3e38; 2 * dimension], |_| 0.0, &mut found);
        assert!(found.iter().all(|n| n.index == u32::MAX), "{found:?}");
    }
}
