//! A first look at where vectors belong: the nearest of the centroids of the nearest groups.

use super::super::nearest::{Codewords, Form};
use super::lloyd::{Lloyd, assign};
use super::members::Members;
use super::neighbours::{Meeting, Neighbours};
use super::points::Points;
use crate::error::Result;

/// So many centroids are compared with all others to find those beside them; of more those of near groups are.
const COMPARED: usize = 4096;
/// Groups among which the neighbours of a centroid are looked for.
const AROUND: usize = 15;
/// Iterations that group the centroids.
const ITERATIONS: usize = 6;
/// Groups beside the nearest one that are looked at.
const NEAR: usize = 2;

/// Centroids in groups.
pub struct Groups {
    centers: Vec<f32>,
    members: Members,
    near: Neighbours,
}

/// The centroids beside each, as far as they are in groups beside its own where there are very many.
pub fn neighbours(centroids: Points<'_>, each: usize, seed: u64) -> Result<Neighbours> {
    if centroids.len() <= COMPARED {
        return Ok(Neighbours::of(centroids, each));
    }
    let groups = Groups::of(centroids, AROUND, seed)?;
    Ok(Neighbours::within(centroids, each, &groups.members, |group| groups.beside(group)))
}

impl Groups {
    /// In which [`Self::place`] looks.
    pub fn to_place(centroids: Points<'_>, seed: u64) -> Result<Self> {
        Self::of(centroids, NEAR, seed)
    }

    fn of(centroids: Points<'_>, near: usize, seed: u64) -> Result<Self> {
        // A vector meets the groups, and the centroids of a few.
        let groups = ((2.0 * (centroids.len() as f64).sqrt()) as usize).clamp(1, centroids.len());
        let lloyd = Lloyd { clusters: groups, iterations: ITERATIONS, seed, spherical: false };
        let centers = lloyd.run(centroids.values, centroids.dimension, &|_| Ok(()))?.centroids;
        let mut labels = vec![0; centroids.len()];
        assign(centroids.values, centroids.dimension, &Codewords::new(&centers, centroids.dimension, Form::L2), &mut labels);
        let near = Neighbours::of(Points::new(&centers, centroids.dimension), near);
        Ok(Self { centers, members: Members::of(&labels, groups), near })
    }

    /// The centroids of the groups near to one.
    fn beside(&self, group: usize) -> Vec<u32> {
        self.near.of_centroid(group).iter().flat_map(|g| self.members.of_cluster(*g as usize)).copied().collect()
    }

    /// Labels of points that have none.
    pub fn place(&self, points: Points<'_>, centroids: Points<'_>) -> Vec<u32> {
        let centers = Points::new(&self.centers, points.dimension);
        let mut labels = vec![0; points.len()];
        assign(points.values, points.dimension, &Codewords::new(&self.centers, points.dimension, Form::L2), &mut labels);
        Members::of(&labels, centers.len()).relabel(&mut labels, |group, rows, new| {
            let met: Vec<u32> = self.members.of_cluster(group).iter().copied().chain(self.beside(group)).collect();
            if rows.is_empty() || met.is_empty() {
                return;
            }
            Meeting::new(centroids, &met, centers.get(group as u32)).each(points, rows, |i, found| {
                new[i] = found.map_or(met[0], |(centroid, _)| centroid);
            });
        });
        labels
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_of_clusters_far_apart_find_their_own() {
        let (count, dimension) = (400usize, 3);
        let values: Vec<f32> = (0..count * dimension).map(|i| ((i / dimension * 7919 + i % dimension * 104_729) % 1009) as f32).collect();
        let centroids = Points::new(&values, dimension);
        let vectors: Vec<f32> = (0..2000 * dimension).map(|i| values[i % values.len()] + (i % 5) as f32 / 100.0).collect();
        let points = Points::new(&vectors, dimension);
        let labels = Groups::to_place(centroids, 4).unwrap().place(points, centroids);
        let right = (0..2000usize).filter(|row| labels[*row] as usize == row % count).count();
        assert!(right > 1900, "{right}");
    }
}
