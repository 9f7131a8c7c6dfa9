//! `auxiliary.idx` of a committed index, as a merge reads it: damaged, and read in each way. All of them must tell of the same rows.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use lance_artifact::lance::dataset::{Dataset, DatasetHandle};
use lance_artifact::lance::segment::{CommittedSegment, SegmentReader};
use lance_table::format::pb;
use prost::Message;

use super::Target;
use crate::bases::golden_folder;
use crate::check::answer;
use crate::input::Input;
use crate::lance_file::damaged;
use crate::place::{Files, Ground};

const INDEX: &str = "vector_idx";

struct Segment {
    ground: Ground,
    dataset: Dataset,
    committed: CommittedSegment,
    file: PathBuf,
    bytes: Vec<u8>,
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

pub fn make() -> Box<dyn Target> {
    let ground = Ground::new(&Files::new());
    let folder = ground.beside("indexed.lance");
    copy(&golden_folder().join("indexed-v1.lance"), &folder);
    let uri = folder.to_str().unwrap();
    let (dataset, committed) = ground.block_on(async {
        let manifest = lance::Dataset::open(uri).await.unwrap().manifest().clone();
        let manifest = pb::Manifest::from(&manifest).encode_to_vec();
        let dataset = DatasetHandle::try_new(uri, &manifest, None, HashMap::new()).unwrap().open().await.unwrap();
        let committed = CommittedSegment::of_index(&dataset, INDEX).await.unwrap().remove(0);
        (dataset, committed)
    });
    let file = folder.join("_indices").join(&committed.uuid).join("auxiliary.idx");
    let bytes = fs::read(&file).unwrap();
    Box::new(Segment { ground, dataset, committed, file, bytes })
}

impl Target for Segment {
    fn run(&mut self, input: &[u8]) {
        let mut input = Input::new(input);
        let (first, rows) = (input.number(), input.number());
        fs::write(&self.file, damaged(&self.bytes, &mut input)).unwrap();
        self.ground.block_on(read(&self.dataset, &self.committed, first, rows));
        self.ground.assert_stayed_inside();
    }
}

async fn read(dataset: &Dataset, committed: &CommittedSegment, first: u64, rows: u64) {
    let Some(reader) = answer(SegmentReader::open(dataset, committed, None).await) else { return };
    let (partitions, width) = (reader.num_partitions(), reader.code_width());
    assert_eq!((0..partitions).map(|partition| reader.partition_rows(partition)).sum::<u64>(), reader.num_rows());
    for partition in 0..partitions.min(16) {
        let size = reader.partition_rows(partition);
        let whole = answer(reader.partitions(partition..partition + 1).await);
        let row_ids = answer(reader.row_ids(partition..partition + 1).await);
        if let (Some((ids, codes)), Some(row_ids)) = (&whole, &row_ids) {
            assert_eq!((ids.len() as u64, codes.value_length() as usize), (size, width));
            assert_eq!(ids.values().as_ref(), row_ids.as_slice());
        }
        let first = if size == 0 { 0 } else { first % size };
        let rows = rows.min(size - first);
        let Some((ids, codes)) = answer(reader.slice(partition, first, rows).await) else { continue };
        assert_eq!((ids.len() as u64, codes.len()), (rows, rows as usize * width));
        if let (Some((_, all)), Some(row_ids)) = (whole, row_ids) {
            let (first, rows, size) = (first as usize, rows as usize, size as usize);
            assert_eq!(ids, row_ids[first..first + rows]);
            let all = all.values().to_data();
            let all = &all.buffers()[0].as_slice()[all.offset()..];
            for (row, code) in codes.chunks(width.max(1)).enumerate() {
                for (byte, value) in code.iter().enumerate() {
                    let row = first + row;
                    assert_eq!(*value, if reader.is_transposed() { all[byte * size + row] } else { all[row * width + byte] });
                }
            }
        }
    }
}
