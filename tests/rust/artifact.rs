//! The core without Python: write an artifact, read it back, refuse what it must.

use std::sync::Arc;

use arrow_array::{FixedSizeListArray, RecordBatch, UInt8Array, UInt32Array, UInt64Array};
use lance_artifact::Error;
use lance_artifact::artifact::format::bucket_schema;
use lance_artifact::artifact::{Artifact, BuilderOptions, Encoding, PartitionArtifactBuilder, delete_artifact, row_ids_and_codes};
use lance_artifact::model::fixed_size_list;

const PARTITIONS: usize = 5;
const WIDTH: usize = 3;

fn shape() -> Encoding {
    Encoding::Shape { num_partitions: PARTITIONS, pq_code_width: WIDTH }
}

/// Rows `first..first + rows`, partition `id % 5`, code `[id, id, id]`.
fn batch(first: u64, rows: u64) -> RecordBatch {
    let ids = first..first + rows;
    let codes: Vec<u8> = ids.clone().flat_map(|id| [id as u8; WIDTH]).collect();
    let codes: FixedSizeListArray = fixed_size_list(Arc::new(UInt8Array::from(codes)), WIDTH).unwrap();
    RecordBatch::try_new(
        bucket_schema(WIDTH),
        vec![
            Arc::new(UInt64Array::from_iter_values(ids.clone())),
            Arc::new(UInt32Array::from_iter_values(ids.map(|id| (id % PARTITIONS as u64) as u32))),
            Arc::new(codes),
        ],
    )
    .unwrap()
}

async fn rows_of(artifact: &Artifact, partition: usize) -> Vec<(u64, Vec<u8>)> {
    let batches = artifact.read_partitions(partition..partition + 1).await.unwrap().batches(0);
    batches
        .iter()
        .flat_map(|b| {
            let (ids, codes) = row_ids_and_codes(b);
            ids.iter().copied().zip(codes.chunks(WIDTH).map(<[u8]>::to_vec)).collect::<Vec<_>>()
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_in_comes_out() {
    for buckets in 1..=PARTITIONS {
        let dir = tempfile::tempdir().unwrap();
        let uri = dir.path().join("a").to_string_lossy().to_string();
        let options = BuilderOptions { num_buckets: Some(buckets), ..Default::default() };
        let builder = PartitionArtifactBuilder::try_new(&uri, shape(), options).await.unwrap();
        for (first, rows) in [(0, 7), (7, 0), (7, 93)] {
            builder.append_batch(&batch(first, rows)).unwrap();
        }
        let manifest = builder.finish(None).unwrap();
        assert_eq!(manifest.num_rows(), 100);
        let artifact = Artifact::open(&uri, None).await.unwrap();
        for partition in 0..PARTITIONS {
            let expected: Vec<_> = (0..100u64).filter(|id| id % 5 == partition as u64).map(|id| (id, vec![id as u8; WIDTH])).collect();
            assert_eq!(rows_of(&artifact, partition).await, expected);
        }
        let report = artifact.verify(|_| {}).await.unwrap();
        assert!(report.ok(), "{:?}", report.problems);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_flushes_and_threads_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let uri = dir.path().join("a").to_string_lossy().to_string();
    let options = BuilderOptions { memory_limit: Some(4 << 20), num_buckets: Some(2), ..Default::default() };
    let builder = Arc::new(PartitionArtifactBuilder::try_new(&uri, shape(), options).await.unwrap());
    let rows = builder.memory_plan().stage_rows as u64 * 3;
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let builder = builder.clone();
            scope.spawn(move || {
                for step in 0..rows / 1000 {
                    builder.append_batch(&batch((step * 4 + thread) * 1000, 1000)).unwrap();
                }
            });
        }
    });
    let expected = rows / 1000 * 4000;
    assert_eq!(builder.num_rows(), expected);
    builder.finish(None).unwrap();
    let artifact = Artifact::open(&uri, None).await.unwrap();
    let report = artifact.verify(|_| {}).await.unwrap();
    assert!(report.ok() && report.num_rows == expected, "{:?}", report.problems);
    assert!(report.num_ranges > PARTITIONS as u64 * 3, "expected several flushes, got {} ranges", report.num_ranges);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_builder_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let uri = dir.path().join("a").to_string_lossy().to_string();
    let builder = PartitionArtifactBuilder::try_new(&uri, shape(), BuilderOptions::default()).await.unwrap();
    builder.append_batch(&batch(0, 1000)).unwrap();
    drop(builder);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    assert!(matches!(Artifact::open(&uri, None).await, Err(Error::ArtifactNotFound(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_are_typed() {
    let dir = tempfile::tempdir().unwrap();
    let uri = dir.path().join("a").to_string_lossy().to_string();
    let builder = PartitionArtifactBuilder::try_new(&uri, shape(), BuilderOptions::default()).await.unwrap();
    let wrong = batch(0, 3).project(&[0, 1]).unwrap();
    assert!(matches!(builder.append_batch(&wrong), Err(Error::InvalidInput(_))));
    builder.finish(None).unwrap();
    assert!(matches!(builder.append_batch(&batch(0, 1)), Err(Error::InvalidInput(_))));
    let again = PartitionArtifactBuilder::try_new(&uri, shape(), BuilderOptions::default()).await;
    assert!(matches!(again, Err(Error::ArtifactExists(_))));
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn an_artifact_that_cannot_be_deleted_stays_whole() {
    let dir = tempfile::tempdir().unwrap();
    let uri = dir.path().join("a").to_string_lossy().to_string();
    let options = BuilderOptions { num_buckets: Some(2), ..Default::default() };
    let builder = PartitionArtifactBuilder::try_new(&uri, shape(), options).await.unwrap();
    builder.append_batch(&batch(0, 50)).unwrap();
    builder.finish(None).unwrap();
    let (bucket, elsewhere) = (dir.path().join("a/partitions/bucket-00001.lance"), dir.path().join("elsewhere"));
    std::fs::rename(&bucket, &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &bucket).unwrap();
    assert!(matches!(delete_artifact(&uri, None).await, Err(Error::CorruptArtifact(_))));
    for left in ["a/manifest.json", "a/partitions/bucket-00000.lance", "a/partitions/bucket-00001.lance", "elsewhere"] {
        assert!(dir.path().join(left).exists(), "{left}");
    }
    std::fs::remove_file(&bucket).unwrap();
    std::fs::rename(&elsewhere, &bucket).unwrap();
    delete_artifact(&uri, None).await.unwrap();
    assert!(!dir.path().join("a").exists());
}
