//! Centroids of small clusters given to large ones, where that brings the vectors nearer to their centroids.
//!
//! Iterations move centroids only to where they are means; many are left where few vectors are, and few where many are. Such an
//! exchange makes partitions more even and the distances smaller at once.

use rayon::prelude::*;

use super::super::simd::square_between;
use super::lloyd::Lloyd;
use super::members::Members;
use super::neighbours::{Meeting, Neighbours};
use super::points::Points;
use crate::error::Result;

/// Clusters below this part of the mean give, those above this multiple of it take.
const SMALL: f64 = 0.5;
const LARGE: f64 = 2.0;
/// At most one in so many clusters at once, for what is gained is counted by itself.
const PART: usize = 10;
/// Of a large cluster as many vectors tell how it is split.
const ENOUGH: usize = 512;
/// Iterations of the split.
const ITERATIONS: usize = 4;

/// A cluster without its centroid: where its vectors go, and the squared distance that adds.
struct Removal {
    cluster: usize,
    labels: Vec<u32>,
    cost: f64,
}

/// A cluster in two.
struct Split {
    cluster: usize,
    centroids: Vec<f32>,
    gain: f64,
}

/// Exchange centroids, and label the vectors of those that were given away anew. Returns how many were.
pub fn rebalance(points: Points<'_>, centroids: &mut [f32], neighbours: &Neighbours, labels: &mut [u32], seed: u64) -> Result<usize> {
    let dimension = points.dimension;
    let clusters = centroids.len() / dimension;
    let members = Members::of(labels, clusters);
    let mean = points.len() as f64 / clusters as f64;
    let mut order: Vec<usize> = (0..clusters).collect();
    order.sort_by_key(|cluster| (members.size(*cluster), *cluster));
    let size = |cluster: &usize| members.size(*cluster) as f64;
    let most = clusters / PART;
    let large: Vec<usize> = order.iter().rev().copied().take(most).take_while(|c| size(c) > LARGE * mean).collect();
    let small: Vec<usize> = order.into_iter().take(large.len()).take_while(|c| size(c) < SMALL * mean).collect();
    let mut giving = vec![false; clusters];
    small.iter().for_each(|cluster| giving[*cluster] = true);

    let all = Points::new(centroids, dimension);
    let mut removals: Vec<Removal> = small.par_iter().map(|c| remove(points, all, neighbours, &members, *c, &giving)).collect();
    let mut splits = large[..small.len()].par_iter().map(|c| split(points, all, &members, *c, seed)).collect::<Result<Vec<_>>>()?;
    removals.sort_by(|a, b| a.cost.total_cmp(&b.cost).then(a.cluster.cmp(&b.cluster)));
    splits.sort_by(|a, b| b.gain.total_cmp(&a.gain).then(a.cluster.cmp(&b.cluster)));
    let mut given = 0;
    for (removal, split) in removals.iter().zip(&splits).take_while(|(removal, split)| removal.cost < split.gain) {
        for (row, label) in members.of_cluster(removal.cluster).iter().zip(&removal.labels) {
            labels[*row as usize] = *label;
        }
        for (cluster, half) in [split.cluster, removal.cluster].into_iter().zip(split.centroids.chunks_exact(dimension)) {
            centroids[cluster * dimension..][..dimension].copy_from_slice(half);
        }
        given += 1;
    }
    Ok(given)
}

fn remove(points: Points<'_>, centroids: Points<'_>, near: &Neighbours, members: &Members, cluster: usize, giving: &[bool]) -> Removal {
    let staying: Vec<u32> = near.of_centroid(cluster).iter().copied().filter(|c| !giving[*c as usize]).collect();
    let rows = members.of_cluster(cluster);
    let mut removal = Removal { cluster, labels: Vec::with_capacity(rows.len()), cost: 0.0 };
    if staying.is_empty() {
        removal.cost = f64::INFINITY;
        return removal;
    }
    let meeting = Meeting::new(centroids, &staying, centroids.get(cluster as u32));
    meeting.each(points, rows, |_, found| {
        let (centroid, further) = found.unwrap_or((staying[0], f32::INFINITY));
        removal.labels.push(centroid);
        removal.cost += f64::from(further);
    });
    removal
}

/// By k-means of two on some of the cluster's vectors.
fn split(points: Points<'_>, centroids: Points<'_>, members: &Members, cluster: usize, seed: u64) -> Result<Split> {
    let rows = members.of_cluster(cluster);
    let some = points.gather(&rows[..rows.len().min(ENOUGH)]);
    let lloyd = Lloyd { clusters: 2, iterations: ITERATIONS, seed: seed.wrapping_add(cluster as u64), spherical: false };
    let found = lloyd.run(&some, points.dimension, &|_| Ok(()))?.centroids;
    let whole = centroids.get(cluster as u32);
    let (left, right) = found.split_at(points.dimension);
    let gain: f64 = some
        .chunks_exact(points.dimension)
        .map(|v| f64::from(square_between(v, whole) - square_between(v, left).min(square_between(v, right))))
        .sum();
    let gain = gain * rows.len() as f64 / (some.len() / points.dimension) as f64;
    Ok(Split { cluster, centroids: found, gain })
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::super::neighbours::reassign;
    use super::*;

    /// Two heaps, of which the small one has nearly all centroids.
    #[test]
    fn centroids_go_to_where_vectors_are() {
        let (dimension, clusters) = (4, 40);
        let mut random = SmallRng::seed_from_u64(2);
        let mut at = |center: f32| -> Vec<f32> { (0..dimension).map(|_| center + random.random_range(-1.0f32..1.0)).collect() };
        let vectors: Vec<f32> = (0..4000).flat_map(|row| at(if row % 20 == 0 { 9.0 } else { 0.0 })).collect();
        let mut centroids: Vec<f32> = (0..clusters).flat_map(|c| at(if c < 4 { 0.0 } else { 9.0 })).collect();
        let points = Points::new(&vectors, dimension);
        let lloyd = Lloyd { clusters, iterations: 1, seed: 1, spherical: false };
        let mut labels = vec![0u32; 4000];
        let (mut given, mut most) = (0, Vec::new());
        for step in 0..20 {
            let neighbours = Neighbours::of(Points::new(&centroids, dimension), 39);
            reassign(points, Points::new(&centroids, dimension), &neighbours, &mut labels);
            lloyd.update(&vectors, dimension, &labels, &mut centroids, &mut SmallRng::seed_from_u64(step));
            let members = Members::of(&labels, clusters);
            most.push((0..clusters).map(|c| members.size(c)).max().unwrap());
            let now = rebalance(points, &mut centroids, &neighbours, &mut labels, step).unwrap();
            assert!(now <= clusters / PART);
            given += now;
        }
        assert!(given >= 20, "{given}");
        assert!(*most.last().unwrap() < 300 && most[1] > 600, "{most:?}");
    }

    #[test]
    fn even_clusters_stay_as_they_are() {
        let vectors: Vec<f32> = (0..1000).map(|i| (i % 10) as f32).collect();
        let mut centroids: Vec<f32> = (0..10).map(|i| i as f32).collect();
        let mut labels: Vec<u32> = (0..1000).map(|i| i % 10).collect();
        let neighbours = Neighbours::of(Points::new(&centroids, 1), 64);
        let before = centroids.clone();
        assert_eq!(rebalance(Points::new(&vectors, 1), &mut centroids, &neighbours, &mut labels, 0).unwrap(), 0);
        assert_eq!(centroids, before);
    }
}
