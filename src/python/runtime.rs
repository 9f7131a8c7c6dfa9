//! One Tokio runtime for the process, made at the first call that needs it, and waiting that answers Ctrl-C.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use lance_index::progress::IndexBuildProgress;
use pyo3::prelude::*;
use tokio::runtime::Runtime;
use tokio::sync::watch;

use crate::encode::TrainProgress;
use crate::error::{Error, Result};

/// How often a waiting call looks for signals.
const POLL: Duration = Duration::from_millis(50);

/// After work that takes longer, its memory is given back.
const LONG: Duration = Duration::from_millis(500);

static RUNTIME: OnceLock<(u32, Runtime)> = OnceLock::new();

pub fn runtime() -> Result<&'static Runtime> {
    if RUNTIME.get().is_none() {
        let made = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("lance-artifact").build()?;
        let _ = RUNTIME.set((std::process::id(), made));
    }
    match RUNTIME.get() {
        Some((pid, runtime)) if *pid == std::process::id() => Ok(runtime),
        Some(_) => Err(Error::internal(
            "lance_artifact was used before this process was forked, and its threads did not come along; start workers with the multiprocessing method \"spawn\" or \"forkserver\"",
        )),
        None => Err(Error::internal("the runtime could not be made")),
    }
}

/// Tells background work to stop.
#[derive(Clone)]
pub struct Cancel(Arc<watch::Sender<bool>>);

impl Cancel {
    fn new() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }

    pub fn is_set(&self) -> bool {
        *self.0.borrow()
    }

    fn set(&self) {
        self.0.send_replace(true);
    }

    /// For work that has to wind up in order: true once it is cancelled.
    pub fn subscribe(&self) -> watch::Receiver<bool> {
        self.0.subscribe()
    }

    /// Run `work` until it ends or is cancelled; then it is dropped where it waits.
    pub async fn race<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let mut cancelled = self.0.subscribe();
        tokio::select! {
            result = work => result,
            _ = cancelled.wait_for(|set| *set) => Err(Error::Interrupted("interrupted".into())),
        }
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

impl std::fmt::Debug for Reporter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reporter")
    }
}

impl TrainProgress for Reporter {
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

/// Lance's builder reports its stages here. Its training and shuffling do nothing in a finalizer and are not shown.
#[async_trait]
impl IndexBuildProgress for Reporter {
    async fn stage_start(&self, stage: &str, total: Option<u64>, unit: &str) -> lance_core::Result<()> {
        if stage == "merge_partitions" {
            self.start(stage, total, unit);
        }
        Ok(())
    }

    async fn stage_progress(&self, stage: &str, completed: u64) -> lance_core::Result<()> {
        if stage == "merge_partitions" {
            self.advance(stage, completed);
        }
        Ok(())
    }

    async fn stage_complete(&self, stage: &str) -> lance_core::Result<()> {
        if stage == "merge_partitions" {
            self.complete(stage);
        }
        Ok(())
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
    let runtime = runtime()?;
    let started = Instant::now();
    let cancel = Cancel::new();
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
        let (events, ended) = py.detach(|| drain(&receiver.lock().unwrap_or_else(PoisonError::into_inner)));
        if ended || task.is_finished() {
            let mut events = events;
            events.extend(receiver.lock().unwrap_or_else(PoisonError::into_inner).try_iter());
            if raised.is_none() {
                raised = listener.tell(events).err();
            }
            break;
        }
        if raised.is_none() {
            raised = py.check_signals().and_then(|()| listener.tell(events)).err();
            if raised.is_some() {
                cancel.set();
            }
        }
    }
    let result = py.detach(|| runtime.block_on(task));
    if started.elapsed() > LONG {
        py.detach(super::allocator::give_back);
    }
    match (raised, result) {
        (Some(exception), _) => Err(exception),
        (None, Ok(result)) => Ok(result?),
        (None, Err(join)) => Err(Error::from(join).into()),
    }
}

/// [`run`] for blocking work, which goes on to its own end even where the caller was interrupted.
pub fn run_blocking<T: Send + 'static>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send + 'static) -> PyResult<T> {
    run(py, None, |_, cancel| async move { cancel.race(async { tokio::task::spawn_blocking(work).await? }).await })
}
