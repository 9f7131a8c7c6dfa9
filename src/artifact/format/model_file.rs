//! `metadata.lance`: one row with the model, shapes and metric as schema metadata.

use std::collections::HashMap;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::{Array, FixedSizeListArray, ListArray, RecordBatch};
use arrow_schema::{DataType, Field, Schema};

use super::layout::LISTED;
use super::manifest::FileEntry;
use crate::error::{Error, Result};
use crate::io::Store;
use crate::lance::file::write_row;
use crate::model::{IvfPqModel, Metric, fixed_size_list, flat_values, item_field};

const CENTROIDS_COLUMN: &str = "_ivf_centroids";
const CODEBOOK_COLUMN: &str = "_pq_codebook";
const PREFIX: &str = "lance:index_build:";

/// One list of all rows of `rows`.
fn one_list(rows: FixedSizeListArray) -> Result<ListArray> {
    let field = item_field(rows.data_type().clone());
    let offsets = arrow_buffer::OffsetBuffer::from_lengths([rows.len()]);
    Ok(ListArray::try_new(field, offsets, Arc::new(rows), None)?)
}

/// Write the model. The codebook's rows are sub-vectors, so that its shape tells their number.
pub async fn write_model(store: &Store, file: &str, model: &IvfPqModel, sync: bool) -> Result<FileEntry> {
    let sub_dimension = model.dimension() / model.num_sub_vectors();
    let centroids = one_list(model.centroids().clone())?;
    let codebook = one_list(fixed_size_list(model.codebook().values().clone(), sub_dimension)?)?;
    let schema = Arc::new(Schema::new(vec![
        Field::new(CENTROIDS_COLUMN, centroids.data_type().clone(), true),
        Field::new(CODEBOOK_COLUMN, codebook.data_type().clone(), true),
    ]));
    let batch = RecordBatch::try_new(schema.clone(), vec![Arc::new(centroids), Arc::new(codebook)])?;
    let metadata = [
        ("artifact_version", LISTED.to_string()),
        ("distance_type", model.metric().to_string()),
        ("num_partitions", model.num_partitions().to_string()),
        ("num_sub_vectors", model.num_sub_vectors().to_string()),
        ("num_bits", model.num_bits().to_string()),
        ("dimension", model.dimension().to_string()),
    ];
    let metadata = metadata.map(|(key, value)| (format!("{PREFIX}{key}"), value));
    Ok(FileEntry::of(write_row(store, file, &metadata, &batch, sync).await?))
}

/// A value of the schema's metadata.
fn told<'a>(metadata: &'a HashMap<String, String>, name: &str) -> Result<&'a String> {
    metadata.get(&format!("{PREFIX}{name}")).ok_or_else(|| Error::corrupt(format!("schema metadata {PREFIX}{name} is missing")))
}

fn told_number(metadata: &HashMap<String, String>, name: &str) -> Result<usize> {
    let text = told(metadata, name)?;
    text.parse().map_err(|_| Error::corrupt(format!("schema metadata {PREFIX}{name} is {text:?}, expected a number")))
}

/// How many partitions the model of a file has.
pub fn told_partitions(metadata: &HashMap<String, String>) -> Result<usize> {
    told_number(metadata, "num_partitions")
}

/// The model of the file's only row.
pub fn parse_model(metadata: &HashMap<String, String>, batch: &RecordBatch) -> Result<IvfPqModel> {
    let number = |name: &str| told_number(metadata, name);
    if number("artifact_version")? != LISTED as usize {
        return Err(Error::corrupt(format!("artifact_version {} is not known, expected {LISTED}", number("artifact_version")?)));
    }
    if batch.num_rows() != 1 {
        return Err(Error::corrupt(format!("{} rows, expected one", batch.num_rows())));
    }
    let metric: Metric = told(metadata, "distance_type")?.parse()?;
    let (dimension, num_sub_vectors) = (number("dimension")?, number("num_sub_vectors")?);
    let column = |name: &str| -> Result<FixedSizeListArray> {
        let column = batch.column_by_name(name).ok_or_else(|| Error::corrupt(format!("column {name} is missing")))?;
        let bad = || Error::corrupt(format!("column {name} is {}, expected list<fixed_size_list<float>>", column.data_type()));
        let lists: &ListArray = column.as_list_opt().ok_or_else(bad)?;
        if lists.is_null(0) {
            return Err(Error::corrupt(format!("column {name} is null")));
        }
        lists.value(0).as_fixed_size_list_opt().cloned().ok_or_else(bad)
    };
    let centroids = column(CENTROIDS_COLUMN)?;
    let codebook = column(CODEBOOK_COLUMN)?;
    if centroids.value_length() as usize != dimension || dimension == 0 {
        return Err(Error::corrupt(format!("centroids of {} values, expected dimension {dimension}", centroids.value_length())));
    }
    let values = flat_values(&codebook);
    if !values.len().is_multiple_of(dimension) {
        return Err(Error::corrupt(format!("a codebook of {} values does not fit dimension {dimension}", values.len())));
    }
    // Whatever the writer's rows, the flat order is the same.
    let codebook = match values.data_type() {
        DataType::Float16 | DataType::Float32 | DataType::Float64 => fixed_size_list(values, dimension)?,
        other => return Err(Error::corrupt(format!("a codebook of {other}, expected float16, float32 or float64"))),
    };
    let model = IvfPqModel::try_new(&centroids, &codebook, metric, Some(num_sub_vectors))?;
    for (name, got, expected) in [
        ("num_partitions", model.num_partitions(), number("num_partitions")?),
        ("num_bits", model.num_bits() as usize, number("num_bits")?),
    ] {
        if got != expected {
            return Err(Error::corrupt(format!("the model has {name} {got}, the schema metadata says {expected}")));
        }
    }
    Ok(model)
}
