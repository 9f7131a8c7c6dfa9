//! Lance files in memory: written by Lance, taken apart, damaged, and put together again so that what is damaged is not just their frame.

use std::sync::Arc;

use arrow_array::RecordBatch;
use lance_core::datatypes::Schema;
use lance_file::version::ConcreteFileVersion;
use lance_file::versions::create_writer;
use lance_file::writer::FileWriterOptions;
use lance_io::object_store::ObjectStore;
use object_store::path::Path;
use xxhash_rust::xxh3::xxh3_64;

use crate::input::Input;
use crate::wire;

pub use lance_file::version::ConcreteFileVersion as Version;

/// Three positions, two counts, two version numbers, the magic.
const FOOTER: usize = 40;

/// The versions that artifacts may have.
pub const VERSIONS: [Version; 3] = [ConcreteFileVersion::V2_0, ConcreteFileVersion::V2_1, ConcreteFileVersion::V2_2];

/// A file of one batch, or what Lance says against it.
pub async fn written(version: Version, batch: &RecordBatch, metadata: &[(String, String)]) -> lance_core::Result<Vec<u8>> {
    let (store, path) = (Arc::new(ObjectStore::memory()), Path::from("file"));
    let schema = Schema::try_from(batch.schema().as_ref())?;
    let mut writer = create_writer(version, store.create(&path).await?, schema, FileWriterOptions::default())?;
    for (key, value) in metadata {
        writer.add_schema_metadata(key, value);
    }
    writer.write_batch(batch).await?;
    writer.finish().await?;
    Ok(store.read_one_all(&path).await?.to_vec())
}

/// A file apart: what is before its metadata, the buffers and the columns' descriptions.
struct Parts {
    data: Vec<u8>,
    /// The first is the schema. Those in the data stay where they are.
    globals: Vec<Global>,
    columns: Vec<Vec<u8>>,
    versions: [u8; 4],
}

enum Global {
    There(u64, u64),
    Moved(Vec<u8>),
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)
}

impl Parts {
    fn of(file: &[u8]) -> Option<Self> {
        let footer = file.len().checked_sub(FOOTER)?;
        let position = |at: usize| u64_at(file, footer + at).and_then(|p| usize::try_from(p).ok()).filter(|p| *p <= file.len());
        let (cmo, gbo) = (position(8)?, position(16)?);
        let (num_globals, num_columns) = (u32_at(file, footer + 24)? as usize, u32_at(file, footer + 28)? as usize);
        let table =
            |start: usize, n: usize| -> Option<(u64, u64)> { Some((u64_at(file, start + 16 * n)?, u64_at(file, start + 16 * n + 8)?)) };
        let within = |(start, len): (u64, u64)| {
            let (start, len) = (usize::try_from(start).ok()?, usize::try_from(len).ok()?);
            Some(file.get(start..start.checked_add(len)?)?.to_vec())
        };
        let (schema, _) = table(gbo, 0)?;
        let data = file.get(..usize::try_from(schema).ok()?)?.to_vec();
        let mut globals = Vec::new();
        for n in 0..num_globals {
            let (start, len) = table(gbo, n)?;
            globals.push(if start < schema { Global::There(start, len) } else { Global::Moved(within((start, len))?) });
        }
        let columns = (0..num_columns).map(|n| within(table(cmo, n)?)).collect::<Option<Vec<_>>>()?;
        Some(Self { data, globals, columns, versions: file.get(footer + 32..footer + 36)?.try_into().ok()? })
    }

    fn together(&self) -> Vec<u8> {
        let mut file = self.data.clone();
        let mut tables: [Vec<(u64, u64)>; 2] = Default::default();
        for global in &self.globals {
            tables[0].push(match global {
                Global::There(start, len) => (*start, *len),
                Global::Moved(bytes) => {
                    file.extend_from_slice(bytes);
                    ((file.len() - bytes.len()) as u64, bytes.len() as u64)
                }
            });
        }
        let columns_start = file.len() as u64;
        for column in &self.columns {
            file.extend_from_slice(column);
            tables[1].push(((file.len() - column.len()) as u64, column.len() as u64));
        }
        let mut push_table = |table: &[(u64, u64)]| {
            let start = file.len() as u64;
            table.iter().for_each(|(start, len)| file.extend([start.to_le_bytes(), len.to_le_bytes()].concat()));
            start
        };
        let (cmo, gbo) = (push_table(&tables[1]), push_table(&tables[0]));
        [columns_start, cmo, gbo].iter().for_each(|position| file.extend(position.to_le_bytes()));
        [self.globals.len(), self.columns.len()].iter().for_each(|count| file.extend((*count as u32).to_le_bytes()));
        file.extend(self.versions);
        file.extend(b"LANC");
        file
    }
}

/// Bytes from the schema on: what a tail's checksum is over.
pub fn tail_bytes(file: &[u8]) -> usize {
    Parts::of(file).map_or(file.len(), |parts| file.len() - parts.data.len())
}

/// A checksum as manifests spell it.
pub fn checksum(bytes: &[u8]) -> String {
    format!("{:016x}", xxh3_64(bytes))
}

/// The file with some changes.
pub fn damaged(file: &[u8], input: &mut Input<'_>) -> Vec<u8> {
    let mut file = file.to_vec();
    for _ in 0..input.u8() % 6 + 1 {
        file = match input.u8() % 12 {
            0..=4 => described_otherwise(&file, input).unwrap_or(file),
            5 => columns_moved(&file, input).unwrap_or(file),
            6 => number_in_the_frame(file, input),
            7 => {
                file.truncate(file.len() - input.below(file.len() + 1));
                file
            }
            8 => {
                let at = input.below(file.len() + 1);
                let bytes = input.bytes(32);
                file.splice(at..at, bytes.iter().copied());
                file
            }
            9 => {
                let at = input.below(file.len() + 1);
                let end = (at + input.below(256)).min(file.len());
                file.drain(at..end);
                file
            }
            _ => {
                let at = input.below(file.len() + 1);
                for (old, new) in file[at..].iter_mut().zip(input.bytes(16)) {
                    *old = *new;
                }
                file
            }
        };
        if input.is_empty() {
            break;
        }
    }
    file
}

/// A column, or the schema, that says something else of itself.
fn described_otherwise(file: &[u8], input: &mut Input<'_>) -> Option<Vec<u8>> {
    let mut parts = Parts::of(file)?;
    let which = input.below(parts.columns.len() + parts.globals.len());
    let message = match which.checked_sub(parts.columns.len()) {
        None => parts.columns.get_mut(which)?,
        Some(global) => match parts.globals.get_mut(global)? {
            Global::Moved(bytes) => bytes,
            // As if it had been behind the schema.
            there @ Global::There(..) => {
                let Global::There(start, len) = *there else { return None };
                let (start, len) = (usize::try_from(start).ok()?, usize::try_from(len).ok()?);
                *there = Global::Moved(file.get(start..start.checked_add(len)?)?.to_vec());
                let Global::Moved(bytes) = there else { return None };
                bytes
            }
        },
    };
    *message = wire::changed(message, input);
    Some(parts.together())
}

/// Columns that are missing, there twice, or in another order; and other versions.
fn columns_moved(file: &[u8], input: &mut Input<'_>) -> Option<Vec<u8>> {
    let mut parts = Parts::of(file)?;
    let (a, b) = (input.below(parts.columns.len()), input.below(parts.columns.len()));
    match input.u8() % 5 {
        _ if parts.columns.is_empty() => {}
        0 => drop(parts.columns.remove(a)),
        1 => parts.columns.swap(a, b),
        2 => parts.columns.push(parts.columns[a].clone()),
        3 => parts.versions[2] = input.u8() % 5,
        _ => parts.globals.push(Global::Moved(input.bytes(64).to_vec())),
    }
    Some(parts.together())
}

/// A position, a length or a count of the tables and the footer.
fn number_in_the_frame(mut file: Vec<u8>, input: &mut Input<'_>) -> Vec<u8> {
    let (word, number) = (usize::from(input.u8() % 24), input.number());
    // The counts lie in one word; the tables before the footer are of whole words too.
    if let Some(at) = file.len().checked_sub(8 * (word + 1)) {
        file[at..at + 8].copy_from_slice(&number.to_le_bytes());
        if word == 0 {
            let end = file.len();
            file[end - 4..].copy_from_slice(b"LANC");
        }
    }
    file
}
