//! Storage options that are renewed where they came from: vended credentials end after an hour, builds do not.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use pyo3::prelude::*;

use crate::error::{Error, Result};
use crate::lance::{OptionsSource, StorageOptions, renewed_options, static_options};
use crate::sync::spawn;

/// A Python callable that gives a dictionary, or None.
struct Renewal(Arc<Py<PyAny>>);

#[async_trait]
impl OptionsSource for Renewal {
    async fn fetch(&self) -> Result<Option<HashMap<String, String>>> {
        let call = self.0.clone();
        spawn(move || {
            let given = Python::try_attach(|py| call.call0(py)?.extract::<Option<HashMap<String, String>>>(py));
            match given {
                Some(Ok(options)) => Ok(options),
                Some(Err(error)) => Err(Error::Storage(format!("storage_options: they ended and could not be renewed: {error}"))),
                None => Err(Error::Interrupted("the interpreter is ending".into())),
            }
        })
        .await
    }
}

/// `storage_options` of a caller: a dictionary, or a callable that gives one, and another one when that ends.
pub struct StorageOptionsArg {
    /// As they are now.
    pub options: HashMap<String, String>,
    pub accessor: Option<StorageOptions>,
}

impl<'a, 'py> FromPyObject<'a, 'py> for StorageOptionsArg {
    type Error = PyErr;

    fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let bad = |what: String| {
            PyErr::from(Error::invalid(format!("storage_options: got {what}, expected a dict of strings, or a callable that gives one")))
        };
        let renew = value.is_callable().then(|| value.to_owned().unbind());
        let given = if renew.is_some() { value.call0()? } else { value.to_owned() };
        let options: HashMap<String, String> =
            given.extract::<Option<_>>().map_err(|_| bad(given.get_type().to_string()))?.unwrap_or_default();
        Ok(Self { accessor: accessor(Some(options.clone()), renew), options })
    }
}

/// The accessor and the options as they are now, of options that may be missing.
pub fn parts(given: Option<StorageOptionsArg>) -> (Option<StorageOptions>, Option<HashMap<String, String>>) {
    given.map_or((None, None), |given| (given.accessor, Some(given.options)))
}

/// Options as they are now; `renew` is asked again when they end (`expires_at_millis`).
pub fn accessor(options: Option<HashMap<String, String>>, renew: Option<Py<PyAny>>) -> Option<StorageOptions> {
    let options = options.filter(|options| !options.is_empty())?;
    Some(match renew {
        None => static_options(options),
        Some(renew) => renewed_options(options, Box::new(Renewal(Arc::new(renew)))),
    })
}
