//! Vectors of floats as the processor has them: AVX-512, AVX2 with FMA, NEON, or plain arrays. Kernels are written once over
//! the trait and compiled for each.

/// A vector register of floats, and one of as many 32-bit indices.
///
/// # Safety
/// The methods may only be called where the processor has the instructions; `load` and `store` take pointers to that many
/// numbers.
pub trait Vector: Copy {
    const LANES: usize;
    type Index: Copy;

    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    /// `self + a * b`, rounded once where the processor can.
    unsafe fn add_product(self, a: Self, b: Self) -> Self;
    unsafe fn min(self, other: Self) -> Self;
    unsafe fn max(self, other: Self) -> Self;
    unsafe fn index(value: u32) -> Self::Index;
    unsafe fn load_index(from: *const u32) -> Self::Index;
    unsafe fn store_index(index: Self::Index, to: *mut u32);
    /// Lane by lane the smaller value with its index; `best` where they are equal.
    unsafe fn keep_less(best: (Self, Self::Index), new: (Self, Self::Index)) -> (Self, Self::Index);
    /// The bits of `mask` as they are, the others of `tag`, which has none of the mask's.
    unsafe fn tagged(self, mask: u32, tag: Self::Index) -> Self;
    /// The smallest number, and the first lane that has it. None may be NaN.
    unsafe fn least(self) -> (f32, u32);
    /// One lane of `other`, the rest as they are.
    unsafe fn with_lane_of(self, lane: u32, other: Self) -> Self;
}

/// The sum over `f` of each number, in eight parts, which need not wait for each other.
#[inline(always)]
fn sum(count: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut sums = [0f32; 8];
    let whole = count / 8 * 8;
    let mut i = 0;
    while i < whole {
        for (lane, sum) in sums.iter_mut().enumerate() {
            *sum += f(i + lane);
        }
        i += 8;
    }
    let halves = [sums[0] + sums[4], sums[1] + sums[5], sums[2] + sums[6], sums[3] + sums[7]];
    (whole..count).map(f).fold((halves[0] + halves[2]) + (halves[1] + halves[3]), |sum, value| sum + value)
}

/// The squared length.
#[inline(always)]
pub fn square(a: &[f32]) -> f32 {
    sum(a.len(), |i| a[i] * a[i])
}

/// The squared distance of two points of one dimension.
#[inline(always)]
pub fn square_between(a: &[f32], b: &[f32]) -> f32 {
    let b = &b[..a.len()];
    sum(a.len(), |i| (a[i] - b[i]) * (a[i] - b[i]))
}

/// The dot product of two points of one dimension.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let b = &b[..a.len()];
    sum(a.len(), |i| a[i] * b[i])
}

/// `sums + values`. By index, as [`difference`]: what iterators call is not inlined across units of compilation, and this runs for each
/// sub-vector.
#[inline(always)]
pub fn add(sums: &mut [f64], values: &[f32]) {
    let values = &values[..sums.len()];
    let mut i = 0;
    while i < sums.len() {
        sums[i] += f64::from(values[i]);
        i += 1;
    }
}

/// `out = a - b`.
#[inline(always)]
pub fn difference(a: &[f32], b: &[f32], out: &mut [f32]) {
    let (a, b) = (&a[..out.len()], &b[..out.len()]);
    let mut i = 0;
    while i < out.len() {
        out[i] = a[i] - b[i];
        i += 1;
    }
}

/// Eight floats for the compiler to make of what it can.
#[derive(Clone, Copy)]
pub struct Plain([f32; 8]);

macro_rules! each {
    ($f:expr) => {
        Plain(std::array::from_fn($f))
    };
}

impl Vector for Plain {
    const LANES: usize = 8;
    type Index = [u32; 8];

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; 8])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { Self(from.cast::<[f32; 8]>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        each!(|i| self.0[i] - other.0[i])
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        each!(|i| self.0[i] + other.0[i])
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        each!(|i| self.0[i] * other.0[i])
    }
    #[inline(always)]
    unsafe fn add_product(self, a: Self, b: Self) -> Self {
        each!(|i| self.0[i] + a.0[i] * b.0[i])
    }
    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        each!(|i| if other.0[i] < self.0[i] { other.0[i] } else { self.0[i] })
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        each!(|i| if other.0[i] > self.0[i] { other.0[i] } else { self.0[i] })
    }
    #[inline(always)]
    unsafe fn index(value: u32) -> [u32; 8] {
        [value; 8]
    }
    #[inline(always)]
    unsafe fn load_index(from: *const u32) -> [u32; 8] {
        // SAFETY: the caller's.
        unsafe { from.cast::<[u32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_index(index: [u32; 8], to: *mut u32) {
        // SAFETY: the caller's.
        unsafe { to.cast::<[u32; 8]>().write_unaligned(index) }
    }
    #[inline(always)]
    unsafe fn keep_less(best: (Self, [u32; 8]), new: (Self, [u32; 8])) -> (Self, [u32; 8]) {
        let (mut value, mut index) = best;
        for (i, kept) in index.iter_mut().enumerate() {
            if new.0.0[i] < value.0[i] {
                value.0[i] = new.0.0[i];
                *kept = new.1[i];
            }
        }
        (value, index)
    }
    #[inline(always)]
    unsafe fn tagged(self, mask: u32, tag: [u32; 8]) -> Self {
        each!(|i| f32::from_bits(self.0[i].to_bits() & mask | tag[i]))
    }
    #[inline(always)]
    unsafe fn least(self) -> (f32, u32) {
        first_least(&self.0)
    }
    #[inline(always)]
    unsafe fn with_lane_of(self, lane: u32, other: Self) -> Self {
        each!(|i| if i as u32 == lane { other.0[i] } else { self.0[i] })
    }
}

/// The smallest, and where it is first.
#[inline(always)]
fn first_least(lanes: &[f32]) -> (f32, u32) {
    let mut least = (lanes[0], 0);
    for (lane, value) in (0..).zip(lanes) {
        if *value < least.0 {
            least = (*value, lane);
        }
    }
    least
}

// One comment in each module for all its blocks.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::undocumented_unsafe_blocks)]
mod x86 {
    use std::arch::x86_64::*;

    use super::Vector;

    // SAFETY of the blocks below: intrinsics of the instructions that the caller promises, on memory that it promises.
    macro_rules! vector {
        ($name:ty, $index:ty, $lanes:expr, $splat:ident, $load:ident, $store:ident, $sub:ident, $add:ident, $mul:ident,
         $fma:ident, $min:ident, $max:ident, $splat_index:ident, $load_index:ident, $store_index:ident, $keep:expr, $tagged:expr, $least:expr, $with_lane:expr) => {
            impl Vector for $name {
                const LANES: usize = $lanes;
                type Index = $index;

                #[inline(always)]
                unsafe fn splat(value: f32) -> Self {
                    unsafe { $splat(value) }
                }
                #[inline(always)]
                unsafe fn load(from: *const f32) -> Self {
                    unsafe { $load(from) }
                }
                #[inline(always)]
                unsafe fn store(self, to: *mut f32) {
                    unsafe { $store(to, self) }
                }
                #[inline(always)]
                unsafe fn sub(self, other: Self) -> Self {
                    unsafe { $sub(self, other) }
                }
                #[inline(always)]
                unsafe fn add(self, other: Self) -> Self {
                    unsafe { $add(self, other) }
                }
                #[inline(always)]
                unsafe fn mul(self, other: Self) -> Self {
                    unsafe { $mul(self, other) }
                }
                #[inline(always)]
                unsafe fn add_product(self, a: Self, b: Self) -> Self {
                    unsafe { $fma(a, b, self) }
                }
                #[inline(always)]
                unsafe fn min(self, other: Self) -> Self {
                    unsafe { $min(self, other) }
                }
                #[inline(always)]
                unsafe fn max(self, other: Self) -> Self {
                    unsafe { $max(self, other) }
                }
                #[inline(always)]
                unsafe fn index(value: u32) -> $index {
                    unsafe { $splat_index(value as i32) }
                }
                #[inline(always)]
                unsafe fn load_index(from: *const u32) -> $index {
                    unsafe { $load_index(from.cast()) }
                }
                #[inline(always)]
                unsafe fn store_index(index: $index, to: *mut u32) {
                    unsafe { $store_index(to.cast(), index) }
                }
                #[inline(always)]
                unsafe fn keep_less(best: (Self, $index), new: (Self, $index)) -> (Self, $index) {
                    unsafe { $keep(best, new) }
                }
                #[inline(always)]
                unsafe fn tagged(self, mask: u32, tag: $index) -> Self {
                    unsafe { $tagged(self, mask, tag) }
                }
                #[inline(always)]
                unsafe fn least(self) -> (f32, u32) {
                    unsafe { $least(self) }
                }
                #[inline(always)]
                unsafe fn with_lane_of(self, lane: u32, other: Self) -> Self {
                    unsafe { $with_lane(self, lane, other) }
                }
            }
        };
    }

    #[inline(always)]
    unsafe fn keep_512(best: (__m512, __m512i), new: (__m512, __m512i)) -> (__m512, __m512i) {
        // SAFETY: the caller's.
        unsafe {
            let less = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(new.0, best.0);
            // The smaller directly, not by the comparison: the next one waits for it. Of NaN and a number the second.
            (_mm512_min_ps(new.0, best.0), _mm512_mask_mov_epi32(best.1, less, new.1))
        }
    }

    #[inline(always)]
    unsafe fn keep_256(best: (__m256, __m256i), new: (__m256, __m256i)) -> (__m256, __m256i) {
        // SAFETY: the caller's.
        unsafe {
            let less = _mm256_cmp_ps::<_CMP_LT_OQ>(new.0, best.0);
            let index = _mm256_blendv_ps(_mm256_castsi256_ps(best.1), _mm256_castsi256_ps(new.1), less);
            // As above.
            (_mm256_min_ps(new.0, best.0), _mm256_castps_si256(index))
        }
    }

    #[inline(always)]
    unsafe fn tagged_512(value: __m512, mask: u32, tag: __m512i) -> __m512 {
        // SAFETY: the caller's.
        unsafe {
            let kept = _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(mask as i32));
            _mm512_castsi512_ps(_mm512_or_si512(kept, tag))
        }
    }

    #[inline(always)]
    unsafe fn tagged_256(value: __m256, mask: u32, tag: __m256i) -> __m256 {
        // SAFETY: the caller's.
        unsafe {
            let kept = _mm256_and_ps(value, _mm256_castsi256_ps(_mm256_set1_epi32(mask as i32)));
            _mm256_or_ps(kept, _mm256_castsi256_ps(tag))
        }
    }

    #[inline(always)]
    unsafe fn least_512(value: __m512) -> (f32, u32) {
        // SAFETY: the caller's.
        unsafe {
            let least = _mm512_reduce_min_ps(value);
            let lanes = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(value, _mm512_set1_ps(least));
            (least, u32::from(lanes).trailing_zeros())
        }
    }

    #[inline(always)]
    unsafe fn least_256(value: __m256) -> (f32, u32) {
        // SAFETY: the caller's. The least is in all lanes in the end.
        unsafe {
            let halves = _mm256_min_ps(value, _mm256_permute2f128_ps::<1>(value, value));
            let quarters = _mm256_min_ps(halves, _mm256_permute_ps::<0b0100_1110>(halves));
            let least = _mm256_min_ps(quarters, _mm256_permute_ps::<0b1011_0001>(quarters));
            let lanes = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_EQ_OQ>(value, least)) as u32;
            (_mm256_cvtss_f32(least), lanes.trailing_zeros())
        }
    }

    #[inline(always)]
    unsafe fn with_lane_512(value: __m512, lane: u32, other: __m512) -> __m512 {
        // SAFETY: the caller's.
        unsafe { _mm512_mask_mov_ps(value, 1u16.unbounded_shl(lane), other) }
    }

    #[inline(always)]
    unsafe fn with_lane_256(value: __m256, lane: u32, other: __m256) -> __m256 {
        // SAFETY: the caller's.
        unsafe {
            let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let chosen = _mm256_cmpeq_epi32(lanes, _mm256_set1_epi32(lane as i32));
            _mm256_blendv_ps(value, other, _mm256_castsi256_ps(chosen))
        }
    }

    vector!(
        __m512,
        __m512i,
        16,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_sub_ps,
        _mm512_add_ps,
        _mm512_mul_ps,
        _mm512_fmadd_ps,
        _mm512_min_ps,
        _mm512_max_ps,
        _mm512_set1_epi32,
        _mm512_loadu_si512,
        _mm512_storeu_si512,
        keep_512,
        tagged_512,
        least_512,
        with_lane_512
    );
    vector!(
        __m256,
        __m256i,
        8,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_sub_ps,
        _mm256_add_ps,
        _mm256_mul_ps,
        _mm256_fmadd_ps,
        _mm256_min_ps,
        _mm256_max_ps,
        _mm256_set1_epi32,
        _mm256_loadu_si256,
        _mm256_storeu_si256,
        keep_256,
        tagged_256,
        least_256,
        with_lane_256
    );
}

#[cfg(target_arch = "aarch64")]
#[allow(clippy::undocumented_unsafe_blocks)]
mod neon {
    use std::arch::aarch64::*;

    use super::Vector;

    // SAFETY of the blocks below: NEON is part of the architecture; memory is the caller's promise.
    impl Vector for float32x4_t {
        const LANES: usize = 4;
        type Index = uint32x4_t;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { vdupq_n_f32(value) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { vld1q_f32(from) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { vst1q_f32(to, self) }
        }
        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            unsafe { vsubq_f32(self, other) }
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            unsafe { vaddq_f32(self, other) }
        }
        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            unsafe { vmulq_f32(self, other) }
        }
        #[inline(always)]
        unsafe fn add_product(self, a: Self, b: Self) -> Self {
            unsafe { vfmaq_f32(self, a, b) }
        }
        #[inline(always)]
        unsafe fn min(self, other: Self) -> Self {
            unsafe { vminq_f32(self, other) }
        }
        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            unsafe { vmaxq_f32(self, other) }
        }
        #[inline(always)]
        unsafe fn index(value: u32) -> uint32x4_t {
            unsafe { vdupq_n_u32(value) }
        }
        #[inline(always)]
        unsafe fn load_index(from: *const u32) -> uint32x4_t {
            unsafe { vld1q_u32(from) }
        }
        #[inline(always)]
        unsafe fn store_index(index: uint32x4_t, to: *mut u32) {
            unsafe { vst1q_u32(to, index) }
        }
        #[inline(always)]
        unsafe fn keep_less(best: (Self, uint32x4_t), new: (Self, uint32x4_t)) -> (Self, uint32x4_t) {
            unsafe {
                let less = vcltq_f32(new.0, best.0);
                (vbslq_f32(less, new.0, best.0), vbslq_u32(less, new.1, best.1))
            }
        }
        #[inline(always)]
        unsafe fn tagged(self, mask: u32, tag: uint32x4_t) -> Self {
            unsafe { vreinterpretq_f32_u32(vorrq_u32(vandq_u32(vreinterpretq_u32_f32(self), vdupq_n_u32(mask)), tag)) }
        }
        #[inline(always)]
        unsafe fn least(self) -> (f32, u32) {
            let mut lanes = [0f32; 4];
            unsafe { self.store(lanes.as_mut_ptr()) };
            super::first_least(&lanes)
        }
        #[inline(always)]
        unsafe fn with_lane_of(self, lane: u32, other: Self) -> Self {
            unsafe {
                let lanes = [0u32, 1, 2, 3];
                let chosen = vceqq_u32(vld1q_u32(lanes.as_ptr()), vdupq_n_u32(lane));
                vbslq_f32(chosen, other, self)
            }
        }
    }
}
