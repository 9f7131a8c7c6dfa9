//! Batches that cuVS encodes without Python's interpreter, for which they would wait wherever another thread of Python is busy.

use std::ffi::{c_int, c_void};

use pyo3::prelude::*;

use super::dlpack::{Borrowed, DlManagedTensor, dtype};
use crate::encode::device::{Cuda, Device, Tensor};

/// `cuvsIvfPqTransform`.
type Transform = unsafe extern "C" fn(usize, *mut c_void, *mut DlManagedTensor, *mut DlManagedTensor, *mut DlManagedTensor) -> c_int;
const SUCCEEDED: c_int = 1;
/// Whose sessions say so.
const SESSIONS: &str = "lance_artifact.backends.cuvs";

/// Calls that encode a batch, one after the other, by the handles of a session, which outlives this.
pub struct WithoutPython {
    transform: Transform,
    resources: usize,
    /// The index of each, and where its codes go if nobody reads them.
    calls: Vec<(usize, Option<usize>)>,
    /// Fewer rows than this are compared less exactly, where there is no room for so many.
    exact_from: usize,
    /// Rows that there is room for where codes go that nobody reads.
    rows: usize,
    device: usize,
}

impl WithoutPython {
    /// What a session says, for batches of up to `rows`; `None` where it must be asked for each.
    pub fn of(session: &Bound<'_, PyAny>, rows: usize, device: usize) -> PyResult<Option<Self>> {
        let kind = session.get_type();
        if kind.module()?.to_str()? != SESSIONS {
            return Ok(None);
        }
        let Some((transform, resources, calls, exact_from)) =
            session.call_method1("without_python", (rows,))?.extract::<Option<(usize, usize, Vec<(usize, Option<usize>)>, usize)>>()?
        else {
            return Ok(None);
        };
        // SAFETY: the address that our own backend got of the loaded library, which has the function of that name and signature.
        let transform = unsafe { std::mem::transmute::<*const c_void, Transform>(transform as *const c_void) };
        Ok(Some(Self { transform, resources, calls, exact_from, rows, device }))
    }

    /// Encode a batch; false where that failed, and who is to say why must do it again.
    pub fn encode(&self, batch: &[Tensor<<Cuda as Device>::Memory>; 3]) -> bool {
        let rows = batch[0].rows;
        let wide: Option<Vec<_>> =
            (rows < self.exact_from).then(|| batch.iter().map(|tensor| tensor.widened(self.exact_from)).collect()).flatten();
        let batch: Vec<_> = wide.unwrap_or_else(|| batch.to_vec());
        let rows = batch[0].rows;
        if rows > self.rows {
            return false;
        }
        let borrowed = |tensor: &Tensor<<Cuda as Device>::Memory>, address: usize, columns: Option<usize>| {
            let shape: Vec<usize> = std::iter::once(rows).chain(columns).collect();
            Borrowed::new(address, self.device, dtype(tensor.element), &shape)
        };
        self.calls.iter().all(|(index, unread)| {
            let [mut vectors, mut labels] = [&batch[0], &batch[1]].map(|tensor| borrowed(tensor, tensor.address(), tensor.columns));
            let mut codes = match unread {
                Some(address) => borrowed(&batch[2], *address, Some(1)),
                None => borrowed(&batch[2], batch[2].address(), batch[2].columns),
            };
            // SAFETY: the session lives, and with it resources and indexes; the arrays are of the slot, or have room for `self.rows`
            // rows, and this thread has their device. What the call puts on the stream the slot waits for.
            let status = unsafe {
                (self.transform)(self.resources, *index as *mut c_void, vectors.as_mut_ptr(), labels.as_mut_ptr(), codes.as_mut_ptr())
            };
            status == SUCCEEDED
        })
    }
}
