//! Vectors, and how rows of them are got at.

/// Rows that are fetched before they are needed.
pub const AHEAD: usize = 4;

/// Vectors one after the other.
#[derive(Clone, Copy)]
pub struct Points<'a> {
    pub values: &'a [f32],
    pub dimension: usize,
}

impl<'a> Points<'a> {
    #[inline]
    pub fn new(values: &'a [f32], dimension: usize) -> Self {
        Self { values, dimension }
    }

    #[inline]
    pub fn len(self) -> usize {
        self.values.len() / self.dimension
    }

    #[inline]
    pub fn get(self, row: u32) -> &'a [f32] {
        &self.values[row as usize * self.dimension..][..self.dimension]
    }

    /// Tell the processor that the row is needed soon: rows of a cluster are anywhere, which it cannot foresee.
    #[inline]
    pub fn prefetch(self, row: Option<&u32>) {
        if let Some(row) = row {
            prefetch(self.get(*row));
        }
    }

    /// As [`Self::prefetch`], of a part of each row, where there is one.
    #[inline]
    pub fn prefetch_part(self, row: usize, part: &std::ops::Range<usize>) {
        if let Some(numbers) = self.values.get(row * self.dimension + part.start..row * self.dimension + part.end) {
            prefetch(numbers);
        }
    }

    pub fn range(self, rows: std::ops::Range<usize>) -> Self {
        Self { values: &self.values[rows.start * self.dimension..rows.end * self.dimension], ..self }
    }

    /// Some of them, one after the other.
    pub fn gather(self, rows: &[u32]) -> Vec<f32> {
        let mut gathered = Vec::with_capacity(rows.len() * self.dimension);
        rows.iter().for_each(|row| gathered.extend_from_slice(self.get(*row)));
        gathered
    }
}

#[inline]
fn prefetch(numbers: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    for line in numbers.chunks(64 / size_of::<f32>()) {
        // SAFETY: has no effect but on the cache; part of the architecture.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = numbers;
}
