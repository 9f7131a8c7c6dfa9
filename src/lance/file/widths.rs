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
                Some(Layout::MiniBlockLayout(blocks)) => blocks.value_compression.as_ref(),
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
    use lance_encoding::format::ProtobufUtils;

    use super::*;
    use crate::model::item_field;

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
