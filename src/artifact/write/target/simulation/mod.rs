//! Attempts at one place, several at once, over a store whose every request is a point at which another one may go on instead.
//!
//! The attempts are the product's own code: [`Target`](super::Target), uploads, deletion. The store is a strongly consistent one in
//! memory (`world`), whose requests wait until a schedule lets them happen, fail, or happen without an answer (`schedule`). Time,
//! processes and tags are the simulation's too, so that a seed, or a list of choices, is a run. After every request the promises
//! of `docs/FORMAT.md` are looked after (`rules`).

mod actors;
mod choosers;
mod requests;
mod rules;
mod schedule;
mod tests;
mod world;
