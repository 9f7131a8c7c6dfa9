//! A column, scanned in order in bounded memory.

use std::collections::HashSet;
use std::sync::Arc;

use futures::{Stream, StreamExt, TryFutureExt, TryStreamExt, stream};
use lance::dataset::fragment::{BaseSchedulers, FileFragment, FragReadConfig, FragmentReader};
use lance_io::scheduler::{ScanScheduler, SchedulerConfig};
use lance_table::format::Fragment;

use super::column::VectorColumn;
use super::plain::PlainFragment;
use super::scanned::ScannedRows;
use super::version::Dataset;
use crate::error::{Error, Result};

/// How the rows of a fragment are read.
enum FragmentRows {
    Plain(PlainFragment),
    /// By Lance's decoder.
    Encoded(FragmentReader),
}

/// How much a scan holds at once.
#[derive(Debug, Clone, Copy)]
pub struct ScanOptions {
    pub batch_rows: u32,
    /// Batches read ahead.
    pub ahead: usize,
}

impl Dataset {
    /// The rows of a column in some fragments, in order.
    ///
    /// Reads ranges of rows rather than Lance's scan, which reads whole pages: of a table written in one piece those are as
    /// large as its files, and several at a time. Where a fragment's vectors lie in its file as they are, they are read so, without Lance's
    /// decoder.
    pub async fn scan(
        &self,
        column: &VectorColumn,
        fragment_ids: &[u32],
        options: ScanOptions,
    ) -> Result<impl Stream<Item = Result<ScannedRows>> + Send + use<>> {
        let (dataset, path, rows) = (self.0.clone(), column.path.clone(), options.batch_rows);
        let chosen: HashSet<u64> = fragment_ids.iter().map(|id| u64::from(*id)).collect();
        let fragments: Vec<Fragment> = dataset.manifest().fragments.iter().filter(|f| chosen.contains(&f.id)).cloned().collect();
        let store = dataset.object_store(None).await?;
        let scheduler = ScanScheduler::new(store.clone(), SchedulerConfig::max_bandwidth(&store));
        let bases = BaseSchedulers::max_bandwidth();
        let (version, wanted) = (self.clone(), column.clone());
        let opened = stream::iter(fragments)
            .map(move |fragment| {
                let (dataset, path) = (dataset.clone(), path.clone());
                let (scheduler, bases) = (scheduler.clone(), bases.clone());
                let (version, column) = (version.clone(), wanted.clone());
                let opened = version.clone();
                let open = async move {
                    if let Some(plain) = PlainFragment::open(&version, &fragment, &column, &scheduler).await? {
                        let rows = fragment.physical_rows.unwrap_or(0) as u32;
                        return Ok((Arc::new(FragmentRows::Plain(plain)), rows));
                    }
                    let projection = dataset.schema().project(&[path])?;
                    let fragment = FileFragment::new(dataset, fragment);
                    let config = FragReadConfig::default().with_row_id(true).with_scan_scheduler(scheduler).with_base_schedulers(bases);
                    let physical_rows = fragment.physical_rows().await? as u32;
                    let reader = fragment.open(&projection, config).await?;
                    Ok::<_, Error>((Arc::new(FragmentRows::Encoded(reader)), physical_rows))
                };
                open.map_err(move |e| opened.named(e))
            })
            // The next fragment's metadata comes while this one is read.
            .buffered(2);
        let ranges = opened
            .map_ok(move |(reader, physical_rows)| {
                let starts = (0..physical_rows).step_by(rows as usize);
                stream::iter(starts.map(move |start| Ok::<_, Error>((reader.clone(), start..physical_rows.min(start + rows)))))
            })
            .try_flatten();
        let (column, read) = (column.clone(), self.clone());
        Ok(ranges
            .map(move |range| {
                let (column, read) = (column.clone(), read.clone());
                let rows = async move {
                    let (reader, range) = range?;
                    // A task of its own: decoding is work, and the reader of the stream may be busy.
                    tokio::spawn(async move {
                        match reader.as_ref() {
                            FragmentRows::Plain(plain) => plain.read(range).await,
                            FragmentRows::Encoded(reader) => {
                                let batches = reader.take_range(range, rows).await?.buffered(1).try_collect::<Vec<_>>().await?;
                                let scanned = batches.iter().filter(|b| b.num_rows() > 0).map(|b| ScannedRows::of(b, &column));
                                scanned.collect::<Result<Vec<_>>>()
                            }
                        }
                    })
                    .await?
                };
                rows.map_err(move |e: Error| read.named(e))
            })
            .buffered(options.ahead)
            .map_ok(|batches| stream::iter(batches.into_iter().map(Ok)))
            .try_flatten())
    }
}
