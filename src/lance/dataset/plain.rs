//! A fragment's vectors, read as they lie.
//!
//! Vectors are wide, so that Lance stores them page after page as their values, with nothing between where none is null. Ranges of rows are
//! then ranges of bytes, and there is nothing to decode, which would copy all of them once more.

use std::ops::Range;
use std::sync::Arc;

use arrow_array::{Array, FixedSizeListArray, UInt64Array, make_array};
use arrow_buffer::Buffer;
use arrow_data::ArrayData;
use bytes::Bytes;
use lance_file::reader::FileReader;
use lance_io::scheduler::{FileScheduler, ScanScheduler};
use lance_table::format::{DataFile, Fragment};

use super::column::VectorColumn;
use super::scanned::ScannedRows;
use super::version::Dataset;
use crate::error::{Error, Result};
use crate::lance::file::{FlatColumn, FlatType};
use crate::model::{ElementType, fixed_size_list};

/// Values are numbers of at most so many bytes.
const ALIGNMENT: usize = 8;
/// From format 2.1 on Lance packs values of fewer bytes.
const WIDE: usize = 256;
/// Where a row id has the fragment's.
const FRAGMENT_SHIFT: u32 = 32;

/// The column of one fragment.
pub struct PlainFragment {
    file: FileScheduler,
    column: FlatColumn,
    /// The row id of its first row; those of the others follow.
    first: u64,
    element_type: ElementType,
    dimension: usize,
}

impl PlainFragment {
    /// `None` where the column does not lie so, or more than its values says which rows there are.
    pub async fn open(
        dataset: &Dataset,
        fragment: &Fragment,
        column: &VectorColumn,
        scheduler: &Arc<ScanScheduler>,
    ) -> Result<Option<Self>> {
        let Some((file, index)) = only_file(fragment, column).filter(|_| !dataset.has_stable_row_ids()) else { return Ok(None) };
        let path = dataset.data_file(&file.path);
        let file = scheduler.open_file_with_priority(&path, fragment.id, &file.file_size_bytes).await?;
        let metadata = FileReader::read_all_metadata(&file).await?;
        let (element_type, dimension) = (column.element_type, column.dimension);
        let kind = FlatType::Vector { bits: 8 * element_type.byte_width() as u64, dimension: dimension as u64 };
        let found = metadata.column_infos.get(index).and_then(|info| FlatColumn::of(info, kind, metadata.file_size_bytes));
        let rows = fragment.physical_rows.map(|rows| rows as u64);
        let Some(column) = found.filter(|found| Some(found.num_rows()) == rows && rows == Some(metadata.num_rows)) else { return Ok(None) };
        Ok(Some(Self { file, column, first: fragment.id << FRAGMENT_SHIFT, element_type, dimension }))
    }

    /// Some rows, a part for each page that they lie in.
    pub async fn read(&self, rows: Range<u32>) -> Result<Vec<ScannedRows>> {
        let pieces: Vec<Range<u64>> = self.column.pieces(u64::from(rows.start)..u64::from(rows.end)).collect();
        let expected: Vec<u64> = pieces.iter().map(|piece| piece.end - piece.start).collect();
        let read = self.file.submit_request(pieces, u64::from(rows.start)).await?;
        if !read.iter().map(|bytes| bytes.len() as u64).eq(expected) {
            return Err(Error::internal("a read of a data file gave other than it was asked for"));
        }
        let mut next = self.first + u64::from(rows.start);
        let of_piece = |bytes: Bytes| {
            let vectors = self.vectors(bytes)?;
            let row_ids = UInt64Array::from_iter_values(next..next + vectors.len() as u64);
            next += row_ids.len() as u64;
            Ok(ScannedRows { row_ids, vectors })
        };
        read.into_iter().map(of_piece).collect()
    }

    fn vectors(&self, bytes: Bytes) -> Result<FixedSizeListArray> {
        // As it was read, which is aligned where the store reads into memory of its own.
        let aligned = bytes.as_ptr().align_offset(ALIGNMENT) == 0;
        let values = if aligned { Buffer::from(bytes) } else { Buffer::from_slice_ref(bytes.as_ref()) };
        let data = ArrayData::builder(self.element_type.data_type())
            .len(values.len() / self.element_type.byte_width())
            .add_buffer(values)
            .build()?;
        fixed_size_list(make_array(data), self.dimension)
    }
}

/// The file of the dataset that holds the column of a fragment, and its place there, where no row was deleted or changed since.
fn only_file<'a>(fragment: &'a Fragment, column: &VectorColumn) -> Option<(&'a DataFile, usize)> {
    // Of a nested column the rows that its parents lack would be missing.
    if fragment.deletion_file.is_some() || !fragment.overlays.is_empty() || !column.is_top_level() {
        return None;
    }
    let mut holding = fragment.files.iter().filter_map(|file| {
        let place = file.fields.iter().position(|field| *field == column.field_id)?;
        // Files of the first format have none.
        Some((file, file.column_indices.get(place).copied().unwrap_or(-1)))
    });
    let (file, index) = holding.next()?;
    // Its end need not be read for that.
    let packed = (file.file_major_version, file.file_minor_version) >= (2, 1) && column.dimension * column.element_type.byte_width() < WIDE;
    let here = file.base_id.is_none() && !packed && holding.next().is_none();
    here.then_some((file, usize::try_from(index).ok()?))
}

#[cfg(test)]
mod tests {
    use arrow_array::cast::AsArray;
    use arrow_array::types::{Float32Type, Int64Type};
    use arrow_array::{Float32Array, ListArray, RecordBatch, RecordBatchIterator, StringArray};
    use arrow_schema::{Field, Schema};
    use futures::TryStreamExt;
    use lance::dataset::WriteParams;
    use lance_file::version::LanceFileVersion;
    use lance_io::scheduler::SchedulerConfig;

    use super::*;
    use crate::lance::dataset::ScanOptions;
    use crate::model::item_field;

    const ROWS: usize = 5000;

    /// Written in batches that are no pages, into fragments of 2,000 rows, behind other columns.
    async fn written(uri: &str, dimension: usize, null: Option<usize>, version: LanceFileVersion) -> Dataset {
        let values: Float32Array = (0..ROWS * dimension).map(|n| n as f32).collect();
        let validity = null.map(|null| arrow_buffer::NullBuffer::from_iter((0..ROWS).map(|row| row != null)));
        let kind = item_field(arrow_schema::DataType::Float32);
        let vectors = FixedSizeListArray::try_new(kind, dimension as i32, Arc::new(values), validity).unwrap();
        let text: StringArray = (0..ROWS).map(|row| Some(format!("row {row}"))).collect();
        let lists = ListArray::from_iter_primitive::<Int64Type, _, _>((0..ROWS).map(|row| Some(vec![Some(row as i64); row % 3])));
        let fields = [("text", text.data_type()), ("lists", lists.data_type()), ("vector", vectors.data_type())];
        let schema = Arc::new(Schema::new(fields.map(|(name, kind)| Field::new(name, kind.clone(), true)).to_vec()));
        let batch = RecordBatch::try_new(schema.clone(), vec![Arc::new(text), Arc::new(lists), Arc::new(vectors)]).unwrap();
        let batches: Vec<_> = (0..ROWS).step_by(700).map(|row| Ok(batch.slice(row, 700.min(ROWS - row)))).collect();
        let params = WriteParams { max_rows_per_file: 2000, data_storage_version: Some(version), ..WriteParams::default() };
        let reader = RecordBatchIterator::new(batches, schema);
        Dataset::new(lance::Dataset::write(reader, uri, Some(params)).await.unwrap())
    }

    async fn plain_fragments(dataset: &Dataset, column: &VectorColumn) -> usize {
        let store = dataset.0.object_store(None).await.unwrap();
        let scheduler = ScanScheduler::new(store.clone(), SchedulerConfig::max_bandwidth(&store));
        let mut plain = 0;
        for fragment in dataset.0.manifest().fragments.iter() {
            plain += usize::from(PlainFragment::open(dataset, fragment, column, &scheduler).await.unwrap().is_some());
        }
        plain
    }

    /// Row ids, and the first number of each vector.
    async fn scanned(dataset: &Dataset, column: &VectorColumn, batch_rows: u32) -> Vec<(u64, f32)> {
        let ids: Vec<u32> = dataset.0.manifest().fragments.iter().map(|fragment| fragment.id as u32).collect();
        let scan = dataset.scan(column, &ids, ScanOptions { batch_rows, ahead: 3 }).await.unwrap();
        let parts: Vec<ScannedRows> = scan.try_collect().await.unwrap();
        let rows = parts.iter().flat_map(|part| {
            let values = part.vectors.values().as_primitive::<Float32Type>().values();
            let width = part.vectors.value_length() as usize;
            assert_eq!(values.len(), part.vectors.len() * width);
            part.row_ids.values().iter().copied().zip(values.chunks_exact(width).map(|vector| vector[0])).collect::<Vec<_>>()
        });
        rows.collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn vectors_that_lie_as_they_are_are_read_so_and_others_as_lance_reads_them() {
        use LanceFileVersion::{V2_0, V2_1, V2_2};
        // Narrow ones are packed from 2.1 on; the second fragment has a null.
        for (version, dimension, null, plain) in [
            (V2_0, 96, None, 3),
            (V2_0, 8, None, 3),
            (V2_0, 96, Some(2500), 2),
            (V2_1, 96, None, 3),
            (V2_1, 768, None, 3),
            (V2_1, 8, None, 0),
            (V2_1, 96, Some(2500), 2),
            (V2_2, 96, None, 3),
            (V2_2, 768, Some(0), 2),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let dataset = written(folder.path().to_str().unwrap(), dimension, null, version).await;
            let column = VectorColumn::resolve(&dataset, "vector").unwrap();
            assert_eq!(plain_fragments(&dataset, &column).await, plain, "{version:?} {dimension} {null:?}");
            let row_id = |row: usize| ((row as u64 / 2000) << 32) + row as u64 % 2000;
            let is_null = |row: &u64| null.is_some_and(|null| *row == row_id(null));
            let expected: Vec<(u64, f32)> =
                (0..ROWS).map(|row| (row_id(row), (row * dimension) as f32)).filter(|(row, _)| !is_null(row)).collect();
            for batch_rows in [100, 999, 65_536] {
                let mut found = scanned(&dataset, &column, batch_rows).await;
                // What stands for a null is not looked at.
                found.retain(|(row, _)| !is_null(row));
                assert!(found == expected, "{version:?} {dimension} {null:?} {batch_rows}");
            }
            // What was deleted is not read.
            let mut changed = dataset.0.as_ref().clone();
            changed.delete("_rowid = 7").await.unwrap();
            let changed = Dataset::new(changed);
            assert_eq!(plain_fragments(&changed, &column).await, plain - usize::from(plain > 0 && null != Some(0)));
            let found = scanned(&changed, &column, 999).await;
            assert!(found.iter().all(|(row, _)| *row != 7));
            assert_eq!(found.len(), ROWS - 1);
        }
    }
}
