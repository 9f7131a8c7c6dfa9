//! The place where artifacts are published, by several attempts at a time. A state machine of its own: see `attempt`.

mod attempt;
mod claim;
mod delete;
mod leftovers;

pub use attempt::{Abandoned, Target};
pub use delete::delete_artifact;
