//! Bounds of the distances between rounded vectors and the codewords of a panel.

use super::rounded::{BLOCK, CHUNK, HOLE, LANES, PANEL, Pruned, REGISTERS, Rounded};

/// Vectors that meet a panel at once.
pub const TILE: usize = 3;

/// Vectors on their way past panels, and what is known of each so far.
pub struct Passing<'a> {
    /// The rounded numbers, one vector after the other.
    pub(super) bytes: &'a [u8],
    pub(super) rounded: &'a [Rounded],
    /// The smallest upper bound of each.
    pub(super) upper: &'a mut [f32],
    /// The smallest lower bound of each.
    pub(super) lower: &'a mut [f32],
    /// What may be nearest to one of them.
    pub(super) candidates: &'a mut Vec<Candidate>,
    pub(super) vectors: &'a [f32],
}

#[derive(Clone, Copy)]
pub struct Candidate {
    pub row: u32,
    /// Of the panels.
    pub place: u32,
    /// Its distance is no smaller.
    pub bound: f32,
}

impl Pruned {
    /// The vectors `rows` past panels: what may be nearest is put to the candidates, with its lower bound.
    pub fn panels(&self, panels: std::ops::Range<usize>, rows: &[u32], passing: &mut Passing<'_>) {
        let width = self.chunks * CHUNK;
        assert!(panels.end * PANEL <= self.known.base.len());
        assert!(rows.iter().all(|row| (*row as usize) < passing.rounded.len() && (*row as usize + 1) * width <= passing.bytes.len()));
        #[cfg(target_arch = "x86_64")]
        if self.wide {
            // SAFETY: the instructions were detected; panels and rows are there.
            unsafe { self.panels_wide(panels, rows, passing) };
            return;
        }
        for panel in panels {
            for row in rows {
                self.plain(panel, *row as usize, passing);
            }
        }
    }

    /// Those of a panel that may be nearest, after all of their upper bounds. One that seems nearer than any before is met at once:
    /// its distance is the best of upper bounds.
    #[inline(always)]
    fn keep(&self, row: usize, panel: usize, lower: &[f32; PANEL], upper: &[f32; PANEL], passing: &mut Passing<'_>) {
        let mut least = upper.iter().fold(passing.upper[row], |least, upper| least.min(*upper));
        for (place, bound) in (panel * PANEL..).zip(lower) {
            if *bound < passing.lower[row] && self.places[place] != HOLE {
                passing.lower[row] = *bound;
                let vector = &passing.vectors[row * self.dimension..][..self.dimension];
                least = least.min(self.distance(vector, self.places[place] as usize));
            }
        }
        passing.upper[row] = least;
        let limit = least + passing.rounded[row].slack;
        for (place, bound) in (panel * PANEL..).zip(lower) {
            if *bound <= limit {
                passing.candidates.push(Candidate { row: row as u32, place: place as u32, bound: *bound });
            }
        }
    }

    /// One vector, without instructions of its own.
    fn plain(&self, panel: usize, row: usize, passing: &mut Passing<'_>) {
        let width = self.chunks * CHUNK;
        let bytes = &passing.bytes[row * width..][..width];
        let codes = &self.codes[panel * width * PANEL..][..width * PANEL];
        let mut sums = [0i32; PANEL];
        for (value, code) in bytes.chunks_exact(4).zip(codes.chunks_exact(4 * PANEL)) {
            for (sum, code) in sums.iter_mut().zip(code.chunks_exact(4)) {
                *sum += (0..4).map(|i| i32::from(value[i]) * i32::from(code[i])).sum::<i32>();
            }
        }
        let x = &passing.rounded[row];
        let (mut upper, mut lower) = ([0f32; PANEL], [0f32; PANEL]);
        for (i, sum) in sums.into_iter().enumerate() {
            let at = panel * PANEL + i;
            let product = (sum - self.known.zero[at]) as f32 * self.known.scale[at];
            let about = self.known.base[at] - self.factor * x.scale * product;
            let off = self.known.length[at] * (self.factor * x.error) + self.known.error[at] * (self.factor * x.length);
            (lower[i], upper[i]) = (about - off, about + off);
        }
        self.keep(row, panel, &lower, &upper, passing);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn panels_wide(&self, panels: std::ops::Range<usize>, rows: &[u32], passing: &mut Passing<'_>) {
        let (tiles, rest) = rows.as_chunks::<TILE>();
        for panel in panels {
            for rows in tiles {
                // SAFETY: the caller's: a tile of rows, and a panel, that are there.
                unsafe { self.tile(panel, rows, passing) };
            }
            for row in rest {
                // SAFETY: as above.
                unsafe { self.tile(panel, &[*row], passing) };
            }
        }
    }

    /// The products of some vectors' numbers with a panel's.
    #[cfg(target_arch = "x86_64")]
    #[allow(clippy::needless_range_loop)] // indices that the compiler unrolls, for registers
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn sums<const S: usize>(
        &self,
        panel: usize,
        rows: &[u32; S],
        bytes: &[u8],
    ) -> [[std::arch::x86_64::__m256i; REGISTERS]; S] {
        use std::arch::x86_64::*;
        let width = self.chunks * CHUNK;
        // SAFETY: the caller's: `S` rows of `width` bytes, and a panel of as many codes for each of its codewords.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let mut sums = [[_mm256_setzero_si256(); REGISTERS]; S];
            let mut codes = self.codes.as_ptr().add(panel * width * PANEL).cast::<__m256i>();
            let mut values = [bytes.as_ptr(); S];
            for s in 0..S {
                values[s] = values[s].add(rows[s] as usize * width);
            }
            for chunk in 0..self.chunks {
                // In 16 bits for four dimensions at a time, whose codes are in registers for all vectors.
                let mut short = [[_mm256_setzero_si256(); REGISTERS]; S];
                for g in 0..CHUNK / 4 {
                    let mut code = [_mm256_setzero_si256(); REGISTERS];
                    for r in 0..REGISTERS {
                        code[r] = _mm256_loadu_si256(codes.add(g * REGISTERS + r));
                    }
                    for s in 0..S {
                        let x = _mm256_set1_epi32(values[s].add(chunk * CHUNK + 4 * g).cast::<i32>().read_unaligned());
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
            }
            sums
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[allow(clippy::needless_range_loop)] // indices that the compiler unrolls, for registers
    #[target_feature(enable = "avx2,fma")]
    unsafe fn tile<const S: usize>(&self, panel: usize, rows: &[u32; S], passing: &mut Passing<'_>) {
        use std::arch::x86_64::*;
        // SAFETY: the caller's: rows and panel are there.
        unsafe {
            let sums = self.sums(panel, rows, passing.bytes);
            for s in 0..S {
                let row = rows[s] as usize;
                let x = &passing.rounded[row];
                let factor = _mm256_set1_ps(self.factor * x.scale);
                let error = _mm256_set1_ps(self.factor * x.error);
                let length = _mm256_set1_ps(self.factor * x.length);
                let limit = passing.upper[row] + x.slack;
                let (mut about, mut off) = ([_mm256_setzero_ps(); REGISTERS], [_mm256_setzero_ps(); REGISTERS]);
                let mut passed = _mm256_setzero_ps();
                for r in 0..REGISTERS {
                    let at = panel * PANEL + r * LANES;
                    let product = _mm256_sub_epi32(sums[s][r], _mm256_loadu_si256(self.known.zero.as_ptr().add(at).cast()));
                    let product = _mm256_mul_ps(_mm256_cvtepi32_ps(product), _mm256_loadu_ps(self.known.scale.as_ptr().add(at)));
                    about[r] = _mm256_fnmadd_ps(product, factor, _mm256_loadu_ps(self.known.base.as_ptr().add(at)));
                    off[r] = _mm256_fmadd_ps(
                        _mm256_loadu_ps(self.known.length.as_ptr().add(at)),
                        error,
                        _mm256_mul_ps(_mm256_loadu_ps(self.known.error.as_ptr().add(at)), length),
                    );
                    let lower = _mm256_sub_ps(about[r], off[r]);
                    passed = _mm256_or_ps(passed, _mm256_cmp_ps::<_CMP_LE_OQ>(lower, _mm256_set1_ps(limit)));
                }
                // As a rule none is near enough, and no upper bound smaller.
                if _mm256_movemask_ps(passed) == 0 {
                    continue;
                }
                let (mut upper, mut lower) = ([0f32; PANEL], [0f32; PANEL]);
                for r in 0..REGISTERS {
                    _mm256_storeu_ps(upper.as_mut_ptr().add(r * LANES), _mm256_add_ps(about[r], off[r]));
                    _mm256_storeu_ps(lower.as_mut_ptr().add(r * LANES), _mm256_sub_ps(about[r], off[r]));
                }
                self.keep(row, panel, &lower, &upper, passing);
            }
        }
    }
}

/// The rows of a block, one after the other.
pub const IN_ORDER: [u32; BLOCK] = {
    let mut rows = [0; BLOCK];
    let mut row = 0;
    while row < BLOCK {
        rows[row] = row as u32;
        row += 1;
    }
    rows
};
