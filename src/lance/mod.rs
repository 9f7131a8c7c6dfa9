//! The only room that knows Lance, beside the seam to its index builder (`finalize::seam`). None of what is used here is a stable
//! contract: an upgrade of Lance is read against this list, and `tests/test_oracle.py` and the committed fixtures run against it.
//!
//! What may enter: code that names `lance` or a `lance_*` crate. Nothing here decides anything about artifacts or indexes.
//!
//! | module | leans on | what would break without an error |
//! | --- | --- | --- |
//! | `store` | `lance_io::object_store` (`ObjectStore`, its registry and storage options) | two stores for one `memory://`; credentials that are not renewed |
//! | `dataset::handle`, `manifest` | `DatasetBuilder`, `lance_table::format::{Manifest, Fragment}` as protobuf | a field that tells two commits apart is renamed or left empty: another dataset passes for the handle's |
//! | `dataset::rows` | `FileFragment::{count_rows, get_deletion_vector, physical_rows}`, `load_row_id_sequence`, `Dataset::{take, take_rows}` | row ids of another kind: coverage would compare the wrong numbers (each one is compared, so a build is refused) |
//! | `dataset::scan` | `FileFragment::open`, `FragmentReader::take_range` with row ids | deleted rows in a range: they would be encoded (the coverage check refuses them) |
//! | `dataset::history` | `DataFile::{fields, path}`, overlays, `row_id_meta`, transactions (`Operation::{Delete, Update}`) | a new way to change a column in place that leaves its file names: a stale index would be committed |
//! | `file::flat` | the 2.0 format: `PageEncoding::Legacy`, flat and fixed-size-list array encodings, `ColumnInfo` | none: other encodings are told apart and decoded by Lance |
//! | `file::write`, `segment::writer` | `FileWriter::{write_external_buffer, initialize_with_external_columns, add_global_buffer}`, `create_lazy_writer` | buffers without the alignment that a reader expects (fixtures) |
//! | `file::read` | `FileReader::{try_open, read_stream_projected}`, `ScanScheduler`; the 40 bytes of a footer | none: what does not fit is refused |
//! | `segment::writer` | `BatchEncoder`, `FieldEncodingStrategy` by version, `IvfModel`, `QuantizerMetadata`, metadata keys, transposed codes | a layout of codes that searches read otherwise: recall (oracle tests compare files and searches with stock's) |
//! | `segment::details` | `pb::VectorIndexDetails` and the runtime hints that stock writes | `optimize_indices` goes by other numbers (test_details compares with stock's) |
//! | `segment::{folder, committed}` | `indices_dir`, `load_indices`, the seven days of Lance's cleanup | none |
//! | `segment::model` | `DatasetIndexInternalExt::open_vector_index`, `VectorIndex::{ivf_model, quantizer, metric_type}` | a codebook in another order: codes of new rows would be noise (tests compare fingerprints with what was committed, and codes with stock's) |
//! | `segment::reader` | `auxiliary.idx`: its columns, `IVF_METADATA_KEY`, `STORAGE_METADATA_KEY`, `transposed`; `CompactFragReuseIndex` of version 0 | codes in another order: a merged index would be noise (tests compare it with stock's, row by row) |
//! | `kernels` | `normalize`, `compute_partitions_arrow_array`, `ProductQuantizer::quantize`, `L2Prepared` | another order of sums: codes would differ where it is close (oracle tests) |
//! | `builds` | `spawn_cpu`, `get_num_compute_intensive_cpus`, `IndexBuildProgress` | a stage of another name: no progress is shown |
//! | `finalize::seam` | `IvfIndexBuilder`, `ShuffleReader`, `Shuffler`, `HnswBuildParams` | the builder reads rows twice, or not all: rows read and stored are counted |

pub mod builds;
pub mod dataset;
mod error;
pub mod file;
pub mod kernels;
pub mod segment;
mod store;

pub use store::{LanceStore, OptionsSource, StorageOptions, renewed_options, static_options};
