# The verbs of this project; people and continuous integration use the same.

default:
    @just --list

# Make .venv and build the extension into it
setup:
    scripts/setup demo,progress,test

# The main job on real vectors, beside stock pylance
demo *args:
    scripts/demo {{args}}

# Every check
test *args:
    scripts/test {{args}}

# Random histories of datasets and indexes against a plain list of rows: `just histories 20000`, `just histories --seed S`
histories *args:
    scripts/histories {{args}}

# Formatting, lints, types and Rust's tests, without Python's
lint:
    cargo fmt --check
    scripts/check-rust
    .venv/bin/ruff check python tests benches examples scripts/house
    .venv/bin/ruff format --check python tests benches examples scripts/house
    .venv/bin/mypy

# On a machine with an NVIDIA GPU: the GPU tests, then the GPU benchmark
gpu *args:
    scripts/gpu {{args}}

# Benchmarks, as one table and bench.json: all, `quick` (ten minutes), or one of handover, writer, finalize, scale, build, memory,
# limits, shards, ceiling, gpu
bench name="all" *args:
    scripts/bench {{name}} {{args}}

# A wheel for this machine, stripped, in dist/
wheel: setup
    .venv/bin/maturin build --strip --compression-level 9 --out dist

# The documentation's site, in site/
docs: setup
    .venv/bin/mkdocs build --strict

# Rust documentation, warnings refused
rustdoc:
    RUSTDOCFLAGS="-D warnings" cargo doc --release --no-deps

# The package with each release of pylance and LanceDB that it is said to work with
matrix *args: setup
    scripts/matrix {{args}}
