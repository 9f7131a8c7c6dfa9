//! `IvfPqModel`: centroids, codebook and metric of one IVF_PQ index, validated once.

use std::fmt::{Display, Formatter};
use std::str::FromStr;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float16Type, Float32Type, Float64Type};
use arrow_array::{Array, ArrayRef, FixedSizeListArray};
use arrow_schema::{DataType, Field};
use xxhash_rust::xxh3::Xxh3;

use crate::error::{Error, Result};

/// How two vectors are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    L2,
    Cosine,
    Dot,
}

impl Metric {
    /// L2 and cosine encode residuals to the centroid; dot encodes the raw vector.
    pub fn encodes_residuals(self) -> bool {
        self != Self::Dot
    }
}

impl Display for Metric {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::L2 => "l2",
            Self::Cosine => "cosine",
            Self::Dot => "dot",
        })
    }
}

impl FromStr for Metric {
    type Err = Error;

    /// The names pylance takes, in any case.
    fn from_str(name: &str) -> Result<Self> {
        match name.to_ascii_lowercase().as_str() {
            "l2" | "euclidean" => Ok(Self::L2),
            "cosine" => Ok(Self::Cosine),
            "dot" => Ok(Self::Dot),
            _ => Err(Error::invalid(format!("metric: got {name:?}, expected \"l2\" (or \"euclidean\"), \"cosine\" or \"dot\""))),
        }
    }
}

/// The element types a vector column, its centroids and its codebook can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElementType {
    Float16,
    Float32,
    Float64,
}

impl ElementType {
    pub fn data_type(self) -> DataType {
        match self {
            Self::Float16 => DataType::Float16,
            Self::Float32 => DataType::Float32,
            Self::Float64 => DataType::Float64,
        }
    }

    pub fn byte_width(self) -> usize {
        match self {
            Self::Float16 => 2,
            Self::Float32 => 4,
            Self::Float64 => 8,
        }
    }
}

impl Display for ElementType {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Float16 => "float16",
            Self::Float32 => "float32",
            Self::Float64 => "float64",
        })
    }
}

impl TryFrom<&DataType> for ElementType {
    type Error = Error;

    fn try_from(data_type: &DataType) -> Result<Self> {
        match data_type {
            DataType::Float16 => Ok(Self::Float16),
            DataType::Float32 => Ok(Self::Float32),
            DataType::Float64 => Ok(Self::Float64),
            other => Err(Error::invalid(format!("vector element type: got {other}, expected float16, float32 or float64"))),
        }
    }
}

/// How a model was trained, as the details of an index record it. Lance goes by it when it optimizes an index or trains it anew.
/// It is not part of what a model is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Training {
    /// Rows that a partition was to have, where the caller said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_partition_size: Option<u64>,
    /// Training vectors per centroid and per codeword.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample_rate: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_iters: Option<u64>,
}

/// A trained IVF_PQ model: what an encoder needs to encode and what an index needs to be searched.
#[derive(Debug, Clone)]
pub struct IvfPqModel {
    centroids: FixedSizeListArray,
    codebook: FixedSizeListArray,
    metric: Metric,
    element_type: ElementType,
    num_sub_vectors: usize,
    num_bits: u32,
    fingerprint: String,
    training: Option<Training>,
}

/// An inner field as Lance writes it: nullable and named `item`.
pub fn item_field(data_type: DataType) -> Arc<Field> {
    Arc::new(Field::new("item", data_type, true))
}

/// A fixed-size list over `values` with Lance's inner field.
pub fn fixed_size_list(values: ArrayRef, size: usize) -> Result<FixedSizeListArray> {
    let width = i32::try_from(size).map_err(|_| Error::invalid(format!("list size {size} does not fit in 32 bits")))?;
    Ok(FixedSizeListArray::try_new(item_field(values.data_type().clone()), width, values, None)?)
}

/// The values that the rows of a fixed-size list cover, with the offset of a sliced array applied.
pub fn flat_values(list: &FixedSizeListArray) -> ArrayRef {
    let width = list.value_length() as usize;
    list.values().slice(list.value_offset(0) as usize * usize::from(!list.is_empty()), list.len() * width)
}

fn all_finite(values: &ArrayRef) -> bool {
    if values.null_count() > 0 {
        return false;
    }
    match values.data_type() {
        DataType::Float16 => values.as_primitive::<Float16Type>().values().iter().all(|v| v.is_finite()),
        DataType::Float32 => values.as_primitive::<Float32Type>().values().iter().all(|v| v.is_finite()),
        DataType::Float64 => values.as_primitive::<Float64Type>().values().iter().all(|v| v.is_finite()),
        _ => false,
    }
}

fn value_bytes(values: &ArrayRef) -> Vec<u8> {
    // Little-endian whatever the machine, so that a fingerprint means the same everywhere.
    match values.data_type() {
        DataType::Float16 => values.as_primitive::<Float16Type>().values().iter().flat_map(|v| v.to_le_bytes()).collect(),
        DataType::Float32 => values.as_primitive::<Float32Type>().values().iter().flat_map(|v| v.to_le_bytes()).collect(),
        _ => values.as_primitive::<Float64Type>().values().iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

impl IvfPqModel {
    /// Check and take a model.
    ///
    /// * `centroids`: `num_partitions` rows of `fixed_size_list<T>[dimension]`.
    /// * `codebook`: the flat buffer is ordered `[sub_vector][code][dimension / num_sub_vectors]`, as `2^num_bits` rows of
    ///   `fixed_size_list<T>[dimension]` (pylance's form) or as `num_sub_vectors * 2^num_bits` rows of
    ///   `fixed_size_list<T>[dimension / num_sub_vectors]`.
    /// * `num_sub_vectors`: needed for pylance's form, whose shape does not tell it; checked otherwise.
    pub fn try_new(
        centroids: &FixedSizeListArray,
        codebook: &FixedSizeListArray,
        metric: Metric,
        num_sub_vectors: Option<usize>,
    ) -> Result<Self> {
        let dimension = centroids.value_length() as usize;
        let num_partitions = centroids.len();
        if dimension == 0 || num_partitions == 0 {
            return Err(Error::invalid(format!(
                "ivf_centroids: got shape ({num_partitions}, {dimension}), expected at least one centroid of at least one dimension"
            )));
        }
        if u32::try_from(num_partitions).is_err() {
            return Err(Error::invalid(format!("ivf_centroids: {num_partitions} partitions do not fit in 32 bits")));
        }
        let element_type = ElementType::try_from(&centroids.value_type()).map_err(|e| e.context("ivf_centroids"))?;
        let codebook_type = ElementType::try_from(&codebook.value_type()).map_err(|e| e.context("pq_codebook"))?;
        if codebook_type != element_type {
            return Err(Error::invalid(format!(
                "pq_codebook: got {codebook_type}, expected the dtype of ivf_centroids, {element_type}; both must have the dtype of the column"
            )));
        }
        let row = codebook.value_length() as usize;
        let derived = if row > 0 && row != dimension && dimension.is_multiple_of(row) { Some(dimension / row) } else { None };
        let num_sub_vectors = match (derived, num_sub_vectors) {
            (Some(derived), Some(given)) if derived != given => {
                return Err(Error::invalid(format!(
                    "pq_codebook: its rows of {row} values make {derived} sub-vectors of dimension {dimension}, but num_sub_vectors is {given}"
                )));
            }
            (Some(derived), _) => derived,
            (None, Some(given)) => given,
            (None, None) => {
                return Err(Error::invalid(
                    "pq_codebook: a fixed-size list of whole vectors does not tell the number of sub-vectors; pass num_sub_vectors, or the codebook as an array of shape (num_sub_vectors, 2**num_bits, dimension // num_sub_vectors)",
                ));
            }
        };
        if num_sub_vectors == 0 || !dimension.is_multiple_of(num_sub_vectors) {
            return Err(Error::invalid(format!("num_sub_vectors: got {num_sub_vectors}, expected a divisor of the dimension {dimension}")));
        }
        let codes = codebook.len() * row / dimension;
        let num_bits = match codes {
            16 => 4,
            256 => 8,
            _ => 0,
        };
        if num_bits == 0 || codes * dimension != codebook.len() * row {
            return Err(Error::invalid(format!(
                "pq_codebook: got {} values, expected 2**num_bits * dimension with num_bits 4 or 8: {} or {} at dimension {dimension}",
                codebook.len() * row,
                16 * dimension,
                256 * dimension
            )));
        }
        if num_bits == 4 && !num_sub_vectors.is_multiple_of(2) {
            return Err(Error::invalid(format!(
                "num_sub_vectors: got {num_sub_vectors}, expected an even number with num_bits=4 (two codes share a byte)"
            )));
        }
        let centroid_values = flat_values(centroids);
        let codebook_values = flat_values(codebook);
        for (name, list, values) in [("ivf_centroids", centroids, &centroid_values), ("pq_codebook", codebook, &codebook_values)] {
            if list.null_count() > 0 || !all_finite(values) {
                return Err(Error::invalid(format!("{name}: holds a null, NaN or infinite value; every value must be finite")));
            }
        }
        let mut hash = Xxh3::new();
        hash.update(format!("{metric}|{element_type}|{num_partitions}|{dimension}|{num_sub_vectors}|{num_bits}|").as_bytes());
        hash.update(&value_bytes(&centroid_values));
        hash.update(&value_bytes(&codebook_values));
        Ok(Self {
            centroids: fixed_size_list(centroid_values, dimension)?,
            codebook: fixed_size_list(codebook_values, dimension)?,
            metric,
            element_type,
            num_sub_vectors,
            num_bits,
            fingerprint: format!("{:032x}", hash.digest128()),
            training: None,
        })
    }

    /// The same model, with how it was trained.
    pub fn with_training(self, training: Option<Training>) -> Self {
        Self { training, ..self }
    }

    /// How it was trained, where that is known.
    pub fn training(&self) -> Option<Training> {
        self.training
    }

    /// `num_partitions` rows of `fixed_size_list<T>[dimension]`.
    /// Bytes of centroids and codebook.
    pub fn num_bytes(&self) -> usize {
        flat_values(&self.centroids).len() * self.element_type.byte_width()
            + flat_values(&self.codebook).len() * self.element_type.byte_width()
    }

    pub fn centroids(&self) -> &FixedSizeListArray {
        &self.centroids
    }

    /// `2^num_bits` rows of `fixed_size_list<T>[dimension]`, flat order `[sub_vector][code][sub_dimension]`.
    pub fn codebook(&self) -> &FixedSizeListArray {
        &self.codebook
    }

    pub fn metric(&self) -> Metric {
        self.metric
    }

    pub fn element_type(&self) -> ElementType {
        self.element_type
    }

    pub fn num_partitions(&self) -> usize {
        self.centroids.len()
    }

    pub fn dimension(&self) -> usize {
        self.centroids.value_length() as usize
    }

    pub fn num_sub_vectors(&self) -> usize {
        self.num_sub_vectors
    }

    pub fn num_bits(&self) -> u32 {
        self.num_bits
    }

    /// Bytes of one PQ code.
    pub fn code_width(&self) -> usize {
        self.num_sub_vectors * self.num_bits as usize / 8
    }

    /// 32 hexadecimal digits over metric, dtype, shapes and every value: equal models have equal fingerprints.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}
