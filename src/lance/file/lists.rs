//! Files of lists of rows, read as files of rows.
//!
//! Lance's shuffler writes a list of rows for each partition. In the 2.0 format the values of what lists hold lie in columns of their own,
//! just as those of a file without lists do; the column of the lists says where each of them ends.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::UInt64Type;
use arrow_schema::{DataType, Field, Fields, Schema};
use lance_encoding::decoder::{ColumnInfo, PageEncoding, PageInfo};
use lance_encoding::format::pb::{ColumnEncoding, array_encoding, column_encoding};
use lance_file::version::ConcreteFileVersion;

use super::read::LanceFile;
use crate::error::{Error, Result};

const OFFSETS: &str = "offsets";
/// Lists whose ends are decoded at once.
const LISTS_AT_ONCE: u32 = 1 << 16;
/// The most lists for a byte of a file: an empty one takes an offset, which packs into a bit.
const LISTS_PER_BYTE: u64 = 8;
/// Columns before those of the rows: the lists, and the struct that each row is.
const BEFORE: usize = 2;

/// What a page of lists says of itself.
struct Page {
    lists: u64,
    /// An end as large as this is that of a list that is null.
    null: u64,
    rows: u64,
}

impl LanceFile {
    /// How many rows each list of the file's only column holds, and the same file as if it held those rows.
    pub async fn into_rows(self) -> Result<(Vec<u64>, Self)> {
        let corrupt = |what: &str| Error::corrupt(format!("{}: {what}", self.place()));
        let fields = fields_of_rows(self.schema())
            .ok_or_else(|| corrupt(&format!("it holds {:?}, expected one column of lists of structs", self.schema().fields())))?;
        let metadata = self.file_metadata().clone();
        if metadata.version != ConcreteFileVersion::V2_0 {
            return Err(corrupt(&format!(
                "lists in Lance's file format {:?}, expected 2.0, in which they can be read in part",
                metadata.version
            )));
        }
        let infos = &metadata.column_infos;
        if infos.len() != BEFORE + fields.len() || self.num_rows() > self.size().saturating_mul(LISTS_PER_BYTE) {
            return Err(corrupt("its columns are not those of lists of rows"));
        }
        let (ends, pages) = ends_of_lists(&infos[0]).ok_or_else(|| corrupt("its first column is not encoded as lists"))?;
        if pages.iter().try_fold(0u64, |sum, page| sum.checked_add(page.lists)) != Some(self.num_rows()) {
            return Err(corrupt("the pages of its lists do not hold all of them"));
        }
        let schema = Schema::new(vec![Field::new(OFFSETS, DataType::UInt64, false)]);
        let offsets = self.seen_as(schema, vec![ends], self.num_rows()).await?;
        let all = std::iter::once(0..self.num_rows()).filter(|lists| !lists.is_empty()).collect();
        let read = offsets.decode(all, vec![OFFSETS], LISTS_AT_ONCE, Ok).await?;
        let mut ends = read.iter().flat_map(|batch| batch.column(0).as_primitive::<UInt64Type>().values().iter().copied());
        let mut lengths = Vec::with_capacity(self.num_rows() as usize);
        for page in &pages {
            let mut last = 0;
            for _ in 0..page.lists {
                let end = ends.next().filter(|end| *end >= last && *end < page.null);
                let end = end.ok_or_else(|| corrupt("one of its lists is null, or ends before it begins"))?;
                lengths.push(end - last);
                last = end;
            }
            if last != page.rows {
                return Err(corrupt(&format!("its lists end at row {last} of a page, which says {}", page.rows)));
            }
        }
        let rows = pages.iter().try_fold(0u64, |sum, page| sum.checked_add(page.rows)).ok_or_else(|| corrupt("its rows overflow"))?;
        let in_column = |info: &Arc<ColumnInfo>| info.page_infos.iter().try_fold(0u64, |sum, page| sum.checked_add(page.num_rows));
        if infos[BEFORE..].iter().any(|info| in_column(info) != Some(rows)) {
            return Err(corrupt(&format!("its lists hold {rows} rows, its columns do not")));
        }
        let columns = (0u32..).zip(&infos[BEFORE..]).map(|(index, info)| {
            Arc::new(ColumnInfo::new(index, info.page_infos.clone(), info.buffer_offsets_and_sizes.to_vec(), info.encoding.clone()))
        });
        let seen = self.seen_as(Schema::new(fields), columns.collect(), rows).await?;
        Ok((lengths, seen))
    }
}

fn fields_of_rows(schema: &Schema) -> Option<Fields> {
    let [field] = schema.fields().as_ref() else { return None };
    let (DataType::List(item) | DataType::LargeList(item)) = field.data_type() else { return None };
    let DataType::Struct(fields) = item.data_type() else { return None };
    // Others have columns of their own within.
    let plain = |field: &Arc<Field>| match field.data_type() {
        DataType::FixedSizeList(item, _) => item.data_type().is_primitive(),
        other => other.is_primitive(),
    };
    fields.iter().all(plain).then(|| fields.clone())
}

/// Where lists end, as a column of numbers, and its pages.
fn ends_of_lists(lists: &ColumnInfo) -> Option<(Arc<ColumnInfo>, Vec<Page>)> {
    let (mut infos, mut pages) = (Vec::new(), Vec::new());
    for page in lists.page_infos.iter() {
        let PageEncoding::Legacy(encoding) = &page.encoding else { return None };
        let Some(array_encoding::ArrayEncoding::List(list)) = &encoding.array_encoding else { return None };
        pages.push(Page { lists: page.num_rows, null: list.null_offset_adjustment, rows: list.num_items });
        infos.push(PageInfo {
            num_rows: page.num_rows,
            priority: page.priority,
            encoding: PageEncoding::Legacy(list.offsets.as_deref()?.clone()),
            buffer_offsets_and_sizes: page.buffer_offsets_and_sizes.clone(),
        });
    }
    let values = ColumnEncoding { column_encoding: Some(column_encoding::ColumnEncoding::Values(())) };
    Some((Arc::new(ColumnInfo::new(0, infos.into(), Vec::new(), values)), pages))
}
