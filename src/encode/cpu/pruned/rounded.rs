//! Codewords and vectors, rounded.

use crate::encode::cpu::center::center;
use crate::encode::cpu::nearest::Form;

/// Dimensions whose products are summed in 16 bits: `16 * 63 * 63 / 2` is below their limit for each of two sums.
pub const CHUNK: usize = 16;
/// Codewords of one register.
pub const LANES: usize = 8;
/// Registers of a panel.
pub const REGISTERS: usize = 2;
pub const PANEL: usize = LANES * REGISTERS;
/// Vectors whose candidates are kept while panels pass by.
pub const BLOCK: usize = 96;
/// The largest rounded number of a codeword, and of a vector, which is stored with `ZERO` added.
const MOST_CODE: f32 = 63.0;
const MOST_VALUE: f32 = 31.0;
pub const ZERO: f32 = 32.0;
/// What bounds that are computed in float32 may be too small by, as a part.
const LOOSE: f32 = 1.0 + 1e-5;
/// Added to a number between `-2^22` and `2^22` it rounds it to a whole one.
const WHOLE: f32 = 12_582_912.0;
/// What is computed in float32 may be off by this part of the numbers it is summed of.
const ROUNDING: f32 = 4e-6;

/// No codeword's.
pub const HOLE: u32 = u32::MAX;

/// Whether this processor has the instructions for vectors of such a dimension.
pub fn can_prune(dimension: usize) -> bool {
    dimension >= CHUNK && is_wide()
}

fn is_wide() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// What is known of each codeword, one after the other, filled up to whole panels.
#[derive(Default)]
pub struct Known {
    /// `|c'|^2`, or zero for dot; infinite where there is none.
    pub(super) base: Vec<f32>,
    /// What a rounded number stands for.
    pub(super) scale: Vec<f32>,
    /// The sum of the rounded numbers, times `ZERO`.
    pub(super) zero: Vec<i32>,
    /// `|c'|`.
    pub(super) length: Vec<f32>,
    /// The length of what was rounded off.
    pub(super) error: Vec<f32>,
}

/// Codewords, rounded and as they are.
pub struct Pruned {
    pub(super) dimension: usize,
    pub(super) chunks: usize,
    pub(super) count: usize,
    /// Whether the processor has the instructions.
    pub(super) wide: bool,
    /// The codeword at each place of the panels; `HOLE` where there is none.
    pub(super) places: Vec<u32>,
    /// 2 for L2, 1 for dot: what a product counts for.
    pub(super) factor: f32,
    /// For each panel, and four dimensions after the other: four bytes of each codeword.
    pub(super) codes: Vec<i8>,
    pub(super) known: Known,
    /// `c'`, and what each distance starts from, as [`super::nearest::Codewords`] has them.
    pub(super) rows: Vec<f32>,
    pub(super) starts: Vec<f32>,
    /// Zero for dot; what is rounded is the difference to it.
    pub(super) center: Vec<f32>,
    pub(super) largest: (f32, f32),
}

/// A vector, rounded.
#[derive(Clone, Copy, Default)]
pub struct Rounded {
    pub(super) scale: f32,
    /// Its length when rounded, and that of what was rounded off.
    pub(super) length: f32,
    pub(super) error: f32,
    /// What lies between two distances that are the same as far as can be told.
    pub(super) slack: f32,
}

impl Pruned {
    /// `codewords (count, dimension)`, of [`Form::L2`] or [`Form::Dot`].
    pub fn new(codewords: &[f32], dimension: usize, form: Form) -> Self {
        Self::in_groups(codewords, dimension, form, &[(0..(codewords.len() / dimension.max(1)) as u32).collect()]).0
    }

    /// The same, the codewords of each group in panels of their own; and where those of each group end.
    pub fn in_groups(codewords: &[f32], dimension: usize, form: Form, groups: &[Vec<u32>]) -> (Self, Vec<usize>) {
        let count = codewords.len() / dimension.max(1);
        let chunks = dimension.div_ceil(CHUNK);
        let center = if form == Form::L2 { center(codewords, dimension) } else { vec![0.0; dimension] };
        let center = center.into_iter().map(|c| c as f32).collect();
        let mut places = Vec::with_capacity(count.next_multiple_of(PANEL));
        let mut ends = Vec::with_capacity(groups.len());
        let mut place_of = vec![0u32; count];
        for group in groups {
            for codeword in group {
                place_of[*codeword as usize] = places.len() as u32;
                places.push(*codeword);
            }
            places.resize(places.len().next_multiple_of(PANEL), HOLE);
            ends.push(places.len() / PANEL);
        }
        let padded = places.len();
        let mut made = Self {
            dimension,
            chunks,
            count,
            wide: is_wide(),
            places,
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
        for (codeword, place) in codewords.chunks_exact(dimension).zip(place_of) {
            made.push(place as usize, codeword, form);
        }
        (made, ends)
    }

    /// The next codeword, at its place.
    fn push(&mut self, i: usize, codeword: &[f32], form: Form) {
        let (mut square, mut start, mut most) = (0f64, 0f64, 0f32);
        let begin = self.rows.len();
        for (value, center) in codeword.iter().zip(&self.center) {
            let packed = value - center;
            self.rows.push(packed);
            most = most.max(packed.abs());
            let packed = f64::from(packed);
            square += packed * packed;
            start += packed * (packed + 2.0 * f64::from(*center));
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

    /// Places of some panels, holes among them.
    pub fn places_of(&self, panels: std::ops::Range<usize>) -> usize {
        panels.len() * PANEL
    }

    /// The codewords of some panels.
    pub fn in_panels(&self, panels: std::ops::Range<usize>) -> impl Iterator<Item = u32> {
        self.places[panels.start * PANEL..panels.end * PANEL].iter().copied().filter(|codeword| *codeword != HOLE)
    }

    /// As [`super::nearest::Codewords::magnitude`].
    pub fn magnitude(&self, length: f32) -> f32 {
        self.largest.0 + 2.0 * length * self.largest.1
    }

    /// Of the bounds, whose parts are computed in float32, and of the distances that are compared in the end, of a vector of some
    /// length from the center.
    #[inline(always)]
    pub fn rounding(&self, own: f32) -> f32 {
        let largest = self.largest.1;
        2.0 * ROUNDING * (largest * largest + self.factor * own * largest)
    }

    /// Loops over arrays, not closures, which would not be compiled for the instructions.
    #[inline(always)]
    fn round_all(&self, vectors: &[f32], doubt: &impl Fn(f32) -> f32, bytes: &mut [u8], rounded: &mut [Rounded]) {
        let width = self.chunks * CHUNK;
        let (centers, last_center) = self.center.as_chunks();
        let last_center = filled(last_center);
        for (row, vector) in vectors.chunks_exact(self.dimension).enumerate() {
            let (values, last) = vector.as_chunks();
            let last_value = filled(last);
            let (bytes, _) = bytes[row * width..][..width].as_chunks_mut();
            let mut most = Most::default();
            for i in 0..values.len() {
                most.meet(&values[i], &centers[i]);
            }
            most.meet(&last_value, &last_center);
            let most_of_all = most.of_all();
            let scale = if most_of_all > 0.0 { most_of_all / MOST_VALUE } else { 1.0 };
            let mut sums = Sums::default();
            for i in 0..values.len() {
                bytes[i] = sums.round(&values[i], &centers[i], scale);
            }
            if !last.is_empty() {
                // What is beyond the dimensions is no difference, and stands for nothing.
                bytes[values.len()] = sums.round(&last_value, &last_center, scale);
            }
            let (length, off, own) = (total(&sums.lengths), total(&sums.off), total(&sums.own));
            let slack = doubt(total(&most.squares).sqrt()) + self.rounding(own.sqrt());
            rounded[row] = Rounded { scale, length: length.sqrt() * scale * LOOSE, error: off.sqrt() * LOOSE, slack };
        }
    }

    /// Their numbers, and what is known of each.
    pub fn round_rows(&self, vectors: &[f32], doubt: &impl Fn(f32) -> f32, bytes: &mut [u8], rounded: &mut [Rounded]) {
        #[cfg(target_arch = "x86_64")]
        if self.wide {
            // SAFETY: the instructions were detected.
            return unsafe { self.round_wide(vectors, doubt, bytes, rounded) };
        }
        self.round_all(vectors, doubt, bytes, rounded);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn round_wide(&self, vectors: &[f32], doubt: &impl Fn(f32) -> f32, bytes: &mut [u8], rounded: &mut [Rounded]) {
        self.round_all(vectors, doubt, bytes, rounded);
    }
}

/// The largest differences to the center, and squares of the numbers, lane by lane.
#[derive(Default)]
struct Most {
    differences: [f32; LANES],
    squares: [f32; LANES],
}

impl Most {
    #[inline(always)]
    fn meet(&mut self, values: &[f32; LANES], centers: &[f32; LANES]) {
        for i in 0..LANES {
            let y = (values[i] - centers[i]).abs();
            self.differences[i] = if y > self.differences[i] { y } else { self.differences[i] };
            self.squares[i] += values[i] * values[i];
        }
    }

    #[inline(always)]
    fn of_all(&self) -> f32 {
        let mut most = 0f32;
        for y in self.differences {
            most = if y > most { y } else { most };
        }
        most
    }
}

/// Squares of the whole numbers, of what was rounded off, and of the differences, lane by lane.
#[derive(Default)]
struct Sums {
    lengths: [f32; LANES],
    off: [f32; LANES],
    own: [f32; LANES],
}

impl Sums {
    #[inline(always)]
    fn round(&mut self, values: &[f32; LANES], centers: &[f32; LANES], scale: f32) -> [u8; LANES] {
        let mut numbers = [0u8; LANES];
        for i in 0..LANES {
            let y = values[i] - centers[i];
            let part = y / scale;
            let part = if part < MOST_VALUE { part } else { MOST_VALUE };
            let part = if part > -MOST_VALUE { part } else { -MOST_VALUE };
            // Adding a number that leaves no room for fractions rounds to the nearest whole one, which is then in the lowest bits.
            let rounded = part + WHOLE;
            let whole = rounded - WHOLE;
            numbers[i] = (rounded.to_bits() as u8).wrapping_add(ZERO as u8);
            self.lengths[i] += whole * whole;
            self.off[i] += (y - whole * scale) * (y - whole * scale);
            self.own[i] += y * y;
        }
        numbers
    }
}

/// The numbers, and zeros after them.
#[inline(always)]
fn filled(values: &[f32]) -> [f32; LANES] {
    let mut found = [0f32; LANES];
    found[..values.len()].copy_from_slice(values);
    found
}

#[inline(always)]
fn total(lanes: &[f32; LANES]) -> f32 {
    let mut sum = 0f32;
    for lane in lanes {
        sum += lane;
    }
    sum
}
