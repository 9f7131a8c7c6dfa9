//! The nearest of centroids, by the search that is quickest for them.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rayon::prelude::*;

use super::grouped::Grouped;
use super::nearest::{Codewords, Form, Nearest};
use super::pruned::{Head, Pruned, can_prune};
use crate::artifact::Groups;
use crate::error::Result;

/// Vectors searched for by one task.
const TASK_ROWS: usize = 4096;
/// Of so few numbers and fewer a full search is quicker than a pruned one.
const FULL_TO: usize = 1 << 16;
/// And of so few centroids.
const FULL_OF: usize = 384;
/// From so many on a pruned search is the quicker one whatever the vectors are, and two tables would take much memory.
const PRUNED_FROM: usize = 8192;
/// A full search is quicker where a pruned one computes more distances than one in so many centroids.
const PRUNES: u64 = 64;
/// After so many vectors that shows.
const TRIED: u64 = 4096;
/// After so many, times centroids, a first look along few axes is made, which takes up to a second.
const LOOKED_AFTER: u64 = 1 << 27;

pub struct Search {
    by: By,
}

enum By {
    Full(Codewords),
    Pruned(Looked),
    Either(Either),
    Grouped(Grouped),
}

/// Which is quicker depends on the vectors, and shows.
struct Either {
    full: Codewords,
    pruned: Looked,
    /// Vectors that were searched for by the pruned one, and distances that it computed.
    tried: AtomicU64,
    computed: AtomicU64,
}

/// A pruned search, with a first look once it is worth making one.
struct Looked {
    pruned: Pruned,
    head: OnceLock<Option<Head>>,
    /// One task has begun to make it.
    begun: AtomicBool,
    searched: AtomicU64,
}

impl Looked {
    fn new(values: &[f32], dimension: usize, form: Form) -> Self {
        Self {
            pruned: Pruned::new(values, dimension, form),
            head: OnceLock::new(),
            begun: AtomicBool::new(false),
            searched: AtomicU64::new(0),
        }
    }

    /// As [`Pruned::nearest`]. What it finds does not depend on what was searched for before.
    fn nearest(&self, vectors: &[f32], doubt: impl Fn(f32) -> f32, out: &mut [Nearest]) -> usize {
        let searched = self.searched.fetch_add(out.len() as u64, Ordering::Relaxed);
        let enough = searched * self.pruned.count() as u64 >= LOOKED_AFTER;
        // Nobody waits for who makes it: its own tasks may bring that one here again.
        if enough && !self.begun.swap(true, Ordering::Relaxed) {
            // Set by this task only.
            let _ = self.head.set(Head::of(&self.pruned));
        }
        self.pruned.nearest_by(self.head.get().and_then(Option::as_ref), vectors, doubt, out)
    }
}

impl Either {
    fn nearest(&self, vectors: &[f32], dimension: usize, doubt: impl Fn(f32) -> f32, out: &mut [Nearest]) {
        let tried = self.tried.load(Ordering::Relaxed);
        if tried >= TRIED && !self.prunes(self.computed.load(Ordering::Relaxed), tried) {
            return self.full.nearest_of_parts(vectors, dimension, out);
        }
        self.computed.fetch_add(self.pruned.nearest(vectors, doubt, out) as u64, Ordering::Relaxed);
        self.tried.fetch_add(out.len() as u64, Ordering::Relaxed);
    }

    /// Whether few distances are left to be computed.
    fn prunes(&self, computed: u64, tried: u64) -> bool {
        computed * PRUNES < tried * self.pruned.pruned.count() as u64
    }
}

/// Bytes of `count` centroids in float32, as they are and as they are searched: in the order of a kernel, or rounded to bytes too, with
/// what is known of each, or both. In groups, which are filled up to whole panels, they take some more.
pub fn table_bytes(count: usize, dimension: usize) -> usize {
    let float32 = count * dimension * size_of::<f32>();
    let rounded = float32 + count * (dimension.next_multiple_of(16) * 5 / 4 + 32) + Head::bytes(count, dimension);
    let searched = match count {
        _ if count * dimension <= FULL_TO => float32,
        ..PRUNED_FROM => float32 + rounded,
        _ => rounded,
    };
    float32 + searched
}

impl Search {
    pub fn new(values: &[f32], dimension: usize, form: Form) -> Self {
        let count = values.len() / dimension;
        let by = if !can_prune(dimension) || values.len() <= FULL_TO || count < FULL_OF {
            By::Full(Codewords::new(values, dimension, form))
        } else if count >= PRUNED_FROM {
            By::Pruned(Looked::new(values, dimension, form))
        } else {
            let (full, pruned) = (Codewords::new(values, dimension, form), Looked::new(values, dimension, form));
            By::Either(Either { full, pruned, tried: AtomicU64::new(0), computed: AtomicU64::new(0) })
        };
        Self { by }
    }

    /// As [`Grouped::calibrated`].
    pub fn grouped(values: &[f32], dimension: usize, form: Form, sample: &[f32]) -> Result<Option<(Self, Groups)>> {
        let made = Grouped::calibrated(values, dimension, form, sample)?;
        Ok(made.map(|(grouped, groups)| (Self { by: By::Grouped(grouped) }, groups)))
    }

    pub fn count(&self) -> usize {
        match &self.by {
            By::Full(codewords) => codewords.count(),
            By::Pruned(looked) | By::Either(Either { pruned: looked, .. }) => looked.pruned.count(),
            By::Grouped(codewords) => codewords.count(),
        }
    }

    /// See [`Codewords::magnitude`].
    pub fn magnitude(&self, length: f32) -> f32 {
        match &self.by {
            By::Full(codewords) => codewords.magnitude(length),
            By::Pruned(looked) | By::Either(Either { pruned: looked, .. }) => looked.pruned.magnitude(length),
            By::Grouped(codewords) => codewords.magnitude(length),
        }
    }

    /// The nearest of all, or in groups of those that are looked at; the nearest but one at least where it is within `doubt` of a
    /// vector's length.
    pub fn nearest(&self, vectors: &[f32], dimension: usize, doubt: impl Fn(f32) -> f32, out: &mut [Nearest]) {
        match &self.by {
            By::Full(codewords) => codewords.nearest_of_parts(vectors, dimension, out),
            By::Pruned(codewords) => {
                codewords.nearest(vectors, doubt, out);
            }
            By::Either(either) => either.nearest(vectors, dimension, doubt, out),
            By::Grouped(codewords) => codewords.nearest(vectors, doubt, out),
        }
    }

    /// Where [`Self::nearest`] does not look at all, what does.
    pub fn groups(&self) -> Option<&Grouped> {
        if let By::Grouped(codewords) = &self.by { Some(codewords) } else { None }
    }

    /// The index of the nearest to each vector, on all threads, and the same for any number of them; 0 where no distance is a number.
    pub fn label(&self, vectors: &[f32], labels: &mut [u32]) {
        if labels.is_empty() {
            return;
        }
        let dimension = vectors.len() / labels.len();
        let full = |codewords: &Codewords, vectors: &[f32], labels: &mut [u32]| {
            label(vectors, dimension, labels, |vectors, found| codewords.only_nearest(vectors, found));
        };
        let pruned = |codewords: &Looked, vectors: &[f32], labels: &mut [u32]| {
            let counts = label(vectors, dimension, labels, |vectors, found| codewords.nearest(vectors, |_| 0.0, found));
            counts.into_iter().sum::<usize>() as u64
        };
        match &self.by {
            By::Full(codewords) => full(codewords, vectors, labels),
            By::Pruned(codewords) => {
                pruned(codewords, vectors, labels);
            }
            By::Either(either) => {
                // They may tell nearly equal ones apart differently: which it is does not depend on what was searched for before.
                let tried = labels.len().min(TRIED as usize);
                let ((first, rest), (labels, others)) = (vectors.split_at(tried * dimension), labels.split_at_mut(tried));
                let computed = pruned(&either.pruned, first, labels);
                if either.prunes(computed, tried as u64) {
                    pruned(&either.pruned, rest, others);
                } else {
                    full(&either.full, rest, others);
                }
            }
            By::Grouped(codewords) => {
                label(vectors, dimension, labels, |vectors, found| codewords.nearest(vectors, |_| 0.0, found));
            }
        }
    }
}

/// Labels by one search, and what it told of each task.
fn label<T: Send>(vectors: &[f32], dimension: usize, labels: &mut [u32], search: impl Fn(&[f32], &mut [Nearest]) -> T + Sync) -> Vec<T> {
    let tasks = vectors.par_chunks(TASK_ROWS * dimension).zip(labels.par_chunks_mut(TASK_ROWS));
    let told = tasks.map(|(vectors, labels)| {
        let mut found = vec![Nearest { index: 0, distance: 0.0, second: 0.0 }; labels.len()];
        let told = search(vectors, &mut found);
        for (label, found) in labels.iter_mut().zip(&found) {
            *label = if found.index == u32::MAX { 0 } else { found.index };
        }
        told
    });
    told.collect()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    /// Tasks of one pool meet the search while one of them makes the first look, by tasks of the same pool: while it waits for those
    /// it may be given one of the others.
    #[test]
    fn a_first_look_is_made_while_others_search() {
        let (dimension, count, rows) = (64, 1024, 16);
        let mut random = SmallRng::seed_from_u64(5);
        let values: Vec<f32> = (0..count * dimension).map(|_| random.random_range(-1.0..1.0)).collect();
        if !can_prune(dimension) {
            return;
        }
        let (told, ended) = mpsc::channel();
        std::thread::spawn(move || {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
            for _ in 0..6 {
                let looked = Looked::new(&values, dimension, Form::L2);
                // Some tasks are on their way already when the first look is made.
                looked.searched.store(LOOKED_AFTER / count as u64 - 3 * rows as u64, Ordering::Relaxed);
                let search = || {
                    for vectors in values.chunks(rows * dimension) {
                        let mut found = vec![Nearest { index: 0, distance: 0.0, second: 0.0 }; rows];
                        pool.install(|| looked.nearest(vectors, |_| 0.0, &mut found));
                    }
                };
                std::thread::scope(|scope| (0..6).for_each(|_| drop(scope.spawn(search))));
                assert!(looked.head.get().is_some());
            }
            told.send(()).unwrap();
        });
        ended.recv_timeout(Duration::from_secs(60)).expect("the search hangs");
    }
}
