//! Reads of a file that stay within it.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use lance_core::utils::io_stats::IoStatsRecorder;
use lance_encoding::EncodingsIo;
use lance_file::LanceEncodingsIo;
use lance_io::scheduler::FileScheduler;

use crate::error::Error;

/// What a decoder asks of a file. Damaged widths and offsets make it ask for bytes behind the end, and Lance cuts what it is asked for into
/// pieces of some megabytes before it looks: of a range without end it would make a list without end.
#[derive(Debug)]
pub struct Bounded {
    io: Arc<dyn EncodingsIo>,
    /// Bytes of the file.
    size: u64,
}

impl Bounded {
    pub fn new(file: FileScheduler, size: u64) -> Arc<Self> {
        Arc::new(Self { io: Arc::new(LanceEncodingsIo::new(file)), size })
    }

    fn of(&self, io: Option<Arc<dyn EncodingsIo>>) -> Option<Arc<dyn EncodingsIo>> {
        io.map(|io| Arc::new(Self { io, size: self.size }) as Arc<dyn EncodingsIo>)
    }
}

impl EncodingsIo for Bounded {
    fn submit_request(&self, ranges: Vec<Range<u64>>, priority: u64) -> BoxFuture<'static, lance_core::Result<Vec<Bytes>>> {
        let wrong = ranges.iter().find(|range| range.start > range.end || range.end > self.size);
        if let Some(Range { start, end }) = wrong {
            let what = format!("its values are said to lie at bytes {start} to {end}, and it has {}", self.size);
            return async move { Err(lance_core::Error::from(Error::corrupt(what))) }.boxed();
        }
        self.io.submit_request(ranges, priority)
    }

    fn with_bypass_backpressure(&self) -> Option<Arc<dyn EncodingsIo>> {
        self.of(self.io.with_bypass_backpressure())
    }

    fn with_io_stats(&self, stats: Arc<dyn IoStatsRecorder>) -> Option<Arc<dyn EncodingsIo>> {
        self.of(self.io.with_io_stats(stats))
    }

    fn with_coalesce_gap(&self, gap: u64) -> Option<Arc<dyn EncodingsIo>> {
        self.of(self.io.with_coalesce_gap(gap))
    }
}
