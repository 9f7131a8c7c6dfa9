//! Iterations that compare each vector with the centroids beside its own.
//!
//! A vector that changes its cluster goes to one next to it. So an iteration costs some dozens of distances for each vector instead
//! of one for each centroid, and the vectors of a cluster meet the same few centroids, which stay in the cache.

use rayon::prelude::*;

use super::super::nearest::{Codewords, Form, Nearest};
use super::super::smallest::smallest;
use super::members::Members;
use super::points::{AHEAD, Points};

/// Vectors that are gathered and compared at a time.
const BLOCK: usize = 192;
/// Distances that one task holds.
const HELD: usize = 1 << 19;

/// For each centroid those nearest to it, in no order.
pub struct Neighbours {
    each: usize,
    lists: Vec<u32>,
}

impl Neighbours {
    /// Of each centroid `each` others, or all there are.
    pub fn of(centroids: Points<'_>, each: usize) -> Self {
        let count = centroids.len();
        let each = each.min(count.saturating_sub(1));
        let mut lists = vec![0u32; count * each];
        if each > 0 {
            let codewords = Codewords::new(centroids.values, centroids.dimension, Form::L2);
            let rows = (HELD / codewords.padded()).clamp(6, 96);
            lists.par_chunks_mut(rows * each).enumerate().for_each(|(n, lists)| {
                let first = n * rows;
                nearest(centroids.range(first..first + lists.len() / each), &codewords, first, each, lists);
            });
        }
        Self { each, lists }
    }

    /// As [`Self::of`], for each of some groups of centroids among its own and `others`; where those are fewer than `each`, some
    /// of its own once more.
    pub fn within(centroids: Points<'_>, each: usize, groups: &Members, others: impl Fn(usize) -> Vec<u32> + Sync) -> Self {
        let each = each.min(centroids.len().saturating_sub(1));
        let found: Vec<Vec<u32>> = (0..groups.count())
            .into_par_iter()
            .map(|group| {
                let own = groups.of_cluster(group);
                let met: Vec<u32> = own.iter().copied().chain(others(group)).collect();
                let few = each.min(met.len().saturating_sub(1));
                if few == 0 {
                    return own.iter().flat_map(|c| std::iter::repeat_n(*c, each)).collect();
                }
                let codewords = Codewords::new(&centroids.gather(&met), centroids.dimension, Form::L2);
                let gathered = centroids.gather(own);
                let mut found = vec![0u32; own.len() * few];
                let rows = (HELD / codewords.padded()).clamp(6, 96);
                for (n, lists) in found.chunks_mut(rows * few).enumerate() {
                    let some = Points::new(&gathered, centroids.dimension).range(n * rows..n * rows + lists.len() / few);
                    nearest(some, &codewords, n * rows, few, lists);
                }
                let lists = found.chunks_exact(few).zip(own);
                lists.flat_map(|(list, own)| list.iter().map(|i| met[*i as usize]).chain(std::iter::repeat_n(*own, each - few))).collect()
            })
            .collect();
        let mut lists = vec![0u32; centroids.len() * each];
        for (group, found) in found.iter().enumerate() {
            for (own, list) in groups.of_cluster(group).iter().zip(found.chunks_exact(each.max(1))) {
                lists[*own as usize * each..][..each].copy_from_slice(list);
            }
        }
        Self { each, lists }
    }

    pub fn of_centroid(&self, centroid: usize) -> &[u32] {
        &self.lists[centroid * self.each..][..self.each]
    }
}

/// For each of `centroids`, which are codewords from `first` on, the `each` codewords nearest to it.
fn nearest(centroids: Points<'_>, codewords: &Codewords, first: usize, each: usize, lists: &mut [u32]) {
    let mut distances = vec![0f32; centroids.len() * codewords.padded()];
    codewords.distances(centroids.values, &mut distances);
    let mut found = Vec::new();
    for (i, (list, distances)) in lists.chunks_exact_mut(each).zip(distances.chunks_exact(codewords.padded())).enumerate() {
        smallest(&distances[..codewords.count()], Some(first + i), each, &mut found);
        list.iter_mut().zip(&found).for_each(|(place, (_, index))| *place = *index);
    }
}

/// Vectors of one place, which meet the same centroids.
pub struct Meeting<'a> {
    centroids: &'a [u32],
    codewords: Codewords,
    origin: &'a [f32],
}

impl<'a> Meeting<'a> {
    /// `all` centroids, those that are met, and a point that is near to them and the vectors.
    pub fn new(all: Points<'a>, centroids: &'a [u32], origin: &'a [f32]) -> Self {
        Self { centroids, codewords: Codewords::around(centroids.iter().map(|c| all.get(*c)), origin), origin }
    }

    /// For each of `rows` of `points` its place among them, the nearest of the centroids, and how much further away than the origin
    /// that is; `None` where no distance is a number.
    pub fn each(&self, points: Points<'_>, rows: &[u32], mut tell: impl FnMut(usize, Option<(u32, f32)>)) {
        let dimension = points.dimension;
        let mut residuals = vec![0f32; rows.len().min(BLOCK) * dimension];
        let mut nearest = [Nearest { index: 0, distance: 0.0, second: 0.0 }; BLOCK];
        for (block, rows) in rows.chunks(BLOCK).enumerate() {
            for (i, (row, residual)) in rows.iter().zip(residuals.chunks_exact_mut(dimension)).enumerate() {
                points.prefetch(rows.get(i + AHEAD));
                for ((residual, value), origin) in residual.iter_mut().zip(points.get(*row)).zip(self.origin) {
                    *residual = value - origin;
                }
            }
            self.codewords.only_nearest(&residuals[..rows.len() * dimension], &mut nearest[..rows.len()]);
            for (i, nearest) in nearest[..rows.len()].iter().enumerate() {
                let found = (nearest.index != u32::MAX).then(|| (self.centroids[nearest.index as usize], nearest.distance));
                tell(block * BLOCK + i, found);
            }
        }
    }
}

/// Each point to the nearest of its centroid and that one's neighbours. Returns how many went elsewhere.
pub fn reassign(points: Points<'_>, centroids: Points<'_>, neighbours: &Neighbours, labels: &mut [u32]) -> usize {
    let moved = Members::of(labels, centroids.len()).relabel(labels, |cluster, rows, new| {
        new.fill(cluster as u32);
        if rows.is_empty() {
            return 0;
        }
        let mut moved = 0;
        let near = Meeting::new(centroids, neighbours.of_centroid(cluster), centroids.get(cluster as u32));
        near.each(points, rows, |i, found| {
            if let Some((centroid, _)) = found.filter(|(_, further)| *further < 0.0) {
                new[i] = centroid;
                moved += 1;
            }
        });
        moved
    });
    moved.into_iter().sum()
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        let mut random = SmallRng::seed_from_u64(seed);
        (0..count).map(|_| random.random_range(-1.0..1.0)).collect()
    }

    fn square(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    #[test]
    fn neighbours_are_the_nearest_others() {
        for (count, each) in [(500, 20), (70, 64), (65, 64), (40, 64), (2, 64), (1, 64)] {
            let (values, dimension) = (numbers(count * 7, 3), 7);
            let centroids = Points::new(&values, dimension);
            let neighbours = Neighbours::of(centroids, each);
            for own in 0..count {
                let mut all: Vec<u32> = (0..count as u32).filter(|i| *i as usize != own).collect();
                all.sort_by(|a, b| {
                    let to = |c: &u32| square(centroids.get(*c), centroids.get(own as u32));
                    to(a).total_cmp(&to(b))
                });
                all.truncate(each);
                let mut found = neighbours.of_centroid(own).to_vec();
                found.sort_unstable();
                all.sort_unstable();
                assert_eq!(found, all);
            }
        }
        let none = vec![f32::NAN; 300];
        let neighbours = Neighbours::of(Points::new(&none, 3), 64);
        assert!((0..100).all(|c| neighbours.of_centroid(c).iter().collect::<std::collections::HashSet<_>>().len() == 64));
    }

    #[test]
    fn within_groups_that_see_all_others_they_are_the_same() {
        let (values, dimension) = (numbers(90 * 7, 3), 7);
        let centroids = Points::new(&values, dimension);
        let labels: Vec<u32> = (0..90).map(|i| i % 4).collect();
        let groups = Members::of(&labels, 5);
        let others = |group: usize| (0..90).filter(|i| labels[*i as usize] as usize != group).collect::<Vec<u32>>();
        let (within, of) = (Neighbours::within(centroids, 20, &groups, others), Neighbours::of(centroids, 20));
        let few = Neighbours::within(centroids, 64, &groups, |_| Vec::new());
        for own in 0..90 {
            let sorted = |neighbours: &Neighbours| {
                let mut list = neighbours.of_centroid(own).to_vec();
                list.sort_unstable();
                list
            };
            assert_eq!(sorted(&within), sorted(&of));
            // All of its own group, and itself to fill up.
            assert!(few.of_centroid(own).iter().all(|i| labels[*i as usize] == labels[own]));
            assert_eq!(few.of_centroid(own).iter().filter(|i| **i as usize != own).count(), groups.size(labels[own] as usize) - 1);
        }
    }

    #[test]
    fn with_all_as_neighbours_it_is_a_full_search() {
        let (vectors, values, dimension) = (numbers(3000 * 5, 1), numbers(60 * 5, 2), 5);
        let (points, centroids) = (Points::new(&vectors, dimension), Points::new(&values, dimension));
        let mut labels = vec![7u32; points.len()];
        let moved = reassign(points, centroids, &Neighbours::of(centroids, 64), &mut labels);
        assert_eq!(moved, labels.iter().filter(|l| **l != 7).count());
        for (row, label) in (0u32..).zip(&labels) {
            let best = (0..60).map(|c| square(points.get(row), centroids.get(c))).fold(f64::INFINITY, f64::min);
            assert!(square(points.get(row), centroids.get(*label)) < best + 1e-5);
        }
        assert_eq!(reassign(points, centroids, &Neighbours::of(centroids, 64), &mut labels), 0);
    }
}
