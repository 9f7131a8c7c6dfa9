//! Small files of a folder, wherever it is: what a run keeps beside its artifacts. And its URI.

use bytes::Bytes;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;

use super::runtime::run;
use super::storage::StorageOptionsArg;
use super::storage::parts;
use crate::io::{Condition, without_credentials, without_quoted_credentials};
use crate::lance::LanceStore;

/// Put a file of a folder where there is none of that name; whether it was put. Readers see the whole of it, or nothing.
#[pyfunction]
#[pyo3(signature = (folder, name, content, storage_options = None, sync = true))]
pub fn put_new(
    py: Python<'_>,
    folder: String,
    name: String,
    content: PyBackedBytes,
    storage_options: Option<StorageOptionsArg>,
    sync: bool,
) -> PyResult<bool> {
    let (options, _) = parts(storage_options);
    run(py, None, |_, cancel| async move {
        let put = async {
            let store = LanceStore::open(&folder, options.as_ref()).await?;
            store.put_if(&name, Bytes::from_owner(content), Condition::Absent, sync).await
        };
        cancel.race(put).await
    })
}

/// The content of a file of a folder; None where it does not exist.
#[pyfunction]
#[pyo3(signature = (folder, name, storage_options = None))]
pub fn read_file<'py>(
    py: Python<'py>,
    folder: String,
    name: String,
    storage_options: Option<StorageOptionsArg>,
) -> PyResult<Option<Bound<'py, PyBytes>>> {
    let (options, _) = parts(storage_options);
    let read = run(py, None, |_, cancel| async move {
        cancel.race(async { LanceStore::open(&folder, options.as_ref()).await?.read(&name).await }).await
    })?;
    Ok(read.map(|content| PyBytes::new(py, &content)))
}

/// Files and folders in a folder ("" is the root), each with its bytes (None: a folder) and the second it was changed; nothing below.
#[pyfunction]
#[pyo3(signature = (folder, below = "", storage_options = None))]
pub fn list_folder(
    py: Python<'_>,
    folder: String,
    below: &str,
    storage_options: Option<StorageOptionsArg>,
) -> PyResult<Vec<(String, Option<u64>, f64)>> {
    let (options, _) = parts(storage_options);
    let below = below.to_string();
    let entries = run(py, None, |_, cancel| async move {
        cancel.race(async { LanceStore::open(&folder, options.as_ref()).await?.list_folder(&below).await }).await
    })?;
    let seconds = |time: std::time::SystemTime| time.duration_since(std::time::UNIX_EPOCH).map_or(0.0, |age| age.as_secs_f64());
    Ok(entries.into_iter().map(|e| (e.path, (!e.is_folder).then_some(e.size), seconds(e.modified))).collect())
}

/// Delete files of a folder, those already gone included, and local folders (`""` is the root) that are empty then.
#[pyfunction]
#[pyo3(signature = (folder, names, folders, storage_options = None))]
pub fn delete_files(
    py: Python<'_>,
    folder: String,
    names: Vec<String>,
    folders: Vec<String>,
    storage_options: Option<StorageOptionsArg>,
) -> PyResult<()> {
    let (options, _) = parts(storage_options);
    run(py, None, |_, cancel| async move {
        let delete = async {
            let store = LanceStore::open(&folder, options.as_ref()).await?;
            store.delete(&names).await?;
            store.remove_empty_dirs(&folders.iter().map(String::as_str).collect::<Vec<_>>());
            Ok(())
        };
        cancel.race(delete).await
    })
}

/// Files that attempts to write an artifact left in a folder, in the order in which they may be deleted, and whether one is at work
/// there. Of attempts elsewhere it cannot be known: they are over if `unknown_too`.
#[pyfunction]
#[pyo3(signature = (folder, storage_options = None, unknown_too = false))]
pub fn unfinished_files(
    py: Python<'_>,
    folder: String,
    storage_options: Option<StorageOptionsArg>,
    unknown_too: bool,
) -> PyResult<(Vec<String>, bool)> {
    let (options, _) = parts(storage_options);
    let found =
        run(
            py,
            None,
            |_, cancel| async move { cancel.race(crate::artifact::unfinished_files(&folder, options.as_ref(), unknown_too)).await },
        )?;
    Ok((found.files, found.is_busy))
}

/// Delete them, plain names under a claim on those, and local folders that are empty then.
#[pyfunction]
#[pyo3(signature = (folder, storage_options = None, unknown_too = false))]
pub fn delete_unfinished(py: Python<'_>, folder: String, storage_options: Option<StorageOptionsArg>, unknown_too: bool) -> PyResult<()> {
    let (options, _) = parts(storage_options);
    run(py, None, |_, cancel| async move { cancel.race(crate::artifact::delete_unfinished(&folder, options.as_ref(), unknown_too)).await })
}

/// A URI without passwords, signatures and tokens, for messages.
#[pyfunction]
pub fn shown_uri(uri: &str) -> String {
    without_credentials(uri)
}

/// What somebody else says of a URI, without its passwords, signatures and tokens.
#[pyfunction]
pub fn without_secrets(message: &str, uri: &str) -> String {
    without_quoted_credentials(message, uri)
}

/// The URI, or path, of a file or folder below one.
#[pyfunction]
pub fn uri_below(uri: &str, path: &str) -> String {
    crate::io::uri_below(uri, path)
}

/// A URI without user, password, query and fragment; a path as it is.
#[pyfunction]
pub fn uri_place(uri: &str) -> String {
    crate::io::uri_place(uri)
}
