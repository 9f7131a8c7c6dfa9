//! Of the codewords that bounds leave, the nearest.

use super::head::{Along, Head};
use super::kernel::{Candidate, IN_ORDER, Passing};
use super::rounded::{BLOCK, CHUNK, HOLE, PANEL, Pruned, Rounded, ZERO};
use crate::encode::cpu::nearest::Nearest;

impl Pruned {
    /// The nearest codeword to each of `vectors (n, dimension)`, and the nearest but one of those that are no further from it than
    /// `doubt(length of the vector)`; where there is none, `second` is just beyond that. Where distances are infinite or NaN the
    /// index is `u32::MAX`. Returns how many distances were computed in float32.
    pub fn nearest(&self, vectors: &[f32], doubt: impl Fn(f32) -> f32, out: &mut [Nearest]) -> usize {
        self.nearest_by(None, vectors, doubt, out)
    }

    /// The same, after a first look that was made of these codewords.
    pub fn nearest_by(&self, head: Option<&Head>, vectors: &[f32], doubt: impl Fn(f32) -> f32, out: &mut [Nearest]) -> usize {
        let mut room = Room::new(self, BLOCK.min(out.len()));
        let mut along = Along::default();
        let mut computed = 0;
        for (vectors, out) in vectors.chunks(BLOCK * self.dimension).zip(out.chunks_mut(BLOCK)) {
            let (panels, rows) = (self.known.base.len() / PANEL, &IN_ORDER[..out.len()]);
            computed += match head.filter(|head| head.is_worth_it()) {
                None => room.search(self, vectors, &doubt, out, |passing| self.panels(0..panels, rows, passing)),
                Some(head) => {
                    head.look(self, vectors, &mut along);
                    head.bounds(panels, &mut along);
                    room.search(self, vectors, &doubt, out, |passing| self.panels_left(head, &along, rows, passing))
                }
            };
        }
        computed
    }

    /// The vectors past the panels that a first look leaves. Loops by index, which need no calls.
    fn panels_left(&self, head: &Head, along: &Along, rows: &[u32], passing: &mut Passing<'_>) {
        let count = rows.len();
        // First the one that seems nearest, so that it is known how near.
        let (mut least, mut first) = ([f32::INFINITY; BLOCK], [0u32; BLOCK]);
        for (panel, lowest) in (0..).zip(along.lowest.chunks_exact(BLOCK)) {
            for i in 0..BLOCK {
                let nearer = lowest[i] < least[i];
                least[i] = if nearer { lowest[i] } else { least[i] };
                first[i] = if nearer { panel } else { first[i] };
            }
        }
        let mut limit = [f32::NEG_INFINITY; BLOCK];
        let limit_of = |passing: &Passing<'_>, i: usize| passing.upper[i] + passing.rounded[i].slack + along.off[i].1;
        for (i, row) in rows.iter().enumerate() {
            let panel = first[i] as usize;
            self.panels(panel..panel + 1, &[*row], passing);
            limit[i] = limit_of(passing, i);
        }
        let mut passed = 0;
        let mut left = Vec::with_capacity(count);
        for (panel, lowest) in along.lowest.chunks_exact(BLOCK).enumerate() {
            let mut any = false;
            for i in 0..BLOCK {
                // Also where nothing is a number.
                let further = lowest[i] > limit[i];
                any |= !further;
            }
            if !any {
                continue;
            }
            left.clear();
            for (i, row) in rows.iter().enumerate() {
                let further = lowest[i] > limit[i];
                if !further && first[i] as usize != panel {
                    left.push(*row);
                }
            }
            if !left.is_empty() {
                passed += left.len() as u64;
                self.panels(panel..panel + 1, &left, passing);
                for row in &left {
                    limit[*row as usize] = limit_of(passing, *row as usize);
                }
            }
        }
        head.count((along.lowest.len() / BLOCK * count) as u64, passed);
    }

    /// The same among the codewords of some groups, which `pass` shows the vectors to by [`Self::panels`].
    pub fn nearest_among(&self, vectors: &[f32], doubt: impl Fn(f32) -> f32, out: &mut [Nearest], pass: impl FnOnce(&mut Passing<'_>)) {
        Room::new(self, out.len()).search(self, vectors, &doubt, out, pass);
    }

    /// Of the candidates those that can still be nearest, in float32: first, for each vector, the one whose bound is smallest.
    #[inline(always)]
    fn decide(&self, vectors: &[f32], rounded: &[Rounded], candidates: &[Candidate], out: &mut [Nearest]) -> usize {
        let mut computed = out.len();
        let mut first = vec![(f32::INFINITY, HOLE); out.len()];
        for candidate in candidates {
            let first = &mut first[candidate.row as usize];
            if candidate.bound < first.0 {
                *first = (candidate.bound, candidate.place);
            }
        }
        for (row, (out, (_, place))) in out.iter_mut().zip(&first).enumerate() {
            *out = Nearest { index: HOLE, distance: f32::INFINITY, second: f32::INFINITY };
            if *place != HOLE {
                self.meet(vectors, row, *place, out);
            }
        }
        for candidate in candidates {
            let row = candidate.row as usize;
            if candidate.bound <= out[row].distance + rounded[row].slack && candidate.place != first[row].1 {
                self.meet(vectors, row, candidate.place, &mut out[row]);
                computed += 1;
            }
        }
        for (found, rounded) in out.iter_mut().zip(rounded) {
            if !found.distance.is_finite() {
                found.index = u32::MAX;
            }
            // Whatever was not looked at is further away than this.
            found.second = found.second.min(found.distance + rounded.slack);
        }
        computed
    }

    #[inline(always)]
    fn meet(&self, vectors: &[f32], row: usize, place: u32, found: &mut Nearest) {
        let index = self.places[place as usize];
        // Where no bound is finite, what fills up a panel is no further away.
        if index == HOLE {
            return;
        }
        let distance = self.distance(&vectors[row * self.dimension..][..self.dimension], index as usize);
        // Of several equally near ones the first.
        if distance < found.distance || (distance == found.distance && index < found.index) {
            *found = Nearest { index, distance, second: found.distance };
        } else {
            found.second = found.second.min(distance);
        }
    }

    #[inline(always)]
    pub(super) fn distance(&self, vector: &[f32], index: usize) -> f32 {
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

    /// The same, compiled for the processor's instructions where it has them.
    fn decide_rows(&self, vectors: &[f32], rounded: &[Rounded], candidates: &[Candidate], out: &mut [Nearest]) -> usize {
        #[cfg(target_arch = "x86_64")]
        if self.wide {
            // SAFETY: the instructions were detected.
            return unsafe { self.decide_wide(vectors, rounded, candidates, out) };
        }
        self.decide(vectors, rounded, candidates, out)
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn decide_wide(&self, vectors: &[f32], rounded: &[Rounded], candidates: &[Candidate], out: &mut [Nearest]) -> usize {
        self.decide(vectors, rounded, candidates, out)
    }
}

/// What a block of vectors takes while it is searched for.
struct Room {
    bytes: Vec<u8>,
    rounded: Vec<Rounded>,
    upper: Vec<f32>,
    lower: Vec<f32>,
    candidates: Vec<Candidate>,
}

impl Room {
    fn new(codewords: &Pruned, rows: usize) -> Self {
        let bytes = vec![ZERO as u8; rows * codewords.chunks * CHUNK];
        Self { bytes, rounded: vec![Rounded::default(); rows], upper: vec![0.0; rows], lower: vec![0.0; rows], candidates: Vec::new() }
    }

    fn search(
        &mut self,
        codewords: &Pruned,
        vectors: &[f32],
        doubt: &impl Fn(f32) -> f32,
        out: &mut [Nearest],
        pass: impl FnOnce(&mut Passing<'_>),
    ) -> usize {
        let rows = out.len();
        let (bytes, rounded) = (&mut self.bytes[..rows * codewords.chunks * CHUNK], &mut self.rounded[..rows]);
        codewords.round_rows(vectors, doubt, bytes, rounded);
        let (upper, lower) = (&mut self.upper[..rows], &mut self.lower[..rows]);
        upper.fill(f32::INFINITY);
        lower.fill(f32::INFINITY);
        self.candidates.clear();
        pass(&mut Passing { bytes, rounded, upper, lower, candidates: &mut self.candidates, vectors });
        codewords.decide_rows(vectors, rounded, &self.candidates, out)
    }
}
