//! The nearest of many centroids, by looking only at those in the groups nearest to a vector.
//!
//! The nearest centroid may be in another group. In how many groups to look so that this is rare is found from vectors of the
//! table: for each of a sample it is known, from a search through all centroids, how far down the list of groups its nearest is.

use rayon::prelude::*;

use super::kmeans::{Lloyd, Members, assign};
use super::nearest::{Codewords, Form, Nearest};
use super::pruned::Pruned;
use super::smallest::smallest;
use crate::artifact::Groups;
use crate::error::Result;

/// The part of the rows that may go to another than their nearest centroid.
pub const MOST_MISSED: f64 = 1e-3;
/// How likely it may be that a sample understates that.
const DOUBT: f64 = 0.05;
/// Fewer centroids are not worth it.
const LEAST: usize = 2048;
/// Groups of `count` centroids: so many times its root.
const ROOTS: f64 = 3.0;
const ITERATIONS: usize = 6;
const SEED: u64 = 0x6772_6F75;
/// Sampled vectors searched for by one task.
const TASK_ROWS: usize = 1024;
/// Distances of groups that are held at once.
const HELD: usize = 1 << 16;
/// A group's distance takes as long as so many bounds of centroids.
const GROUP_COST: usize = 3;
/// Of the centroids at most this part is looked at, or all are.
const WORTH: f64 = 0.6;

pub struct Grouped {
    codewords: Pruned,
    dimension: usize,
    /// The panels of each group end here.
    ends: Vec<usize>,
    /// Middles of the groups.
    centers: Codewords,
    looked_at: usize,
}

impl Grouped {
    /// Groups of `codewords (count, dimension)`, and how many to look at, as `sample (n, dimension)` tells. `None` where there are
    /// too few of either, or too many would have to be looked at.
    pub fn calibrated(codewords: &[f32], dimension: usize, form: Form, sample: &[f32]) -> Result<Option<(Self, Groups)>> {
        let (count, rows) = (codewords.len() / dimension, sample.len() / dimension);
        let Some(allowed) = most_misses(rows).filter(|_| count >= LEAST) else { return Ok(None) };
        let mut made = Self::new(codewords, dimension, form)?;
        let mut ranks = made.ranks(sample);
        ranks.sort_unstable();
        made.looked_at = ranks[rows - 1 - allowed].max(1);
        let groups = made.ends.len();
        let bounds = made.looked_at * made.codewords.places() / groups + GROUP_COST * groups;
        if bounds as f64 > WORTH * count as f64 {
            return Ok(None);
        }
        let missed = ranks.iter().filter(|rank| **rank > made.looked_at).count();
        let told = Groups { groups, looked_at: made.looked_at, sampled: rows as u64, sampled_missed: missed as u64, checked: 0, missed: 0 };
        Ok(Some((made, told)))
    }

    fn new(codewords: &[f32], dimension: usize, form: Form) -> Result<Self> {
        let count = codewords.len() / dimension;
        let lloyd = Lloyd { clusters: (ROOTS * (count as f64).sqrt()) as usize, iterations: ITERATIONS, seed: SEED, spherical: false };
        let centers = lloyd.run(codewords, dimension, &|_| Ok(()))?.centroids;
        let mut home = vec![0u32; count];
        assign(codewords, dimension, &Codewords::new(&centers, dimension, Form::L2), &mut home);
        let members = Members::of(&home, lloyd.clusters);
        let groups: Vec<Vec<u32>> = (0..lloyd.clusters).map(|group| members.of_cluster(group).to_vec()).collect();
        let (codewords, ends) = Pruned::in_groups(codewords, dimension, form, &groups);
        Ok(Self { codewords, dimension, ends, centers: Codewords::new(&centers, dimension, form), looked_at: 0 })
    }

    pub fn count(&self) -> usize {
        self.codewords.count()
    }

    /// See [`Codewords::magnitude`].
    pub fn magnitude(&self, length: f32) -> f32 {
        self.codewords.magnitude(length)
    }

    /// As [`Pruned::nearest`], among the codewords of the nearest groups.
    pub fn nearest(&self, vectors: &[f32], doubt: impl Fn(f32) -> f32, out: &mut [Nearest]) {
        let mut chosen = Vec::with_capacity(out.len() * self.looked_at);
        let mut found = Vec::new();
        self.each_distances(vectors, |distances| {
            smallest(distances, None, self.looked_at, &mut found);
            chosen.extend(found.iter().map(|(_, group)| *group));
        });
        let members = Members::of(&chosen, self.ends.len());
        self.codewords.nearest_among(vectors, doubt, out, |passing| {
            let (mut rows, mut begin) = (Vec::new(), 0);
            for (group, end) in self.ends.iter().enumerate() {
                rows.clear();
                rows.extend(members.of_cluster(group).iter().map(|at| at / self.looked_at as u32));
                self.codewords.panels(begin..*end, &rows, passing);
                begin = *end;
            }
        });
    }

    /// As [`Pruned::nearest`], among all.
    pub fn nearest_of_all(&self, vectors: &[f32], doubt: impl Fn(f32) -> f32, out: &mut [Nearest]) {
        self.codewords.nearest(vectors, doubt, out);
    }

    /// For each vector the distances of all groups.
    fn each_distances(&self, vectors: &[f32], mut tell: impl FnMut(&[f32])) {
        let padded = self.centers.padded();
        let rows = (HELD / padded).max(6);
        let mut distances = vec![0f32; rows * padded];
        for vectors in vectors.chunks(rows * self.dimension) {
            let distances = &mut distances[..vectors.len() / self.dimension * padded];
            self.centers.distances(vectors, distances);
            distances.chunks_exact(padded).for_each(|distances| tell(&distances[..self.ends.len()]));
        }
    }

    /// For each vector in how many groups one has to look to find its nearest codeword.
    fn ranks(&self, vectors: &[f32]) -> Vec<usize> {
        let homes = self.homes();
        let tasks = vectors.par_chunks(TASK_ROWS * self.dimension).map(|vectors| {
            let mut found = vec![Nearest { index: 0, distance: 0.0, second: 0.0 }; vectors.len() / self.dimension];
            self.nearest_of_all(vectors, |_| 0.0, &mut found);
            let mut found = found.iter();
            let mut ranks = Vec::with_capacity(found.len());
            self.each_distances(vectors, |distances| {
                let nearest = found.next().map_or(u32::MAX, |found| found.index);
                let home = homes.get(nearest as usize).copied().unwrap_or(0) as usize;
                let before = |(group, distance): (usize, &f32)| (*distance, group) < (distances[home], home);
                ranks.push(1 + distances.iter().enumerate().filter(|group| before(*group)).count());
            });
            ranks
        });
        tasks.flatten().collect()
    }

    /// The group of each codeword.
    fn homes(&self) -> Vec<u32> {
        let mut homes = vec![0; self.count()];
        let mut begin = 0;
        for (group, end) in self.ends.iter().enumerate() {
            self.codewords.in_panels(begin..*end).for_each(|codeword| homes[codeword as usize] = group as u32);
            begin = *end;
        }
        homes
    }
}

/// How many of so many sampled rows may miss, if with confidence no more than [`MOST_MISSED`] of all do; `None`: they are too few
/// to tell.
fn most_misses(rows: usize) -> Option<usize> {
    // Poisson: as many or fewer would be seen only with probability `DOUBT` if more of all did.
    let mean = MOST_MISSED * rows as f64;
    let mut term = (-mean).exp();
    let mut sum = 0.0;
    let mut most = None;
    for misses in 0.. {
        sum += term;
        if sum > DOUBT || misses > rows {
            break;
        }
        most = Some(misses);
        term *= mean / (misses + 1) as f64;
    }
    most
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    const DIMENSION: usize = 16;

    fn numbers(rng: &mut SmallRng, count: usize) -> Vec<f32> {
        (0..count).map(|_| rng.random_range(-1.0f32..1.0)).collect()
    }

    /// Around `middles` vectors, `rows` of them.
    fn around(rng: &mut SmallRng, middles: &[f32], rows: usize, spread: f32) -> Vec<f32> {
        let count = middles.len() / DIMENSION;
        (0..rows)
            .flat_map(|_| {
                let middle = rng.random_range(0..count) * DIMENSION;
                middles[middle..middle + DIMENSION].iter().map(|v| v + spread * rng.random_range(-1.0f32..1.0)).collect::<Vec<_>>()
            })
            .collect()
    }

    #[test]
    fn few_are_not_with_their_nearest_and_it_is_known_how_many() {
        let mut rng = SmallRng::seed_from_u64(1);
        let middles = numbers(&mut rng, 60 * DIMENSION);
        let codewords = around(&mut rng, &middles, LEAST, 0.3);
        let sample = around(&mut rng, &middles, 3200, 0.3);
        for form in [Form::L2, Form::Dot] {
            let full = Codewords::new(&codewords, DIMENSION, form);
            let (grouped, told) = Grouped::calibrated(&codewords, DIMENSION, form, &sample).unwrap().unwrap();
            assert_eq!((told.groups, told.sampled), (135, 3200));
            assert!(told.looked_at < told.groups / 2, "{told:?}");
            let none = Nearest { index: 7, distance: 0.0, second: 0.0 };
            let (mut nearest, mut found, mut all) = (vec![none; 3200], vec![none; 3200], vec![none; 3200]);
            full.nearest(&sample, &mut nearest);
            grouped.nearest(&sample, |_| 0.0, &mut found);
            grouped.nearest_of_all(&sample, |_| 0.0, &mut all);
            let differ = |found: &[Nearest]| found.iter().zip(&nearest).filter(|(found, nearest)| found.index != nearest.index).count();
            assert_eq!(differ(&all), 0);
            assert_eq!(differ(&found) as u64, told.sampled_missed);
            assert!(told.sampled_missed <= most_misses(3200).unwrap() as u64);
            // A vector's neighbours in a block make no difference to it.
            let mut parts = vec![none; 3200];
            for (vectors, parts) in sample.chunks(77 * DIMENSION).zip(parts.chunks_mut(77)) {
                grouped.nearest(vectors, |_| 0.0, parts);
            }
            assert!(found.iter().zip(&parts).all(|(a, b)| (a.index, a.distance) == (b.index, b.distance)));
        }
    }

    #[test]
    fn where_it_does_not_pay_or_cannot_be_told_there_are_no_groups() {
        let mut rng = SmallRng::seed_from_u64(2);
        let middles = numbers(&mut rng, 60 * DIMENSION);
        let codewords = around(&mut rng, &middles, LEAST, 0.3);
        let sample = around(&mut rng, &middles, 2990, 0.3);
        let made = |codewords: &[f32], dimension: usize, sample: &[f32]| Grouped::calibrated(codewords, dimension, Form::L2, sample);
        assert!(made(&codewords, DIMENSION, &sample).unwrap().is_none());
        let few = &codewords[..(LEAST - 1) * DIMENSION];
        assert!(made(few, DIMENSION, &around(&mut rng, &middles, 3200, 0.3)).unwrap().is_none());
        let (noise, vectors) = (numbers(&mut rng, LEAST * 48), numbers(&mut rng, 3000 * 48));
        assert!(made(&noise, 48, &vectors).unwrap().is_none());
    }

    #[test]
    fn so_many_misses_would_be_rare_if_more_of_all_were_missed() {
        assert_eq!((most_misses(0), most_misses(2990), most_misses(3000)), (None, None, Some(0)));
        for rows in [5000, 20_000, 100_000] {
            let mean = rows as f64 * MOST_MISSED;
            let at_most = |misses: usize| {
                let terms = (0..=misses).map(|n| (1..=n).fold((-mean).exp(), |term, i| term * mean / i as f64));
                terms.sum::<f64>()
            };
            let most = most_misses(rows).unwrap();
            assert!(at_most(most) <= DOUBT && at_most(most + 1) > DOUBT, "{rows}: {most}");
        }
    }
}
