//! `append_batch` with any Arrow data there is: types, names, nulls, offsets, slices. What is right must come back as it was given, what is
//! not must be refused and leave the builder as it was.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{UInt8Type, UInt32Type, UInt64Type};
use arrow_array::{
    Array, ArrayRef, BooleanArray, DictionaryArray, FixedSizeListArray, Int64Array, LargeStringArray, ListArray, NullArray, RecordBatch,
    RecordBatchOptions, UInt8Array, UInt32Array, UInt64Array,
};
use arrow_buffer::{NullBuffer, OffsetBuffer};
use arrow_schema::{DataType, Field, Schema};
use lance_artifact::Error;
use lance_artifact::artifact::{Artifact, BuilderOptions, Encoding, PartitionArtifactBuilder};

use super::Target;
use crate::bases::Rows;
use crate::check::{answer, rows_at};
use crate::input::Input;
use crate::place::{Files, Ground};

/// Of a stage: more rows than this are written in several.
const MOST_ROWS: usize = 3000;

struct Append {
    ground: Ground,
}

pub fn make() -> Box<dyn Target> {
    Box::new(Append { ground: Ground::new(&Files::new()) })
}

impl Target for Append {
    fn run(&mut self, input: &[u8]) {
        let mut input = Input::new(input);
        let (how, partitions, width) = (input.u8(), input.below(40) + 1, input.below(20) + 1);
        let disk = self.ground.beside("built");
        let uri = if how & 1 > 0 { "memory://fuzz/built".to_string() } else { disk.to_str().unwrap().to_string() };
        let options = BuilderOptions {
            overwrite: true,
            sync: false,
            memory_limit: Some(3 << 20),
            num_buckets: (how & 1 == 0).then_some(1 + usize::from(how >> 1 & 3).min(partitions - 1)),
            format_version: Some(1 + u32::from(how >> 3 & 1)),
            ..Default::default()
        };
        // Uploads take more.
        let options = if how & 1 > 0 { BuilderOptions { memory_limit: Some(64 << 20), num_buckets: Some(1), ..options } } else { options };
        self.ground.block_on(async {
            let shape = Encoding::Shape { num_partitions: partitions, pq_code_width: width };
            let builder = PartitionArtifactBuilder::try_new(&uri, shape, options).await.unwrap();
            let mut expected: Vec<Rows> = vec![Rows::new(); partitions];
            let mut rows = 0u64;
            for _ in 0..8 {
                let Some(batch) = batch(&mut input, partitions, width) else { break };
                let given = meant(&batch, partitions, width);
                match (builder.append_batch(&batch), given) {
                    (Ok(()), Some(given)) => given.into_iter().for_each(|(partition, row)| {
                        rows += 1;
                        expected[partition as usize].push(row);
                    }),
                    (Err(Error::InvalidInput(_)), None) => {}
                    (result, given) => panic!("{result:?} for {batch:?}, expected {given:?}"),
                }
                assert_eq!(builder.num_rows(), rows);
                if input.is_empty() {
                    break;
                }
            }
            if how & 0xf0 == 0xf0 {
                return builder.abort().unwrap();
            }
            builder.finish(None).unwrap();
            let artifact = Artifact::open(&uri, None).await.unwrap();
            assert!(answer(artifact.verify(|_| {}).await).unwrap().num_rows == rows);
            let found = artifact.read_partitions(0..partitions).await.unwrap();
            for (partition, expected) in expected.iter().enumerate() {
                assert!(rows_at(&found, partition, width) == *expected, "partition {partition}");
            }
        });
    }
}

const NAMES: [[&str; 4]; 3] =
    [["_rowid", "row_id", "_rowid ", "part_id"], ["__ivf_part_id", "part_id", "", "_rowid"], ["__pq_code", "pq_code", "code", "row_id"]];

/// Columns that are mostly as they should be.
fn batch(input: &mut Input<'_>, partitions: usize, width: usize) -> Option<RecordBatch> {
    let rows = match input.u8() {
        few @ 0..=0xf7 => usize::from(few % 50),
        _ => input.below(MOST_ROWS),
    };
    let odd = input.u8();
    let mut order = [0, 1, 2];
    if odd & 1 > 0 {
        order.rotate_left(usize::from(odd >> 1 & 3) % 3);
    }
    let mut columns: Vec<(String, ArrayRef)> = Vec::new();
    for which in order {
        let name = NAMES[which][usize::from(if odd >= 0xc0 { input.u8() % 4 } else { input.u8() % 2 })];
        columns.push((name.to_string(), column(input, which, rows, partitions, width)));
    }
    match odd {
        0xf0 => drop(columns.remove(input.below(3))),
        0xf1 => columns.push(("more".into(), Arc::new(NullArray::new(rows)))),
        0xf2 => columns.clear(),
        _ => {}
    }
    let fields: Vec<Field> = columns.iter().map(|(name, column)| Field::new(name, column.data_type().clone(), true)).collect();
    let columns = columns.into_iter().map(|(_, column)| column).collect();
    let options = RecordBatchOptions::new().with_row_count(Some(rows));
    let batch = RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), columns, &options).ok()?;
    if odd & 2 == 0 {
        return Some(batch);
    }
    let first = input.below(rows + 1);
    Some(batch.slice(first, input.below(rows - first + 1)))
}

/// Values before those that count: what is sliced off.
fn column(input: &mut Input<'_>, which: usize, rows: usize, partitions: usize, width: usize) -> ArrayRef {
    let (how, seed) = (input.u8(), usize::from(input.u8()));
    let before = usize::from(how >> 4 & 3);
    let all = rows + before;
    let nulls = match how & 15 {
        // A bitmap that says that none is null, and one that says that one is.
        8 => Some(NullBuffer::new_valid(all)),
        9 => Some(NullBuffer::from_iter((0..all).map(|row| row != seed % all.max(1)))),
        _ => None,
    };
    let kind = if how & 15 > 11 { usize::from(how) * 31 % 10 } else { which };
    let width = if kind == 2 && how & 15 == 10 { input.below(40) } else { width };
    // One partition too many, at times.
    let ids = if how & 15 == 11 { partitions + 1 } else { partitions };
    let part_id = |row: usize| ((row * 7 + seed * row * row) % ids) as u32;
    let array: ArrayRef = match kind {
        0 => Arc::new(UInt64Array::new((0..all as u64).map(|row| row.wrapping_mul(0x9e37_79b9) ^ seed as u64).collect(), nulls)),
        1 => Arc::new(UInt32Array::new((0..all).map(part_id).collect(), nulls)),
        2 => {
            let skipped = usize::from(how >> 6);
            let bytes = (0..(all + skipped) * width).map(|at| (at * 31 + seed) as u8);
            let values = if how & 15 == 7 {
                UInt8Array::from_iter(bytes.map(|byte| (byte != 3).then_some(byte)))
            } else {
                UInt8Array::from_iter_values(bytes)
            };
            let item = Arc::new(Field::new(if seed & 1 > 0 { "item" } else { "x" }, DataType::UInt8, true));
            let values = values.slice(skipped * width, all * width);
            // Of no width an array has no length of its own, unless it says so by its nulls.
            let nulls = if width == 0 { Some(NullBuffer::new_valid(all)) } else { nulls };
            Arc::new(FixedSizeListArray::try_new(item, width as i32, Arc::new(values), nulls).unwrap())
        }
        3 => Arc::new(Int64Array::from_iter_values((0..all as i64).map(|row| row - seed as i64))),
        4 => Arc::new(NullArray::new(all)),
        5 => Arc::new(BooleanArray::from_iter((0..all).map(|row| Some(row % 2 == 0)))),
        6 => Arc::new(LargeStringArray::from_iter_values((0..all).map(|row| row.to_string()))),
        7 => {
            let keys = UInt8Array::from_iter_values((0..all).map(|row| (row % 3) as u8));
            Arc::new(DictionaryArray::try_new(keys, Arc::new(UInt32Array::from(vec![0, 1, 2]))).unwrap())
        }
        8 => {
            let values: ArrayRef = Arc::new(UInt8Array::from_iter_values((0..all * width).map(|at| at as u8)));
            let item = Arc::new(Field::new("item", DataType::UInt8, true));
            Arc::new(ListArray::try_new(item, OffsetBuffer::from_lengths(vec![width; all]), values, nulls).unwrap())
        }
        _ => Arc::new(UInt32Array::new((0..all).map(|row| row as u32 ^ seed as u32).collect(), nulls)),
    };
    array.slice(before, rows)
}

/// The rows of a batch that is as it should be, value by value; `None` for any other.
fn meant(batch: &RecordBatch, partitions: usize, width: usize) -> Option<Vec<(u32, (u64, Vec<u8>))>> {
    let schema = batch.schema();
    let one = |names: [&str; 2]| {
        let mut found = schema.fields().iter().zip(batch.columns()).filter(|(field, _)| names.contains(&field.name().as_str()));
        found.next().filter(|_| found.next().is_none()).map(|(_, column)| column).filter(|column| column.null_count() == 0)
    };
    let (ids, part_ids) = (one(["_rowid", "row_id"])?, one(["__ivf_part_id", "part_id"])?);
    let codes = one(["__pq_code", "pq_code"])?;
    if batch.num_columns() != 3 {
        return None;
    }
    let (ids, part_ids) = (ids.as_primitive_opt::<UInt64Type>()?, part_ids.as_primitive_opt::<UInt32Type>()?);
    let codes = codes.as_fixed_size_list_opt().filter(|codes| codes.value_length() as usize == width)?;
    let mut rows = Vec::new();
    for row in 0..batch.num_rows() {
        let code = codes.value(row);
        let code = code.as_primitive_opt::<UInt8Type>()?;
        if code.null_count() > 0 || part_ids.value(row) as usize >= partitions {
            return None;
        }
        rows.push((part_ids.value(row), (ids.value(row), code.values().to_vec())));
    }
    // Of no rows the types count all the same.
    (codes.value_type() == DataType::UInt8).then_some(rows)
}
