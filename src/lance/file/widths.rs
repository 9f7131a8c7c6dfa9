//! Whether the pages of a file hold values of the type that its schema says.
//!
//! Lance's decoder takes the width of a value from each page and its type from the schema. Where they differ, rows that are read from the
//! first on look right, and those that are read from the middle are the bytes of others.

use arrow_schema::DataType;
use lance_encoding::decoder::{ColumnInfo, PageEncoding};
use lance_encoding::format::metadata::compressive_encoding::Compression;
use lance_encoding::format::metadata::page_layout::Layout;
use lance_encoding::format::metadata::{CompressiveEncoding, PageLayout};
use lance_encoding::format::pb::nullable::Nullability;
use lance_encoding::format::pb::{ArrayEncoding, array_encoding};
use lance_file::reader::CachedFileMetadata;

use crate::error::{Error, Result};

/// Refuse a file with a page of values of another width than their type has.
pub fn check_widths(metadata: &CachedFileMetadata) -> Result<()> {
    let fields = &metadata.file_schema.fields;
    let types: Vec<DataType> = fields.iter().map(|field| field.data_type()).collect();
    // One column of the file for each field, as long as none has columns of its own.
    if types.len() != metadata.column_infos.len() || !types.iter().all(is_plain) {
        return Ok(());
    }
    for ((field, kind), column) in fields.iter().zip(&types).zip(&metadata.column_infos) {
        if let Some(page) = other_page(column, kind) {
            let what = format!("page {page} of column {:?} holds values of another width than its type, {kind}", field.name);
            return Err(Error::corrupt(what));
        }
    }
    Ok(())
}

fn is_plain(kind: &DataType) -> bool {
    match kind {
        DataType::FixedSizeList(item, _) => item.data_type().is_primitive(),
        other => other.is_primitive(),
    }
}

/// The first page of values of another width.
fn other_page(column: &ColumnInfo, kind: &DataType) -> Option<usize> {
    column.page_infos.iter().position(|page| match &page.encoding {
        PageEncoding::Legacy(encoding) => !may_hold(encoding, kind),
        PageEncoding::Structural(PageLayout { layout }) => {
            let values = match layout {
                Some(Layout::FullZipLayout(zipped)) => zipped.value_compression.as_ref(),
                // With a dictionary they are places in it.
                Some(Layout::MiniBlockLayout(blocks)) => blocks.value_compression.as_ref().filter(|_| blocks.dictionary.is_none()),
                _ => None,
            };
            !values.is_none_or(|values| may_compress(values, kind))
        }
        // Of a format that artifacts cannot have.
        PageEncoding::Planar(_) => false,
    })
}

/// Bits of a number as it is.
fn bits(kind: &DataType) -> Option<u64> {
    kind.primitive_width().map(|bytes| 8 * bytes as u64)
}

/// Of format 2.0. What says nothing of widths, or is compressed, is for the decoder to look at.
fn may_hold(encoding: &ArrayEncoding, kind: &DataType) -> bool {
    match &encoding.array_encoding {
        Some(array_encoding::ArrayEncoding::Nullable(nullable)) => {
            let values = match &nullable.nullability {
                Some(Nullability::NoNulls(some)) => some.values.as_ref(),
                Some(Nullability::SomeNulls(some)) => some.values.as_ref(),
                _ => None,
            };
            values.is_none_or(|values| may_hold(values, kind))
        }
        Some(array_encoding::ArrayEncoding::FixedSizeList(list)) => match kind {
            DataType::FixedSizeList(item, items) => {
                i64::from(list.dimension) == i64::from(*items) && list.items.as_ref().is_none_or(|items| may_hold(items, item.data_type()))
            }
            _ => false,
        },
        Some(array_encoding::ArrayEncoding::Flat(flat)) if flat.compression.is_none() => {
            bits(kind).is_none_or(|bits| flat.bits_per_value == bits)
        }
        _ => true,
    }
}

/// Of later formats.
fn may_compress(encoding: &CompressiveEncoding, kind: &DataType) -> bool {
    match (&encoding.compression, kind) {
        (Some(Compression::FixedSizeList(list)), DataType::FixedSizeList(item, items)) => {
            i64::try_from(list.items_per_value) == Ok(i64::from(*items))
                && list.values.as_ref().is_none_or(|values| may_compress(values, item.data_type()))
        }
        (Some(Compression::FixedSizeList(_)), _) => false,
        (Some(Compression::Flat(flat)), _) if flat.data.is_none() => bits(kind).is_none_or(|bits| flat.bits_per_value == bits),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::types::{Decimal128Type, Float32Type, Int8Type, UInt8Type, UInt32Type, UInt64Type};
    use arrow_array::{Array, ArrayRef, ArrowPrimitiveType, PrimitiveArray, RecordBatch};
    use arrow_schema::{Field, Schema};
    use lance_encoding::format::ProtobufUtils;
    use lance_file::version::ConcreteFileVersion;
    use lance_file::versions::create_writer;
    use lance_file::writer::FileWriterOptions;
    use lance_io::object_store::ObjectStore;
    use object_store::path::Path;

    use super::*;
    use crate::lance::LanceStore;
    use crate::lance::file::{Expected, LanceFiles};
    use crate::model::{fixed_size_list, item_field};

    const ROWS: usize = 20_000;
    const COLUMNS: [&str; 6] = ["ids", "part_ids", "small", "wide", "codes", "vectors"];

    /// `distinct` values, all over the range of their type.
    fn values<T: ArrowPrimitiveType>(count: usize, distinct: u64, of: impl Fn(u64) -> T::Native) -> ArrayRef {
        let value = |at: usize| of((at as u64 * 7 % distinct).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        Arc::new(PrimitiveArray::<T>::from_iter_values((0..count).map(value)))
    }

    /// Lance chooses how to encode by the values: as they are, packed, by a dictionary, or as one that is repeated.
    #[tokio::test(flavor = "multi_thread")]
    async fn what_lance_writes_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let store = LanceStore::open(folder.path().to_str().unwrap(), None).await.unwrap();
        let files = LanceFiles::new(&store);
        for distinct in [1, 3, 100, 1 << 40] {
            let columns: [ArrayRef; 6] = [
                values::<UInt64Type>(ROWS, distinct, |n| n),
                values::<UInt32Type>(ROWS, distinct, |n| n as u32),
                values::<Int8Type>(ROWS, distinct, |n| n as i8),
                values::<Decimal128Type>(ROWS, distinct, i128::from),
                Arc::new(fixed_size_list(values::<UInt8Type>(ROWS * 16, distinct, |n| n as u8), 16).unwrap()),
                Arc::new(fixed_size_list(values::<Float32Type>(ROWS * 96, distinct, |n| n as f32), 96).unwrap()),
            ];
            let fields: Vec<Field> = COLUMNS.iter().zip(&columns).map(|(name, c)| Field::new(*name, c.data_type().clone(), true)).collect();
            let batch = RecordBatch::try_new(Arc::new(Schema::new(fields)), columns.to_vec()).unwrap();
            for version in [ConcreteFileVersion::V2_0, ConcreteFileVersion::V2_1, ConcreteFileVersion::V2_2] {
                let (memory, path) = (Arc::new(ObjectStore::memory()), Path::from("file"));
                let schema = lance_core::datatypes::Schema::try_from(batch.schema().as_ref()).unwrap();
                let mut writer = create_writer(version, memory.create(&path).await.unwrap(), schema, FileWriterOptions::default()).unwrap();
                writer.write_batch(&batch).await.unwrap();
                writer.finish().await.unwrap();
                let name = format!("{distinct}-{version:?}.lance");
                std::fs::write(folder.path().join(&name), memory.read_one_all(&path).await.unwrap()).unwrap();
                let file = files.open(&name, Expected::default()).await.unwrap_or_else(|e| panic!("{name}: {e}"));
                let all = std::iter::once(0..ROWS as u64).collect();
                let read = file.decode(all, COLUMNS.to_vec(), ROWS as u32, Ok).await.unwrap();
                let [read] = read.as_slice() else { panic!("{name}: {} batches", read.len()) };
                assert_eq!(read.columns(), batch.columns(), "{name}");
            }
        }
    }

    #[test]
    fn values_have_the_width_of_their_type() {
        let flat = |bits| ProtobufUtils::basic_no_null_encoding(ProtobufUtils::flat_encoding(bits, 0, None));
        let list = |items, bits| ProtobufUtils::basic_no_null_encoding(ProtobufUtils::fsl_encoding(items, flat(bits), false));
        let codes = DataType::FixedSizeList(item_field(DataType::UInt8), 4);
        for (encoding, kind, expected) in [
            (flat(64), DataType::UInt64, true),
            (flat(32), DataType::UInt64, false),
            (flat(64), DataType::UInt32, false),
            (list(4, 8), codes.clone(), true),
            (list(5, 8), codes.clone(), false),
            (list(3, 8), codes.clone(), false),
            (list(4, 16), codes.clone(), false),
            (list(4, 8), DataType::UInt32, false),
            (ProtobufUtils::constant(Vec::new()), codes, true),
        ] {
            assert_eq!(may_hold(&encoding, &kind), expected, "{encoding:?} as {kind}");
        }
    }
}
