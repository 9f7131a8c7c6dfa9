//! A dataset as an encoder sees it: opened at one version, restricted to fragments, scanned or sampled in bounded memory.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::UInt64Type;
use arrow_array::{Array, FixedSizeListArray, RecordBatch, UInt64Array, make_array};
use arrow_buffer::{Buffer, MutableBuffer};
use arrow_data::ArrayData;
use futures::{Stream, StreamExt, TryStreamExt, stream};
use lance::Dataset;
use lance::dataset::ProjectionRequest;
use lance::dataset::fragment::{BaseSchedulers, FileFragment, FragReadConfig};
use lance_io::scheduler::{ScanScheduler, SchedulerConfig};
use lance_table::format::Fragment;
use rand::rngs::SmallRng;
use rand::seq::index;
use rand::{Rng, SeedableRng};

use super::column::VectorColumn;
use super::dataset::data_files;
use super::prepare::{PreparedVectors, prepare};
use crate::artifact::{Source, without_credentials};
use crate::error::{Error, Result};
use crate::model::{Metric, fixed_size_list, flat_values};

/// Vector bytes of one scanned batch.
const BATCH_BYTES: usize = 16 << 20;
/// Vector bytes of one random read while sampling.
const TAKE_BYTES: usize = 32 << 20;

/// The vectors of a column in some fragments of one version of a dataset.
#[derive(Debug, Clone)]
pub struct VectorSource {
    pub dataset: Arc<Dataset>,
    pub column: VectorColumn,
    fragments: Vec<Fragment>,
}

impl VectorSource {
    /// `fragment_ids`: all fragments if `None`.
    pub fn try_new(dataset: Dataset, column: &str, fragment_ids: Option<&[u32]>) -> Result<Self> {
        let column = VectorColumn::resolve(&dataset, column)?;
        let fragments = select_fragments(&dataset, fragment_ids)?;
        Ok(Self { dataset: Arc::new(dataset), column, fragments })
    }

    pub fn fragment_ids(&self) -> Vec<u32> {
        self.fragments.iter().map(|f| f.id as u32).collect()
    }

    /// For the manifest.
    pub fn describe(&self) -> Source {
        Source {
            dataset_uri: without_credentials(self.dataset.uri()),
            version: self.dataset.version().version,
            branch: self.dataset.manifest().branch.clone(),
            column: self.column.path.clone(),
            field_id: Some(self.column.field_id),
            fragment_ids: self.fragment_ids(),
            stable_row_ids: self.dataset.manifest().uses_stable_row_ids(),
            data_files: Some(data_files(&self.dataset, &self.fragment_ids(), self.column.field_id)),
        }
    }

    /// Live rows.
    pub async fn count_rows(&self) -> Result<u64> {
        let chosen: std::collections::HashSet<u64> = self.fragments.iter().map(|f| f.id).collect();
        let mut rows = 0;
        for fragment in self.dataset.get_fragments().into_iter().filter(|f| chosen.contains(&(f.id() as u64))) {
            rows += fragment.count_rows(None).await? as u64;
        }
        Ok(rows)
    }

    fn row_bytes(&self) -> usize {
        self.column.dimension * self.column.element_type.byte_width()
    }

    /// All rows in order, in batches of about 16 MiB of vectors with a few read ahead.
    ///
    /// Reads ranges of rows rather than Lance's scan, which reads whole pages: of a table written in one piece those are as
    /// large as its files, and several at a time.
    pub async fn scan_unfiltered(&self) -> Result<impl Stream<Item = Result<Scanned>> + Send + use<>> {
        let rows = (BATCH_BYTES / self.row_bytes().max(1)).clamp(256, 65_536) as u32;
        let ahead = std::thread::available_parallelism().map_or(4, usize::from).clamp(4, 16);
        let (dataset, column) = (self.dataset.clone(), self.column.clone());
        let store = dataset.object_store(None).await?;
        let scheduler = ScanScheduler::new(store.clone(), SchedulerConfig::max_bandwidth(&store));
        let bases = BaseSchedulers::max_bandwidth();
        let opened = stream::iter(self.fragments.clone())
            .map(move |fragment| {
                let (dataset, path) = (dataset.clone(), column.path.clone());
                let (scheduler, bases) = (scheduler.clone(), bases.clone());
                async move {
                    let projection = dataset.schema().project(&[path])?;
                    let fragment = FileFragment::new(dataset, fragment);
                    let config = FragReadConfig::default().with_row_id(true).with_scan_scheduler(scheduler).with_base_schedulers(bases);
                    let physical_rows = fragment.physical_rows().await? as u32;
                    Ok::<_, Error>((Arc::new(fragment.open(&projection, config).await?), physical_rows))
                }
            })
            // The next fragment's metadata comes while this one is read.
            .buffered(2);
        let ranges = opened
            .map_ok(move |(reader, physical_rows)| {
                let starts = (0..physical_rows).step_by(rows as usize);
                stream::iter(starts.map(move |start| Ok::<_, Error>((reader.clone(), start..physical_rows.min(start + rows)))))
            })
            .try_flatten();
        let column = self.column.clone();
        Ok(ranges
            .map(move |range| {
                let column = column.clone();
                async move {
                    let (reader, range) = range?;
                    // A task of its own: decoding is work, and the reader of the stream may be busy.
                    tokio::spawn(async move {
                        let batches = reader.take_range(range, rows).await?.buffered(1).try_collect::<Vec<_>>().await?;
                        batches.iter().filter(|b| b.num_rows() > 0).map(|b| Scanned::of(b, &column)).collect::<Result<Vec<_>>>()
                    })
                    .await?
                }
            })
            .buffered(ahead)
            .map_ok(|batches| stream::iter(batches.into_iter().map(Ok)))
            .try_flatten())
    }

    /// All rows in order, prepared for `metric`.
    pub async fn scan(&self, metric: Metric) -> Result<impl Stream<Item = Result<PreparedVectors>> + Send + use<>> {
        Ok(self.scan_unfiltered().await?.map(move |scanned| scanned.and_then(|s| prepare(&s.row_ids, &s.vectors, metric))))
    }

    /// `rows` random vectors, prepared for `metric`, drawn without loading the column and the same for the same seed; fewer
    /// where the dataset holds fewer usable ones. They come in random order, because training takes prefixes. Memory: the
    /// sample once, and what is read ahead.
    pub async fn sample(&self, rows: usize, metric: Metric, seed: u64) -> Result<FixedSizeListArray> {
        let total = self.count_rows().await?;
        let total = usize::try_from(total).map_err(|_| Error::invalid(format!("{total} rows do not fit this machine's addresses")))?;
        let mut random = SmallRng::seed_from_u64(seed);
        let mut drawn = MutableBuffer::new(rows.min(total).saturating_mul(self.row_bytes()));
        // Where so much of the table is wanted, reading it once in order is cheaper than random access.
        if rows >= total / 8 || !self.sample_by_access(rows, total, metric, &mut random, &mut drawn).await? {
            drawn.truncate(0);
            self.sample_by_scan(rows, metric, &mut random, &mut drawn).await?;
        }
        let width = self.row_bytes();
        let drawn = tokio::task::spawn_blocking(move || {
            shuffle_rows(drawn.as_slice_mut(), width, &mut random);
            drawn
        })
        .await?;
        let values = ArrayData::builder(self.column.element_type.data_type())
            .len(drawn.len() / self.column.element_type.byte_width())
            .add_buffer(drawn.into())
            .build()?;
        fixed_size_list(make_array(values), self.column.dimension)
    }

    /// Random rows until enough are usable; false where most are not.
    async fn sample_by_access(
        &self,
        rows: usize,
        total: usize,
        metric: Metric,
        random: &mut SmallRng,
        drawn: &mut MutableBuffer,
    ) -> Result<bool> {
        let mut order = index::sample(random, total, (rows * 2 + 1024).min(total)).into_vec();
        let step = (TAKE_BYTES / self.row_bytes().max(1)).max(1);
        let mut have = 0;
        while have < rows {
            if order.is_empty() {
                return Ok(false);
            }
            let mut offsets: Vec<u64> = order.drain(..order.len().min(step).min(rows - have)).map(|i| i as u64).collect();
            offsets.sort_unstable();
            let batch = self.take(&offsets).await?;
            let row_ids = UInt64Array::from_iter_values(0..batch.num_rows() as u64);
            let picked = prepare(&row_ids, &self.column.extract(&batch)?, metric)?;
            have += picked.vectors.len();
            drawn.extend_from_slice(self.bytes(&picked).as_slice());
        }
        Ok(true)
    }

    /// A reservoir over all usable rows, in one pass.
    async fn sample_by_scan(&self, rows: usize, metric: Metric, random: &mut SmallRng, reservoir: &mut MutableBuffer) -> Result<()> {
        let width = self.row_bytes();
        let mut seen = 0usize;
        // Prepared side by side, taken in order.
        let mut stream = Box::pin(
            self.scan_unfiltered()
                .await?
                .map(|scanned| async {
                    let scanned = scanned?;
                    tokio::task::spawn_blocking(move || prepare(&scanned.row_ids, &scanned.vectors, metric)).await?
                })
                .buffered(4),
        );
        while let Some(prepared) = stream.try_next().await? {
            let bytes = self.bytes(&prepared);
            let at_once = rows.saturating_sub(seen).min(prepared.vectors.len());
            reservoir.extend_from_slice(&bytes.as_slice()[..at_once * width]);
            seen += at_once;
            for vector in bytes.as_slice()[at_once * width..].chunks_exact(width) {
                let place = random.random_range(0..=seen);
                if place < rows {
                    reservoir.as_slice_mut()[place * width..(place + 1) * width].copy_from_slice(vector);
                }
                seen += 1;
            }
        }
        Ok(())
    }

    /// The bytes of prepared vectors, without a copy.
    fn bytes(&self, prepared: &PreparedVectors) -> Buffer {
        let values = flat_values(&prepared.vectors).to_data();
        let width = self.column.element_type.byte_width();
        values.buffers()[0].slice_with_length(values.offset() * width, values.len() * width)
    }

    /// Rows by their place among the live rows of the chosen fragments.
    async fn take(&self, offsets: &[u64]) -> Result<RecordBatch> {
        let projection = ProjectionRequest::from_columns([self.column.path.as_str()], self.dataset.schema());
        if self.fragments.len() == self.dataset.get_fragments().len() {
            return Ok(self.dataset.take(offsets, projection).await?);
        }
        // A place among some fragments is a place in the dataset, shifted by the rows of the fragments left out.
        let chosen: std::collections::HashSet<u64> = self.fragments.iter().map(|f| f.id).collect();
        let mut shifted = Vec::with_capacity(offsets.len());
        let (mut dataset_start, mut chosen_start, mut next) = (0u64, 0u64, 0usize);
        for fragment in self.dataset.get_fragments() {
            let rows = fragment.count_rows(None).await? as u64;
            if chosen.contains(&(fragment.id() as u64)) {
                while next < offsets.len() && offsets[next] < chosen_start + rows {
                    shifted.push(offsets[next] - chosen_start + dataset_start);
                    next += 1;
                }
                chosen_start += rows;
            }
            dataset_start += rows;
        }
        Ok(self.dataset.take(&shifted, projection).await?)
    }
}

/// Fisher and Yates, in place.
fn shuffle_rows(rows: &mut [u8], width: usize, random: &mut SmallRng) {
    for last in (1..rows.len() / width.max(1)).rev() {
        let other = random.random_range(0..=last);
        if other < last {
            let (before, from_last) = rows.split_at_mut(last * width);
            before[other * width..(other + 1) * width].swap_with_slice(&mut from_last[..width]);
        }
    }
}

fn select_fragments(dataset: &Dataset, fragment_ids: Option<&[u32]>) -> Result<Vec<Fragment>> {
    let all = dataset.manifest().fragments.iter();
    let Some(ids) = fragment_ids else {
        return Ok(all.cloned().collect());
    };
    let wanted: std::collections::BTreeSet<u64> = ids.iter().map(|id| u64::from(*id)).collect();
    if wanted.is_empty() {
        return Err(Error::invalid("fragment_ids: got an empty list; expected at least one fragment id, or None for all"));
    }
    let found: Vec<Fragment> = all.filter(|f| wanted.contains(&f.id)).cloned().collect();
    if found.len() != wanted.len() {
        let missing: Vec<u64> = wanted.iter().filter(|id| found.iter().all(|f| f.id != **id)).copied().collect();
        return Err(Error::invalid(format!(
            "fragment_ids: fragments {missing:?} are not in {} at version {}",
            without_credentials(dataset.uri()),
            dataset.version().version
        )));
    }
    Ok(found)
}

/// Scanned rows, not yet filtered.
#[derive(Debug, Clone)]
pub struct Scanned {
    pub row_ids: UInt64Array,
    pub vectors: FixedSizeListArray,
}

impl Scanned {
    fn of(batch: &RecordBatch, column: &VectorColumn) -> Result<Self> {
        let row_ids = batch
            .column_by_name(lance_core::ROW_ID)
            .and_then(|c| c.as_primitive_opt::<UInt64Type>())
            .ok_or_else(|| Error::internal("a scanned batch has no row ids"))?;
        Ok(Self { row_ids: row_ids.clone(), vectors: column.extract(batch)? })
    }

    pub fn len(&self) -> usize {
        self.row_ids.len()
    }

    /// `rows` rows from `first` on, without a copy.
    pub fn slice(&self, first: usize, rows: usize) -> Self {
        Self { row_ids: self.row_ids.slice(first, rows), vectors: self.vectors.slice(first, rows) }
    }
}
