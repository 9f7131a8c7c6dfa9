//! The nearest of many codewords to each of many vectors: the one kernel of training, assignment and encoding.
//!
//! Codewords are packed in panels, as many side by side as fit some registers, dimension after dimension. A tile of a few
//! vectors meets a panel at a time, so that its distances stay in registers, and each loaded number is used several times.

mod tagged;

use super::center::center;
use super::simd::{Plain, Vector};

/// How distances are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `|c'|^2 + 2 m.c' - 2 x.c'` with `c' = c - m`, `m` amid the codewords, which ranks as L2 does, in half the
    /// operations. Without `m`, vectors far from the origin would lose their differences in rounding.
    L2,
    /// `-x.c`.
    Dot,
    /// `sum (x - c)^2`, each product and sum rounded, dimension after dimension: bit by bit what Lance's kernel for small
    /// codebooks computes.
    Exact,
}

/// Two distances that differ by less than this part of the numbers they are summed of may be out of order.
pub const DOUBT: f32 = 4e-6;

/// The nearest codeword, and how near.
#[derive(Debug, Clone, Copy)]
pub struct Nearest {
    pub index: u32,
    pub distance: f32,
    /// The distance of the nearest but one, where it was asked for.
    pub second: f32,
}

/// The instructions that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "aarch64")]
    Neon,
    Plain,
}

impl Isa {
    /// The best that this processor has.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if std::is_x86_feature_detected!("avx512f") {
                return Self::Avx512;
            }
            if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
                return Self::Avx2;
            }
        }
        #[cfg(target_arch = "aarch64")]
        return Self::Neon;
        #[allow(unreachable_code)]
        Self::Plain
    }

    /// Codewords side by side in a panel.
    fn panel_width(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => 64,
            #[cfg(target_arch = "aarch64")]
            Self::Neon => 16,
            _ => 16,
        }
    }
}

/// Most lanes of any register.
const MOST_LANES: usize = 16;
/// Vectors whose state is kept while panels pass by.
const BLOCK: usize = 96;
/// Codewords up to this size stay in the first-level cache, and every tile meets all panels in one go.
const SMALL: usize = 24 << 10;

/// The best of each lane so far.
#[derive(Clone, Copy)]
struct State {
    best: [f32; MOST_LANES],
    index: [u32; MOST_LANES],
    second: [f32; MOST_LANES],
}

const FRESH: State = State { best: [f32::INFINITY; MOST_LANES], index: [u32::MAX; MOST_LANES], second: [f32::INFINITY; MOST_LANES] };

/// Codewords, packed.
pub struct Codewords {
    dimension: usize,
    count: usize,
    form: Form,
    isa: Isa,
    /// For each panel: `dimension` rows of `panel_width` numbers.
    panels: Vec<f32>,
    /// What each distance starts from.
    starts: Vec<f32>,
    /// `m` of [`Form::L2`]; zero for the others.
    center: Vec<f64>,
    /// The largest start, and the largest length of a packed codeword (without its factor).
    largest: (f32, f32),
}

impl Codewords {
    /// `codewords (count, dimension)`.
    pub fn new(codewords: &[f32], dimension: usize, form: Form) -> Self {
        Self::with_isa(codewords, dimension, form, Isa::detect())
    }

    pub fn with_isa(codewords: &[f32], dimension: usize, form: Form, isa: Isa) -> Self {
        let width = isa.panel_width();
        let count = codewords.len() / dimension.max(1);
        let scale = match form {
            Form::L2 => -2.0,
            Form::Dot => -1.0,
            Form::Exact => 1.0,
        };
        let center = if form == Form::L2 { center(codewords, dimension) } else { vec![0.0; dimension] };
        let mut panels = vec![0.0; count.div_ceil(width) * width * dimension];
        // Codewords that only fill up the last panel are never nearest.
        let mut starts = vec![f32::INFINITY; count.div_ceil(width) * width];
        let mut largest = (0f32, 0f32);
        for (i, codeword) in codewords.chunks_exact(dimension).enumerate() {
            let panel = i / width * width * dimension + i % width;
            let (mut square, mut start) = (0f64, 0f64);
            for (d, value) in codeword.iter().enumerate() {
                // Rounded as it is packed: the start belongs to that codeword.
                let packed = if form == Form::L2 { (f64::from(*value) - center[d]) as f32 } else { *value };
                panels[panel + d * width] = scale * packed;
                let packed = f64::from(packed);
                square += packed * packed;
                start += packed * (packed + 2.0 * center[d]);
            }
            starts[i] = if form == Form::L2 { start as f32 } else { 0.0 };
            largest = (largest.0.max(starts[i].abs()), largest.1.max(square.sqrt() as f32));
        }
        Self { dimension, count, form, isa, panels, starts, center, largest }
    }

    /// Codewords of [`Form::L2`] as they are seen from `origin`, for vectors of which it was subtracted: what is left out is their
    /// squared length. Quicker to make than by [`Self::new`].
    pub fn around<'a>(codewords: impl ExactSizeIterator<Item = &'a [f32]>, origin: &[f32]) -> Self {
        let isa = Isa::detect();
        let (width, dimension, count) = (isa.panel_width(), origin.len(), codewords.len());
        let padded = count.div_ceil(width) * width;
        let mut panels = vec![0.0; padded * dimension];
        let mut starts = vec![f32::INFINITY; padded];
        for (i, codeword) in codewords.enumerate() {
            let panel = &mut panels[i / width * width * dimension + i % width..];
            let mut square = 0f32;
            for (place, (value, origin)) in panel.iter_mut().step_by(width).zip(codeword.iter().zip(origin)) {
                let difference = value - origin;
                *place = -2.0 * difference;
                square += difference * difference;
            }
            starts[i] = square;
        }
        Self { dimension, count, form: Form::L2, isa, panels, starts, center: Vec::new(), largest: (0.0, 0.0) }
    }

    /// What [`Form::L2`] leaves out is the squared distance to this.
    pub fn center(&self) -> &[f64] {
        &self.center
    }

    /// The size of the numbers that a distance to a vector of some length is the sum of: its rounding is a part of that.
    #[inline]
    pub fn magnitude(&self, length: f32) -> f32 {
        self.largest.0 + 2.0 * length * self.largest.1
    }

    /// The length of the longest codeword ([`Form::L2`]: from their center).
    pub fn largest_length(&self) -> f32 {
        self.largest.1
    }

    pub fn count(&self) -> usize {
        self.count
    }

    #[cfg(test)]
    pub fn nearest(&self, vectors: &[f32], out: &mut [Nearest]) {
        self.nearest_of_parts(vectors, self.dimension, out);
    }

    /// As [`Self::nearest_of_parts`] for vectors one after the other, without [`Nearest::second`], which costs.
    pub fn only_nearest(&self, vectors: &[f32], out: &mut [Nearest]) {
        self.run::<false>(vectors, self.dimension, out);
    }

    /// The nearest codeword to the first `dimension` numbers of each of `vectors (n, stride)`, the last of which may end after
    /// those; of several equally near ones the first. Where all distances are infinite or NaN the index is `u32::MAX`.
    pub fn nearest_of_parts(&self, vectors: &[f32], stride: usize, out: &mut [Nearest]) {
        self.run::<true>(vectors, stride, out);
    }

    /// All distances of `vectors (n, dimension)`, `n` rows of [`Self::padded`]; those of no codeword are infinite.
    pub fn distances(&self, vectors: &[f32], out: &mut [f32]) {
        assert!(
            self.form != Form::Exact && vectors.len().is_multiple_of(self.dimension),
            "{} numbers, vectors of {}",
            vectors.len(),
            self.dimension
        );
        assert_eq!(out.len(), vectors.len() / self.dimension * self.padded());
        self.dispatch(Job::All { vectors, out });
    }

    /// [`Self::count`], filled up to whole panels.
    pub fn padded(&self) -> usize {
        self.starts.len()
    }

    fn run<const SECOND: bool>(&self, vectors: &[f32], stride: usize, out: &mut [Nearest]) {
        if out.is_empty() {
            return;
        }
        self.check_rows(vectors, stride, out.len());
        self.dispatch(if SECOND { Job::NearestTwo { vectors, stride, out } } else { Job::Nearest { vectors, stride, out } });
    }

    fn check_rows(&self, vectors: &[f32], stride: usize, rows: usize) {
        assert!(
            stride >= self.dimension && vectors.len() >= (rows - 1) * stride + self.dimension,
            "{} numbers are not {rows} vectors of {} every {stride}",
            vectors.len(),
            self.dimension
        );
    }

    fn dispatch(&self, job: Job<'_>) {
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: detected, or chosen by a test that detected it.
            Isa::Avx512 => unsafe { avx512(self, job) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { avx2(self, job) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: part of the architecture.
            Isa::Neon => unsafe { run::<std::arch::aarch64::float32x4_t, 4, 5>(self, job) },
            // SAFETY: needs no instructions of its own.
            Isa::Plain => unsafe { run::<Plain, 2, 4>(self, job) },
        }
    }
}

/// What a kernel is asked for, of vectors `stride` numbers apart.
enum Job<'a> {
    Nearest { vectors: &'a [f32], stride: usize, out: &'a mut [Nearest] },
    NearestTwo { vectors: &'a [f32], stride: usize, out: &'a mut [Nearest] },
    All { vectors: &'a [f32], out: &'a mut [f32] },
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512(codewords: &Codewords, job: Job<'_>) {
    // SAFETY: compiled for the instructions that the caller promises.
    unsafe { run::<std::arch::x86_64::__m512, 4, 6>(codewords, job) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(codewords: &Codewords, job: Job<'_>) {
    // SAFETY: as above.
    unsafe { run::<std::arch::x86_64::__m256, 2, 6>(codewords, job) }
}

#[inline(always)]
unsafe fn run<V: Vector, const R: usize, const S: usize>(codewords: &Codewords, job: Job<'_>) {
    let exact = codewords.form == Form::Exact;
    // SAFETY: the caller's.
    unsafe {
        match job {
            Job::Nearest { vectors, stride, out } if exact => blocks::<V, R, S, true, false>(codewords, vectors, stride, out),
            Job::Nearest { vectors, stride, out } => blocks::<V, R, S, false, false>(codewords, vectors, stride, out),
            Job::NearestTwo { vectors, stride, out } if exact => blocks::<V, R, S, true, true>(codewords, vectors, stride, out),
            Job::NearestTwo { vectors, stride, out } => blocks::<V, R, S, false, true>(codewords, vectors, stride, out),
            Job::All { vectors, out } => all::<V, R, S>(codewords, vectors, out),
        }
    }
}

/// The distances of all vectors to the codewords of one panel after the other.
#[inline(always)]
unsafe fn all<V: Vector, const R: usize, const S: usize>(codewords: &Codewords, vectors: &[f32], out: &mut [f32]) {
    let (dimension, padded, width) = (codewords.dimension, codewords.starts.len(), R * V::LANES);
    let rows = vectors.len() / dimension;
    for panel in 0..padded / width {
        let mut row = 0;
        // SAFETY: rows and panels are within the slices; the instructions are the caller's promise.
        unsafe {
            while row < rows {
                let (from, to) = (vectors.as_ptr().add(row * dimension), out.as_mut_ptr().add(row * padded + panel * width));
                if row + S <= rows {
                    store::<V, R, S>(&sums::<V, R, S, false>(codewords, from, dimension, panel), to, padded);
                    row += S;
                } else {
                    store::<V, R, 1>(&sums::<V, R, 1, false>(codewords, from, dimension, panel), to, padded);
                    row += 1;
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn store<V: Vector, const R: usize, const S: usize>(sums: &[[V; R]; S], to: *mut f32, stride: usize) {
    for (s, row) in sums.iter().enumerate() {
        for (r, sum) in row.iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { sum.store(to.add(s * stride + r * V::LANES)) };
        }
    }
}

/// Blocks of vectors: panels pass by a block, or a block's tiles by all panels, whichever leaves more in the cache.
#[inline(always)]
unsafe fn blocks<V: Vector, const R: usize, const S: usize, const EXACT: bool, const SECOND: bool>(
    codewords: &Codewords,
    vectors: &[f32],
    stride: usize,
    out: &mut [Nearest],
) {
    let panels = codewords.starts.len() / (R * V::LANES);
    let step = if codewords.panels.len() * 4 <= SMALL { panels.max(1) } else { 1 };
    let mut states = [FRESH; BLOCK];
    for (vectors, out) in vectors.chunks(BLOCK * stride).zip(out.chunks_mut(BLOCK)) {
        let rows = out.len();
        states[..rows].fill(FRESH);
        let mut panel = 0;
        while panel < panels {
            let end = (panel + step).min(panels);
            let mut row = 0;
            // SAFETY: rows and panels are within the slices; the instructions are the caller's promise.
            unsafe {
                while row + S <= rows {
                    tile::<V, R, S, EXACT, SECOND>(
                        codewords,
                        vectors.as_ptr().add(row * stride),
                        stride,
                        &mut states[row..row + S],
                        panel,
                        end,
                    );
                    row += S;
                }
                while row < rows {
                    tile::<V, R, 1, EXACT, SECOND>(
                        codewords,
                        vectors.as_ptr().add(row * stride),
                        stride,
                        &mut states[row..row + 1],
                        panel,
                        end,
                    );
                    row += 1;
                }
            }
            panel = end;
        }
        for (state, out) in states.iter().zip(out) {
            *out = match V::LANES {
                16 => reduce::<16, SECOND>(state),
                8 => reduce::<8, SECOND>(state),
                _ => reduce::<4, SECOND>(state),
            };
        }
    }
}

/// The distances of `S` vectors to the codewords of a panel of `R` registers.
#[allow(clippy::needless_range_loop)] // indices that the compiler unrolls, for registers
#[inline(always)]
unsafe fn sums<V: Vector, const R: usize, const S: usize, const EXACT: bool>(
    codewords: &Codewords,
    vectors: *const f32,
    stride: usize,
    panel: usize,
) -> [[V; R]; S] {
    let (dimension, width) = (codewords.dimension, R * V::LANES);
    // SAFETY: the caller's: panel and vectors are there, and the instructions too.
    unsafe {
        // Loops, not closures: those would not be compiled for the instructions, and no intrinsic inlined in them.
        let starts = codewords.starts.as_ptr().add(panel * width);
        let mut at = codewords.panels.as_ptr().add(panel * width * dimension);
        let mut row = [V::splat(0.0); R];
        for r in 0..R {
            row[r] = V::load(starts.add(r * V::LANES));
        }
        let mut sums = [row; S];
        for d in 0..dimension {
            for r in 0..R {
                row[r] = V::load(at.add(r * V::LANES));
            }
            for s in 0..S {
                let x = V::splat(*vectors.add(s * stride + d));
                for r in 0..R {
                    sums[s][r] = if EXACT {
                        let difference = x.sub(row[r]);
                        sums[s][r].add(difference.mul(difference))
                    } else {
                        sums[s][r].add_product(x, row[r])
                    };
                }
            }
            at = at.add(width);
        }
        sums
    }
}

/// `S` vectors against panels `first..end` of `R` registers each.
#[allow(clippy::needless_range_loop)] // indices that the compiler unrolls, for registers
#[inline(always)]
unsafe fn tile<V: Vector, const R: usize, const S: usize, const EXACT: bool, const SECOND: bool>(
    codewords: &Codewords,
    vectors: *const f32,
    stride: usize,
    states: &mut [State],
    first: usize,
    end: usize,
) {
    // SAFETY: the caller's: panels and vectors are there, and the instructions too.
    unsafe {
        let mut best = [(V::splat(0.0), V::index(0)); S];
        let mut second = [V::splat(f32::INFINITY); S];
        for s in 0..S {
            best[s] = (V::load(states[s].best.as_ptr()), V::load_index(states[s].index.as_ptr()));
            if SECOND {
                second[s] = V::load(states[s].second.as_ptr());
            }
        }
        for panel in first..end {
            let sums = sums::<V, R, S, EXACT>(codewords, vectors, stride, panel);
            for r in 0..R {
                let register = V::index((panel * R + r) as u32);
                for s in 0..S {
                    if SECOND {
                        second[s] = second[s].min(best[s].0.max(sums[s][r]));
                    }
                    best[s] = V::keep_less(best[s], (sums[s][r], register));
                }
            }
        }
        for s in 0..S {
            best[s].0.store(states[s].best.as_mut_ptr());
            V::store_index(best[s].1, states[s].index.as_mut_ptr());
            if SECOND {
                second[s].store(states[s].second.as_mut_ptr());
            }
        }
    }
}

/// The best of all lanes; of equal ones the first index. Written without branches, for it runs once a vector.
#[inline(always)]
fn reduce<const LANES: usize, const SECOND: bool>(state: &State) -> Nearest {
    let mut distance = f32::INFINITY;
    for lane in 0..LANES {
        distance = if state.best[lane] < distance { state.best[lane] } else { distance };
    }
    let mut index = u32::MAX;
    for lane in 0..LANES {
        let candidate = state.index[lane].wrapping_mul(LANES as u32).wrapping_add(lane as u32);
        let is_best = state.best[lane] == distance && distance < f32::INFINITY;
        index = index.min(if is_best { candidate } else { u32::MAX });
    }
    let mut second = f32::INFINITY;
    if SECOND {
        for lane in 0..LANES {
            // The lane of the best one has its own second; of the others it is their best.
            let of_lane = if index % LANES as u32 == lane as u32 { state.second[lane] } else { state.best[lane] };
            second = if of_lane < second { of_lane } else { second };
        }
    }
    Nearest { index, distance, second }
}

#[cfg(test)]
mod tests;
