//! Centroids for partitions: a few full iterations on a part of the sample, then more among neighbours on more of it.

use rand::SeedableRng;
use rand::rngs::SmallRng;
use rayon::prelude::*;

use super::super::search::Search;
use super::lloyd::{Clustering, Lloyd, normalise};
use super::members::Members;
use super::neighbours::reassign;
use super::passes::{OF_FEW, progressive};
use super::points::Points;
use super::rebalance::rebalance;
use super::rough;
use crate::error::Result;

/// So few clusters are found with full iterations only: nearly all would be neighbours.
pub const FEW: usize = 128;
/// Centroids beside its own that a vector is compared with.
pub const NEIGHBOURS: usize = 64;
/// So many are found at once; of more each is a part of one of these.
const AT_ONCE: usize = 8192;
/// Vectors for each cluster that are needed to place it, and to find its mean.
const LEAST_EACH: usize = 24;
const ENOUGH_EACH: usize = 128;
/// Iterations end when so small a part of the vectors changes its cluster: no search would tell.
const SETTLED: f64 = 0.002;
/// A cluster is split as if it were at most so many times as large as the mean.
const MOST_TIMES: usize = 8;
/// Iterations that find the parts of a cluster.
const OF_PARTS: usize = 6;
/// So many vectors are given a first label between two looks at whether to go on: seconds of one core.
const PLACED_AT_ONCE: usize = 1 << 18;

/// What is done on which part of the sample.
struct Stage {
    /// One in so many,
    part: usize,
    /// and as many for each cluster at least.
    each: usize,
    /// Comparing with all centroids.
    full: usize,
    /// Comparing with neighbours.
    among_neighbours: usize,
}

const fn stage(part: usize, each: usize, full: usize, among_neighbours: usize) -> Stage {
    Stage { part, each, full, among_neighbours }
}

fn stages(clusters: usize) -> &'static [Stage] {
    match clusters {
        ..=2048 => const { &[stage(8, LEAST_EACH, 6, 2), stage(2, LEAST_EACH, 0, 4), stage(1, ENOUGH_EACH, 0, 3)] },
        _ => const { &[stage(8, LEAST_EACH, 2, 4), stage(1, ENOUGH_EACH, 0, 4)] },
    }
}

/// For the parts of clusters.
const AFTER_SPLIT: &[Stage] = &[stage(8, LEAST_EACH, 0, 4), stage(2, ENOUGH_EACH, 0, 3)];

/// Cluster `vectors (n, dimension)` in random order, `n >= clusters`. `check` as [`Lloyd::run`] calls it.
pub fn partitions(lloyd: Lloyd, vectors: &[f32], dimension: usize, check: &(dyn Fn(usize) -> Result<()> + Sync)) -> Result<Clustering> {
    if lloyd.clusters <= FEW {
        return progressive(lloyd, OF_FEW, vectors, dimension, check);
    }
    let points = Points::new(vectors, dimension);
    let mut run = Run::new(lloyd, points, check);
    if lloyd.clusters <= AT_ONCE {
        run.at_once()?
    } else {
        run.in_two_steps(AT_ONCE)?
    }
    Ok(Clustering { centroids: run.centroids, iterations: run.done })
}

struct Run<'a> {
    lloyd: Lloyd,
    points: Points<'a>,
    check: &'a (dyn Fn(usize) -> Result<()> + Sync),
    random: SmallRng,
    centroids: Vec<f32>,
    /// Of the first vectors.
    labels: Vec<u32>,
    done: usize,
}

impl<'a> Run<'a> {
    fn new(lloyd: Lloyd, points: Points<'a>, check: &'a (dyn Fn(usize) -> Result<()> + Sync)) -> Self {
        let random = SmallRng::seed_from_u64(lloyd.seed);
        Self { lloyd, points, check, random, centroids: Vec::new(), labels: Vec::new(), done: 0 }
    }

    fn at_once(&mut self) -> Result<()> {
        self.start(self.points.range(0..self.lloyd.clusters));
        self.stages(stages(self.lloyd.clusters), self.points.len())
    }

    /// First fewer clusters, from as many vectors as those need, and then parts of them.
    fn in_two_steps(&mut self, first: usize) -> Result<()> {
        let (clusters, rows) = (self.lloyd.clusters, self.points.len());
        self.lloyd.clusters = first;
        self.start(self.points.range(0..first));
        self.stages(&stages(first)[..1], rows.min(first * 8 * LEAST_EACH))?;
        self.grow(rows.min((rows / 8).max(clusters * LEAST_EACH)))?;
        self.split(clusters)?;
        self.stages(AFTER_SPLIT, rows)
    }

    /// Vectors as centroids.
    fn start(&mut self, chosen: Points<'_>) {
        self.centroids = chosen.values.to_vec();
        self.unit();
    }

    fn unit(&mut self) {
        if self.lloyd.spherical {
            normalise(&mut self.centroids, self.points.dimension);
        }
    }

    fn left(&self) -> usize {
        self.lloyd.iterations.saturating_sub(self.done)
    }

    /// Of the first `rows` vectors.
    fn stages(&mut self, stages: &[Stage], rows: usize) -> Result<()> {
        for stage in stages {
            let part = (rows / stage.part).max(self.lloyd.clusters * stage.each).min(rows);
            if stage.full > 0 {
                self.full(part, stage.full)?;
            }
            if stage.among_neighbours > 0 && self.left() > 0 {
                self.grow(part)?;
                self.among_neighbours(stage.among_neighbours)?;
            }
        }
        Ok(())
    }

    fn full(&mut self, rows: usize, iterations: usize) -> Result<()> {
        let points = self.points.range(0..rows);
        for _ in 0..iterations.min(self.left()) {
            (self.check)(self.done)?;
            let before = std::mem::replace(&mut self.labels, vec![u32::MAX; rows]);
            let search = Search::new(&self.centroids, points.dimension, self.lloyd.form());
            search.label(points.values, &mut self.labels);
            self.update();
            let moved = before.iter().zip(&self.labels).filter(|(a, b)| a != b).count();
            if before.len() == rows && self.settled(moved) {
                break;
            }
        }
        Ok(())
    }

    /// Labels for the first `rows` vectors that have none, by a first look.
    fn grow(&mut self, rows: usize) -> Result<()> {
        if self.labels.len() >= rows {
            return Ok(());
        }
        let centroids = Points::new(&self.centroids, self.points.dimension);
        let groups = rough::Groups::to_place(centroids, self.lloyd.seed)?;
        while self.labels.len() < rows {
            (self.check)(self.done)?;
            let first = self.labels.len();
            let new = self.points.range(first..rows.min(first + PLACED_AT_ONCE));
            self.labels.extend(groups.place(new, centroids));
        }
        Ok(())
    }

    fn among_neighbours(&mut self, iterations: usize) -> Result<()> {
        let points = self.points.range(0..self.labels.len());
        let iterations = iterations.min(self.left());
        for iteration in 0..iterations {
            (self.check)(self.done)?;
            let centroids = Points::new(&self.centroids, points.dimension);
            let neighbours = rough::neighbours(centroids, NEIGHBOURS, self.lloyd.seed)?;
            let moved = reassign(points, centroids, &neighbours, &mut self.labels);
            self.update();
            let mut given = 0;
            // What is exchanged has some iterations to settle.
            if iteration + 2 < iterations {
                let seed = self.lloyd.seed.wrapping_add(self.done as u64);
                given = rebalance(points, &mut self.centroids, &neighbours, &mut self.labels, seed)?;
                self.unit();
            }
            if given == 0 && self.settled(moved) {
                break;
            }
        }
        Ok(())
    }

    fn update(&mut self) {
        self.lloyd.update(self.points.values, self.points.dimension, &self.labels, &mut self.centroids, &mut self.random);
        self.done += 1;
    }

    fn settled(&self, moved: usize) -> bool {
        (moved as f64) < SETTLED * self.labels.len() as f64
    }

    /// Each cluster in as many as its share of the vectors.
    fn split(&mut self, clusters: usize) -> Result<()> {
        let points = self.points.range(0..self.labels.len());
        let members = Members::of(&self.labels, self.lloyd.clusters);
        let mut sizes: Vec<usize> = (0..members.count()).map(|c| members.size(c)).collect();
        // One that is as large as many, of copies of one vector say, is no use in as many parts.
        let most = MOST_TIMES * points.len().div_ceil(sizes.len());
        if sizes.iter().map(|size| most.min(*size)).sum::<usize>() >= clusters {
            sizes.iter_mut().for_each(|size| *size = most.min(*size));
        }
        let shares = shares(&sizes, clusters);
        let (lloyd, check, done) = (self.lloyd, self.check, self.done);
        let parts: Vec<Vec<f32>> = (0..members.count())
            .into_par_iter()
            .map(|cluster| match shares[cluster] {
                0 => Ok(Vec::new()),
                share => {
                    let seed = lloyd.seed.wrapping_add(1 + cluster as u64);
                    let of = Lloyd { clusters: share, iterations: OF_PARTS, seed, ..lloyd };
                    Ok(of.run(&points.gather(members.of_cluster(cluster)), points.dimension, &|_| check(done))?.centroids)
                }
            })
            .collect::<Result<_>>()?;
        let mut first: Vec<u32> = Vec::with_capacity(shares.len());
        shares.iter().fold(0, |sum, share| {
            first.push(sum);
            sum + *share as u32
        });
        members.relabel(&mut self.labels, |cluster, rows, new| {
            let part = &parts[cluster];
            if !part.is_empty() {
                Search::new(part, points.dimension, lloyd.form()).label(&points.gather(rows), new);
                new.iter_mut().for_each(|label| *label += first[cluster]);
            }
        });
        self.centroids = parts.concat();
        self.lloyd.clusters = clusters;
        Ok(())
    }
}

/// `clusters` shared out in proportion to `sizes`, none more than its size, each that has any at least one.
fn shares(sizes: &[usize], clusters: usize) -> Vec<usize> {
    let total = sizes.iter().sum::<usize>().max(1) as u128;
    let share = |size: usize| ((size as u128 * clusters as u128 / total) as usize).max(usize::from(size > 0)).min(size);
    let mut shares: Vec<usize> = sizes.iter().map(|size| share(*size)).collect();
    let mut sum: usize = shares.iter().sum();
    // Then one by one, where most are to a share.
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    let each = |i: usize, shares: &[usize]| sizes[i] as f64 / shares[i].max(1) as f64;
    while sum != clusters {
        order.sort_by(|a, b| each(*b, &shares).total_cmp(&each(*a, &shares)).then(a.cmp(b)));
        let before = sum;
        if sum < clusters {
            for i in order.iter().copied().filter(|i| shares[*i] < sizes[*i]).take(clusters - sum).collect::<Vec<_>>() {
                shares[i] += 1;
                sum += 1;
            }
        } else {
            for i in order.iter().rev().copied().filter(|i| shares[*i] > 1).take(sum - clusters).collect::<Vec<_>>() {
                shares[i] -= 1;
                sum -= 1;
            }
        }
        if sum == before {
            break;
        }
    }
    shares
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::atomic::Ordering::Relaxed;

    use super::super::testing::{blobs, lloyd, quality};
    use super::*;
    use crate::error::Error;

    fn found(clusters: usize, vectors: &[f32], dimension: usize) -> Clustering {
        partitions(lloyd(clusters, false), vectors, dimension, &|_| Ok(())).unwrap()
    }

    #[test]
    fn centroids_are_as_good_as_those_of_full_iterations() {
        let (rows, dimension, clusters) = (14_000, 12, 300);
        let vectors = blobs(rows, dimension, 250);
        let (ours, used) = quality(&vectors, dimension, &found(clusters, &vectors, dimension).centroids);
        let full = lloyd(clusters, false).run(&vectors, dimension, &|_| Ok(())).unwrap().centroids;
        let (full, _) = quality(&vectors, dimension, &full);
        assert!(ours < full * 1.02, "{ours} {full}");
        assert!(used > clusters * 99 / 100, "{used}");
    }

    #[test]
    fn is_the_same_for_any_number_of_threads() {
        let vectors = blobs(8_000, 40, 50);
        for clusters in [100, 300] {
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| found(clusters, &vectors, 40).centroids)
            };
            assert_eq!(run(1), run(7));
        }
    }

    #[test]
    fn in_two_steps() {
        let (rows, dimension, clusters) = (14_000, 12, 300);
        let vectors = blobs(rows, dimension, 250);
        let mut run = Run::new(lloyd(clusters, false), Points::new(&vectors, dimension), &|_| Ok(()));
        run.in_two_steps(80).unwrap();
        assert_eq!(run.centroids.len(), clusters * dimension);
        let (loss, used) = quality(&vectors, dimension, &run.centroids);
        let (full, _) = quality(&vectors, dimension, &lloyd(clusters, false).run(&vectors, dimension, &|_| Ok(())).unwrap().centroids);
        assert!(loss < full * 1.1, "{loss} {full}");
        assert!(used > clusters * 99 / 100, "{used}");
        // Half of all vectors the same.
        let copies = [&vectors[..], &vectors[..dimension].repeat(rows)].concat();
        let mixed: Vec<f32> = (0..2 * rows).flat_map(|i| copies[i * 40_009 % (2 * rows) * dimension..][..dimension].to_vec()).collect();
        let mut run = Run::new(lloyd(clusters, false), Points::new(&mixed, dimension), &|_| Ok(()));
        run.in_two_steps(80).unwrap();
        let (loss, _) = quality(&vectors, dimension, &run.centroids);
        let (full, _) = quality(&vectors, dimension, &lloyd(clusters, false).run(&mixed, dimension, &|_| Ok(())).unwrap().centroids);
        assert!(loss < full * 1.2, "{loss} {full}");
        // As many vectors as clusters, and iterations for a part of it.
        for iterations in [1, 30] {
            let few = Lloyd { iterations, ..lloyd(clusters, false) };
            let mut run = Run::new(few, Points::new(&vectors[..clusters * dimension], dimension), &|_| Ok(()));
            run.in_two_steps(80).unwrap();
            assert_eq!(run.centroids.len(), clusters * dimension);
            assert!(run.done <= iterations);
        }
    }

    /// Each stage asks in between whether to go on, not only each iteration.
    #[test]
    fn can_be_stopped_anywhere() {
        let (rows, dimension, clusters) = (PLACED_AT_ONCE + 1000, 2, 300);
        let vectors = blobs(rows, dimension, 250);
        let asked = AtomicUsize::new(0);
        let ask = |_| {
            asked.fetch_add(1, Relaxed);
            Ok(())
        };
        let mut run = Run::new(lloyd(clusters, false), Points::new(&vectors, dimension), &ask);
        let mut during = |stage: &mut dyn FnMut(&mut Run<'_>) -> Result<()>| {
            let before = asked.load(Relaxed);
            stage(&mut run).unwrap();
            asked.load(Relaxed) - before
        };
        during(&mut |run| {
            run.lloyd.clusters = 80;
            run.start(run.points.range(0..80));
            Ok(())
        });
        assert_eq!(during(&mut |run| run.grow(rows)), 2);
        assert!(during(&mut |run| run.split(clusters)) >= 80);
        let stop = |_| Err(Error::Interrupted("stopped".into()));
        let mut stopped = Run { check: &stop, ..run };
        assert!(matches!(stopped.split(2 * clusters), Err(Error::Interrupted(_))));
        stopped.labels.clear();
        assert!(matches!(stopped.grow(rows), Err(Error::Interrupted(_))));
    }

    #[test]
    fn iterations_are_no_more_than_asked_for() {
        let vectors = blobs(13_000, 8, 200);
        for iterations in [1, 2, 3, 9] {
            let told = std::sync::Mutex::new(Vec::new());
            let check = |iteration| {
                told.lock().unwrap().push(iteration);
                Ok(())
            };
            let of = Lloyd { iterations, ..lloyd(500, false) };
            let made = partitions(of, &vectors, 8, &check).unwrap();
            assert_eq!((made.centroids.len(), made.iterations), (500 * 8, iterations));
            assert_eq!(told.into_inner().unwrap(), (0..iterations).collect::<Vec<_>>());
        }
        let stopped =
            partitions(lloyd(500, false), &vectors, 8, &|i| if i == 7 { Err(crate::error::Error::internal("stop")) } else { Ok(()) });
        assert!(stopped.is_err());
    }

    #[test]
    fn unit_norm_for_dot_and_one_vector_for_each_cluster() {
        let vectors = blobs(10_000, 8, 300);
        let made = partitions(lloyd(400, true), &vectors, 8, &|_| Ok(())).unwrap();
        for centroid in made.centroids.chunks_exact(8) {
            assert!((centroid.iter().map(|v| v * v).sum::<f32>() - 1.0).abs() < 1e-5);
        }
        let few = &vectors[..400 * 8];
        assert!(quality(few, 8, &found(400, few, 8).centroids).0 < 0.1);
        let same = vec![1.0f32; 3000 * 8];
        assert!(found(400, &same, 8).centroids.iter().all(|v| (v - 1.0).abs() < 0.1));
    }

    #[test]
    fn shares_add_up() {
        for (sizes, clusters) in
            [(vec![10, 0, 5, 1000], 20), (vec![3, 3, 3], 9), (vec![1, 1, 1, 500], 4), (vec![7, 9, 1, 1, 1, 1], 7), (vec![100; 50], 4999)]
        {
            let shares = shares(&sizes, clusters);
            assert_eq!(shares.iter().sum::<usize>(), clusters, "{sizes:?}");
            assert!(shares.iter().zip(&sizes).all(|(share, size)| share <= size && (*share > 0) == (*size > 0)));
        }
    }
}
