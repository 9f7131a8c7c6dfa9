//! The place where artifacts are published, by several attempts at a time. A state machine of its own: see `attempt`.

mod attempt;
mod claim;
mod delete;
mod leftovers;
#[cfg(test)]
mod simulation;
mod unfinished;

pub use attempt::{Abandoned, Target};
pub use delete::delete_artifact;
pub use unfinished::{Unfinished, delete_unfinished, unfinished_files};
