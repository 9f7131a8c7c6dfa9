//! Where a file's bytes go: straight to a local file, or to a multipart upload of bounded memory.
//!
//! Hundreds of files are open at once, so the memory of each is small and known.

use std::io::{self, Write};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::FutureExt;
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStoreExt, PutPayload};
use tokio::io::AsyncWrite;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::local::{HIDDEN_PREFIX, new_temporary_file};
use super::store::Store;
use crate::error::{Error, Result};

/// Bytes of the smallest part of a multipart upload that S3 takes.
pub const MIN_PART_BYTES: usize = 5 * 1024 * 1024;
/// The most parts that an upload can have.
pub const MAX_PARTS: usize = 10_000;
/// Bytes that an open local file collects.
pub const LOCAL_BUFFER_BYTES: usize = 32 * 1024;

/// How long an upload is given up for. One that could not be aborted by then is left to the store's own rules.
const ABORT_TIME: Duration = Duration::from_secs(30);

/// The uploads of one builder: the size of their parts, and those that are being aborted. An open file holds two parts, one
/// that fills and one in flight.
#[derive(Clone)]
pub struct Uploads {
    part_bytes: usize,
    runtime: Handle,
    aborting: Arc<watch::Sender<usize>>,
}

impl Uploads {
    pub fn new(part_bytes: usize, runtime: Handle) -> Self {
        Self { part_bytes, runtime, aborting: Arc::new(watch::Sender::new(0)) }
    }

    /// Wait until the uploads that were dropped are aborted, for a bounded time. Whether all are.
    pub async fn aborted(&self) -> bool {
        let mut aborting = self.aborting.subscribe();
        // A little longer than each of them waits.
        tokio::time::timeout(ABORT_TIME + Duration::from_secs(1), aborting.wait_for(|left| *left == 0)).await.is_ok()
    }

    fn abort(&self, step: Option<Step>, upload: Option<Box<dyn MultipartUpload>>) {
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
                let upload = match step {
                    Some(step) => step.await.ok().and_then(|result| result.ok().flatten()),
                    None => upload,
                };
                if let Some(mut upload) = upload {
                    let _ = upload.abort().await;
                }
            };
            let _ = tokio::time::timeout(ABORT_TIME, abort).await;
        });
    }
}

/// A file that appears under its name only once it is finished; dropped before, it never was there.
pub enum FileSink {
    Local(LocalFile),
    Upload(Upload),
}

impl FileSink {
    /// A file of a store. `sync` makes it durable on a local disk when it is finished.
    pub fn create(store: &Store, uploads: &Uploads, relative: &str, sync: bool) -> Result<Self> {
        let path = store.path(relative)?;
        Ok(match store.local_root() {
            Some(root) => Self::Local(LocalFile::create(root.join(relative), store.temporary_prefix(), sync)?),
            None => Self::Upload(Upload::new(store.object_store().clone(), path, uploads.clone())),
        })
    }

    /// A local file, without waiting until it is on the disk.
    pub fn local(path: PathBuf) -> Result<Self> {
        Ok(Self::Local(LocalFile::create(path, HIDDEN_PREFIX, false)?))
    }

    /// Bytes written so far.
    pub fn size(&self) -> usize {
        match self {
            Self::Local(file) => file.size,
            Self::Upload(upload) => upload.size,
        }
    }

    /// Publish it.
    pub async fn finish(&mut self) -> io::Result<()> {
        match self {
            Self::Local(file) => file.finish(),
            Self::Upload(upload) => std::future::poll_fn(|cx| upload.poll_finish(cx)).await,
        }
    }

    fn writer(self: Pin<&mut Self>) -> Pin<&mut (dyn AsyncWrite + Send + Unpin)> {
        match self.get_mut() {
            Self::Local(file) => Pin::new(file),
            Self::Upload(upload) => Pin::new(upload),
        }
    }
}

impl AsyncWrite for FileSink {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.writer().poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.writer().poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.writer().poll_shutdown(cx)
    }
}

/// A local file under a temporary name. It writes on the calling thread: one made for writing, or the task of a segment, beside
/// which the runtime has others.
pub struct LocalFile {
    file: Option<io::BufWriter<tempfile::NamedTempFile>>,
    target: PathBuf,
    size: usize,
    sync: bool,
}

impl LocalFile {
    fn create(target: PathBuf, prefix: &str, sync: bool) -> Result<Self> {
        let parent = target.parent().ok_or_else(|| Error::internal("a file has no folder"))?;
        let file = std::fs::create_dir_all(parent)
            .and_then(|()| new_temporary_file(parent, prefix))
            .map_err(|e| Error::from(e).context(format!("creating {}", target.display())))?;
        Ok(Self { file: Some(io::BufWriter::with_capacity(LOCAL_BUFFER_BYTES, file)), target, size: 0, sync })
    }

    fn finish(&mut self) -> io::Result<()> {
        if let Some(file) = self.file.take() {
            let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
            if self.sync {
                file.as_file().sync_all()?;
            }
            file.persist(&self.target).map_err(|e| e.error)?;
        }
        Ok(())
    }
}

impl AsyncWrite for LocalFile {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let Some(file) = &mut self.file else {
            return Poll::Ready(Err(io::Error::other("the file is finished")));
        };
        let written = file.write(bytes)?;
        self.size += written;
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.file.as_mut().map_or(Ok(()), Write::flush))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.finish())
    }
}

type Step = JoinHandle<object_store::Result<Option<Box<dyn MultipartUpload>>>>;

/// Give up an upload whose request failed: stores bill the parts of forgotten ones.
async fn or_abort(
    mut upload: Box<dyn MultipartUpload>,
    result: object_store::Result<()>,
) -> object_store::Result<Box<dyn MultipartUpload>> {
    match result {
        Ok(()) => Ok(upload),
        Err(e) => {
            let _ = tokio::time::timeout(ABORT_TIME, upload.abort()).await;
            Err(e)
        }
    }
}

/// A multipart upload with one part in flight while the next one fills; a small object is one put. Parts are of one size, as
/// some stores want them.
pub struct Upload {
    store: Arc<dyn object_store::ObjectStore>,
    path: Path,
    uploads: Uploads,
    part: Vec<u8>,
    upload: Option<Box<dyn MultipartUpload>>,
    step: Option<Step>,
    size: usize,
    parts: usize,
    done: bool,
}

impl Upload {
    fn new(store: Arc<dyn object_store::ObjectStore>, path: Path, uploads: Uploads) -> Self {
        Self { store, path, uploads, part: Vec::new(), upload: None, step: None, size: 0, parts: 0, done: false }
    }

    /// Drive the step in flight to its end.
    fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(step) = &mut self.step {
            let result = futures::ready!(step.poll_unpin(cx));
            self.step = None;
            self.upload = result.map_err(io::Error::other)?.map_err(io::Error::other)?;
        }
        Poll::Ready(Ok(()))
    }

    fn send_part(&mut self) {
        let part = PutPayload::from(std::mem::take(&mut self.part));
        let upload = self.upload.take();
        let (store, path) = (self.store.clone(), self.path.clone());
        // A task of its own: the next write of this file, which would drive it, may be minutes away.
        self.step = Some(self.uploads.runtime.spawn(async move {
            let mut upload = match upload {
                Some(upload) => upload,
                None => store.put_multipart(&path).await?,
            };
            let sent = upload.put_part(part).await;
            or_abort(upload, sent).await.map(Some)
        }));
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.done {
            futures::ready!(self.poll_step(cx))?;
            if self.part.is_empty() && self.upload.is_none() {
                self.done = true;
            } else if let Some(mut upload) = self.upload.take() {
                let part = PutPayload::from(std::mem::take(&mut self.part));
                self.step = Some(self.uploads.runtime.spawn(async move {
                    if part.content_length() > 0 {
                        let sent = upload.put_part(part).await;
                        upload = or_abort(upload, sent).await?;
                    }
                    let completed = upload.complete().await.map(|_| ());
                    or_abort(upload, completed).await.map(|_| None)
                }));
            } else {
                let part = PutPayload::from(std::mem::take(&mut self.part));
                let (store, path) = (self.store.clone(), self.path.clone());
                self.step = Some(self.uploads.runtime.spawn(async move { store.put(&path, part).await.map(|_| None) }));
            }
        }
        Poll::Ready(Ok(()))
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
            futures::ready!(this.poll_step(cx))?;
            this.send_part();
            this.parts += 1;
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
        self.poll_step(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_finish(cx)
    }
}

impl Drop for Upload {
    /// An unfinished upload is aborted: stores bill the parts of forgotten ones.
    fn drop(&mut self) {
        let (step, upload) = (self.step.take(), self.upload.take());
        if step.is_some() || upload.is_some() {
            self.uploads.abort(step, upload);
        }
    }
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn parts_are_of_one_size_and_of_a_known_number() {
        let store = Arc::new(InMemory::new());
        let uploads = Uploads::new(1000, Handle::current());
        let mut upload = Upload::new(store.clone(), Path::from("x"), uploads.clone());
        for _ in 0..100 {
            upload.write_all(&[7; 99]).await.unwrap();
            assert!(upload.part.capacity() <= 1000);
        }
        assert_eq!(upload.parts, 9);
        upload.shutdown().await.unwrap();
        assert_eq!(store.head(&Path::from("x")).await.unwrap().size, 9900);

        let mut long = Upload::new(store.clone(), Path::from("y"), Uploads::new(10, Handle::current()));
        let error = long.write_all(&[7; 10 * MAX_PARTS + 1]).await.unwrap_err().to_string();
        assert!(error.contains("10000 parts") && error.contains("expected_rows"), "{error}");
        let uploads = long.uploads.clone();
        drop(long);
        assert!(uploads.aborted().await && store.head(&Path::from("y")).await.is_err());
    }
}
