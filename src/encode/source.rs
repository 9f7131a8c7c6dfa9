//! The vectors that an encoder reads: a column of some fragments of one version of a dataset, scanned or sampled.

use arrow_array::cast::AsArray;
use arrow_array::types::UInt64Type;
use arrow_array::{Array, BooleanArray, FixedSizeListArray, UInt64Array, make_array};
use arrow_buffer::{Buffer, MutableBuffer};
use arrow_data::ArrayData;
use arrow_select::filter::filter;
use futures::stream::BoxStream;
use futures::{Stream, StreamExt, TryStreamExt, stream};
use rand::rngs::SmallRng;
use rand::seq::index;
use rand::{Rng, SeedableRng};

use super::cpu::as_float32;
use super::memory::{Vectors, scan_options};
use super::outliers::Outliers;
use super::prepare::{PreparedVectors, prepare};
use crate::artifact::Source;
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::lance::dataset::{Dataset, ScannedRows, VectorColumn};
use crate::model::{Metric, fixed_size_list, flat_values};

/// Vector bytes of one random read while sampling, where there is memory for it.
const TAKE_BYTES: usize = 32 << 20;

/// Reads on their way at once.
const TAKES_AT_ONCE: usize = 4;
/// Neighbouring rows that are drawn at once, where they are not alike; and fewer.
const RUNS: [usize; 4] = [64, 16, 4, 1];
/// A sample is of so many runs at least.
const LEAST_RUNS: usize = 256;
/// Runs that tell how alike neighbours are.
const PILOT_RUNS: usize = 64;

/// Of the rows that are encoded one in so many, and how many at least and at most, are looked at before.
const ENCODED_PER_SAMPLED: usize = 50;
const LEAST_SAMPLED: usize = 5000;
const MOST_SAMPLED: usize = 20_000;
const ENCODED_SEED: u64 = 0x7061_7274;

#[derive(Default)]
struct Mean {
    sum: f64,
    count: usize,
}

impl Mean {
    fn add(&mut self, value: f64) {
        self.sum += value;
        self.count += 1;
    }

    fn get(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }
}

/// How the vectors of a sample come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// For who takes prefixes.
    Random,
    /// Runs of neighbouring rows, for who draws from all of them again.
    AsRead,
}

/// The vectors of a column in some fragments of one version of a dataset.
#[derive(Debug, Clone)]
pub struct VectorSource {
    pub dataset: Dataset,
    pub column: VectorColumn,
    fragment_ids: Vec<u32>,
    /// What a scan may hold.
    scan_bytes: Option<u64>,
}

impl VectorSource {
    /// `fragment_ids`: all fragments if `None`.
    pub fn try_new(dataset: Dataset, column: &str, fragment_ids: Option<&[u32]>) -> Result<Self> {
        let column = VectorColumn::resolve(&dataset, column)?;
        let fragment_ids = dataset.select_fragments(fragment_ids)?;
        Ok(Self { dataset, column, fragment_ids, scan_bytes: None })
    }

    /// The same, whose scans keep within so many bytes.
    pub fn with_scan_bytes(self, scan_bytes: u64) -> Self {
        Self { scan_bytes: Some(scan_bytes), ..self }
    }

    /// As far as memory goes.
    pub fn vectors(&self) -> Vectors {
        Vectors { dimension: self.column.dimension, byte_width: self.column.element_type.byte_width() }
    }

    pub fn fragment_ids(&self) -> &[u32] {
        &self.fragment_ids
    }

    /// For the manifest.
    pub fn describe(&self) -> Source {
        Source {
            dataset_uri: self.dataset.shown_uri(),
            version: self.dataset.version(),
            branch: self.dataset.branch().map(str::to_string),
            column: self.column.path.clone(),
            field_id: Some(self.column.field_id),
            fragment_ids: self.fragment_ids.clone(),
            stable_row_ids: self.dataset.has_stable_row_ids(),
            data_files: Some(self.dataset.column_fingerprint(&self.fragment_ids, self.column.field_id)),
        }
    }

    /// Live rows.
    pub async fn count_rows(&self) -> Result<u64> {
        self.dataset.count_rows(&self.fragment_ids).await
    }

    fn row_bytes(&self) -> usize {
        self.column.dimension * self.column.element_type.byte_width()
    }

    /// All rows in order, in batches of about 16 MiB of vectors, or less, with a few read ahead.
    pub async fn scan_unfiltered(&self) -> Result<impl Stream<Item = Result<ScannedRows>> + Send + use<>> {
        self.dataset.scan(&self.column, &self.fragment_ids, scan_options(self.vectors(), self.scan_bytes)).await
    }

    /// All rows in order, prepared for `metric`.
    pub async fn scan(&self, metric: Metric) -> Result<impl Stream<Item = Result<PreparedVectors>> + Send + use<>> {
        Ok(self.scan_unfiltered().await?.map(move |scanned| scanned.and_then(|s| prepare(&s.row_ids, &s.vectors, metric))))
    }

    /// `rows` random vectors, prepared for `metric`, drawn without loading the column and the same for the same seed; fewer
    /// where the dataset holds fewer usable ones. Memory: the sample once, and what is read ahead.
    pub async fn sample(&self, rows: usize, metric: Metric, seed: u64, order: Order, budget: &Budget) -> Result<FixedSizeListArray> {
        Ok(self.drawn(rows, metric, seed, order, None, budget).await?.0)
    }

    /// The same, to train on: a few vectors that are far larger than all others are left out where `least` are left.
    pub async fn sample_to_train(
        &self,
        (rows, least): (usize, usize),
        metric: Metric,
        seed: u64,
        order: Order,
        budget: &Budget,
    ) -> Result<(FixedSizeListArray, Outliers)> {
        self.drawn(rows, metric, seed, order, Some(least), budget).await
    }

    async fn drawn(
        &self,
        rows: usize,
        metric: Metric,
        seed: u64,
        order: Order,
        least: Option<usize>,
        budget: &Budget,
    ) -> Result<(FixedSizeListArray, Outliers)> {
        let total = self.count_rows().await?;
        let total = usize::try_from(total).map_err(|_| Error::invalid(format!("{total} rows do not fit this machine's addresses")))?;
        let mut random = SmallRng::seed_from_u64(seed);
        let mut drawn = MutableBuffer::new(rows.min(total).saturating_mul(self.row_bytes()));
        // Where so much of the table is wanted, reading it once in order is cheaper than random access.
        if rows >= total / 8 || !self.sample_by_access(rows, total, metric, &mut random, &mut drawn, budget).await? {
            drawn.truncate(0);
            self.sample_by_scan(rows, metric, &mut random, &mut drawn, budget).await?;
        }
        let (width, element, dimension) = (self.row_bytes(), self.column.element_type, self.column.dimension);
        let (drawn, outliers) = tokio::task::spawn_blocking(move || {
            let outliers = least.map(|least| Outliers::trim(&mut drawn, element, dimension, metric, least)).transpose()?;
            if order == Order::Random {
                shuffle_rows(drawn.as_slice_mut(), width, &mut random);
            }
            Ok::<_, Error>((drawn, outliers.unwrap_or_default()))
        })
        .await??;
        budget.settle();
        let values = ArrayData::builder(self.column.element_type.data_type())
            .len(drawn.len() / self.column.element_type.byte_width())
            .add_buffer(drawn.into())
            .build()?;
        Ok((fixed_size_list(make_array(values), self.column.dimension)?, outliers))
    }

    /// Prepared vectors that tell how those that will be encoded lie among centroids: the same for the same rows.
    pub async fn sample_of_encoded(&self, metric: Metric, budget: &Budget) -> Result<FixedSizeListArray> {
        let there = self.count_rows().await? as usize;
        let rows = (there / ENCODED_PER_SAMPLED).clamp(LEAST_SAMPLED, MOST_SAMPLED);
        let held = self.scan_bytes.map_or(usize::MAX, |bytes| bytes as usize / self.row_bytes().max(1));
        self.sample(rows.min(held), metric, ENCODED_SEED, Order::Random, budget).await
    }

    /// Random runs of rows until enough are usable; false where most are not.
    async fn sample_by_access(
        &self,
        rows: usize,
        total: usize,
        metric: Metric,
        random: &mut SmallRng,
        drawn: &mut MutableBuffer,
        budget: &Budget,
    ) -> Result<bool> {
        let run = self.run_rows(rows, total, metric, random).await?;
        let runs = total / run;
        let mut order = index::sample(random, runs, (rows.div_ceil(run) * 2 + 1024).min(runs)).into_vec();
        let step = self.runs_of_a_take(run);
        let mut have = 0;
        while have < rows {
            if order.is_empty() {
                return Ok(false);
            }
            // As many as are missing, in a few reads side by side.
            let next: Vec<usize> = order.drain(..order.len().min(step * TAKES_AT_ONCE).min((rows - have).div_ceil(run))).collect();
            let takes: Vec<Vec<usize>> = next.chunks(step).map(<[usize]>::to_vec).collect();
            let mut taken = stream::iter(takes).map(|runs| self.take_runs(runs, run, metric)).buffered(TAKES_AT_ONCE);
            while let Some(picked) = taken.try_next().await? {
                let usable = picked.vectors.len().min(rows - have);
                have += usable;
                drawn.extend_from_slice(&self.bytes(&picked).as_slice()[..usable * self.row_bytes()]);
            }
            budget.relieve();
        }
        Ok(true)
    }

    fn runs_of_a_take(&self, run: usize) -> usize {
        // A take holds what it reads about four times.
        let take_bytes = self.scan_bytes.map_or(TAKE_BYTES, |bytes| TAKE_BYTES.min(bytes as usize / 4)) / TAKES_AT_ONCE;
        (take_bytes / self.row_bytes().max(1) / run).max(1)
    }

    /// About `rows` random vectors, prepared for `metric`, part by part, the same for the same seed: what would not fit memory at once.
    /// Rows that are not usable are missing from them. Unlike [`Self::sample`]'s they come as they lie.
    pub async fn sample_in_parts(&self, rows: usize, metric: Metric, seed: u64) -> Result<BoxStream<'_, Result<PreparedVectors>>> {
        let total = self.count_rows().await? as usize;
        let mut random = SmallRng::seed_from_u64(seed);
        if rows >= total / 8 {
            let keep = move |prepared: Result<PreparedVectors>| prepared.and_then(|p| thinned(p, rows, total, &mut random));
            return Ok(self.scan_prepared(metric).await?.map(keep).boxed());
        }
        let run = self.run_rows(rows, total, metric, &mut random).await?;
        let order = index::sample(&mut random, total / run, rows.div_ceil(run)).into_vec();
        let takes: Vec<Vec<usize>> = order.chunks(self.runs_of_a_take(run)).map(<[usize]>::to_vec).collect();
        Ok(stream::iter(takes).map(move |runs| self.take_runs(runs, run, metric)).buffered(TAKES_AT_ONCE).boxed())
    }

    /// The usable rows of some runs of `run` neighbouring rows, by their numbers.
    async fn take_runs(&self, mut runs: Vec<usize>, run: usize, metric: Metric) -> Result<PreparedVectors> {
        runs.sort_unstable();
        let places: Vec<u64> = runs.iter().flat_map(|n| n * run..(n + 1) * run).map(|place| place as u64).collect();
        let vectors = self.dataset.take(&places, &self.column, &self.fragment_ids).await?;
        tokio::task::spawn_blocking(move || prepare(&UInt64Array::from(places), &vectors, metric)).await?
    }

    /// How many neighbouring rows to draw at once: as many as tell nearly as much as that many from anywhere. Where rows lie beside
    /// those like them, as the pieces of a document do, that is few or one; and of a small sample too.
    async fn run_rows(&self, rows: usize, total: usize, metric: Metric, random: &mut SmallRng) -> Result<usize> {
        let most = RUNS[0];
        let enough = |run: &usize| *run == 1 || rows / run >= LEAST_RUNS;
        if total / most < PILOT_RUNS * 2 || RUNS.iter().filter(|run| enough(run)).count() == 1 {
            return Ok(1);
        }
        let pilot = index::sample(random, total / most, PILOT_RUNS).into_vec();
        let found = self.take_runs(pilot, most, metric).await?;
        let vectors = as_float32(&found.vectors);
        let vectors: Vec<&[f32]> = vectors.chunks_exact(self.column.dimension).collect();
        let run_of = |i: usize| found.row_ids.value(i) / most as u64;
        let square = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        // Between rows of the same runs, and of different ones.
        let (mut beside, mut apart) = (Mean::default(), Mean::default());
        for i in 0..vectors.len() {
            for step in [1, 7, most] {
                let Some(other) = vectors.get(i + step) else { continue };
                let mean = if run_of(i) == run_of(i + step) { &mut beside } else { &mut apart };
                mean.add(square(vectors[i], other));
            }
        }
        let alike = match (beside.get(), apart.get()) {
            (Some(beside), Some(apart)) if apart > 0.0 => (1.0 - beside / apart).max(0.0),
            _ => return Ok(1),
        };
        // So many rows tell as much as `run / (1 + (run - 1) * alike)` that were drawn by themselves.
        Ok(RUNS.into_iter().find(|run| enough(run) && (run - 1) as f64 * alike <= 1.0).unwrap_or(1))
    }

    /// As [`Self::scan`], prepared side by side, in order.
    async fn scan_prepared(&self, metric: Metric) -> Result<impl Stream<Item = Result<PreparedVectors>> + Send + use<>> {
        let scan = self.scan_unfiltered().await?;
        Ok(scan
            .map(move |scanned| async move {
                let scanned = scanned?;
                tokio::task::spawn_blocking(move || prepare(&scanned.row_ids, &scanned.vectors, metric)).await?
            })
            .buffered(4))
    }

    /// A reservoir over all usable rows, in one pass.
    async fn sample_by_scan(
        &self,
        rows: usize,
        metric: Metric,
        random: &mut SmallRng,
        reservoir: &mut MutableBuffer,
        budget: &Budget,
    ) -> Result<()> {
        let width = self.row_bytes();
        let mut seen = 0usize;
        let mut stream = Box::pin(self.scan_prepared(metric).await?);
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
            budget.relieve();
        }
        Ok(())
    }

    /// The bytes of prepared vectors, without a copy.
    fn bytes(&self, prepared: &PreparedVectors) -> Buffer {
        let values = flat_values(&prepared.vectors).to_data();
        let width = self.column.element_type.byte_width();
        values.buffers()[0].slice_with_length(values.offset() * width, values.len() * width)
    }
}

/// Each row with a chance of `rows` in `total`.
fn thinned(prepared: PreparedVectors, rows: usize, total: usize, random: &mut SmallRng) -> Result<PreparedVectors> {
    if rows >= total {
        return Ok(prepared);
    }
    let kept: BooleanArray = (0..prepared.vectors.len()).map(|_| Some(random.random_range(0..total) < rows)).collect();
    let row_ids = filter(&prepared.row_ids, &kept)?.as_primitive::<UInt64Type>().clone();
    let vectors = filter(&prepared.vectors, &kept)?.as_fixed_size_list().clone();
    Ok(PreparedVectors { row_ids, vectors, dropped: prepared.dropped })
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
