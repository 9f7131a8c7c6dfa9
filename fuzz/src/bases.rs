//! Valid artifacts, of which targets damage copies: those of `tests/golden`, and such as other writers make.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{Array, ArrayRef, FixedSizeListArray, Float32Array, RecordBatch, UInt8Array, UInt32Array, UInt64Array};
use arrow_schema::{DataType, Field, Schema};
use lance_artifact::artifact::format::{METADATA_FILE, checksum as rows_checksum, to_hex, write_model};
use lance_artifact::lance::LanceStore;
use lance_artifact::model::fixed_size_list;
use lance_artifact::{IvfPqModel, Metric};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::lance_file::{Version, checksum, tail_bytes, written};
use crate::place::Files;

/// Partitions and bytes of a code of the artifacts made here.
pub const PARTITIONS: usize = 6;
pub const WIDTH: usize = 4;

/// Rows of a partition: row id and code.
pub type Rows = Vec<(u64, Vec<u8>)>;

/// A valid artifact.
#[derive(Clone)]
pub struct Base {
    pub manifest: Value,
    /// All but the manifest.
    pub files: Files,
    /// What is in it.
    pub rows: Vec<Rows>,
}

impl Base {
    /// The artifact with one file replaced. `described`: the manifest says of it what it is, as its writer would have.
    pub fn with(&self, name: &str, bytes: Vec<u8>, described: bool) -> Files {
        let mut manifest = self.manifest.clone();
        if described && let Some(entry) = manifest["files"].get_mut(name) {
            describe(entry, &bytes);
        }
        let mut files = self.files.clone();
        files.insert(name.to_string(), bytes);
        files.insert("manifest.json".into(), serde_json::to_vec(&manifest).unwrap());
        files
    }
}

/// Size and checksum as they are now.
pub fn describe(entry: &mut Value, bytes: &[u8]) {
    let tail = tail_bytes(bytes);
    entry["size_bytes"] = json!(bytes.len());
    if entry.get("tail_bytes").is_some() {
        entry["tail_bytes"] = json!(tail);
        entry["tail_checksum"] = json!(checksum(&bytes[bytes.len() - tail..]));
    }
}

/// Where the repository's own fixtures are.
pub fn golden_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden")
}

/// An artifact of `tests/golden`.
pub fn golden(version: u32) -> Base {
    let folder = golden_folder().join(format!("artifact-v{version}"));
    let mut files = Files::new();
    let mut folders = vec![String::new()];
    while let Some(within) = folders.pop() {
        for entry in fs::read_dir(folder.join(&within)).unwrap() {
            let entry = entry.unwrap();
            let name = format!("{within}{}", entry.file_name().to_str().unwrap());
            match entry.file_type().unwrap().is_dir() {
                true => folders.push(format!("{name}/")),
                false => drop(files.insert(name, fs::read(entry.path()).unwrap())),
            }
        }
    }
    let manifest = serde_json::from_slice(&files.remove("manifest.json").unwrap()).unwrap();
    let expected: Value = serde_json::from_slice(&fs::read(golden_folder().join(format!("expected-v{version}.json"))).unwrap()).unwrap();
    let bytes = |hex: &str| (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect();
    let rows = |partition: &Value| {
        let rows = partition.as_object().unwrap().iter();
        rows.map(|(id, code)| (id.parse().unwrap(), bytes(code.as_str().unwrap()))).collect()
    };
    Base { manifest, files, rows: expected["partitions"].as_array().unwrap().iter().map(rows).collect() }
}

/// How another writer may lay bucket files out.
#[derive(Clone, Copy)]
pub struct Layout {
    pub version: Version,
    pub part_ids: bool,
    pub checksums: bool,
    /// Codes that are all the same, which encodings make a few bytes of.
    pub constant: bool,
}

/// The ranges of two bucket files: of which partition each run is.
const RUNS: [&[u32]; 2] = [&[4, 0, 2, 4, 0], &[5, 1]];

/// An artifact as another writer makes it: no model, runs in any order, any version of Lance's files.
pub fn foreign(runtime: &Runtime, layout: Layout) -> Base {
    let mut rows: Vec<Rows> = vec![Vec::new(); PARTITIONS];
    let mut partitions: Vec<Value> = (0..PARTITIONS).map(|_| json!({"num_rows": 0, "ranges": []})).collect();
    let (mut files, mut described) = (Files::new(), json!({}));
    let mut next = 0u64;
    for (bucket, runs) in RUNS.iter().enumerate() {
        let name = format!("partitions/b{bucket}.lance");
        let (mut ids, mut part_ids, mut codes): (Vec<u64>, Vec<u32>, Vec<u8>) = Default::default();
        for (run, partition) in runs.iter().enumerate() {
            let count = 11 + 17 * run + 5 * bucket;
            let entry = &mut partitions[*partition as usize];
            entry["path"] = json!(name);
            entry["num_rows"] = json!(entry["num_rows"].as_u64().unwrap() + count as u64);
            entry["ranges"].as_array_mut().unwrap().push(json!({"offset": ids.len(), "num_rows": count}));
            for _ in 0..count {
                let code: Vec<u8> = (0..WIDTH as u64).map(|byte| if layout.constant { 7 } else { (next * 31 + byte * 97) as u8 }).collect();
                rows[*partition as usize].push((next * 3, code.clone()));
                ids.push(next * 3);
                part_ids.push(*partition);
                codes.extend(code);
                next += 1;
            }
        }
        let batch = encoded(ids, layout.part_ids.then_some(part_ids), codes, WIDTH);
        let bytes = runtime.block_on(written(layout.version, &batch, &[])).unwrap();
        if layout.checksums {
            described[&name] = json!({"num_rows": batch.num_rows(), "size_bytes": 0, "tail_bytes": 0, "tail_checksum": ""});
            describe(&mut described[&name], &bytes);
        }
        files.insert(name, bytes);
    }
    let mut manifest = json!({"version": 1, "num_partitions": PARTITIONS});
    if layout.checksums {
        for (partition, rows) in partitions.iter_mut().zip(&rows) {
            let (ids, codes): (Vec<u64>, Vec<&[u8]>) = rows.iter().map(|(id, code)| (*id, code.as_slice())).unzip();
            partition["checksum"] = json!(to_hex(rows_checksum(&ids, &codes.concat(), WIDTH)));
        }
        manifest["checksum_kind"] = json!("xxh3-64-row-sum");
        manifest["files"] = described;
    }
    manifest["partitions"] = Value::Array(partitions);
    Base { manifest, files, rows }
}

/// Rows as bucket files hold them.
pub fn encoded(ids: Vec<u64>, part_ids: Option<Vec<u32>>, codes: Vec<u8>, width: usize) -> RecordBatch {
    let codes = fixed_size_list(Arc::new(UInt8Array::from(codes)), width).unwrap();
    let mut fields = vec![Field::new("_rowid", DataType::UInt64, false), Field::new("__pq_code", codes.data_type().clone(), true)];
    let mut columns: Vec<ArrayRef> = vec![Arc::new(UInt64Array::from(ids)), Arc::new(codes)];
    if let Some(part_ids) = part_ids {
        fields.insert(1, Field::new("__ivf_part_id", DataType::UInt32, false));
        columns.insert(1, Arc::new(UInt32Array::from(part_ids)));
    }
    RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).unwrap()
}

/// Rows of numbers that are neither zero nor all the same.
pub fn vectors(rows: usize, dimension: usize) -> FixedSizeListArray {
    let values = (0..rows * dimension).map(|at| (at * 37 % 101) as f32 / 7.0 - 6.5);
    fixed_size_list(Arc::new(Float32Array::from_iter_values(values)), dimension).unwrap()
}

/// A model of `PARTITIONS` partitions whose codes have `WIDTH` bytes.
pub fn model() -> IvfPqModel {
    IvfPqModel::try_new(&vectors(PARTITIONS, 2 * WIDTH), &vectors(256, 2 * WIDTH), Metric::L2, Some(WIDTH)).unwrap()
}

/// The file of a model.
pub fn model_file(runtime: &Runtime, model: &IvfPqModel) -> Vec<u8> {
    runtime.block_on(async {
        let store = LanceStore::open("memory://fuzz/model", None).await.unwrap();
        write_model(&store.files, METADATA_FILE, model, false).await.unwrap();
        store.read(METADATA_FILE).await.unwrap().unwrap().to_vec()
    })
}
