//! `metadata.lance`: a valid model that is damaged, or one of any shapes, types and words. What opens must be fit to encode with.

use std::sync::Arc;

use arrow_array::{Array, ArrayRef, FixedSizeListArray, Float16Array, Float32Array, Float64Array, ListArray, RecordBatch, UInt8Array};
use arrow_buffer::OffsetBuffer;
use arrow_schema::{Field, Schema};
use half::f16;
use lance_artifact::encode::{CpuEncoder, Encoder};
use lance_artifact::model::{fixed_size_list, item_field};
use serde_json::json;

use super::Target;
use crate::bases::{Base, golden};
use crate::check::{answer, read_everything};
use crate::input::Input;
use crate::lance_file::{VERSIONS, damaged, written};
use crate::place::{Ground, Where};

const FILE: &str = "metadata.lance";

struct Model {
    ground: Ground,
    base: Base,
}

pub fn make() -> Box<dyn Target> {
    let base = golden(1);
    Box::new(Model { ground: Ground::new(&base.files), base })
}

impl Target for Model {
    fn run(&mut self, input: &[u8]) {
        let turn = input.len();
        let mut input = Input::new(input);
        let how = input.u8();
        let mut base = self.base.clone();
        let manifest = base.manifest.as_object_mut().unwrap();
        if how & 8 > 0 {
            manifest.remove("files");
        }
        if how & 16 > 0 {
            manifest.remove("pq_code_width");
        }
        if how & 32 == 0 {
            manifest.remove("model");
        }
        let bytes = if how & 4 > 0 {
            damaged(&base.files[FILE], &mut input)
        } else {
            let version = VERSIONS[usize::from(how >> 6) % VERSIONS.len()];
            let Some((batch, words)) = row(&mut input) else { return };
            if how & 16 > 0 {
                // No rows, whose codes would have to be of the model's width.
                base.manifest["partitions"] = json!([]);
                for _ in 0..words.1 {
                    base.manifest["partitions"].as_array_mut().unwrap().push(json!({"num_rows": 0, "ranges": []}));
                }
                base.manifest["num_partitions"] = json!(words.1);
                base.manifest.as_object_mut().unwrap().remove("rows");
            }
            let Ok(bytes) = self.ground.block_on(written(version, &batch, &words.0)) else { return };
            bytes
        };
        let uri = self.ground.lay(&base.with(FILE, bytes, true), if how & 1 > 0 { Where::Memory } else { Where::Disk });
        let read = self.ground.block_on(read_everything(&uri, turn));
        if let Some(model) = read.and_then(|(artifact, _)| artifact.model().cloned()) {
            assert!(model.code_width() > 0 && model.dimension() > 0 && model.num_partitions() > 0);
            assert_eq!(model.dimension() % model.num_sub_vectors(), 0);
            let vectors = fixed_size_list(model.centroids().values().slice(0, model.dimension()), model.dimension()).unwrap();
            if let Some(encoded) = answer(CpuEncoder::new(&model)).and_then(|encoder| answer(encoder.encode(&vectors))) {
                assert!(encoded.part_ids.iter().all(|id| (*id as usize) < model.num_partitions()));
                assert_eq!((encoded.part_ids.len(), encoded.codes.len()), (1, model.code_width()));
            }
        }
        self.ground.assert_stayed_inside();
    }
}

/// The schema metadata, and how many partitions it says.
type Words = (Vec<(String, String)>, usize);

fn values(input: &mut Input<'_>, kind: u8, len: usize) -> ArrayRef {
    let odd = input.u8();
    let seed = input.u8();
    let value = |at: usize| match odd {
        0xfd if at == 3 => f64::NAN,
        0xfe if at + 1 == len => f64::INFINITY,
        0xff => 1e300,
        _ => ((at * 37 + usize::from(seed)) % 101) as f64 / 7.0 - 6.5,
    };
    let null = |at: usize| odd == 0xfc && at == 1;
    match kind % 8 {
        0 => Arc::new(Float16Array::from_iter((0..len).map(|at| (!null(at)).then(|| f16::from_f64(value(at)))))),
        1 => Arc::new(Float64Array::from_iter((0..len).map(|at| (!null(at)).then(|| value(at))))),
        2 => Arc::new(UInt8Array::from_iter_values((0..len).map(|at| at as u8))),
        _ => Arc::new(Float32Array::from_iter((0..len).map(|at| (!null(at)).then(|| value(at) as f32)))),
    }
}

/// Lists of rows of `size` values.
fn list(input: &mut Input<'_>, kind: u8, rows: usize, size: usize) -> Option<ListArray> {
    let values: FixedSizeListArray = fixed_size_list(values(input, kind, rows * size), size).ok()?;
    // An array of no rows and no size has no length of its own.
    if size == 0 {
        return None;
    }
    ListArray::try_new(item_field(values.data_type().clone()), OffsetBuffer::from_lengths([rows]), Arc::new(values), None).ok()
}

/// The only row of a model's file, mostly as it should be.
fn row(input: &mut Input<'_>) -> Option<(RecordBatch, Words)> {
    let kind = input.u8();
    let dimension = input.below(24) + 1;
    let divisors: Vec<usize> = (1..=dimension).filter(|n| dimension.is_multiple_of(*n)).collect();
    let num_sub_vectors = input.pick(&divisors);
    let num_bits = if input.bool() { 4 } else { 8 };
    let partitions = input.below(9) + 1;
    let (mut rows, mut size) = (num_sub_vectors << num_bits, dimension / num_sub_vectors);
    let how = input.u8();
    match how {
        0xf0..=0xf3 => (rows, size) = (1 << num_bits, dimension),
        0xf4 => rows += 1,
        0xf5 => rows = input.below(300),
        0xf6 => size = input.below(30),
        _ => {}
    }
    let centroids = list(input, kind, partitions, dimension)?;
    let codebook = list(input, if how == 0xf7 { kind ^ 1 } else { kind }, rows, size)?;
    let names = if how == 0xf8 { ("_ivf_centroids", "_pq_codebooks") } else { ("_ivf_centroids", "_pq_codebook") };
    let schema = Schema::new(vec![
        Field::new(names.0, centroids.data_type().clone(), true),
        Field::new(names.1, codebook.data_type().clone(), true),
    ]);
    let batch = RecordBatch::try_new(Arc::new(schema), vec![Arc::new(centroids), Arc::new(codebook)]).ok()?;
    let mut words = vec![
        ("artifact_version", "1".to_string()),
        ("distance_type", input.pick(&["l2", "cosine", "dot", "L2", "hamming", ""]).to_string()),
        ("num_partitions", partitions.to_string()),
        ("num_sub_vectors", num_sub_vectors.to_string()),
        ("num_bits", num_bits.to_string()),
        ("dimension", dimension.to_string()),
    ];
    let odd = input.u8();
    if odd >= 0xc0 {
        let at = input.below(words.len());
        match odd & 3 {
            0 => drop(words.remove(at)),
            1 => words[at].1 = input.text(24),
            _ => words[at].1 = input.number().to_string(),
        }
    }
    let words = words.into_iter().map(|(key, value)| (format!("lance:index_build:{key}"), value)).collect();
    Some((batch, (words, partitions)))
}
