//! The nearest of many centroids, by looking only at those in the groups nearest to a vector.
//!
//! A group seems as far away as its middle, less a part of its width; a vector looks at the nearest one and those that seem hardly
//! further. The nearest centroid may still be in another. How much further to look so that this is rare is found from vectors of the
//! table: for each of a sample it is known, from a search through all centroids, how far away the group of its nearest one seems.

use rayon::prelude::*;

use super::kmeans::{Lloyd, Members, assign};
use super::nearest::{Codewords, Form, Nearest};
use super::pruned::{Head, Pruned};
use super::simd::square_between;
use super::smallest::least;
use crate::artifact::Groups;
use crate::error::Result;

/// The part of the rows that may go to another than their nearest centroid.
pub const MOST_MISSED: f64 = 1e-3;
/// How likely it may be that a sample understates that.
const DOUBT: f64 = 0.05;
/// Fewer centroids are not worth it.
const LEAST: usize = 2048;
/// Groups of `count` centroids: so many times its root, whichever takes less.
const ROOTS: [f64; 2] = [3.0, 6.0];
const ITERATIONS: usize = 6;
const SEED: u64 = 0x6772_6F75;
/// Of the mean squared distance of its members to its middle, by how much a group seems nearer.
const NEARER: f32 = 0.5;
/// Distances that are looked through at once.
const CHUNK: usize = 16;
/// Sampled vectors searched for by one task.
const TASK_ROWS: usize = 1024;
/// Distances of groups that are held at once.
const HELD: usize = 1 << 16;
/// A group's distance takes as long as so many bounds of centroids, and so does it to look at one.
const GROUP_COST: f64 = 3.0;
const LOOK_COST: f64 = 8.0;
/// Sampled vectors that tell how many centroids are in groups that are looked at.
const COUNTED: usize = 1000;
/// Where that takes more than this part of what looking at all takes, all are.
const WORTH: f64 = 0.75;

pub struct Grouped {
    codewords: Pruned,
    dimension: usize,
    /// The panels of each group end here.
    ends: Vec<usize>,
    /// Middles of the groups, and how much nearer than its middle each seems.
    centers: Codewords,
    nearer: Vec<f32>,
    /// A vector looks at groups that seem no further away than the nearest one by more than this.
    within: f32,
}

impl Grouped {
    /// Groups of `codewords (count, dimension)`, and how many to look at, as `sample (n, dimension)` tells. `None` where there are
    /// too few of either, or too many would have to be looked at.
    pub fn calibrated(codewords: &[f32], dimension: usize, form: Form, sample: &[f32]) -> Result<Option<(Self, Groups)>> {
        let (count, rows) = (codewords.len() / dimension, sample.len() / dimension);
        let Some(allowed) = most_misses(rows).filter(|_| count >= LEAST) else { return Ok(None) };
        let (nearest, cost_of_all) = nearest_of_all(codewords, dimension, form, sample);
        let mut best: Option<(Cost, Self, Vec<f32>)> = None;
        for roots in ROOTS {
            let mut made = Self::new(codewords, dimension, form, (roots * (count as f64).sqrt()) as usize)?;
            let mut needed = made.needed(sample, &nearest);
            needed.sort_unstable_by(f32::total_cmp);
            made.within = needed[rows - 1 - allowed];
            let cost = made.cost(&sample[..rows.min(COUNTED) * dimension]);
            if best.as_ref().is_none_or(|(least, ..)| cost.bounds < least.bounds) {
                best = Some((cost, made, needed));
            }
        }
        let Some((cost, made, needed)) = best.filter(|(cost, ..)| cost.bounds < WORTH * cost_of_all) else { return Ok(None) };
        let missed = needed.iter().filter(|needed| **needed > made.within).count();
        let told = Groups {
            groups: made.ends.len(),
            looked_at: (cost.looked_at * 10.0).round() / 10.0,
            sampled: rows as u64,
            sampled_missed: missed as u64,
            checked: 0,
            missed: 0,
        };
        Ok(Some((made, told)))
    }

    fn new(codewords: &[f32], dimension: usize, form: Form, groups: usize) -> Result<Self> {
        let count = codewords.len() / dimension;
        let lloyd = Lloyd { clusters: groups, iterations: ITERATIONS, seed: SEED, spherical: false };
        let centers = lloyd.run(codewords, dimension, &|_| Ok(()))?.centroids;
        let mut home = vec![0u32; count];
        assign(codewords, dimension, &Codewords::new(&centers, dimension, Form::L2), &mut home);
        let members = Members::of(&home, groups);
        let ids: Vec<Vec<u32>> = (0..groups).map(|group| members.of_cluster(group).to_vec()).collect();
        // Those of a wide group may be nearer than its middle.
        let square = |center: &[f32], id: &u32| square_between(center, &codewords[*id as usize * dimension..][..dimension]);
        let spread = |(center, ids): (&[f32], &Vec<u32>)| ids.iter().map(|id| square(center, id)).sum::<f32>() / ids.len().max(1) as f32;
        let nearer =
            centers.chunks_exact(dimension).zip(&ids).map(|group| if form == Form::L2 { NEARER * spread(group) } else { 0.0 }).collect();
        let (codewords, ends) = Pruned::in_groups(codewords, dimension, form, &ids);
        Ok(Self { codewords, dimension, ends, centers: Codewords::new(&centers, dimension, form), nearer, within: 0.0 })
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
        let mut looks = Vec::new();
        self.looks(vectors, |row, group| looks.push((row, group)));
        // The vectors that look at each group, in order.
        let mut places = vec![0u32; self.ends.len() + 1];
        looks.iter().for_each(|(_, group)| places[*group as usize + 1] += 1);
        for group in 0..self.ends.len() {
            places[group + 1] += places[group];
        }
        let mut rows = vec![0u32; looks.len()];
        for (row, group) in looks {
            // Begins of groups become their ends.
            let place = &mut places[group as usize];
            rows[*place as usize] = row;
            *place += 1;
        }
        self.codewords.nearest_among(vectors, doubt, out, |passing| {
            let (mut begin, mut first) = (0, 0);
            for (end, last) in self.ends.iter().zip(&places) {
                self.codewords.panels(begin..*end, &rows[first..*last as usize], passing);
                (begin, first) = (*end, *last as usize);
            }
        });
    }

    /// Tells the groups that each vector looks at.
    fn looks(&self, vectors: &[f32], mut tell: impl FnMut(u32, u32)) {
        self.each_distances(vectors, |row, distances| {
            let limit = least(distances) + self.within;
            for (chunk, distances) in (0u32..).zip(distances.chunks(CHUNK)) {
                if distances.iter().fold(false, |any, d| any | (*d <= limit)) {
                    let near = (chunk * CHUNK as u32..).zip(distances).filter(|(_, d)| **d <= limit);
                    near.for_each(|(group, _)| tell(row, group));
                }
            }
        });
    }

    /// What a vector takes, on the average of some.
    fn cost(&self, vectors: &[f32]) -> Cost {
        let begin = |group: usize| if group == 0 { 0 } else { self.ends[group - 1] };
        let (mut looks, mut bounds) = (0usize, 0usize);
        self.looks(vectors, |_, group| {
            looks += 1;
            bounds += self.codewords.places_of(begin(group as usize)..self.ends[group as usize]);
        });
        let rows = (vectors.len() / self.dimension) as f64;
        let looked_at = looks as f64 / rows;
        Cost { looked_at, bounds: bounds as f64 / rows + GROUP_COST * self.ends.len() as f64 + LOOK_COST * looked_at }
    }

    /// As [`Pruned::nearest`], among all.
    pub fn nearest_of_all(&self, vectors: &[f32], doubt: impl Fn(f32) -> f32, out: &mut [Nearest]) {
        self.codewords.nearest(vectors, doubt, out);
    }

    /// For each vector how far away all groups seem.
    fn each_distances(&self, vectors: &[f32], mut tell: impl FnMut(u32, &[f32])) {
        let padded = self.centers.padded();
        let rows = (HELD / padded).max(6);
        let mut distances = vec![0f32; rows * padded];
        let mut row = 0;
        for vectors in vectors.chunks(rows * self.dimension) {
            let distances = &mut distances[..vectors.len() / self.dimension * padded];
            self.centers.distances(vectors, distances);
            for distances in distances.chunks_exact_mut(padded) {
                let distances = &mut distances[..self.ends.len()];
                distances.iter_mut().zip(&self.nearer).for_each(|(distance, nearer)| *distance -= nearer);
                tell(row, distances);
                row += 1;
            }
        }
    }

    /// For each vector how much further away than the nearest group that of its nearest codeword seems.
    fn needed(&self, vectors: &[f32], nearest: &[u32]) -> Vec<f32> {
        let homes = self.homes();
        let tasks = vectors.par_chunks(TASK_ROWS * self.dimension).zip(nearest.par_chunks(TASK_ROWS)).map(|(vectors, nearest)| {
            let mut needed = Vec::with_capacity(nearest.len());
            self.each_distances(vectors, |row, distances| {
                let home = homes.get(nearest[row as usize] as usize).copied().unwrap_or(0);
                needed.push(distances[home as usize] - least(distances));
            });
            needed
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

/// The nearest of all codewords to each vector, and what finding one takes, in bounds of codewords.
fn nearest_of_all(codewords: &[f32], dimension: usize, form: Form, vectors: &[f32]) -> (Vec<u32>, f64) {
    let count = codewords.len() / dimension;
    let pruned = Pruned::new(codewords, dimension, form);
    let head = Head::of(&pruned);
    let search = |head: Option<&Head>, vectors: &[f32]| {
        let tasks = vectors.par_chunks(TASK_ROWS * dimension).map(|vectors| {
            let mut found = vec![Nearest { index: 0, distance: 0.0, second: 0.0 }; vectors.len() / dimension];
            pruned.nearest_by(head, vectors, |_| 0.0, &mut found);
            found.into_iter().map(|found| found.index).collect::<Vec<_>>()
        });
        tasks.flatten().collect::<Vec<u32>>()
    };
    // So few that the first look is not switched off meanwhile, which would depend on who is first.
    let counted = COUNTED.min(Head::tried(count)).min(vectors.len() / dimension) * dimension;
    let mut nearest = search(head.as_ref(), &vectors[..counted]);
    let cost = head.as_ref().map_or(1.0, Head::cost);
    nearest.extend(search(head.as_ref().filter(|_| cost < 1.0), &vectors[counted..]));
    (nearest, cost * count as f64)
}

/// What a vector takes.
struct Cost {
    looked_at: f64,
    /// In bounds of centroids.
    bounds: f64,
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
            assert!([135, 271].contains(&told.groups) && told.sampled == 3200);
            assert!(told.looked_at < told.groups as f64 / 2.0, "{told:?}");
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
