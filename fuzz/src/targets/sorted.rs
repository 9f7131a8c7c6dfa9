//! Folders of pylance-cuvs: sorted files of Lance's shuffler, of which one is damaged, missing, renamed, or of another build.

use std::sync::Arc;

use arrow_array::{Array, ArrayRef, ListArray, RecordBatch, StructArray};
use arrow_buffer::OffsetBuffer;
use arrow_schema::{Field, Schema};
use lance_artifact::model::item_field;

use super::Target;
use crate::bases::{PARTITIONS, WIDTH, encoded, golden, model, model_file};
use crate::check::read_everything;
use crate::input::Input;
use crate::lance_file::{Version, damaged, written};
use crate::place::{Files, Ground, Where};

struct Sorted {
    ground: Ground,
    files: Files,
}

/// What the shuffler makes of rows of these partitions: a list for each that has rows.
fn sorted_file(sizes: [usize; PARTITIONS], first: u64, width: usize) -> RecordBatch {
    let (mut ids, mut part_ids, mut codes): (Vec<u64>, Vec<u32>, Vec<u8>) = Default::default();
    for (partition, size) in sizes.iter().enumerate() {
        for row in 0..*size {
            let id = first + ids.len() as u64;
            ids.push(id);
            part_ids.push(partition as u32);
            codes.extend((0..width).map(|byte| (id as usize * 31 + byte * 7 + row) as u8));
        }
    }
    let rows = StructArray::from(encoded(ids, Some(part_ids), codes, width));
    let offsets = OffsetBuffer::from_lengths(sizes.into_iter().filter(|size| *size > 0));
    let lists = ListArray::try_new(item_field(rows.data_type().clone()), offsets, Arc::new(rows), None).unwrap();
    let schema = Schema::new(vec![Field::new("partitions", lists.data_type().clone(), true)]);
    RecordBatch::try_new(Arc::new(schema), vec![Arc::new(lists) as ArrayRef]).unwrap()
}

pub fn make() -> Box<dyn Target> {
    let ground = Ground::new(&golden(1).files);
    let file = |sizes, first, width| ground.runtime.block_on(written(Version::V2_0, &sorted_file(sizes, first, width), &[])).unwrap();
    let files = Files::from([
        ("metadata.lance".to_string(), model_file(&ground.runtime, &model())),
        ("sorted_0.lance".to_string(), file([9, 0, 40, 1, 0, 7], 0, WIDTH)),
        ("sorted_2.lance".to_string(), file([0, 3, 0, 70, 2, 0], 1000, WIDTH)),
        ("sorted_4.lance".to_string(), file([5, 5, 5, 5, 5, 5], 2000, WIDTH)),
    ]);
    Box::new(Sorted { ground, files })
}

const NAMES: [&str; 12] = [
    "sorted_0.lance",
    "sorted_1.lance",
    "sorted_2.lance",
    "sorted_3.lance",
    "sorted_4.lance",
    "sorted_6.lance",
    "sorted_18446744073709551615.lance",
    "sorted_9223372036854775808.lance",
    "sorted_01.lance",
    "metadata.lance",
    "unsorted.lance",
    "sorted_8.lance",
];

impl Target for Sorted {
    fn run(&mut self, input: &[u8]) {
        let turn = input.len();
        let mut input = Input::new(input);
        let how = input.u8();
        let mut files = self.files.clone();
        for _ in 0..=how >> 6 {
            let names: Vec<String> = files.keys().cloned().collect();
            let Some(name) = names.get(input.below(names.len())) else { break };
            let bytes = files[name].clone();
            match input.u8() % 8 {
                0 => drop(files.remove(name)),
                1 => {
                    files.remove(name);
                    files.insert(input.pick(&NAMES).to_string(), bytes);
                }
                2 => drop(files.insert(input.pick(&NAMES).to_string(), bytes)),
                _ => drop(files.insert(name.clone(), damaged(&bytes, &mut input))),
            }
            if input.is_empty() {
                break;
            }
        }
        let uri = self.ground.lay(&files, if how & 1 > 0 { Where::Memory } else { Where::Disk });
        if let Some((artifact, _)) = self.ground.block_on(read_everything(&uri, turn)) {
            assert!(artifact.manifest().num_partitions <= 1 << 20);
        }
        self.ground.assert_stayed_inside();
    }
}
