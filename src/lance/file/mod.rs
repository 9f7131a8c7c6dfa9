//! Lance files: written page by page without an encoder, opened without trusting what they say, read by ranges.

mod bounded;
mod flat;
mod lists;
mod read;
mod widths;
mod write;

pub use flat::{CLOSING_PAGE_BYTES, FlatColumn, FlatType};
pub use read::{ByteReader, Expected, LanceFile, LanceFiles, local_read_error};
pub use write::{FlatFileWriter, TableWriter, Written, index_file, write_row};
