//! `partitions.lance` of version 2: a valid one that is damaged, or one of any rows and types.

use std::sync::Arc;

use arrow_array::builder::BinaryBuilder;
use arrow_array::{ArrayRef, RecordBatch, StringArray, UInt32Array, UInt64Array};
use arrow_schema::{DataType, Field, Schema};
use serde_json::json;

use super::Target;
use crate::bases::{Base, golden};
use crate::check::read_everything;
use crate::input::Input;
use crate::lance_file::{VERSIONS, damaged, written};
use crate::place::{Ground, Where};

const FILE: &str = "partitions.lance";

struct Sidecar {
    ground: Ground,
    base: Base,
}

pub fn make() -> Box<dyn Target> {
    let base = golden(2);
    Box::new(Sidecar { ground: Ground::new(&base.files), base })
}

impl Target for Sidecar {
    fn run(&mut self, input: &[u8]) {
        let turn = input.len();
        let mut input = Input::new(input);
        let how = input.u8();
        let mut base = self.base.clone();
        if how & 8 > 0 {
            // Nothing but the frame of the file stands between it and its reader.
            base.manifest.as_object_mut().unwrap().remove("files");
        }
        let mut told = None;
        let bytes = if how & 4 > 0 {
            damaged(&base.files[FILE], &mut input)
        } else {
            let (batch, rows) = table(&mut input);
            base.manifest["num_partitions"] = json!(batch.num_rows() as u64 + u64::from(input.u8() == 1));
            base.manifest.as_object_mut().unwrap().remove("rows");
            told = rows;
            let version = VERSIONS[usize::from(how >> 4) % VERSIONS.len()];
            let Ok(bytes) = self.ground.block_on(written(version, &batch, &[])) else { return };
            bytes
        };
        let uri = self.ground.lay(&base.with(FILE, bytes, true), if how & 1 > 0 { Where::Memory } else { Where::Disk });
        let read = self.ground.block_on(read_everything(&uri, turn));
        if let (Some((artifact, _)), Some(told)) = (read, told) {
            let found: Vec<u64> = (0..artifact.num_partitions()).map(|partition| artifact.partition_rows(partition)).collect();
            assert_eq!(found, told);
        }
        self.ground.assert_stayed_inside();
    }
}

/// The ranges of a partition as the file holds them, and the rows in them.
fn ranges(input: &mut Input<'_>) -> (Vec<u8>, u64) {
    let (mut bytes, mut rows) = (Vec::new(), 0u64);
    if input.u8() % 8 == 7 {
        return (input.bytes(40).to_vec(), input.number());
    }
    for _ in 0..input.u8() % 4 {
        let count = input.number();
        rows = rows.wrapping_add(count);
        for mut number in [input.number(), count] {
            while number >= 0x80 {
                bytes.push(number as u8 | 0x80);
                number >>= 7;
            }
            bytes.push(number as u8);
        }
    }
    (bytes, rows)
}

/// Rows of the file, and the rows that each partition says it has, where columns are as they should be.
fn table(input: &mut Input<'_>) -> (RecordBatch, Option<Vec<u64>>) {
    let (mut files, mut num_rows, mut checksums, mut encoded) = (Vec::new(), Vec::new(), Vec::new(), BinaryBuilder::new());
    for _ in 0..input.u8() % 24 {
        let (bytes, rows) = ranges(input);
        let how = input.u8();
        files.push(if how % 8 == 0 { None } else { Some(if how % 8 == 1 { input.number() as u32 } else { u32::from(how) % 3 }) });
        num_rows.push(if how & 0xf0 == 0xf0 { input.number() as u32 } else { rows as u32 });
        checksums.push(input.number());
        encoded.append_value(bytes);
    }
    let told: Vec<u64> = num_rows.iter().map(|rows| u64::from(*rows)).collect();
    let rows = num_rows.len();
    let mut columns: Vec<(&str, ArrayRef)> = vec![
        ("file", Arc::new(UInt32Array::from(files))),
        ("num_rows", Arc::new(UInt32Array::from(num_rows))),
        ("checksum", Arc::new(UInt64Array::from(checksums))),
        ("ranges", Arc::new(encoded.finish())),
    ];
    let how = input.u8();
    let column = usize::from(how >> 4) % 4;
    let odd = how & 7 > 4;
    match how & 7 {
        5 => drop(columns.remove(column)),
        6 => columns[column].1 = Arc::new(StringArray::from(vec!["1"; rows])),
        7 => columns[column].1 = Arc::new(UInt64Array::from_iter((0..rows as u64).map(|row| (row % 3 > 0).then_some(row)))),
        _ => {}
    }
    let fields: Vec<Field> = columns.iter().map(|(name, column)| Field::new(*name, column.data_type().clone(), true)).collect();
    debug_assert!(fields.iter().all(|field| field.data_type() != &DataType::Null));
    let columns = columns.into_iter().map(|(_, column)| column).collect();
    (RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).unwrap(), (!odd).then_some(told))
}
