//! The nearest of many centroids, without a full look at most of them.
//!
//! Centroids and vectors are rounded to whole numbers of 7 and 6 bits, whose products are summed faster than those of float32.
//! How far a distance can be from the true one is bounded by the lengths of what was rounded off (Cauchy-Schwarz): a centroid
//! whose distance is at least the upper bound of another's is not the nearest. Of the few that are left, distances are computed in
//! float32. So the answer is that of a search through all of them.
//!
//! [`rounded`]: both, rounded. [`kernel`]: bounds of the distances. [`head`]: bounds along few axes, before those. [`search`]: what they leave.

mod head;
mod kernel;
mod rounded;
mod search;
#[cfg(test)]
mod tests;

pub use head::Head;
pub use rounded::{Pruned, can_prune};
