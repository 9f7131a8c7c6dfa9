//! A device for tests that takes its time. What is put on its streams happens on threads of its own, late and beside each other; any call
//! may take a while, fail, or be the moment of an interrupt, as a seed has it. It notices what a real one would suffer in silence:
//! memory that is used, or freed, while work on it is under way.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tokio::sync::watch;

use crate::encode::device::api::{Device, DeviceEncoder};
use crate::encode::device::host::{HostDevice, SharedBytes};
use crate::encode::device::tensor::{DeviceMemory, Tensor};
use crate::error::{Error, Result};
use crate::sync::locked;

/// Bytes that one allocation can have.
const CAPACITY: usize = 1 << 24;

/// What a seed has in store for a run.
pub struct Fate {
    die: Mutex<SmallRng>,
    /// Of a call: that it waits, and how long at most.
    waits: f64,
    longest: Duration,
    /// The calls that fail, by their number.
    fails: Vec<usize>,
    /// A call that failed leaves the device lost: all that come after it fail too.
    is_for_good: bool,
    interrupts: Option<usize>,
    interrupt: watch::Sender<bool>,
    calls: AtomicUsize,
    lost: AtomicBool,
    /// The calls that failed.
    failed: Mutex<Vec<String>>,
    /// Memories, streams, events and devices that are there.
    pub alive: AtomicUsize,
    pub wrong: Mutex<Vec<String>>,
}

impl Fate {
    /// `calls`: about how many there will be.
    pub fn of_seed(seed: u64, calls: usize, interrupt: watch::Sender<bool>) -> Arc<Self> {
        let mut die = SmallRng::seed_from_u64(seed);
        let failures = [0, 0, 1, 1, 2, 5][die.random_range(0..6)];
        let fails = (0..failures).map(|_| die.random_range(0..calls)).collect();
        let interrupts = die.random_bool(0.25).then(|| die.random_range(0..calls));
        Arc::new(Self {
            waits: [0.0, 0.05, 0.3][die.random_range(0..3)],
            longest: Duration::from_micros(die.random_range(1..300)),
            fails,
            is_for_good: die.random_bool(0.5),
            interrupts,
            interrupt,
            die: Mutex::new(die),
            calls: AtomicUsize::new(0),
            lost: AtomicBool::new(false),
            failed: Mutex::default(),
            alive: AtomicUsize::new(0),
            wrong: Mutex::default(),
        })
    }

    pub fn was_interrupted(&self) -> bool {
        *self.interrupt.borrow()
    }

    /// Take a while, or none.
    pub fn dawdle(&self) {
        let mut die = locked(&self.die);
        if die.random_bool(self.waits) {
            let time = self.longest.mul_f64(die.random_range(0.0..1.0));
            drop(die);
            std::thread::sleep(time);
        } else if die.random_bool(0.2) {
            drop(die);
            std::thread::yield_now();
        }
    }

    /// A number below `below`.
    pub fn draw(&self, below: usize) -> usize {
        locked(&self.die).random_range(0..below)
    }

    /// Before anything that may fail.
    pub fn call(&self, what: &str) -> Result<()> {
        self.dawdle();
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        if self.interrupts == Some(call) {
            self.interrupt.send_replace(true);
        }
        if self.lost.load(Ordering::Relaxed) || self.fails.contains(&call) {
            let failed = format!("injected: {what} (call {call})");
            locked(&self.failed).push(failed.clone());
            self.lost.fetch_or(self.is_for_good || ["make_current", "record", "finish"].contains(&what), Ordering::Relaxed);
            return Err(Error::Device(failed));
        }
        Ok(())
    }

    fn notice(&self, what: impl Into<String>) {
        // Of a lost device nothing is expected any more.
        if !self.lost.load(Ordering::Relaxed) {
            let what = format!("{}, after {:?}", what.into(), locked(&self.failed));
            locked(&self.wrong).push(what);
        }
    }
}

/// Counts what is there.
struct Alive(Arc<Fate>);

impl Alive {
    fn new(fate: &Arc<Fate>) -> Self {
        fate.alive.fetch_add(1, Ordering::Relaxed);
        Self(fate.clone())
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.alive.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Memory, and how many pieces of work that use it are under way.
pub struct Watched {
    bytes: Arc<SharedBytes>,
    len: usize,
    in_use: Arc<AtomicUsize>,
    /// Copies to it that are under way.
    arriving: Arc<AtomicUsize>,
    alive: Alive,
}

impl Watched {
    fn check(&self, what: &str) {
        if self.in_use.load(Ordering::SeqCst) > 0 {
            self.alive.0.notice(format!("{what} while work on it is under way"));
        }
    }
}

impl DeviceMemory for Watched {
    fn address(&self) -> usize {
        self.bytes.address()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.check("memory is freed");
    }
}

/// Holds memory in use, as work on a stream does.
struct Using(Arc<AtomicUsize>);

impl Using {
    fn begin(counter: &Arc<AtomicUsize>) -> Self {
        counter.fetch_add(1, Ordering::SeqCst);
        Self(counter.clone())
    }
}

impl Drop for Using {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// How often an event was recorded, and how many of those are over.
#[derive(Default)]
struct Passed {
    recorded: Mutex<(u64, u64)>,
    changed: Condvar,
}

impl Passed {
    fn wait(&self, ticket: u64) {
        let over = self.changed.wait_while(locked(&self.recorded), |(_, over)| *over < ticket);
        drop(over);
    }
}

pub struct Event {
    passed: Arc<Passed>,
    _alive: Alive,
}

type Work = Box<dyn FnOnce() + Send>;

/// A queue with a thread of its own, which goes on until it is empty.
pub struct Stream {
    queue: Mutex<mpsc::Sender<Work>>,
    _alive: Alive,
}

impl Stream {
    fn new(fate: &Arc<Fate>) -> Self {
        let (queue, works) = mpsc::channel::<Work>();
        let (its, thread) = (fate.clone(), Alive::new(fate));
        std::thread::spawn(move || {
            for work in works {
                its.dawdle();
                work();
            }
            drop(thread);
        });
        Self { queue: Mutex::new(queue), _alive: Alive::new(fate) }
    }

    fn put(&self, work: impl FnOnce() + Send + 'static) {
        let _ = locked(&self.queue).send(Box::new(work));
    }
}

pub struct Restless {
    fate: Arc<Fate>,
    _alive: Alive,
}

impl Restless {
    pub fn new(fate: &Arc<Fate>) -> Self {
        Self { fate: fate.clone(), _alive: Alive::new(fate) }
    }

    fn memory(&self, bytes: usize, what: &str) -> Result<Watched> {
        if let Err(error) = self.fate.call(what) {
            // Where there is too little memory, smaller slots are tried.
            return Err(if self.fate.draw(2) == 0 { Error::DeviceMemory(error.to_string()) } else { error });
        }
        let memory = HostDevice { capacity: CAPACITY }.allocate(bytes)?;
        Ok(Watched { bytes: Arc::new(memory), len: bytes, in_use: Arc::default(), arriving: Arc::default(), alive: Alive::new(&self.fate) })
    }

    fn copy(&self, stream: &Stream, source: &Watched, from: usize, target: &Watched, to: usize, bytes: usize) {
        let using = [&source.in_use, &target.in_use, &target.arriving].map(Using::begin);
        let (fate, source, target) = (self.fate.clone(), source.bytes.clone(), target.bytes.clone());
        stream.put(move || {
            // SAFETY: both live, and what uses them beside this is noticed.
            if let Err(error) = unsafe { HostDevice { capacity: CAPACITY }.copy_in(&(), &source, from, &target, to, bytes) } {
                fate.notice(error.to_string());
            }
            drop(using);
        });
    }
}

impl Device for Restless {
    type Pinned = Watched;
    type Memory = Watched;
    type Stream = Stream;
    type Event = Event;

    fn name(&self) -> String {
        "restless memory".into()
    }

    fn make_current(&self) -> Result<()> {
        self.fate.call("make_current")
    }

    fn free_bytes(&self) -> Result<usize> {
        self.fate.call("free_bytes").map(|()| CAPACITY)
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<Watched> {
        self.memory(bytes, "allocate_pinned")
    }

    fn pinned<'a>(&self, memory: &'a Watched) -> &'a [u8] {
        memory.check("memory is read");
        // SAFETY: initialised, and whoever writes to it meanwhile was noticed.
        unsafe { std::slice::from_raw_parts(memory.address() as *const u8, memory.len) }
    }

    fn pinned_mut<'a>(&self, memory: &'a mut Watched) -> &'a mut [u8] {
        memory.check("memory is written");
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(memory.address() as *mut u8, memory.len) }
    }

    fn allocate(&self, bytes: usize) -> Result<Watched> {
        self.memory(bytes, "allocate")
    }

    fn stream(&self) -> Result<Stream> {
        self.fate.call("stream").map(|()| Stream::new(&self.fate))
    }

    fn event(&self) -> Result<Event> {
        self.fate.call("event").map(|()| Event { passed: Arc::default(), _alive: Alive::new(&self.fate) })
    }

    unsafe fn copy_in(&self, stream: &Stream, source: &Watched, from: usize, target: &Watched, to: usize, bytes: usize) -> Result<()> {
        self.fate.call("copy_in")?;
        self.copy(stream, source, from, target, to, bytes);
        Ok(())
    }

    unsafe fn copy_out(&self, stream: &Stream, source: &Watched, target: &Watched, bytes: usize) -> Result<()> {
        self.fate.call("copy_out")?;
        self.copy(stream, source, 0, target, 0, bytes);
        Ok(())
    }

    fn record(&self, event: &Event, stream: &Stream) -> Result<()> {
        self.fate.call("record")?;
        let ticket = {
            let mut recorded = locked(&event.passed.recorded);
            recorded.0 += 1;
            recorded.0
        };
        let passed = event.passed.clone();
        stream.put(move || {
            locked(&passed.recorded).1 = ticket;
            passed.changed.notify_all();
        });
        Ok(())
    }

    fn wait(&self, stream: &Stream, event: &Event) -> Result<()> {
        self.fate.call("wait")?;
        let (passed, ticket) = (event.passed.clone(), locked(&event.passed.recorded).0);
        stream.put(move || passed.wait(ticket));
        Ok(())
    }

    fn finish(&self, event: &Event) -> Result<()> {
        self.fate.call("finish")?;
        let ticket = locked(&event.passed.recorded).0;
        event.passed.wait(ticket);
        Ok(())
    }

    fn seconds_between(&self, _: &Event, _: &Event) -> Option<f64> {
        Some(0.0)
    }
}

/// Puts its work on a stream: partition = the vector's first element, code = its last two bytes.
pub struct RestlessEncoder {
    pub fate: Arc<Fate>,
    /// Of the stream that it computes on.
    pub queue: Option<mpsc::Sender<Work>>,
    pub dimension: usize,
    pub code_width: usize,
}

impl RestlessEncoder {
    pub fn new(fate: &Arc<Fate>, dimension: usize, code_width: usize) -> Self {
        fate.alive.fetch_add(1, Ordering::Relaxed);
        Self { fate: fate.clone(), queue: None, dimension, code_width }
    }
}

impl Drop for RestlessEncoder {
    fn drop(&mut self) {
        if self.queue.is_some() {
            self.fate.notice("an encoder is dropped open");
        }
        self.fate.alive.fetch_sub(1, Ordering::Relaxed);
    }
}

impl DeviceEncoder<Restless> for RestlessEncoder {
    fn open(&mut self, _: &Restless, stream: &Stream) -> Result<()> {
        // What it made before it failed is for `close` to release.
        self.queue = Some(locked(&stream.queue).clone());
        self.fate.call("open")
    }

    fn encode(&mut self, vectors: Tensor<Watched>, part_ids: Tensor<Watched>, codes: Tensor<Watched>) -> Result<()> {
        if vectors.memory.arriving.load(Ordering::SeqCst) > 0 {
            self.fate.notice("vectors are encoded before they are there");
        }
        let Some(queue) = &self.queue else {
            self.fate.notice("encode was called without open");
            return Ok(());
        };
        let failure = self.fate.call("encode").err();
        // Part of a batch may be on its way when it fails.
        let rows = if failure.is_some() { self.fate.draw(vectors.rows + 1) } else { vectors.rows };
        let using = [&vectors, &part_ids, &codes].map(|tensor| (Using::begin(&tensor.memory.in_use), tensor.memory.bytes.clone()));
        let [from, partitions, to] = [&vectors, &part_ids, &codes].map(Tensor::address);
        let (dimension, width) = (self.dimension, self.code_width);
        let work: Work = Box::new(move || {
            for row in 0..rows {
                // SAFETY: the tensors have this many rows of these types, and what uses them meanwhile is noticed.
                unsafe {
                    let value = *(from as *const f32).add(row * dimension) as u32;
                    *(partitions as *mut u32).add(row) = value;
                    for byte in 0..width {
                        *(to as *mut u8).add(row * width + byte) = (value >> (8 * byte)) as u8;
                    }
                }
            }
            drop(using);
        });
        if self.fate.draw(2) == 0 {
            let _ = queue.send(work);
        } else {
            // On this stream, and waited for.
            let (done, ended) = mpsc::channel();
            let _ = queue.send(Box::new(move || {
                work();
                let _ = done.send(());
            }));
            let _ = ended.recv();
        }
        match failure {
            Some(error) if self.fate.draw(2) == 0 => Err(Error::DeviceMemory(error.to_string())),
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn close(&mut self) {
        self.queue = None;
    }
}
