//! Threads, which the system may refuse. Nothing here waits for a thread that it has not got.
//!
//! Tokio's blocking threads are for short work that waits for none of its kind. What waits longer, for a stage to be written,
//! for training or for a device, has a thread of its own.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::Builder;
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, ready};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::oneshot;

use crate::error::{Error, Result};

/// A thread that has just ended is counted a moment longer: how often a refused one is asked for again, and after what.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(10);

/// The error of a refused thread.
pub fn refused(error: &io::Error) -> Error {
    Error::Storage(format!(
        "no thread could be started ({error}): a limit on the threads of this user, container or process is reached; raise it \
         (ulimit -u, the container's limit on pids, ulimit -v), or run less at once"
    ))
}

fn panicked(panic: &(dyn Any + Send)) -> Error {
    let message = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    Error::internal(format!("a thread panicked: {}", message.unwrap_or("unknown")))
}

/// Run work whose panic is an error.
pub fn caught<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(panicked(panic.as_ref())))
}

/// Take a lock. A panic while it was held is caught where it happened, and fails what it was about.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

type Job = Box<dyn FnOnce() + Send>;

/// Threads that have done their work wait for more, up to this number: a builder asks for one with every batch.
const KEPT: usize = 4;

/// Those that wait, of a process: a forked child has none of them.
static IDLE: Mutex<(u32, Vec<mpsc::Sender<Job>>)> = Mutex::new((0, Vec::new()));

fn idle<T>(look: impl FnOnce(&mut Vec<mpsc::Sender<Job>>) -> T) -> T {
    let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
    let process = std::process::id();
    if idle.0 != process {
        *idle = (process, Vec::new());
    }
    look(&mut idle.1)
}

fn work_on(first: Job) {
    let (sender, receiver) = mpsc::channel();
    let mut next = Some(first);
    while let Some(job) = next {
        let _ = catch_unwind(AssertUnwindSafe(job));
        let kept = idle(|idle| {
            let kept = idle.len() < KEPT;
            idle.extend(kept.then(|| sender.clone()));
            kept
        });
        next = if kept { receiver.recv().ok() } else { None };
    }
}

/// Run a job on a thread that waits for one, or a new one; it comes back where that is refused.
fn start(job: Job) -> std::result::Result<(), (io::Error, Job)> {
    let mut job = match idle(Vec::pop) {
        Some(thread) => match thread.send(job) {
            Ok(()) => return Ok(()),
            Err(mpsc::SendError(job)) => job,
        },
        None => job,
    };
    let mut tries = 0;
    loop {
        // A refused thread drops what it is given.
        let slot = Arc::new(Mutex::new(Some(job)));
        let given = slot.clone();
        let run = move || {
            let job = given.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(job) = job {
                work_on(job);
            }
        };
        let Err(error) = Builder::new().name("lance-artifact-work".into()).spawn(run) else { return Ok(()) };
        let Some(back) = slot.lock().unwrap_or_else(PoisonError::into_inner).take() else { return Ok(()) };
        if tries == TRIES {
            return Err((error, back));
        }
        (job, tries) = (back, tries + 1);
        std::thread::sleep(PAUSE);
    }
}

/// Run `work` on a thread of its own, within the runtime of the caller. It begins at once, and goes on to its own end where
/// nobody waits for it any more.
pub fn spawn<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> BoxFuture<'static, Result<T>> {
    let (done, result) = oneshot::channel();
    let runtime = Handle::try_current().ok();
    let started = start(Box::new(move || {
        let _runtime = runtime.as_ref().map(Handle::enter);
        let _ = done.send(caught(work));
    }));
    match started {
        Ok(()) => async { result.await.unwrap_or_else(|_| Err(Error::internal("a thread ended without a result"))) }.boxed(),
        Err((error, _)) => ready(Err(refused(&error))).boxed(),
    }
}

/// Work on a thread of its own, or done already where none could be had.
pub struct Background<T>(std::result::Result<mpsc::Receiver<Result<T>>, Result<T>>);

impl<T: Send + 'static> Background<T> {
    pub fn start(work: impl FnOnce() -> Result<T> + Send + 'static) -> Self {
        let (done, result) = mpsc::channel();
        let run = Box::new(move || {
            let _ = done.send(caught(work));
        });
        match start(run) {
            Ok(()) => Self(Ok(result)),
            Err((_, run)) => {
                run();
                Self(Err(result.recv().unwrap_or_else(|_| Err(Error::internal("work ended without a result")))))
            }
        }
    }

    /// The result, or itself where it takes longer.
    #[cfg(feature = "python")]
    pub fn wait_a_while(self, time: Duration) -> std::result::Result<Result<T>, Self> {
        match self.0 {
            Ok(result) => match result.recv_timeout(time) {
                Ok(result) => Ok(result),
                Err(mpsc::RecvTimeoutError::Timeout) => Err(Self(Ok(result))),
                Err(mpsc::RecvTimeoutError::Disconnected) => Ok(Err(Error::internal("a thread ended without a result"))),
            },
            Err(done) => Ok(done),
        }
    }

    pub fn wait(self) -> Result<T> {
        match self.0 {
            Ok(result) => result.recv().unwrap_or_else(|_| Err(Error::internal("a thread ended without a result"))),
            Err(done) => done,
        }
    }
}

/// Run `work` on up to `threads` threads at once, of which this is one. Those that cannot be had do not help.
pub fn fan_out(threads: usize, name: &str, work: impl Fn() + Sync) {
    std::thread::scope(|scope| {
        for _ in 1..threads {
            if Builder::new().name(name.into()).spawn_scoped(scope, &work).is_err() {
                break;
            }
        }
        work();
    });
}

/// Run IO to its end, from a thread of anybody: a user's, a runtime's, one that drops something.
pub fn block_on<T: Send>(runtime: &Handle, work: impl Future<Output = Result<T>> + Send) -> Result<T> {
    match Handle::try_current().map(|current| current.runtime_flavor()) {
        // Its only thread must not wait, and cannot hand its work to another one.
        Ok(RuntimeFlavor::CurrentThread) => std::thread::scope(|scope| {
            match Builder::new().name("lance-artifact-io".into()).spawn_scoped(scope, || runtime.block_on(work)) {
                Ok(thread) => thread.join().unwrap_or_else(|panic| Err(panicked(panic.as_ref()))),
                Err(error) => Err(refused(&error)),
            }
        }),
        _ => tokio::task::block_in_place(|| runtime.block_on(work)),
    }
}

/// Whether `count` more threads can be had at once. They are, for a moment.
pub fn check_available(count: usize) -> Result<()> {
    let before = running();
    let gate = Arc::new(Mutex::new(()));
    let closed = gate.lock().unwrap_or_else(PoisonError::into_inner);
    let mut threads = Vec::with_capacity(count);
    let mut answer = Ok(());
    let mut tries = 0;
    while threads.len() < count {
        let gate = gate.clone();
        match Builder::new().name("lance-artifact-probe".into()).spawn(move || drop(gate.lock())) {
            Ok(thread) => threads.push(thread),
            Err(_) if tries < TRIES => {
                tries += 1;
                std::thread::sleep(PAUSE);
            }
            Err(error) => {
                answer = Err(refused(&error).context(format!("{count} threads are needed, {} can be had", threads.len())));
                break;
            }
        }
    }
    drop(closed);
    for thread in threads {
        let _ = thread.join();
    }
    // A thread that was joined is counted by the system until it is quite gone.
    for _ in 0..50 {
        if running() <= before {
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    answer
}

#[cfg(target_os = "linux")]
fn running() -> usize {
    std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count)
}

#[cfg(not(target_os = "linux"))]
fn running() -> usize {
    0
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn io_is_waited_for_from_any_thread() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let handle = runtime.handle().clone();
        let io = |handle: &Handle| {
            let inner = handle.clone();
            block_on(handle, async move { inner.spawn_blocking(|| 7).await.map_err(Error::from) }).unwrap()
        };
        assert_eq!(io(&handle), 7, "a user's thread");
        assert_eq!(runtime.block_on(async { io(&handle) }), 7, "within block_on");
        let (a, b) = (handle.clone(), handle.clone());
        assert_eq!(runtime.block_on(async { tokio::spawn(async move { io(&a) }).await.unwrap() }), 7, "the only worker");
        assert_eq!(runtime.block_on(async { tokio::task::spawn_blocking(move || io(&b)).await.unwrap() }), 7, "a blocking thread");
        let single = tokio::runtime::Builder::new_current_thread().build().unwrap();
        assert_eq!(single.block_on(async { io(&handle) }), 7, "the thread of a small runtime");
    }

    #[test]
    fn panics_are_errors() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let error = runtime.block_on(spawn::<()>(|| panic!("oh"))).unwrap_err();
        assert!(error.to_string().contains("oh"), "{error}");
        assert!(Background::<()>::start(|| panic!("oh")).wait().is_err());
        assert_eq!(Background::start(|| Ok(3)).wait().unwrap(), 3);
    }

    #[test]
    fn all_share_the_work() {
        let left = AtomicUsize::new(100);
        let done = AtomicUsize::new(0);
        fan_out(4, "x", || {
            while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok() {
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
        assert_eq!(done.into_inner(), 100);
        check_available(3).unwrap();
    }
}
