//! Which vectors are in each cluster.

use rayon::prelude::*;

/// The vectors of each cluster, in order.
pub struct Members {
    rows: Vec<u32>,
    /// Where those of each cluster end.
    ends: Vec<u32>,
}

impl Members {
    pub fn of(labels: &[u32], clusters: usize) -> Self {
        let mut ends = vec![0u32; clusters + 1];
        for label in labels {
            ends[*label as usize + 1] += 1;
        }
        for cluster in 0..clusters {
            ends[cluster + 1] += ends[cluster];
        }
        let mut rows = vec![0u32; labels.len()];
        for (row, label) in (0u32..).zip(labels) {
            // Begins of clusters become their ends.
            let place = &mut ends[*label as usize];
            rows[*place as usize] = row;
            *place += 1;
        }
        ends.truncate(clusters);
        Self { rows, ends }
    }

    /// Clusters, with members or without.
    pub fn count(&self) -> usize {
        self.ends.len()
    }

    pub fn of_cluster(&self, cluster: usize) -> &[u32] {
        let begin = if cluster == 0 { 0 } else { self.ends[cluster - 1] };
        &self.rows[begin as usize..self.ends[cluster] as usize]
    }

    pub fn size(&self, cluster: usize) -> usize {
        self.of_cluster(cluster).len()
    }

    /// New labels for the vectors of each cluster, which `label` writes, and what it returns; clusters side by side.
    pub fn relabel<T: Send>(&self, labels: &mut [u32], label: impl Fn(usize, &[u32], &mut [u32]) -> T + Sync) -> Vec<T> {
        let mut new = vec![0u32; self.rows.len()];
        let mut parts = Vec::with_capacity(self.ends.len());
        let mut rest = new.as_mut_slice();
        for cluster in 0..self.ends.len() {
            let (part, after) = rest.split_at_mut(self.size(cluster));
            parts.push((cluster, part));
            rest = after;
        }
        let found = parts.into_par_iter().map(|(cluster, part)| label(cluster, self.of_cluster(cluster), part)).collect();
        for (row, new) in self.rows.iter().zip(new) {
            labels[*row as usize] = new;
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_with_its_cluster_and_gets_its_new_label() {
        let mut labels = vec![3, 0, 3, 2, 0, 3];
        let members = Members::of(&labels, 5);
        let all: Vec<&[u32]> = (0..5).map(|c| members.of_cluster(c)).collect();
        assert_eq!(all, [&[1, 4][..], &[], &[3], &[0, 2, 5], &[]]);
        let sizes = members.relabel(&mut labels, |cluster, rows, new| {
            new.iter_mut().zip(rows).for_each(|(new, row)| *new = 10 * cluster as u32 + row);
            rows.len()
        });
        assert_eq!((labels, sizes), (vec![30, 1, 32, 23, 4, 35], vec![2, 0, 1, 3, 0]));
    }
}
