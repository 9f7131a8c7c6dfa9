//! Scan, filter, encode, write: the stages overlap, each with a bounded number of batches.

use std::sync::Arc;

use arrow_array::{FixedSizeListArray, RecordBatch, UInt8Array, UInt32Array};
use futures::{StreamExt, TryStreamExt};

use super::encoder::{Checked, Encoded, Encoder};
use super::prepare::Dropped;
use super::source::VectorSource;
use crate::artifact::format::bucket_schema;
use crate::artifact::{PartitionArtifactBuilder, RowCounts};
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::model::{Metric, fixed_size_list};
use crate::sync::spawn;

/// Batches being encoded at once. Each is encoded by all cores; a second one fills the gaps at its ends.
const BATCHES_IN_FLIGHT: usize = 2;

/// Encode every row of `source` into `builder`. `progress` gets the rows seen so far. The caller finishes or aborts the
/// builder.
pub async fn encode_into(
    source: &VectorSource,
    metric: Metric,
    encoder: Arc<dyn Encoder>,
    builder: Arc<PartitionArtifactBuilder>,
    budget: &Budget,
    progress: impl Fn(u64) + Send,
) -> Result<RowCounts> {
    let expected = source.count_rows().await?;
    let mut encoded = Box::pin(
        source
            .scan(metric)
            .await?
            .map(|prepared| {
                let encoder = encoder.clone();
                async move {
                    let prepared = prepared?;
                    tokio::task::spawn_blocking(move || {
                        let (batch, loss, checked) = encoded_batch(&prepared.row_ids, &prepared.vectors, encoder.as_ref())?;
                        Ok::<_, Error>((batch, loss, checked, prepared.dropped))
                    })
                    .await?
                }
            })
            .buffered(BATCHES_IN_FLIGHT),
    );
    let (mut dropped, mut checked) = (Dropped::default(), Checked::default());
    let (mut written, mut total_loss) = (0, 0.0);
    while let Some((batch, loss, batch_checked, batch_dropped)) = encoded.try_next().await? {
        dropped.add(batch_dropped);
        checked.add(batch_checked);
        total_loss += loss;
        written += batch.num_rows() as u64;
        let writing = builder.clone();
        spawn(move || writing.append_batch(&batch)).await?;
        budget.relieve();
        progress(written + dropped.total());
    }
    let seen = written + dropped.total();
    if seen != expected {
        return Err(Error::internal(format!("the scan gave {seen} rows, the dataset has {expected} in these fragments")));
    }
    builder.set_total_loss(total_loss);
    builder.set_assignment(encoder.assignment(checked));
    Ok(RowCounts { seen, written, dropped: dropped.by_reason() })
}

/// The batch to be written, its loss, and what was checked of it.
fn encoded_batch(
    row_ids: &arrow_array::UInt64Array,
    vectors: &FixedSizeListArray,
    encoder: &dyn Encoder,
) -> Result<(RecordBatch, f64, Checked)> {
    let Encoded { part_ids, codes, loss, checked } = encoder.encode(vectors)?;
    let rows = row_ids.len();
    let width = encoder.code_width();
    if part_ids.len() != rows || codes.len() != rows * width {
        return Err(Error::internal(format!(
            "the encoder gave {} partition ids and {} code bytes for {rows} rows",
            part_ids.len(),
            codes.len()
        )));
    }
    let codes = fixed_size_list(Arc::new(UInt8Array::from(codes)), width)?;
    let columns: Vec<arrow_array::ArrayRef> = vec![Arc::new(row_ids.clone()), Arc::new(UInt32Array::from(part_ids)), Arc::new(codes)];
    Ok((RecordBatch::try_new(bucket_schema(width), columns)?, loss, checked))
}
