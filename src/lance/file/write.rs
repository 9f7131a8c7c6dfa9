//! Files as they are written: through Lance's writer for their metadata, and our own sinks for their bytes.
//!
//! Lance's own sinks hold up to 2 MiB (local) or ten parts (object store) a file, and a builder has hundreds of files open.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use arrow_array::RecordBatch;
use async_trait::async_trait;
use lance_core::datatypes::Schema;
use lance_file::version::ConcreteFileVersion;
use lance_file::versions::{create_lazy_writer, create_writer};
use lance_file::writer::{FileWriteSummary, FileWriter, FileWriterOptions};
use lance_io::object_writer::WriteResult;
use lance_io::traits::Writer;
use tokio::io::AsyncWrite;
use tokio::runtime::Handle;

use super::flat::{FlatPages, FlatType};
use crate::error::{Error, Result};
use crate::io::{FileSink, MIN_PART_BYTES, Store, TailRecorder, Uploads};

/// A finished file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    pub num_rows: u64,
    pub size_bytes: u64,
    /// `xxh3_64` of the metadata at its end, and the bytes of that.
    pub tail: Option<(u64, u64)>,
}

impl Written {
    fn of(summary: FileWriteSummary, tail: &TailRecorder) -> Self {
        Self { num_rows: summary.num_rows, size_bytes: summary.size_bytes, tail: tail.checksum() }
    }
}

/// A sink as Lance's writers want it.
struct Sink {
    file: FileSink,
    tail: TailRecorder,
}

impl AsyncWrite for Sink {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = futures::ready!(Pin::new(&mut self.file).poll_write(cx, bytes))?;
        self.tail.push(&bytes[..written]);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.file).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.file).poll_shutdown(cx)
    }
}

#[async_trait]
impl Writer for Sink {
    async fn tell(&mut self) -> lance_core::Result<usize> {
        Ok(self.file.size())
    }

    async fn shutdown(&mut self) -> lance_core::Result<WriteResult> {
        self.file.finish().await?;
        Ok(WriteResult { size: self.file.size(), e_tag: None })
    }
}

/// A file of an index, without waiting until it is on a local disk.
pub fn index_file(store: &Store, uploads: &Uploads, relative: &str) -> Result<Box<dyn Writer>> {
    Ok(Box::new(Sink { file: FileSink::create(store, uploads, relative, false)?, tail: TailRecorder::default() }))
}

/// A file whose columns are plain values, appended as they are.
pub struct FlatFileWriter {
    writer: FileWriter,
    tail: TailRecorder,
    kinds: Vec<FlatType>,
    pages: FlatPages,
    num_rows: u64,
}

impl FlatFileWriter {
    /// It appears under its name only once it is finished. `sync` makes it durable then.
    pub fn create(store: &Store, uploads: &Uploads, relative: &str, columns: &[FlatType], sync: bool) -> Result<Self> {
        let tail = TailRecorder::default();
        let sink = Sink { file: FileSink::create(store, uploads, relative, sync)?, tail: tail.clone() };
        let writer = create_lazy_writer(ConcreteFileVersion::V2_0, Box::new(sink), FileWriterOptions::default())?;
        Ok(Self { writer, tail, kinds: columns.to_vec(), pages: FlatPages::default(), num_rows: 0 })
    }

    /// Append the values of some rows, a buffer for each column.
    pub async fn append(&mut self, num_rows: u64, buffers: &[&[u8]]) -> Result<()> {
        self.pages.begin(num_rows);
        for buffer in buffers {
            let (position, _) = self.writer.write_external_buffer(buffer).await?;
            let in_order = || Error::internal(format!("a buffer was written at {position}, before others"));
            self.pages.push(position, buffer.len() as u64).ok_or_else(in_order)?;
        }
        self.num_rows += num_rows;
        Ok(())
    }

    /// Bytes that the list of its pages takes.
    pub fn page_bytes(&self) -> usize {
        self.pages.bytes()
    }

    /// Bytes that [`Self::finish`] takes beside those, about.
    pub fn closing_bytes(&self) -> usize {
        self.pages.closing_bytes(self.kinds.len())
    }

    /// Describe the columns and publish the file.
    pub async fn finish(self, schema: &arrow_schema::Schema) -> Result<Written> {
        let Self { mut writer, tail, kinds, pages, num_rows } = self;
        let columns = pages.finish(&kinds);
        writer.initialize_with_external_columns(Schema::try_from(schema)?, &columns, num_rows)?;
        tail.start();
        Ok(Written::of(writer.finish().await?, &tail))
    }
}

/// A file of batches, encoded by Lance.
pub struct TableWriter {
    writer: FileWriter,
    tail: TailRecorder,
}

impl TableWriter {
    /// It appears under its name only once it is finished. `sync` makes it durable then. Call within a Tokio runtime.
    pub fn create(store: &Store, relative: &str, schema: &arrow_schema::Schema, sync: bool) -> Result<Self> {
        let uploads = Uploads::new(MIN_PART_BYTES, 1, Handle::current());
        let tail = TailRecorder::default();
        let sink = Sink { file: FileSink::create(store, &uploads, relative, sync)?, tail: tail.clone() };
        let schema = Schema::try_from(schema)?;
        let writer = create_writer(ConcreteFileVersion::V2_0, Box::new(sink), schema, FileWriterOptions::default())?;
        Ok(Self { writer, tail })
    }

    pub async fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        Ok(self.writer.write_batch(batch).await?)
    }

    pub async fn finish(mut self) -> Result<Written> {
        self.tail.start();
        Ok(Written::of(self.writer.finish().await?, &self.tail))
    }
}

/// Write a small file of one batch with schema metadata, all of which is under the checksum. Call within a Tokio runtime.
pub async fn write_row(store: &Store, relative: &str, metadata: &[(String, String)], batch: &RecordBatch, sync: bool) -> Result<Written> {
    let uploads = Uploads::new(MIN_PART_BYTES, 1, Handle::current());
    let tail = TailRecorder::default();
    tail.start();
    let sink = Sink { file: FileSink::create(store, &uploads, relative, sync)?, tail: tail.clone() };
    let schema = Schema::try_from(batch.schema().as_ref())?;
    let mut writer = create_writer(ConcreteFileVersion::V2_2, Box::new(sink), schema, FileWriterOptions::default())?;
    for (key, value) in metadata {
        writer.add_schema_metadata(key, value);
    }
    writer.write_batch(batch).await?;
    Ok(Written::of(writer.finish().await?, &tail))
}
