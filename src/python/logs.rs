//! What Lance, its stores and this crate log, on its way to Python's `logging`. Whatever thread it comes from, it is kept until the thread that waits
//! for the work looks for signals: worker threads never ask for the GIL.

use std::collections::VecDeque;
use std::fmt::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Metadata, Subscriber};

/// Messages that are kept at most; what comes beyond is counted.
const MOST: usize = 1024;

struct Message {
    level: log::Level,
    target: String,
    text: String,
}

static MESSAGES: Mutex<VecDeque<Message>> = Mutex::new(VecDeque::new());
static LOST: AtomicUsize = AtomicUsize::new(0);

fn keep(level: log::Level, target: &str, text: String) {
    let mut messages = MESSAGES.lock().unwrap_or_else(PoisonError::into_inner);
    if messages.len() >= MOST {
        LOST.fetch_add(1, Ordering::Relaxed);
        return;
    }
    messages.push_back(Message { level, target: target.replace("::", "."), text });
}

/// Whose messages are worth a user's time.
fn is_ours(target: &str) -> bool {
    target.starts_with("lance") || target.starts_with("object_store")
}

struct Logger;

impl log::Log for Logger {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::max_level() && is_ours(metadata.target())
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            keep(record.level(), record.target(), record.args().to_string());
        }
    }

    fn flush(&self) {}
}

/// Events only: spans of Lance are many, and nothing here reads them.
struct Events;

fn level_of(metadata: &Metadata<'_>) -> log::Level {
    match *metadata.level() {
        tracing::Level::ERROR => log::Level::Error,
        tracing::Level::WARN => log::Level::Warn,
        tracing::Level::INFO => log::Level::Info,
        tracing::Level::DEBUG => log::Level::Debug,
        tracing::Level::TRACE => log::Level::Trace,
    }
}

/// The message of an event, and its other fields behind it.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

impl Subscriber for Events {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        // Not "always": the level may be changed.
        if metadata.is_event() && is_ours(metadata.target()) { Interest::sometimes() } else { Interest::never() }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && level_of(metadata) <= log::max_level() && is_ours(metadata.target())
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        keep(level_of(event.metadata()), event.metadata().target(), text.message + &text.fields);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// Once, when the extension is loaded.
pub fn install() {
    log::set_max_level(log::LevelFilter::Warn);
    // Whatever was there first stays.
    let _ = log::set_logger(&Logger);
    let _ = tracing::subscriber::set_global_default(Events);
}

/// Take the level that Python's logger has now. Lance's "info" is of what it does inside, and names places as they were given: for DEBUG.
pub fn follow_level(py: Python<'_>) -> PyResult<()> {
    let level: u32 = py.import("logging")?.call_method1("getLogger", ("lance_artifact",))?.call_method0("getEffectiveLevel")?.extract()?;
    log::set_max_level(match level {
        0..=10 => log::LevelFilter::Debug,
        11..=30 => log::LevelFilter::Warn,
        _ => log::LevelFilter::Error,
    });
    Ok(())
}

/// Give on what was kept, to loggers below "lance_artifact" of the targets' names. A handler that fails does not fail the work.
pub fn deliver(py: Python<'_>) {
    if let Err(error) = give_on(py) {
        error.write_unraisable(py, None);
    }
}

fn give_on(py: Python<'_>) -> PyResult<()> {
    let messages = std::mem::take(&mut *MESSAGES.lock().unwrap_or_else(PoisonError::into_inner));
    if messages.is_empty() {
        return Ok(());
    }
    let get_logger = py.import("logging")?.getattr("getLogger")?;
    for Message { level, target, text } in messages {
        let level = match level {
            log::Level::Error => 40,
            log::Level::Warn => 30,
            log::Level::Info | log::Level::Debug | log::Level::Trace => 10,
        };
        let name = if target.starts_with("lance_artifact") { target } else { format!("lance_artifact.{target}") };
        get_logger.call1((name,))?.call_method1("log", (level, "%s", text))?;
    }
    let lost = LOST.swap(0, Ordering::Relaxed);
    if lost > 0 {
        get_logger.call1(("lance_artifact",))?.call_method1("warning", ("%d messages of Lance were lost", lost))?;
    }
    Ok(())
}
