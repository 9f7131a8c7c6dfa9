//! Folders of pylance-cuvs 0.1.0b1 and 0.1.0b2: the sorted files of Lance's own shuffler, a model, and no manifest.
//!
//! Each file holds a list of rows for every partition that has some among its rows, in the partitions' order; where lists end are the ranges
//! that a manifest would record. Together they count as one file, whose rows are theirs, one file after the other.

use std::collections::{BTreeMap, BTreeSet};

use futures::StreamExt;

use super::files::{BucketFiles, Part};
use crate::artifact::format::{EncodedRanges, LISTED, METADATA_FILE, Manifest, PartitionTable, RowRange, WriterInfo};
use crate::error::{Error, Result};
use crate::lance::LanceStore;

/// The name that the files have together.
const SORTED_FILES: &str = "sorted_*.lance";
/// What the shuffler reads, deleted at the end of a build.
const UNSORTED_FILE: &str = "unsorted.lance";
/// Files opened at once.
const CONCURRENT_FILES: usize = 16;

/// The artifact that the files of a folder make, or `None` where there are none.
pub async fn read_sorted(store: LanceStore) -> Result<Option<(BucketFiles, Manifest)>> {
    let entries = store.list_folder("").await?;
    let names: BTreeSet<String> = entries.into_iter().filter(|entry| !entry.is_folder).map(|entry| entry.path).collect();
    let numbers: BTreeSet<u64> = names.iter().filter_map(|name| number_of(name)).collect();
    if names.contains(UNSORTED_FILE) {
        return Err(Error::ArtifactNotFound(format!(
            "{}: {UNSORTED_FILE} is there: a build of pylance-cuvs has not finished here; it deletes that file at its end. Build it again",
            store.uri()
        )));
    }
    if numbers.is_empty() {
        return Ok(None);
    }
    // Each is named by the first of the batches it was sorted from, as many for each.
    let step = numbers.iter().nth(1).copied().unwrap_or(1);
    let expected = |place: u64| place.saturating_mul(step);
    if let Some((_, place)) = numbers.iter().zip(0..).find(|(number, place)| **number != expected(*place)) {
        return Err(Error::corrupt(format!("{}: {} is missing", store.uri(), name_of(expected(place)))));
    }
    let files = BucketFiles::new(&store, BTreeMap::new());
    if !names.contains(METADATA_FILE) {
        return Err(Error::corrupt(format!(
            "{}: {METADATA_FILE} is missing; files of Lance's shuffler leave out partitions without rows, and only it says how many there are",
            store.uri()
        )));
    }
    let num_partitions = files.told_partitions(METADATA_FILE).await?;
    let opened = futures::stream::iter(numbers).map(|number| {
        let (files, file) = (&files, name_of(number));
        async move {
            let (lists, bucket) = files.open_lists(&file).await?;
            Ok::<_, Error>((file, lists, bucket))
        }
    });
    let mut opened = opened.buffered(CONCURRENT_FILES);
    let (mut parts, mut first): (Vec<Part>, u64) = Default::default();
    let mut partitions = vec![EncodedRanges::default(); num_partitions];
    while let Some(next) = opened.next().await {
        let (file, lists, bucket) = next?;
        if let Some(Part { bucket: other, file: of, .. }) = parts.first()
            && bucket.code_width != other.code_width
        {
            return Err(Error::corrupt(format!(
                "{}: {file} has codes of {} bytes, {of} has {}: they are of different builds",
                store.uri(),
                bucket.code_width,
                other.code_width
            )));
        }
        let mut offset = first;
        for (part_id, num_rows) in lists {
            let ranges = partitions.get_mut(part_id as usize).ok_or_else(|| {
                Error::corrupt(format!("{}: {file} has rows of partition {part_id}, {METADATA_FILE} has {num_partitions}", store.uri()))
            })?;
            ranges.push(RowRange { offset, num_rows });
            offset = offset.checked_add(num_rows).ok_or_else(|| Error::corrupt(format!("{}: its rows overflow", store.uri())))?;
        }
        parts.push(Part { first, end: offset, file, bucket });
        first = offset;
    }
    drop(opened);
    let code_width = parts.first().map(|part| part.bucket.code_width);
    let manifest = Manifest {
        version: LISTED,
        num_partitions,
        num_buckets: None,
        metadata_file: Some(METADATA_FILE.to_string()),
        total_loss: None,
        pq_code_width: code_width,
        checksum_kind: None,
        model: None,
        training: None,
        assignment: None,
        rows: None,
        source: None,
        writer: Some(WriterInfo { name: "pylance-cuvs".to_string(), version: "0.1.0b1 or 0.1.0b2".to_string() }),
        files: None,
        partitions_file: None,
        bucket_files: Vec::new(),
        partitions: PartitionTable::of_one_file(SORTED_FILES, partitions)?,
    };
    let manifest = manifest.checked().map_err(|e| e.context(store.uri()))?;
    Ok(Some((files.joined(SORTED_FILES, parts), manifest)))
}

fn name_of(number: u64) -> String {
    format!("sorted_{number}.lance")
}

fn number_of(name: &str) -> Option<u64> {
    let number = name.strip_prefix("sorted_")?.strip_suffix(".lance")?.parse().ok()?;
    // Not `sorted_+1.lance` or `sorted_01.lance`.
    (name_of(number) == name).then_some(number)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{FixedSizeListArray, Float32Array, RecordBatch, UInt8Array, UInt32Array, UInt64Array};
    use arrow_schema::{DataType, Field, Schema};
    use lance_index::vector::ivf::shuffler::IvfShuffler;
    use object_store::path::Path;
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::artifact::format::write_model;
    use crate::artifact::read::{Artifact, row_ids_and_codes};
    use crate::model::{IvfPqModel, Metric, fixed_size_list, item_field};

    const WIDTH: usize = 12;

    /// Row id and code of each row of each partition.
    type Rows = Vec<Vec<(u64, Vec<u8>)>>;

    fn batch(random: &mut SmallRng, first: u64, rows: usize, filled: &[u32], into: &mut Rows) -> RecordBatch {
        let part_ids: Vec<u32> = (0..rows).map(|_| filled[random.random_range(0..filled.len())]).collect();
        let codes: Vec<u8> = (0..rows * WIDTH).map(|_| random.random()).collect();
        for ((row, part_id), code) in (first..).zip(&part_ids).zip(codes.chunks(WIDTH)) {
            into[*part_id as usize].push((row * 3, code.to_vec()));
        }
        let codes =
            FixedSizeListArray::try_new(item_field(DataType::UInt8), WIDTH as i32, Arc::new(UInt8Array::from(codes)), None).unwrap();
        let schema = Schema::new(vec![
            Field::new("_rowid", DataType::UInt64, false),
            Field::new("__ivf_part_id", DataType::UInt32, false),
            Field::new("__pq_code", DataType::FixedSizeList(item_field(DataType::UInt8), WIDTH as i32), true),
        ]);
        let row_ids = UInt64Array::from_iter_values((first..first + rows as u64).map(|row| row * 3));
        RecordBatch::try_new(Arc::new(schema), vec![Arc::new(row_ids), Arc::new(UInt32Array::from(part_ids)), Arc::new(codes)]).unwrap()
    }

    async fn write_model_of(folder: &std::path::Path, partitions: usize) {
        let mut random = SmallRng::seed_from_u64(0);
        let mut rows = |count: usize| {
            let values: Float32Array = (0..count * WIDTH).map(|_| random.random::<f32>()).collect();
            fixed_size_list(Arc::new(values), WIDTH).unwrap()
        };
        let model = IvfPqModel::try_new(&rows(partitions), &rows(256), Metric::L2, Some(WIDTH)).unwrap();
        let store = LanceStore::open(folder.to_str().unwrap(), None).await.unwrap();
        write_model(&store.files, METADATA_FILE, &model, false).await.unwrap();
    }

    /// As pylance-cuvs does it, of `batches` batches in files of `each`. Partitions that are not `filled` stay empty.
    async fn shuffled(folder: &std::path::Path, partitions: usize, filled: &[u32], batches: usize, each: usize) -> Rows {
        write_model_of(folder, partitions).await;
        let mut random = SmallRng::seed_from_u64(partitions as u64);
        let mut rows: Rows = vec![Vec::new(); partitions];
        let given: Vec<_> = (0..batches).map(|n| Ok(batch(&mut random, n as u64 * 5000, 5000, filled, &mut rows))).collect();
        let mut shuffler = IvfShuffler::try_new(partitions as u32, Some(Path::from_absolute_path(folder).unwrap()), true, None).unwrap();
        shuffler.write_unsorted_stream(futures::stream::iter(given)).await.unwrap();
        shuffler.write_partitioned_shuffles(each, 2).await.unwrap();
        rows
    }

    async fn read(artifact: &Artifact, partitions: std::ops::Range<usize>) -> Rows {
        let read = artifact.read_partitions(partitions.clone()).await.unwrap();
        let rows_of = |partition| {
            let batches = read.batches(partition);
            let rows = batches.iter().flat_map(|batch| {
                let (row_ids, codes) = row_ids_and_codes(batch);
                row_ids.iter().copied().zip(codes.chunks(WIDTH).map(<[u8]>::to_vec)).collect::<Vec<_>>()
            });
            rows.collect()
        };
        (0..partitions.len()).map(rows_of).collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_files_of_lances_shuffler_are_one_artifact() {
        // The shuffler has no list for a partition without rows, wherever it is.
        let cases = [(7, 0..7, 1, 5, 2), (1, 0..1, 1, 4, 2), (300, 0..250, 1, 3, 16), (20, 19..20, 1, 2, 1), (300, 1..300, 7, 3, 1)];
        for (partitions, filled, step, batches, each) in cases {
            let filled: Vec<u32> = filled.step_by(step).collect();
            let folder = tempfile::tempdir().unwrap();
            let mut expected = shuffled(folder.path(), partitions, &filled, batches, each).await;
            let uri = folder.path().to_str().unwrap();
            let unfinished = Artifact::open(uri, None).await.unwrap_err().to_string();
            assert!(unfinished.contains("unsorted.lance is there"), "{unfinished}");
            std::fs::remove_file(folder.path().join(UNSORTED_FILE)).unwrap();

            let artifact = Artifact::open(uri, None).await.unwrap();
            assert_eq!((artifact.num_partitions(), artifact.num_rows()), (partitions, batches as u64 * 5000));
            assert_eq!(artifact.pq_code_width(), WIDTH);
            let opened = artifact.files().bytes_read();
            let mut found = read(&artifact, 0..partitions).await;
            // The order within a partition is the shuffler's.
            found.iter_mut().chain(&mut expected).for_each(|rows| rows.sort_unstable());
            assert!(found == expected);
            let data = (batches * 5000 * (8 + 4 + WIDTH)) as u64;
            assert!(artifact.files().bytes_read() - opened <= data, "each byte once");
            // In slices, and with the partition of each row looked at.
            let middle = partitions / 2;
            let mut some = read(&artifact, middle..partitions).await;
            some.iter_mut().for_each(|rows| rows.sort_unstable());
            assert!(some == expected[middle..]);
            let report = artifact.verify(|_| {}).await.unwrap();
            assert!(report.ok(), "{:?}", report.problems);
            assert!(report.part_ids_checked);
            assert_eq!(report.num_files, batches.div_ceil(each));
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_folder_that_lacks_a_file_or_has_one_of_another_build_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let uri = folder.path().to_str().unwrap();
        shuffled(folder.path(), 5, &[0, 1, 2, 3, 4], 8, 2).await;
        std::fs::remove_file(folder.path().join(UNSORTED_FILE)).unwrap();
        let there = |name: &str| folder.path().join(name);
        // Of the last one nobody can tell but the rows of the dataset.
        std::fs::rename(there("sorted_4.lance"), there("away")).unwrap();
        let error = Artifact::open(uri, None).await.unwrap_err().to_string();
        assert!(error.contains("sorted_4.lance is missing"), "{error}");
        std::fs::rename(there("away"), there("sorted_4.lance")).unwrap();

        let other = tempfile::tempdir().unwrap();
        shuffled(other.path(), 6, &[0, 5], 2, 2).await;
        std::fs::copy(other.path().join("sorted_0.lance"), there("sorted_8.lance")).unwrap();
        let error = Artifact::open(uri, None).await.unwrap_err().to_string();
        assert!(error.contains("rows of partition 5, metadata.lance has 5"), "{error}");
        std::fs::remove_file(there("sorted_8.lance")).unwrap();

        std::fs::rename(there(METADATA_FILE), there("away")).unwrap();
        let error = Artifact::open(uri, None).await.unwrap_err().to_string();
        assert!(error.contains("metadata.lance is missing"), "{error}");
        std::fs::rename(there("away"), there(METADATA_FILE)).unwrap();

        let whole = std::fs::read(there("sorted_4.lance")).unwrap();
        std::fs::write(there("sorted_4.lance"), &whole[..whole.len() - 9]).unwrap();
        assert!(matches!(Artifact::open(uri, None).await.unwrap_err(), Error::CorruptArtifact(_)));
    }
}
