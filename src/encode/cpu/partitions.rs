//! The partitions of vectors.

use super::distinct::{among_all, distinct};
use super::nearest::{Form, Nearest};
use super::search::Search;
use crate::artifact::Groups;
use crate::encode::encoder::Checked;
use crate::error::Result;

/// Of so many vectors one is compared with all centroids, where the others are not.
const CHECKED: usize = 256;

/// The centroids, of which no two are equal in the column's type.
pub struct Partitions {
    search: Search,
    /// The index that each has among all; empty where all are distinct.
    first: Vec<u32>,
    groups: Option<Groups>,
}

impl Partitions {
    /// `bytes`: the same centroids in the column's type. With `sample (n, dimension)` in groups, where those are worth it.
    pub fn new(values: &[f32], bytes: &[u8], dimension: usize, form: Form, sample: Option<&[f32]>) -> Result<Self> {
        let (kept, first) = distinct(values, bytes, dimension);
        let grouped = sample.map(|sample| Search::grouped(&kept, dimension, form, sample)).transpose()?.flatten();
        let (search, groups) = match grouped {
            Some((search, groups)) => (search, Some(groups)),
            None => (Search::new(&kept, dimension, form), None),
        };
        Ok(Self { search, first, groups })
    }

    pub fn count(&self) -> usize {
        self.search.count()
    }

    /// `None` where every vector is compared with all centroids.
    pub fn groups(&self) -> Option<Groups> {
        self.groups
    }

    /// See [`super::nearest::Codewords::magnitude`].
    pub fn magnitude(&self, length: f32) -> f32 {
        self.search.magnitude(length)
    }

    /// The nearest centroid, of all or of the nearest groups; the nearest but one at least where it is within `doubt` of a vector's
    /// length.
    pub fn nearest(&self, vectors: &[f32], dimension: usize, doubt: impl Fn(f32) -> f32, out: &mut [Nearest]) -> Checked {
        self.search.nearest(vectors, dimension, doubt, out);
        let checked = self.check(vectors, dimension, out);
        among_all(&self.first, out);
        checked
    }

    /// Of those that were found among groups some are looked for among all.
    fn check(&self, vectors: &[f32], dimension: usize, found: &[Nearest]) -> Checked {
        let Some(grouped) = self.search.groups() else { return Checked::default() };
        let some = vectors.chunks_exact(dimension).step_by(CHECKED).collect::<Vec<_>>().concat();
        let mut nearest = vec![Nearest { index: u32::MAX, distance: 0.0, second: 0.0 }; some.len() / dimension];
        grouped.nearest_of_all(&some, |_| 0.0, &mut nearest);
        let missed = nearest.iter().zip(found.iter().step_by(CHECKED)).filter(|(nearest, found)| nearest.distance < found.distance);
        Checked { rows: nearest.len() as u64, missed: missed.count() as u64 }
    }
}
