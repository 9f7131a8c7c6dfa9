//! What must hold of whatever is read, however damaged it is.

use lance_artifact::artifact::{Artifact, PartitionReader, PartitionRows};
use lance_artifact::{Error, Result};
use std::sync::Arc;

use crate::bases::Rows;

/// Partitions that are read one by one; all are verified.
const READ: usize = 64;

/// An error that a caller can tell from others, and none that says that something here is broken.
pub fn typed(error: &Error) {
    assert!(!matches!(error, Error::Internal(_) | Error::Device(_) | Error::DeviceMemory(_) | Error::CommitConflict(_)), "{error:?}");
    assert!(!error.to_string().is_empty());
}

/// The value, where there is no error.
pub fn answer<T>(result: Result<T>) -> Option<T> {
    result.inspect_err(typed).ok()
}

/// The rows at a place of a window.
pub fn rows_at(rows: &PartitionRows, place: usize, width: usize) -> Rows {
    let mut found = Rows::new();
    for (row_ids, codes) in rows.runs(place) {
        assert_eq!(row_ids.len() * width, codes.len());
        found.extend(row_ids.iter().copied().zip(codes.chunks(width).map(<[u8]>::to_vec)));
    }
    found
}

/// Read all of an artifact in every way there is. What opens and verifies must be read, with as many rows as its manifest says; the rows
/// of each partition that could be read, where the artifact opened. Slice by slice takes most of the time: one partition in three, by
/// `turn`, and those that cannot be read.
pub async fn read_everything(uri: &str, turn: usize) -> Option<(Arc<Artifact>, Vec<Option<Rows>>)> {
    let artifact = Arc::new(answer(Artifact::open(uri, None).await)?);
    let (partitions, width) = (artifact.num_partitions(), artifact.pq_code_width());
    assert!(partitions > 0 && artifact.manifest().partitions.len() == partitions);
    assert_eq!((0..partitions).map(|p| artifact.partition_rows(p)).sum::<u64>(), artifact.num_rows());
    let complete = answer(artifact.check_files().await).is_some();
    let verified = answer(artifact.verify(|_| {}).await).is_some_and(|report| {
        assert_eq!(report.ok(), report.problems.is_empty());
        report.ok()
    });
    assert!(complete || !verified, "verified, and a file is missing");
    let mut read = Vec::new();
    for partition in 0..partitions.min(READ) {
        let whole = artifact.read_partitions(partition..partition + 1).await;
        let error = whole.as_ref().err().cloned();
        let rows = answer(whole).map(|rows| {
            let found = rows_at(&rows, 0, width);
            assert_eq!(found.len() as u64, artifact.partition_rows(partition));
            assert_eq!(rows.num_rows(0), found.len());
            assert_eq!(rows.batches(0).iter().map(|batch| batch.num_rows()).sum::<usize>(), found.len());
            found
        });
        assert!(rows.is_some() || !verified, "verified, and partition {partition} cannot be read");
        read.push(rows);
        let rows = &read[partition];
        if rows.is_some() && !(partition + turn).is_multiple_of(3) {
            continue;
        }
        // Some rows at a time.
        let mut reader = PartitionReader::of(artifact.clone(), partition, 700);
        let mut slices = Some(Rows::new());
        while let Some(slice) = answer(reader.next().await.inspect_err(|_| slices = None)).flatten() {
            if let Some(slices) = &mut slices {
                slices.extend(rows_at(&slice, 0, width));
            }
        }
        assert_eq!(slices, *rows, "partition {partition} slice by slice and as a whole ({error:?})");
    }
    if let Some(windows) = answer(artifact.read_partitions(0..partitions.min(READ)).await) {
        for (partition, rows) in read.iter().enumerate() {
            assert_eq!(Some(rows_at(&windows, partition, width)), *rows, "partition {partition} in a window and alone");
        }
    }
    assert!(artifact.read_partitions(0..partitions + 1).await.is_err());
    Some((artifact, read))
}

/// Rows without their order.
pub fn sorted(mut rows: Rows) -> Rows {
    rows.sort_unstable();
    rows
}
