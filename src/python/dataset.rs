//! The dataset of a user's handle.

use std::collections::HashMap;
use std::sync::Arc;

use pyo3::prelude::*;

use super::runtime::run;
use super::storage::accessor;
use crate::error::Error;
use crate::lance::dataset::{Dataset, DatasetHandle, DatasetManifest};

/// The dataset that a pylance handle shows, opened again and found to be the same.
#[pyclass(name = "_Dataset", module = "lance_artifact._lance_artifact", frozen)]
pub struct PyDataset {
    pub handle: Arc<DatasetHandle>,
    pub dataset: Dataset,
}

#[pymethods]
impl PyDataset {
    /// `uri`: absolute; of the dataset or of the handle's branch. `manifest`: what the handle shows, serialized by pylance.
    /// `renew`: gives storage options anew when they end.
    #[new]
    #[pyo3(signature = (uri, manifest, *, storage_options = None, renew = None, base_storage_options = None))]
    fn new(
        py: Python<'_>,
        uri: &str,
        manifest: &[u8],
        storage_options: Option<HashMap<String, String>>,
        renew: Option<Py<PyAny>>,
        base_storage_options: Option<HashMap<String, HashMap<String, String>>>,
    ) -> PyResult<Self> {
        let options = accessor(storage_options, renew);
        let handle = Arc::new(DatasetHandle::try_new(uri, manifest, options, base_storage_options.unwrap_or_default())?);
        let opened = handle.clone();
        let dataset = run(py, None, |_, cancel| async move { cancel.race(opened.open()).await })?;
        Ok(Self { handle, dataset })
    }

    /// Whether the version that a serialized manifest describes is in the store as it is described; None where it is gone.
    fn is_there(&self, py: Python<'_>, manifest: &[u8]) -> PyResult<Option<bool>> {
        let handle = self.handle.at(DatasetManifest::parse(manifest)?);
        run(py, None, |_, cancel| async move {
            cancel
                .race(async {
                    match handle.open().await {
                        Ok(_) => Ok(Some(true)),
                        Err(Error::CommitConflict(_)) => Ok(Some(false)),
                        Err(_) => Ok(None),
                    }
                })
                .await
        })
    }

    /// The id of the field of a path.
    fn field_id(&self, path: &str) -> Option<i32> {
        self.dataset.field_id(path)
    }

    /// The path of a field in this version.
    fn path_of(&self, field_id: i32) -> Option<String> {
        self.dataset.field_path(field_id).ok()
    }

    /// Without credentials; of the branch.
    #[getter]
    fn uri(&self) -> String {
        self.handle.shown_uri()
    }

    #[getter]
    fn version(&self) -> u64 {
        self.handle.version()
    }

    /// None for main.
    #[getter]
    fn branch(&self) -> Option<&str> {
        self.handle.branch()
    }
}
