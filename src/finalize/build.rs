//! The files of a segment, of partitions from wherever: written, counted, made durable, or removed again.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::runtime::Handle;

use super::partitions::Partitions;
use super::seam::build_hnsw;
use super::target::SegmentTarget;
use super::windows::{least_bytes, write_segment};
use crate::budget::{Budget, Reservation};
use crate::error::{Error, Result};
use crate::io::{MAX_PARTS, MIN_PART_BYTES, Uploads};
use crate::lance::segment::{IndexType, SegmentFolder, SegmentWriter};
use crate::model::IvfPqModel;
use crate::progress::Progress;
use crate::sync::spawn;

/// What Lance's builder takes for its windows (`PARTITION_BUILD_BUDGET_BYTES`).
const BUILDER_BYTES: u64 = 512 << 20;

/// Parts of a file that are on their way at once.
const MAX_IN_FLIGHT: u64 = 8;

/// What windows and the parts of an upload need for an index of so many rows.
pub fn window_bytes(rows: u64, code_width: usize) -> u64 {
    least_bytes(code_width) + 2 * part_bytes(rows, code_width)
}

/// A store takes so many parts of a file at most: those of a large one are larger.
fn part_bytes(rows: u64, code_width: usize) -> u64 {
    // Room for metadata, and for encodings that take more than the rows.
    let expected = rows.saturating_mul(8 + code_width as u64) / 8 * 10;
    (expected / MAX_PARTS as u64).max(MIN_PART_BYTES as u64).next_multiple_of(1 << 16)
}

/// Write the files of a segment, then run the last checks; the names and bytes of the files. A failure leaves none behind.
pub async fn write_files(
    target: SegmentTarget<'_>,
    model: &Arc<IvfPqModel>,
    partitions: Arc<Partitions>,
    budget: &Budget,
    progress: Arc<dyn Progress>,
    checks: impl Future<Output = Result<()>>,
) -> Result<Vec<(String, u64)>> {
    SegmentFolder::remove_leftovers(target.dataset).await;
    let folder = SegmentFolder::of(target.dataset, target.uuid).await?;
    let result = async {
        folder.mark().await?;
        let files = build_files(&target, &folder, model, partitions, budget, progress).await?;
        checks.await?;
        if let Some(folder) = folder.local().filter(|_| target.sync) {
            sync_files(folder, &files).await?;
        }
        Ok::<_, Error>(files)
    };
    match result.await {
        Ok(files) => Ok(files),
        Err(error) => match folder.remove().await {
            Ok(()) => Err(error),
            Err(left) => Err(error.context(format!("(and the unfinished segment {} could not be removed: {left})", target.uuid))),
        },
    }
}

async fn build_files(
    target: &SegmentTarget<'_>,
    folder: &SegmentFolder,
    model: &Arc<IvfPqModel>,
    partitions: Arc<Partitions>,
    budget: &Budget,
    progress: Arc<dyn Progress>,
) -> Result<Vec<(String, u64)>> {
    let files = match target.index_type {
        IndexType::IvfPq => {
            let (uploads, _held) = uploads(folder, &partitions, budget)?;
            let segment = SegmentWriter::create(target.dataset, folder.clone(), model.clone(), uploads, target.transposed)?;
            write_segment(segment, partitions.clone(), budget, progress.as_ref()).await?
        }
        IndexType::IvfHnswPq(graphs) => {
            if let Some(limit) = target.memory_limit {
                check_graphs(limit, budget, &partitions, graphs.m)?;
            }
            build_hnsw(target, folder, model, partitions.clone(), graphs, progress).await?
        }
    };
    let (read, num_rows) = (partitions.rows_read(), partitions.num_rows());
    if read != num_rows {
        return Err(Error::internal(format!("the index builder read {read} rows of {num_rows}")));
    }
    // The builder checks nothing: count the rows that reached the file.
    let stored = folder.stored_rows().await?;
    if stored != num_rows {
        return Err(Error::internal(format!("the index segment holds {stored} rows, its sources {num_rows}")));
    }
    Ok(files)
}

/// Lance's builder holds its windows, and the graphs that it makes, whatever the limit is: refuse one that it would not keep.
fn check_graphs(limit: u64, budget: &Budget, partitions: &Partitions, m: usize) -> Result<()> {
    let largest = (0..partitions.len()).filter_map(|p| partitions.rows(p)).max().unwrap_or(0);
    // A node has up to twice `m` neighbours, each with its distance, and its codes are read, put together and written.
    let of_row = 3 * partitions.row_bytes() as u64 + 16 * m as u64;
    let needed = (budget.held() + BUILDER_BYTES + largest * of_row).next_multiple_of(1 << 20);
    if needed > limit {
        return Err(Error::invalid(format!(
            "memory_limit: got {limit} bytes, expected at least {needed}: an IVF_HNSW_PQ index is made by Lance's builder, which takes \
             {BUILDER_BYTES} and its largest partition of {largest} rows with its graph; raise it, or make an IVF_PQ index"
        )));
    }
    Ok(())
}

/// How the files of a segment go to an object store, and the bytes that the parts hold.
fn uploads(folder: &SegmentFolder, partitions: &Partitions, budget: &Budget) -> Result<(Uploads, Option<Reservation>)> {
    if folder.local().is_some() {
        return Ok((Uploads::new(MIN_PART_BYTES, 1, Handle::current()), None));
    }
    let (bytes, in_flight, held) = parts(partitions.num_rows(), partitions.code_width(), budget)?;
    Ok((Uploads::new(bytes as usize, in_flight as usize, Handle::current()), Some(held)))
}

/// Bytes of a part, and parts on their way at once. What they take is held to the end, beside the windows.
fn parts(rows: u64, code_width: usize, budget: &Budget) -> Result<(u64, u64, Reservation)> {
    let bytes = part_bytes(rows, code_width);
    let in_flight = (budget.free() / 4 / bytes).clamp(2, MAX_IN_FLIGHT + 1) - 1;
    let held = budget.hold((in_flight + 1) * bytes, "parts of the upload", least_bytes(code_width))?;
    Ok((bytes, in_flight, held))
}

/// Make the files of a segment durable, and the names of them and of the folder above.
async fn sync_files(folder: PathBuf, files: &[(String, u64)]) -> Result<()> {
    let paths: Vec<_> = files.iter().map(|(name, _)| folder.join(name)).collect();
    spawn(move || {
        let above = folder.ancestors().skip(1).take(2);
        for path in paths.iter().map(PathBuf::as_path).chain([folder.as_path()]).chain(above) {
            let synced = std::fs::File::open(path).and_then(|file| file.sync_all());
            synced.map_err(|e| Error::from(e).context(format!("waiting for {} to be on the disk", path.display())))?;
        }
        Ok(())
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2 G rows of 64 bytes: parts are of 18 MB.
    #[test]
    fn the_parts_of_an_upload_are_in_the_least_memory() {
        let (rows, width, held) = (2_000_000_000, 64, 300 << 20);
        let part = part_bytes(rows, width);
        assert!(part > 2 * MIN_PART_BYTES as u64 && part * MAX_PARTS as u64 > rows * 72);
        let within = |limit: u64| {
            let budget = Budget::new(limit);
            let _model = budget.hold(held, "the bits of the rows", 0).unwrap();
            parts(rows, width, &budget).map(|(bytes, in_flight, held)| (bytes, in_flight, held, budget.free()))
        };
        let (bytes, in_flight, _held, free) = within(held + window_bytes(rows, width)).unwrap();
        assert_eq!((bytes, in_flight), (part, 1));
        assert!(free >= least_bytes(width));
        let error = within(held + window_bytes(1000, width)).unwrap_err().to_string();
        assert!(error.contains("memory_limit") && error.contains("parts of the upload"), "{error}");
    }
}
