//! The pipeline on a device that takes its time and fails, as a seed has it: see `restless`.

mod restless;
mod tests;
