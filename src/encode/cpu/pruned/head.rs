//! A first look along few axes.
//!
//! Where codewords differ along some directions more than along others, products along those tell of most codewords that they are too
//! far away: what lies off the axes counts at most as the product of both lengths there (Cauchy-Schwarz). The axes span the directions
//! in which the codewords have the most of what they differ by, found by a few steps of subspace iteration; any that are at right
//! angles would do, these leave the least. Among themselves they are turned at random, so that numbers along them are of one size, and
//! little is rounded off.

use std::sync::atomic::{AtomicU64, Ordering};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::kernel::{IN_ORDER, TILE};
use super::rounded::{BLOCK, CHUNK, PANEL, Pruned, Rounded, ZERO};
use crate::encode::cpu::nearest::{Codewords, Form};
use crate::encode::cpu::simd::square;

/// Of few dimensions more axes are needed for the part of them that tells enough.
const FEW: usize = 256;
/// Codewords that tell the axes, steps that find them, and where those start.
const TOLD: usize = 2048;
const STEPS: usize = 4;
const SEED: u64 = 0x6178_6573;
/// Of the square of a vector what is taken to be off the axes too: it is a difference of sums of hundreds of squares, whose rounding
/// must not make it too small.
const ROUNDED_OFF: f32 = 1e-4;
/// What axes are off a right angle, as a part of both lengths; by far.
const ASKEW: f32 = 1e-5;
/// Panels that vectors met until it shows whether a first look is worth it, and the part that it may let pass.
const TRIED: u64 = 1 << 21;
const MOST_PASSED: f64 = 0.15;
/// What a bound takes beside its products, in products.
const BOUND_COST: f64 = 200.0;

/// Codewords along the axes.
pub struct Head {
    dimension: usize,
    axes: Codewords,
    along: Pruned,
    /// For each place the length of what is off the axes.
    off: Vec<f32>,
    /// What bounds may be too large by, for a vector of length 1.
    blur: f32,
    met: AtomicU64,
    passed: AtomicU64,
}

/// A block of vectors along the axes.
#[derive(Default)]
pub struct Along {
    centered: Vec<f32>,
    products: Vec<f32>,
    numbers: Vec<f32>,
    bytes: Vec<u8>,
    rounded: Vec<Rounded>,
    /// The length of what is off the axes, and what bounds may be too large by.
    pub(super) off: Vec<(f32, f32)>,
    /// For each panel the lowest bound of each vector.
    pub(super) lowest: Vec<f32>,
}

impl Head {
    /// Of codewords one after the other, where the processor has the instructions and the dimensions are worth it.
    pub fn of(codewords: &Pruned) -> Option<Self> {
        let dimension = codewords.dimension;
        let count = axes_of(dimension);
        if !codewords.wide || count == 0 || !codewords.largest.1.is_finite() {
            return None;
        }
        let axes = Codewords::new(&axes(&codewords.rows, dimension, count), dimension, Form::Dot);
        let products = products(&axes, &codewords.rows, dimension);
        let mut packed = Vec::with_capacity(codewords.count * count);
        let mut off = vec![0f32; codewords.places.len()];
        for ((row, products), off) in codewords.rows.chunks_exact(dimension).zip(products.chunks_exact(axes.padded())).zip(&mut off) {
            packed.extend(products[..count].iter().map(|v| -v));
            *off = off_axes(square(row), &products[..count]);
        }
        // What is along the axes is a difference to the codewords' middle already.
        let mut along = Pruned::new(&packed, count, Form::Dot);
        along.known.base.clone_from(&codewords.known.base);
        along.factor = codewords.factor;
        (along.rows, along.starts) = (Vec::new(), Vec::new());
        // Each number along an axis is a sum of as many products as there are dimensions, of a vector and of a codeword.
        let summed = 2.0 * dimension as f32 * f32::EPSILON / 2.0 * (count as f32).sqrt();
        let blur = codewords.factor * codewords.largest.1 * (ASKEW + summed);
        Some(Self { dimension, axes, along, off, blur, met: AtomicU64::new(0), passed: AtomicU64::new(0) })
    }

    /// Bytes that it takes, and while it is made, of `count` codewords.
    pub fn bytes(count: usize, dimension: usize) -> usize {
        let axes = axes_of(dimension);
        2 * axes * dimension * size_of::<f32>() + count * axes * (2 * size_of::<f32>() + 1) + count * 9 * size_of::<f32>()
    }

    /// Whether it leaves few, as far as is known.
    pub fn is_worth_it(&self) -> bool {
        let met = self.met.load(Ordering::Relaxed);
        met < TRIED || (self.passed.load(Ordering::Relaxed) as f64) < MOST_PASSED * met as f64
    }

    /// Count panels that vectors met, and those that may have a nearest codeword.
    pub fn count(&self, met: u64, passed: u64) {
        self.met.fetch_add(met, Ordering::Relaxed);
        self.passed.fetch_add(passed, Ordering::Relaxed);
    }

    /// So many vectors meet panels of `count` codewords before it may be switched off.
    pub fn tried(count: usize) -> usize {
        (TRIED as usize - 1) / count.div_ceil(PANEL).max(1)
    }

    /// What a search after it takes, as a part of one without, as far as is known; 1 where it is not worth it.
    pub fn cost(&self) -> f64 {
        let (met, passed) = (self.met.load(Ordering::Relaxed), self.passed.load(Ordering::Relaxed));
        let passed = passed as f64 / met.max(1) as f64;
        if met == 0 || passed >= MOST_PASSED {
            return 1.0;
        }
        passed + (self.along.dimension as f64 + BOUND_COST) / (self.dimension as f64 + BOUND_COST)
    }

    #[cfg(test)]
    pub fn counted(&self) -> (u64, u64) {
        (self.met.load(Ordering::Relaxed), self.passed.load(Ordering::Relaxed))
    }

    /// Put a block of vectors along the axes.
    pub fn look(&self, codewords: &Pruned, vectors: &[f32], block: &mut Along) {
        let (dimension, count, padded) = (codewords.dimension, self.along.dimension, self.axes.padded());
        let rows = vectors.len() / dimension;
        block.centered.clear();
        for vector in vectors.chunks_exact(dimension) {
            block.centered.extend(vector.iter().zip(&codewords.center).map(|(v, c)| v - c));
        }
        block.products.resize(rows * padded, 0.0);
        self.axes.distances(&block.centered, &mut block.products);
        block.off.clear();
        block.numbers.clear();
        for (vector, products) in block.centered.chunks_exact(dimension).zip(block.products.chunks_exact(padded)) {
            let own = square(vector);
            block.off.push((off_axes(own, &products[..count]), self.blur * own.sqrt()));
            block.numbers.extend(products[..count].iter().map(|v| -v));
        }
        block.bytes.resize(rows * count, ZERO as u8);
        block.rounded.resize(rows, Rounded::default());
        self.along.round_rows(&block.numbers, &|_| 0.0, &mut block.bytes, &mut block.rounded);
    }

    /// For each panel, and each of the block's vectors, the lowest bound of its distances.
    pub fn bounds(&self, panels: usize, block: &mut Along) {
        assert!(panels * PANEL <= self.off.len() && block.rounded.len() <= BLOCK);
        block.lowest.resize(panels * BLOCK, 0.0);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instructions were detected when this was made; panels and rows are there.
        unsafe {
            self.bounds_wide(panels, block);
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn bounds_wide(&self, panels: usize, block: &mut Along) {
        let mut lowest = std::mem::take(&mut block.lowest);
        let (tiles, rest) = IN_ORDER[..block.rounded.len()].as_chunks::<TILE>();
        for (panel, lowest) in lowest.chunks_exact_mut(BLOCK).take(panels).enumerate() {
            for rows in tiles {
                // SAFETY: the caller's.
                let found = unsafe { self.lowest(panel, rows, block) };
                lowest[rows[0] as usize..][..TILE].copy_from_slice(&found);
            }
            for row in rest {
                // SAFETY: the caller's.
                [lowest[*row as usize]] = unsafe { self.lowest(panel, &[*row], block) };
            }
        }
        block.lowest = lowest;
    }

    #[cfg(target_arch = "x86_64")]
    #[allow(clippy::needless_range_loop)] // indices that the compiler unrolls, for registers
    #[target_feature(enable = "avx2,fma")]
    unsafe fn lowest<const S: usize>(&self, panel: usize, rows: &[u32; S], block: &Along) -> [f32; S] {
        use std::arch::x86_64::*;

        use super::rounded::{LANES, REGISTERS};
        // SAFETY: the caller's: rows and panel are there, and were put along the axes.
        unsafe {
            let sums = self.along.sums(panel, rows, &block.bytes);
            let mut found = [0f32; S];
            for s in 0..S {
                let row = rows[s] as usize;
                let x = &block.rounded[row];
                let factor = _mm256_set1_ps(self.along.factor * x.scale);
                let error = _mm256_set1_ps(self.along.factor * x.error);
                let length = _mm256_set1_ps(self.along.factor * x.length);
                let off = _mm256_set1_ps(self.along.factor * block.off[row].0);
                let mut least = _mm256_set1_ps(f32::INFINITY);
                for r in 0..REGISTERS {
                    let at = panel * PANEL + r * LANES;
                    let known = &self.along.known;
                    let product = _mm256_sub_epi32(sums[s][r], _mm256_loadu_si256(known.zero.as_ptr().add(at).cast()));
                    let product = _mm256_mul_ps(_mm256_cvtepi32_ps(product), _mm256_loadu_ps(known.scale.as_ptr().add(at)));
                    let lower = _mm256_fnmadd_ps(product, factor, _mm256_loadu_ps(known.base.as_ptr().add(at)));
                    let lower = _mm256_fnmadd_ps(_mm256_loadu_ps(known.length.as_ptr().add(at)), error, lower);
                    let lower = _mm256_fnmadd_ps(_mm256_loadu_ps(known.error.as_ptr().add(at)), length, lower);
                    let lower = _mm256_fnmadd_ps(_mm256_loadu_ps(self.off.as_ptr().add(at)), off, lower);
                    least = _mm256_min_ps(least, lower);
                }
                let halves = _mm_min_ps(_mm256_castps256_ps128(least), _mm256_extractf128_ps::<1>(least));
                let quarters = _mm_min_ps(halves, _mm_movehl_ps(halves, halves));
                found[s] = _mm_cvtss_f32(_mm_min_ss(quarters, _mm_movehdup_ps(quarters)));
            }
            found
        }
    }
}

fn axes_of(dimension: usize) -> usize {
    let part = if dimension < FEW { dimension * 3 / 8 } else { dimension / 4 };
    part / CHUNK * CHUNK
}

/// The length of what is off the axes, of a vector's square and its products along them.
fn off_axes(own: f32, products: &[f32]) -> f32 {
    ((own - square(products)).max(0.0) + ROUNDED_OFF * own).sqrt()
}

/// Of each row with each axis, negated, filled up to whole panels.
fn products(axes: &Codewords, rows: &[f32], dimension: usize) -> Vec<f32> {
    const ROWS: usize = 64;
    let mut products = vec![0f32; rows.len() / dimension * axes.padded()];
    let parts = products.par_chunks_mut(ROWS * axes.padded()).zip(rows.par_chunks(ROWS * dimension));
    parts.for_each(|(out, rows)| axes.distances(rows, out));
    products
}

/// `count` directions at right angles that hold the most of `rows (n, dimension)`, turned at random.
fn axes(rows: &[f32], dimension: usize, count: usize) -> Vec<f32> {
    let step = (rows.len() / dimension).div_ceil(TOLD).max(1);
    let told: Vec<&[f32]> = rows.chunks_exact(dimension).step_by(step).collect();
    let flat = told.concat();
    let mut random = SmallRng::seed_from_u64(SEED);
    let mut found: Vec<f32> = (0..count * dimension).map(|_| random.random_range(-1.0..1.0)).collect();
    at_right_angles(&mut found, dimension, &mut random);
    for _ in 0..STEPS {
        let products = products(&Codewords::new(&found, dimension, Form::Dot), &flat, dimension);
        let padded = products.len() / told.len();
        found.par_chunks_exact_mut(dimension).enumerate().for_each(|(axis, found)| {
            let weights = products.chunks_exact(padded).map(|products| products[axis]);
            found.copy_from_slice(&combined(weights, told.iter().copied(), dimension));
        });
        at_right_angles(&mut found, dimension, &mut random);
    }
    let mut turned: Vec<f32> = (0..count * count).map(|_| random.random_range(-1.0..1.0)).collect();
    at_right_angles(&mut turned, count, &mut random);
    let mut turned: Vec<f32> = turned
        .par_chunks_exact(count)
        .flat_map_iter(|weights| combined(weights.iter().copied(), found.chunks_exact(dimension), dimension))
        .collect();
    at_right_angles(&mut turned, dimension, &mut random);
    turned
}

/// The sum of `rows` by their weights.
fn combined<'a>(weights: impl Iterator<Item = f32>, rows: impl Iterator<Item = &'a [f32]>, dimension: usize) -> Vec<f32> {
    let mut sum = vec![0f32; dimension];
    for (weight, row) in weights.zip(rows) {
        for (sum, value) in sum.iter_mut().zip(row) {
            *sum += weight * value;
        }
    }
    sum
}

/// Gram and Schmidt, twice, in float64.
fn at_right_angles(axes: &mut [f32], dimension: usize, random: &mut SmallRng) {
    let mut done: Vec<f64> = Vec::with_capacity(axes.len());
    for axis in axes.chunks_exact_mut(dimension) {
        let longest = axis.iter().fold(0f64, |most, v| most.max(f64::from(v.abs())));
        let mut own: Vec<f64> = axis.iter().map(|v| f64::from(*v) / longest).collect();
        // None is left where there are fewer directions than axes.
        while !take_out(&mut own, &done) {
            own = (0..dimension).map(|_| random.random_range(-1.0..1.0)).collect();
        }
        axis.iter_mut().zip(&own).for_each(|(axis, own)| *axis = *own as f32);
        done.extend(own);
    }
}

/// What is at right angles to axes of length 1, with length 1. Whether there is such a part.
fn take_out(own: &mut [f64], axes: &[f64]) -> bool {
    let length = |own: &[f64]| own.iter().map(|v| v * v).sum::<f64>().sqrt();
    let before = length(own);
    for _ in 0..2 {
        for axis in axes.chunks_exact(own.len()) {
            let product: f64 = own.iter().zip(axis).map(|(a, b)| a * b).sum();
            own.iter_mut().zip(axis).for_each(|(own, axis)| *own -= product * axis);
        }
    }
    let left = length(own);
    own.iter_mut().for_each(|v| *v /= left);
    // Also where nothing was a number.
    left > 1e-6 * before
}
