//! Where a file's bytes go: straight to a local file, or to an upload.
//!
//! Hundreds of files are open at once, so the memory of each is small and known.

use std::io::{self, Write};
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::AsyncWrite;

use super::local::new_temporary_file;
use super::store::Store;
use super::upload::{Upload, Uploads};
use crate::error::{Error, Result};

/// Bytes that an open local file collects.
pub const LOCAL_BUFFER_BYTES: usize = 32 * 1024;

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

    /// Bytes written so far.
    pub fn size(&self) -> usize {
        match self {
            Self::Local(file) => file.size,
            Self::Upload(upload) => upload.size(),
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
            let target = &self.target;
            let named = |e: io::Error| io::Error::new(e.kind(), format!("writing {}: {e}", target.display()));
            let file = file.into_inner().map_err(|e| named(e.into_error()))?;
            if self.sync {
                file.as_file().sync_all().map_err(named)?;
            }
            file.persist(target).map_err(|e| named(e.error))?;
        }
        Ok(())
    }
}

impl AsyncWrite for LocalFile {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let Some(file) = &mut self.file else {
            return Poll::Ready(Err(io::Error::other("the file is finished")));
        };
        let written = file.write(bytes);
        let target = &self.target;
        let written = written.map_err(|e| io::Error::new(e.kind(), format!("writing {}: {e}", target.display())))?;
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
