//! Bytes: stores, URIs (true and shown), local files, uploads, checksummed tails, whose a file is, and what comes from outside.
//!
//! What may enter: what would be the same for any bytes. Nothing in here knows what they mean, or Lance.

mod file;
mod limits;
mod local;
pub mod outside;
mod owner;
mod store;
mod tail;
mod upload;
mod uri;

pub use file::{FileSink, LOCAL_BUFFER_BYTES};
pub use limits::files_left;
pub use local::{HIDDEN_PREFIX, LOCK_FILE, Lock, parents_of_new, sync_dir};
pub use owner::Owner;
pub use store::{Condition, Entry, Seen, Store, check_relative_path};
pub use tail::TailRecorder;
pub use upload::{MAX_PARTS, MIN_PART_BYTES, Uploads};
pub use uri::{has_scheme, uri_below, uri_place, without_credentials, without_quoted_credentials};
