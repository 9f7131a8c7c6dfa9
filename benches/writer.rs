//! The writer alone against Lance's own `TwoFileShuffler`: the same encoded batches in memory, both ending in files.
//!
//! `cargo bench --bench writer -- [rows] [partitions] [runs] [--json FILE]`, or `just bench writer`. Interleaved; medians.
//! Beside them, measured in the same run, the machine: copying the same bytes, and writing them to one file.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_array::{RecordBatch, UInt8Array, UInt32Array, UInt64Array};
use lance_artifact::artifact::format::{PART_ID_COLUMN, bucket_schema};
use lance_artifact::artifact::{BuilderOptions, Encoding, PartitionArtifactBuilder};
use lance_artifact::model::fixed_size_list;
use lance_index::vector::v3::shuffler::{Shuffler, TwoFileShuffler};
use lance_io::stream::RecordBatchStreamAdapter;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

type Anyhow<T> = Result<T, Box<dyn std::error::Error>>;

const WIDTH: usize = 64;
const BATCH: usize = 65_536;

fn batches(rows: usize, partitions: usize) -> Anyhow<Vec<RecordBatch>> {
    let mut random = SmallRng::seed_from_u64(1);
    let mut batches = Vec::new();
    for start in (0..rows).step_by(BATCH) {
        let rows = BATCH.min(rows - start);
        let mut codes = vec![0u8; rows * WIDTH];
        random.fill(&mut codes[..]);
        let part_ids: UInt32Array = (0..rows).map(|_| random.random_range(0..partitions as u32)).collect();
        let row_ids: UInt64Array = (start as u64..(start + rows) as u64).collect();
        let codes = fixed_size_list(Arc::new(UInt8Array::from(codes)), WIDTH)?;
        batches.push(RecordBatch::try_new(bucket_schema(WIDTH), vec![Arc::new(row_ids), Arc::new(part_ids), Arc::new(codes)])?);
    }
    Ok(batches)
}

async fn ours(folder: &Path, batches: &[RecordBatch], partitions: usize, sync: bool) -> Anyhow<Duration> {
    let uri = folder.join("artifact").to_string_lossy().to_string();
    let began = Instant::now();
    let shape = Encoding::Shape { num_partitions: partitions, pq_code_width: WIDTH };
    let builder = PartitionArtifactBuilder::try_new(&uri, shape, BuilderOptions { sync, ..Default::default() }).await?;
    let appended = batches.to_vec();
    tokio::task::spawn_blocking(move || {
        for batch in &appended {
            builder.append_batch(batch)?;
        }
        builder.finish(None)
    })
    .await??;
    Ok(began.elapsed())
}

async fn shuffler(folder: &Path, batches: &[RecordBatch], partitions: usize) -> Anyhow<Duration> {
    let folder = object_store::path::Path::from_absolute_path(folder)?;
    let stream = futures::stream::iter(batches.iter().cloned().map(Ok).collect::<Vec<_>>());
    assert!(batches[0].column_by_name(PART_ID_COLUMN).is_some());
    let began = Instant::now();
    let reader =
        TwoFileShuffler::new(folder, partitions).shuffle(Box::new(RecordBatchStreamAdapter::new(batches[0].schema(), stream))).await?;
    let elapsed = began.elapsed();
    let rows: usize = (0..partitions).map(|p| reader.partition_size(p)).sum::<Result<usize, _>>()?;
    assert_eq!(rows, batches.iter().map(RecordBatch::num_rows).sum::<usize>());
    Ok(elapsed)
}

/// Seconds that the machine needs to copy `bytes`, to write them to a file, and to write and sync them.
fn limits(folder: &Path, bytes: &[u8]) -> Anyhow<[Duration; 3]> {
    let began = Instant::now();
    let copy = bytes.to_vec();
    let copied = began.elapsed();
    let began = Instant::now();
    let mut file = std::fs::File::create(folder.join("raw"))?;
    for piece in copy.chunks(1 << 20) {
        file.write_all(piece)?;
    }
    let written = began.elapsed();
    file.sync_data()?;
    Ok([copied, written, began.elapsed()])
}

fn settled(root: &Path) -> Anyhow<PathBuf> {
    let _ = std::fs::remove_dir_all(root);
    std::fs::create_dir_all(root)?;
    // What earlier runs wrote and deleted would be part of the next run's time.
    std::process::Command::new("sync").status()?;
    std::thread::sleep(Duration::from_secs(2));
    Ok(root.to_path_buf())
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
}

#[tokio::main]
async fn main() -> Anyhow<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let json = arguments.iter().position(|a| a == "--json").map(|at| arguments.drain(at..at + 2).nth(1).unwrap_or_default());
    let number = |at: usize, default: usize| arguments.get(at).map_or(Ok(default), |a| a.parse::<usize>());
    let (rows, partitions, runs) = (number(0, 4_000_000)?, number(1, 1024)?, number(2, 5)?);
    let batches = batches(rows, partitions)?;
    let payload = vec![1u8; rows * (WIDTH + 12)];
    let root = tempfile::tempdir()?;
    let mut times: [Vec<Duration>; 6] = Default::default();
    for _ in 0..runs {
        let folder = |name: &str| settled(&root.path().join(name));
        times[0].push(ours(&folder("a")?, &batches, partitions, false).await?);
        times[1].push(ours(&folder("a")?, &batches, partitions, true).await?);
        times[2].push(shuffler(&folder("a")?, &batches, partitions).await?);
        for (times, limit) in times[3..].iter_mut().zip(limits(&folder("a")?, &payload)?) {
            times.push(limit);
        }
    }
    let [ours, synced, shuffler, copied, written, written_synced] = times.map(median);
    let gb = payload.len() as f64 / 1e9;
    println!("\nwriter alone: {rows} rows of {} bytes ({gb:.3} GB), K={partitions}, median of {runs} runs, interleaved\n", WIDTH + 12);
    println!("| | seconds | GB/s | times as fast as TwoFileShuffler |\n|---|---|---|---|");
    for (name, seconds) in [
        ("ours", ours),
        ("ours, synced", synced),
        ("TwoFileShuffler", shuffler),
        ("copying the bytes, one core", copied),
        ("writing the bytes to one file", written),
        ("the same, synced", written_synced),
    ] {
        println!("| {name} | {seconds:.3} | {:.2} | {:.2} |", gb / seconds, shuffler / seconds);
    }
    if let Some(path) = json {
        let row = |goal: &str, ours: f64, peer: f64, limit: f64| serde_json::json!({"goal": goal, "ours": ours, "peer": peer, "ratio": peer / ours, "limit": limit, "unit": "s"});
        let limit = copied.max(written_synced);
        let what = format!("writer alone, {rows} rows, K={partitions}");
        let rows = [
            row(&format!("{what}, at least 5 times as fast as TwoFileShuffler"), ours, shuffler, copied.max(written)),
            row(&format!("{what}, at least half as fast as copying and as writing to disk"), synced, limit, limit),
        ];
        std::fs::write(path, serde_json::to_string_pretty(&rows)?)?;
    }
    Ok(())
}
