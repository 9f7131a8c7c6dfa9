//! Uploads in parts, of bounded memory.
//!
//! `object_store`'s own writers make an upload's parts larger as it grows, or send any number at once, and leave an upload that is
//! dropped to the store's rules; stores bill its parts.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::FutureExt;
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt, PutPayload};
use tokio::io::AsyncWrite;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// Bytes of the smallest part of a multipart upload that S3 takes.
pub const MIN_PART_BYTES: usize = 5 * 1024 * 1024;
/// The most parts that an upload can have.
pub const MAX_PARTS: usize = 10_000;

/// How long an upload is given up for. One that could not be aborted by then is left to the store's own rules.
const ABORT_TIME: Duration = Duration::from_secs(30);

/// The uploads of one writer: the size of their parts, how many of them a file sends at once, and uploads that are being aborted. An
/// open file holds the parts in flight and one that fills.
#[derive(Clone)]
pub struct Uploads {
    part_bytes: usize,
    in_flight: usize,
    runtime: Handle,
    aborting: Arc<watch::Sender<usize>>,
}

impl Uploads {
    pub fn new(part_bytes: usize, in_flight: usize, runtime: Handle) -> Self {
        Self { part_bytes, in_flight: in_flight.max(1), runtime, aborting: Arc::new(watch::Sender::new(0)) }
    }

    /// Wait until the uploads that were dropped are aborted, for a bounded time. Whether all are.
    pub async fn aborted(&self) -> bool {
        let mut aborting = self.aborting.subscribe();
        // A little longer than each of them waits.
        tokio::time::timeout(ABORT_TIME + Duration::from_secs(1), aborting.wait_for(|left| *left == 0)).await.is_ok()
    }

    fn abort(&self, state: State, mut parts: JoinSet<object_store::Result<()>>) {
        /// Counts down also where the task is dropped.
        struct Done(Arc<watch::Sender<usize>>);
        impl Drop for Done {
            fn drop(&mut self) {
                self.0.send_modify(|left| *left -= 1);
            }
        }
        self.aborting.send_modify(|left| *left += 1);
        let done = Done(self.aborting.clone());
        self.runtime.spawn(async move {
            let _done = done;
            let abort = async {
                // A part that arrives after the upload is aborted is billed all the same.
                parts.shutdown().await;
                let upload = match state {
                    State::Starting(starting) => starting.await.ok().and_then(Result::ok),
                    State::Open(upload) => Some(upload),
                    State::Ending(ending) => ending.await.ok().and_then(Result::err).and_then(|(_, upload)| upload),
                    State::None | State::Done | State::Failed => None,
                };
                if let Some(mut upload) = upload {
                    let _ = upload.abort().await;
                }
            };
            let _ = tokio::time::timeout(ABORT_TIME, abort).await;
        });
    }
}

type OpenUpload = Box<dyn MultipartUpload>;
/// What went wrong at the end, and the upload where there is one to be aborted.
type FailedEnd = (object_store::Error, Option<OpenUpload>);

enum State {
    /// All bytes so far fit into the first part.
    None,
    Starting(JoinHandle<object_store::Result<OpenUpload>>),
    Open(OpenUpload),
    Ending(JoinHandle<Result<(), FailedEnd>>),
    Done,
    Failed,
}

/// A file that is uploaded in parts, some in flight while the next one fills; a small one is one put. Parts are of one size, as
/// some stores want them.
pub struct Upload {
    store: Arc<dyn ObjectStore>,
    path: Path,
    uploads: Uploads,
    part: Vec<u8>,
    state: State,
    /// Tasks of their own: the next write of this file, which would drive them, may be minutes away.
    sending: JoinSet<object_store::Result<()>>,
    size: usize,
    parts: usize,
}

impl Upload {
    pub fn new(store: Arc<dyn ObjectStore>, path: Path, uploads: Uploads) -> Self {
        Self { store, path, uploads, part: Vec::new(), state: State::None, sending: JoinSet::new(), size: 0, parts: 0 }
    }

    /// Bytes written so far.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Give the upload up: stores bill the parts of forgotten ones.
    fn give_up(&mut self) {
        let (state, sending) = (std::mem::replace(&mut self.state, State::Failed), std::mem::take(&mut self.sending));
        if !matches!(state, State::None | State::Done | State::Failed) {
            self.uploads.abort(state, sending);
        }
    }

    fn failed(&mut self, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
        self.give_up();
        io::Error::other(error)
    }

    /// Wait until fewer than `most` parts are in flight, and the upload is open where it was begun.
    fn poll_sent(&mut self, cx: &mut Context<'_>, most: usize) -> Poll<io::Result<()>> {
        if let State::Starting(starting) = &mut self.state {
            match futures::ready!(starting.poll_unpin(cx)) {
                Ok(Ok(upload)) => self.state = State::Open(upload),
                Ok(Err(error)) => {
                    self.state = State::Done;
                    return Poll::Ready(Err(self.failed(error)));
                }
                Err(error) => {
                    self.state = State::Done;
                    return Poll::Ready(Err(self.failed(error)));
                }
            }
        }
        // Those that are done make room, and a failure is told at once.
        while !self.sending.is_empty() {
            match self.sending.poll_join_next(cx) {
                Poll::Ready(Some(Ok(Ok(())))) => {}
                Poll::Ready(Some(Ok(Err(error)))) => return Poll::Ready(Err(self.failed(error))),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(self.failed(error))),
                Poll::Ready(None) => break,
                Poll::Pending if self.sending.len() < most => break,
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Put the part that is full on its way.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if matches!(self.state, State::None) {
            let (store, path) = (self.store.clone(), self.path.clone());
            self.state = State::Starting(self.uploads.runtime.spawn(async move { store.put_multipart(&path).await }));
        }
        futures::ready!(self.poll_sent(cx, self.uploads.in_flight))?;
        let State::Open(upload) = &mut self.state else {
            return Poll::Ready(Err(io::Error::other("the upload has failed")));
        };
        let part = upload.put_part(PutPayload::from(std::mem::take(&mut self.part)));
        self.sending.spawn_on(part, &self.uploads.runtime);
        self.parts += 1;
        Poll::Ready(Ok(()))
    }

    /// Send what is left, and publish the file.
    pub fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            match &mut self.state {
                State::Done => return Poll::Ready(Ok(())),
                State::Failed => return Poll::Ready(Err(io::Error::other("the upload has failed"))),
                State::Ending(ending) => {
                    let ended = futures::ready!(ending.poll_unpin(cx));
                    self.state = State::Done;
                    match ended {
                        Ok(Ok(())) => {}
                        Ok(Err((error, upload))) => {
                            self.state = upload.map_or(State::Done, State::Open);
                            return Poll::Ready(Err(self.failed(error)));
                        }
                        Err(error) => return Poll::Ready(Err(self.failed(error))),
                    }
                }
                State::None if self.size == 0 => self.state = State::Done,
                State::None => {
                    let part = PutPayload::from(std::mem::take(&mut self.part));
                    let (store, path) = (self.store.clone(), self.path.clone());
                    let put = async move { store.put(&path, part).await.map(|_| ()).map_err(|error| (error, None)) };
                    self.state = State::Ending(self.uploads.runtime.spawn(put));
                }
                State::Starting(_) | State::Open(_) => {
                    if !self.part.is_empty() {
                        futures::ready!(self.poll_send(cx))?;
                    }
                    futures::ready!(self.poll_sent(cx, 1))?;
                    if !self.sending.is_empty() {
                        return Poll::Pending;
                    }
                    if let State::Open(mut upload) = std::mem::replace(&mut self.state, State::Done) {
                        let complete = async move { upload.complete().await.map(|_| ()).map_err(|error| (error, Some(upload))) };
                        self.state = State::Ending(self.uploads.runtime.spawn(complete));
                    }
                }
            }
        }
    }
}

impl AsyncWrite for Upload {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let most = this.uploads.part_bytes;
        if this.part.len() >= most {
            if this.parts + 1 >= MAX_PARTS {
                return Poll::Ready(Err(io::Error::other(format!(
                    "the file is larger than {MAX_PARTS} parts of {most} bytes, which is what an upload can have; pass expected_rows, \
                     or raise memory_limit or num_buckets"
                ))));
            }
            futures::ready!(this.poll_send(cx))?;
        }
        let taken = &bytes[..bytes.len().min(most - this.part.len())];
        let (len, had) = (this.part.len() + taken.len(), this.part.capacity());
        if len > had {
            // A file of several parts will fill this one. Otherwise it grows as it is needed, and never beyond a part.
            let wanted = if this.parts > 0 { most } else { (2 * had).clamp(len, most) };
            this.part.reserve_exact(wanted - this.part.len());
        }
        this.part.extend_from_slice(taken);
        this.size += taken.len();
        Poll::Ready(Ok(taken.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // What does not fill a part waits for the next run: a part below the minimum is refused by S3.
        let all = self.uploads.in_flight + 1;
        self.poll_sent(cx, all)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_finish(cx)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.give_up();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use object_store::memory::InMemory;
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn parts_are_of_one_size_and_of_a_known_number() {
        let store = Arc::new(InMemory::new());
        let uploads = Uploads::new(1000, 2, Handle::current());
        let mut upload = Upload::new(store.clone(), Path::from("x"), uploads.clone());
        for _ in 0..100 {
            upload.write_all(&[7; 99]).await.unwrap();
            assert!(upload.part.capacity() <= 1000);
        }
        assert_eq!(upload.parts, 9);
        upload.shutdown().await.unwrap();
        assert_eq!(store.head(&Path::from("x")).await.unwrap().size, 9900);

        let mut long = Upload::new(store.clone(), Path::from("y"), Uploads::new(10, 1, Handle::current()));
        let error = long.write_all(&[7; 10 * MAX_PARTS + 1]).await.unwrap_err().to_string();
        assert!(error.contains("10000 parts") && error.contains("expected_rows"), "{error}");
        let uploads = long.uploads.clone();
        drop(long);
        assert!(uploads.aborted().await && store.head(&Path::from("y")).await.is_err());
    }

    /// An upload that fails at its third part: what is below it, how often it was aborted, and parts.
    #[derive(Debug)]
    struct FailingUpload(Box<dyn MultipartUpload>, Arc<AtomicUsize>, usize);

    #[async_trait::async_trait]
    impl MultipartUpload for FailingUpload {
        fn put_part(&mut self, data: PutPayload) -> object_store::UploadPart {
            self.2 += 1;
            if self.2 == 3 {
                return Box::pin(async { Err(object_store::Error::Generic { store: "failing", source: "the third part".into() }) });
            }
            self.0.put_part(data)
        }

        async fn complete(&mut self) -> object_store::Result<object_store::PutResult> {
            self.0.complete().await
        }

        async fn abort(&mut self) -> object_store::Result<()> {
            self.1.fetch_add(1, Ordering::Relaxed);
            self.0.abort().await
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_part_that_fails_ends_the_upload_and_it_never_looks_finished() {
        let (aborts, store) = (Arc::new(AtomicUsize::new(0)), Arc::new(InMemory::new()));
        let below = store.put_multipart(&Path::from("x")).await.unwrap();
        let uploads = Uploads::new(100, 2, Handle::current());
        let mut upload = Upload::new(store.clone(), Path::from("x"), uploads.clone());
        upload.state = State::Open(Box::new(FailingUpload(below, aborts.clone(), 0)));
        let mut failed = None;
        for _ in 0..20 {
            if let Err(error) = upload.write_all(&[7; 60]).await {
                failed = Some(error.to_string());
                break;
            }
        }
        assert!(failed.or(upload.shutdown().await.err().map(|e| e.to_string())).is_some_and(|e| e.contains("third part")));
        assert!(upload.shutdown().await.is_err(), "finished after a failure");
        drop(upload);
        assert!(uploads.aborted().await);
        assert_eq!(aborts.load(Ordering::Relaxed), 1);
        assert!(store.head(&Path::from("x")).await.is_err());
    }
}
