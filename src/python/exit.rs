//! The end of the interpreter. A thread that comes back from work without the GIL while Python is being finalized is killed by
//! it, through Rust's frames, which aborts the process. So before that, while threads still run, new work is refused, work in
//! progress is cancelled and waited for, and builders that are still open are aborted.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use pyo3::marker::Ungil;
use pyo3::prelude::*;

use super::cancel::Cancel;
use crate::artifact::PartitionArtifactBuilder;
use crate::error::{Error, Result};
use crate::sync::Background;

/// How long work in progress may take to wind up, and builders to be aborted.
const WIND_UP: Duration = Duration::from_secs(10);
const ABORTS: Duration = Duration::from_secs(40);

#[derive(Default)]
struct Doors {
    /// A forked child has none of its parent's work.
    process: u32,
    /// No new work.
    closing: bool,
    /// No return either: the interpreter goes away.
    closed: bool,
    next: u64,
    /// Work in progress, and how it is cancelled.
    inside: BTreeMap<u64, Option<Cancel>>,
    /// Threads on their way back to the GIL.
    returning: usize,
    builders: Vec<Weak<PartitionArtifactBuilder>>,
}

static DOORS: Mutex<Option<Doors>> = Mutex::new(None);
static CHANGED: Condvar = Condvar::new();

type Guard = MutexGuard<'static, Option<Doors>>;

fn doors() -> Guard {
    let mut doors = DOORS.lock().unwrap_or_else(PoisonError::into_inner);
    let process = std::process::id();
    if doors.as_ref().is_none_or(|doors| doors.process != process) {
        *doors = Some(Doors { process, ..Doors::default() });
    }
    doors
}

fn with<T>(look: impl FnOnce(&mut Doors) -> T) -> T {
    look(doors().get_or_insert_default())
}

/// Wait until `done`; false where it is not by then.
fn wait_until(deadline: Option<Instant>, done: impl Fn(&mut Doors) -> bool) -> bool {
    let mut guard = doors();
    loop {
        if done(guard.get_or_insert_default()) {
            return true;
        }
        let left = deadline.map_or(WIND_UP, |deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_zero() {
            return false;
        }
        guard = CHANGED.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
    }
}

/// Whether the interpreter is about to go.
pub fn is_closing() -> bool {
    with(|doors| doors.closing)
}

/// Whether it has wound up: builders are aborted, and nothing waits for anybody.
pub fn is_closed() -> bool {
    with(|doors| doors.closed)
}

/// Why somebody comes in.
pub enum Entry {
    Work(Option<Cancel>),
    /// Removes what was left, also while work winds up.
    Cleanup,
}

/// Work in progress, which the end of the interpreter waits for.
pub struct Inside(u64);

/// Begin work; an error where the interpreter is exiting.
pub fn enter(entry: Entry) -> Result<Inside> {
    with(|doors| {
        let (cancel, refused) = match entry {
            Entry::Work(cancel) => (cancel, doors.closing),
            Entry::Cleanup => (None, doors.closed),
        };
        if refused {
            return Err(Error::Interrupted("the interpreter is exiting, and no new work is begun".into()));
        }
        let id = doors.next;
        doors.next += 1;
        doors.inside.insert(id, cancel);
        Ok(Inside(id))
    })
}

/// There is no interpreter to come back to, and the process ends in a moment.
fn stay_away() -> ! {
    loop {
        std::thread::park();
    }
}

impl Inside {
    /// Run `work` without the GIL.
    pub fn detach<T: Ungil>(&self, py: Python<'_>, work: impl Ungil + Send + FnOnce() -> T) -> T {
        let result = py.detach(|| {
            let result = work();
            let closed = with(|doors| {
                doors.returning += usize::from(!doors.closed);
                doors.closed
            });
            if closed {
                stay_away();
            }
            result
        });
        with(|doors| doors.returning = doors.returning.saturating_sub(1));
        CHANGED.notify_all();
        result
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        with(|doors| doors.inside.remove(&self.0));
        CHANGED.notify_all();
    }
}

/// Abort this builder at the end, if it is open then.
pub fn watch(builder: &Arc<PartitionArtifactBuilder>) {
    with(|doors| {
        doors.builders.retain(|known| known.strong_count() > 0);
        doors.builders.push(Arc::downgrade(builder));
    });
}

/// Take the GIL on a thread of Rust's own, to call Python; an error where the interpreter is going.
pub fn attach<T>(work: impl FnOnce(Python<'_>) -> Result<T>) -> Result<T> {
    let going = || Error::Interrupted("the interpreter is exiting".into());
    if with(|doors| doors.closed) {
        return Err(going());
    }
    Python::try_attach(work).unwrap_or_else(|| Err(going()))
}

/// What Python calls before it is finalized.
#[pyfunction]
fn wind_up(py: Python<'_>) {
    // A thread that is refused raises an exception, and must keep the GIL while it does.
    let _ = super::errors::module(py);
    let (cancels, builders) = with(|doors| {
        doors.closing = true;
        let cancels: Vec<Cancel> = doors.inside.values().flatten().cloned().collect();
        (cancels, doors.builders.iter().filter_map(Weak::upgrade).collect::<Vec<_>>())
    });
    py.detach(|| {
        cancels.iter().for_each(Cancel::set);
        builders.iter().for_each(|builder| builder.cancel());
        wait_until(Some(Instant::now() + WIND_UP), |doors| doors.inside.is_empty());
        if !builders.is_empty() {
            let aborting = Background::start(move || {
                builders.iter().for_each(|builder| drop(builder.abort()));
                Ok(())
            });
            let _ = aborting.wait_a_while(ABORTS);
        }
        with(|doors| doors.closed = true);
        // They need the GIL for a moment, which nobody keeps from them.
        wait_until(None, |doors| doors.returning == 0);
    });
}

/// A call of the Python layer in progress: the end of the interpreter waits until it has cleaned up.
#[pyclass(name = "_Call", module = "lance_artifact._lance_artifact", frozen)]
pub struct PyCall(Mutex<Option<Inside>>);

#[pymethods]
impl PyCall {
    #[new]
    fn new() -> PyResult<Self> {
        Ok(Self(Mutex::new(Some(enter(Entry::Work(None))?))))
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, _exception: &Bound<'_, pyo3::types::PyTuple>) {
        drop(self.0.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

/// Have Python call [`wind_up`]. Starts no thread.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyCall>()?;
    let hook = wrap_pyfunction!(wind_up, module)?;
    module.py().import("atexit")?.call_method1("register", (hook,))?;
    Ok(())
}
