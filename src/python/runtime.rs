//! One Tokio runtime for the process, made at the first call that needs it, and waiting that answers Ctrl-C.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use tokio::runtime::Runtime;

use super::cancel::Cancel;
use super::exit::{self, Entry, Inside};
use super::logs;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::sync::{self, Background};

/// How often a waiting call looks for signals.
const POLL: Duration = Duration::from_millis(50);

/// After work that takes longer, its memory is given back.
const LONG: Duration = Duration::from_millis(500);

/// Blocking threads that are kept for the short work of stores and files: IO goes on however many threads are had later.
const BLOCKING_THREADS: usize = 4;
/// More threads than these a build may need at a moment: to train, encode and write. It does with fewer where it must.
const OTHER_THREADS: usize = 3;
/// How long the threads of others may take to start.
const START: Duration = Duration::from_secs(20);

static RUNTIME: OnceLock<(u32, Runtime)> = OnceLock::new();
static MAKING: Mutex<Option<Error>> = Mutex::new(None);

fn number(variable: &str) -> Option<usize> {
    std::env::var(variable).ok()?.trim().parse().ok().filter(|n| *n > 0)
}

/// Start every thread that must not be refused later: this runtime's, Rayon's and those of Lance's computations. Where one is
/// refused it is an error here, before any work; afterwards it would be a panic, or work that waits for ever.
fn make(ruined: &mut Option<Error>) -> Result<Runtime> {
    if let Some(error) = ruined {
        return Err(error.clone());
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let workers = number("TOKIO_WORKER_THREADS").unwrap_or(cores);
    let shared = number("RAYON_NUM_THREADS").unwrap_or(cores);
    // Lance's pool has a worker, and blocking threads, of which one is enough to go on.
    sync::check_available(workers + BLOCKING_THREADS + shared + 2 + OTHER_THREADS)?;
    let made = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads((4 * cores).clamp(32, 512))
        .thread_keep_alive(Duration::from_secs(u64::MAX))
        .enable_all()
        .thread_name("lance-artifact")
        .build()
        .map_err(|e| sync::refused(&e))?;
    // From here on a refusal, by a limit that others reached since the check, cannot be mended in this process.
    let started = sync::caught(|| {
        if let Err(error) = rayon::ThreadPoolBuilder::new().num_threads(shared).build_global()
            && let Some(io) = std::error::Error::source(&error).and_then(|e| e.downcast_ref::<std::io::Error>())
        {
            return Err(sync::refused(io));
        }
        let all = Arc::new(tokio::sync::Barrier::new(BLOCKING_THREADS));
        made.block_on(async {
            let waiting: Vec<_> = (0..BLOCKING_THREADS)
                .map(|_| {
                    let (all, handle) = (all.clone(), made.handle().clone());
                    tokio::task::spawn_blocking(move || handle.block_on(all.wait()).is_leader())
                })
                .collect();
            let ours = futures::future::try_join_all(waiting);
            let lances = crate::lance::builds::start_threads();
            let both = async { (ours.await, lances.await) };
            match tokio::time::timeout(START, both).await {
                Ok((ours, lances)) => lances.and(ours.map(|_| ()).map_err(Error::from)),
                Err(_) => Err(sync::refused(&std::io::ErrorKind::TimedOut.into())),
            }
        })
    });
    match started {
        Ok(()) => Ok(made),
        Err(error) => {
            made.shutdown_background();
            let error = error.context("lance_artifact cannot be used in this process");
            *ruined = Some(error.clone());
            Err(error)
        }
    }
}

pub fn runtime() -> Result<&'static Runtime> {
    if RUNTIME.get().is_none() {
        let mut ruined = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
        if RUNTIME.get().is_none() {
            let made = make(&mut ruined)?;
            let _ = RUNTIME.set((std::process::id(), made));
        }
    }
    match RUNTIME.get() {
        Some((pid, runtime)) if *pid == std::process::id() => Ok(runtime),
        Some(_) => Err(Error::internal(
            "lance_artifact was used before this process was forked, and its threads did not come along; start workers with the multiprocessing method \"spawn\" or \"forkserver\"",
        )),
        None => Err(Error::internal("the runtime could not be made")),
    }
}

/// A step of progress, on its way to the caller's thread.
enum Event {
    Start(String, Option<u64>, String),
    Advance(String, u64),
    Complete(String),
}

/// Reports without ever waiting for whoever listens.
#[derive(Clone)]
pub struct Reporter {
    events: Sender<Event>,
    cancel: Cancel,
}

impl Progress for Reporter {
    fn start(&self, stage: &str, total: Option<u64>, unit: &str) {
        let _ = self.events.send(Event::Start(stage.into(), total, unit.into()));
    }

    fn advance(&self, stage: &str, completed: u64) {
        let _ = self.events.send(Event::Advance(stage.into(), completed));
    }

    fn complete(&self, stage: &str) {
        let _ = self.events.send(Event::Complete(stage.into()));
    }

    fn check(&self) -> Result<()> {
        if self.cancel.is_set() { Err(Error::Interrupted("interrupted".into())) } else { Ok(()) }
    }
}

/// Calls `progress(event, stage, completed, total, unit)` on the thread that waits.
struct Listener<'py> {
    callback: Option<Bound<'py, PyAny>>,
    total: Option<u64>,
    unit: String,
}

impl Listener<'_> {
    fn tell(&mut self, events: Vec<Event>) -> PyResult<()> {
        let mut events = events.into_iter().peekable();
        while let Some(event) = events.next() {
            let Some(callback) = &self.callback else { return Ok(()) };
            // Only the newest of several steps of one stage is worth a call.
            if matches!(event, Event::Advance(..)) && matches!(events.peek(), Some(Event::Advance(..))) {
                continue;
            }
            let result = match event {
                Event::Start(stage, total, unit) => {
                    self.total = total;
                    self.unit = unit;
                    callback.call1(("start", stage, 0u64, total, self.unit.as_str()))
                }
                Event::Advance(stage, completed) => callback.call1(("progress", stage, completed, self.total, self.unit.as_str())),
                Event::Complete(stage) => callback.call1(("complete", stage, self.total.unwrap_or(0), self.total, self.unit.as_str())),
            };
            result?;
        }
        Ok(())
    }
}

fn drain(receiver: &Receiver<Event>) -> (Vec<Event>, bool) {
    let mut events = Vec::new();
    match receiver.recv_timeout(POLL) {
        Ok(event) => events.push(event),
        Err(RecvTimeoutError::Timeout) => return (events, false),
        Err(RecvTimeoutError::Disconnected) => return (events, true),
    }
    while let Ok(event) = receiver.try_recv() {
        events.push(event);
    }
    (events, false)
}

/// Run asynchronous work on the runtime and wait for it without the GIL, passing progress on and looking for signals. An
/// exception (Ctrl-C, or one of the callback) cancels the work, waits for it to clean up, and is raised.
pub fn run<T, F>(py: Python<'_>, progress: Option<Bound<'_, PyAny>>, work: impl FnOnce(Reporter, Cancel) -> F) -> PyResult<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let cancel = Cancel::new();
    let inside = exit::enter(Entry::Work(Some(cancel.clone())))?;
    run_inside(py, &inside, progress, cancel, look, work)
}

static POLL_CANCEL: PyOnceLock<Py<PyAny>> = PyOnceLock::new();

/// Ctrl-C, and what the caller of Python's layer set to cancel.
fn look(py: Python<'_>) -> PyResult<()> {
    py.check_signals()?;
    if exit::is_closing() {
        return Ok(());
    }
    POLL_CANCEL.get_or_try_init(py, || py.import("lance_artifact._cancel")?.getattr("poll").map(Bound::unbind))?.call0(py).map(|_| ())
}

/// [`run`] for what removes what was left: it is done also while the interpreter winds up.
pub fn clean_up<T, F>(py: Python<'_>, work: F) -> PyResult<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    // What cancels a call does not cancel its cleaning up.
    run_inside(py, &exit::enter(Entry::Cleanup)?, None, Cancel::new(), |py| py.check_signals(), |_, _| work)
}

fn run_inside<T, F>(
    py: Python<'_>,
    inside: &Inside,
    progress: Option<Bound<'_, PyAny>>,
    cancel: Cancel,
    look: impl Fn(Python<'_>) -> PyResult<()>,
    work: impl FnOnce(Reporter, Cancel) -> F,
) -> PyResult<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let runtime = inside.detach(py, runtime)?;
    logs::follow_level(py)?;
    let started = Instant::now();
    let (events, receiver) = channel();
    let receiver = Mutex::new(receiver);
    let guard = events.clone();
    let work = work(Reporter { events, cancel: cancel.clone() }, cancel.clone());
    let task = runtime.spawn(async move {
        let result = work.await;
        drop(guard);
        result
    });
    let mut listener = Listener { callback: progress, total: None, unit: String::new() };
    let mut raised = None;
    loop {
        let (events, ended) = inside.detach(py, || drain(&receiver.lock().unwrap_or_else(PoisonError::into_inner)));
        if exit::is_closing() {
            // A thread that runs Python when the interpreter goes is killed.
            listener.callback = None;
        }
        if ended || task.is_finished() {
            let mut events = events;
            events.extend(receiver.lock().unwrap_or_else(PoisonError::into_inner).try_iter());
            if raised.is_none() {
                raised = listener.tell(events).err();
            }
            break;
        }
        if raised.is_none() {
            logs::deliver(py);
            raised = look(py).and_then(|()| listener.tell(events)).err();
            if raised.is_some() {
                cancel.set();
            }
        }
    }
    let result = inside.detach(py, || runtime.block_on(task));
    give_back(py, inside, started);
    if !exit::is_closing() {
        logs::deliver(py);
    }
    match (raised, result) {
        (Some(exception), _) => Err(exception),
        (None, Ok(result)) => Ok(result?),
        (None, Err(join)) => Err(Error::from(join).into()),
    }
}

fn give_back(py: Python<'_>, inside: &Inside, started: Instant) {
    if started.elapsed() > LONG {
        inside.detach(py, super::allocator::give_back);
    }
}

/// Signals come to this thread only.
fn is_main_thread(py: Python<'_>) -> PyResult<bool> {
    let threading = py.import("threading")?;
    let main = threading.call_method0("main_thread")?.getattr("ident")?;
    threading.call_method0("get_ident")?.eq(main)
}

/// [`run`] for blocking work, which goes on to its own end even where the caller was interrupted.
pub fn run_blocking<T: Send + 'static>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send + 'static) -> PyResult<T> {
    let inside = exit::enter(Entry::Work(None))?;
    inside.detach(py, runtime)?;
    block_inside(py, &inside, work)
}

/// [`run_blocking`] for what needs none of the runtime's threads, and starts none of them.
pub fn run_apart<T: Send + 'static>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send + 'static) -> PyResult<T> {
    block_inside(py, &exit::enter(Entry::Work(None))?, work)
}

/// [`run_blocking`] for what removes what was left: it is done also while the interpreter winds up.
pub fn clean_up_blocking<T: Send + 'static>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send + 'static) -> PyResult<T> {
    block_inside(py, &exit::enter(Entry::Cleanup)?, work)
}

/// On this thread, or beside it where signals are to be looked for meanwhile.
fn block_inside<T: Send + 'static>(py: Python<'_>, inside: &Inside, work: impl FnOnce() -> Result<T> + Send + 'static) -> PyResult<T> {
    let started = Instant::now();
    let result = if is_main_thread(py)? {
        let mut beside = inside.detach(py, || Background::start(work));
        loop {
            match inside.detach(py, || beside.wait_a_while(POLL)) {
                Ok(result) => break result,
                Err(later) => beside = later,
            }
            py.check_signals()?;
        }
    } else {
        inside.detach(py, || sync::caught(work))
    };
    give_back(py, inside, started);
    if !exit::is_closing() {
        logs::deliver(py);
    }
    Ok(result?)
}
