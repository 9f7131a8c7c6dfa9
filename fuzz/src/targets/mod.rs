//! The targets. Each reads the fuzzer's bytes as changes of something valid, so that they get past what only looks at the frame.

mod append;
mod buckets;
mod manifest;
mod model;
mod overwrite;
mod paths;
mod planted;
mod segment;
mod sidecar;
mod sorted;
mod uri;

/// What is run with one input after the other.
pub trait Target: Send {
    fn run(&mut self, input: &[u8]);
}

pub struct Entry {
    pub name: &'static str,
    pub make: fn() -> Box<dyn Target>,
    /// Inputs are a byte and JSON.
    pub is_json: bool,
    /// Broken on purpose, to see that what is broken is found.
    pub is_planted: bool,
}

const fn entry(name: &'static str, make: fn() -> Box<dyn Target>) -> Entry {
    Entry { name, make, is_json: false, is_planted: false }
}

pub const TARGETS: &[Entry] = &[
    Entry { is_json: true, ..entry("manifest", manifest::make) },
    entry("sidecar", sidecar::make),
    entry("model", model::make),
    entry("buckets", buckets::make),
    entry("sorted", sorted::make),
    entry("segment", segment::make),
    Entry { is_json: true, ..entry("overwrite", overwrite::make) },
    entry("append", append::make),
    entry("uri", uri::make),
    entry("paths", paths::make),
    Entry { is_planted: true, ..entry("planted", planted::make) },
];
