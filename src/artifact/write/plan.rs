//! The writer's memory, planned before the first row: how the limit is shared between staging, sorting and writing, and how
//! many files that and the process's limit on open files leave room for.

use crate::artifact::format::DEFAULT_MAX_BUCKETS;
use crate::error::{Error, Result};
use crate::io::{LOCAL_BUFFER_BYTES, MAX_PARTS, MIN_PART_BYTES};
use crate::lance::file::CLOSING_PAGE_BYTES;

const DEFAULT_LIMIT: u64 = 1 << 30;
/// What the process needs per open bucket file beside its buffer: the Lance writer.
const FILE_OVERHEAD: usize = 16 * 1024;
/// What is kept per page of a bucket file until it is closed.
const PAGE_OVERHEAD: usize = 12;
/// Columns of a bucket file.
const COLUMNS: usize = 3;
/// What is kept per partition until the manifest is written: its ranges, rows and checksum.
const PARTITION_OVERHEAD: usize = 104;
/// What the runs of a build take at its end, by what they take before: they become ranges, and the ranges a file.
const RUNS_AT_THE_END: u64 = 5;
/// Fewer staged rows than this make runs too short to be worth reading.
const MIN_STAGE_ROWS: usize = 4096;

/// Rows of the first stages, where the limit allows as many.
const SMALL_STAGE_BYTES: usize = 96 << 20;

/// Larger runs are written in several pages.
const MAX_CHUNK_BYTES: usize = 2 << 20;

/// Parts of an upload that are rows: the others are for the file's own metadata, which lists its pages.
const ROW_PARTS: u64 = MAX_PARTS as u64 - MAX_PARTS as u64 / 64;
/// Parts where nobody said how many rows will come: larger ones delay an upload for nothing.
const MAX_UNPLANNED_PART_BYTES: usize = 64 << 20;
/// Sizes of parts are multiples of this.
const PART_STEP: usize = 64 * 1024;

/// Rows in fewer bytes than these are not worth a file of their own, where it is known how many will come.
const MIN_BUCKET_BYTES: u64 = 1 << 20;

/// Files that are left for others than the builder: the dataset's, sockets, what Python opens.
const OTHER_FILES: usize = 24;

/// What a plan is made for.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    pub limit: u64,
    /// What others hold of the call's limit, for messages.
    pub held: u64,
    pub code_width: usize,
    pub num_partitions: usize,
    /// As many as are useful and fit, where it is not given.
    pub num_buckets: Option<usize>,
    /// Rows that will come, about.
    pub expected_rows: Option<u64>,
    /// Bucket files are uploads.
    pub uploads: bool,
    pub threads: usize,
    /// Files that the process may still open.
    pub files_left: usize,
}

/// Shares of a memory limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    pub limit: u64,
    pub num_buckets: usize,
    /// Bytes of one part of an upload, of which an open file holds two.
    pub part_bytes: usize,
    /// Rows that one bucket file can take.
    pub file_rows: u64,
    /// Rows of one stage, at most. Two stages exist: one fills while the other is grouped and written.
    pub stage_rows: usize,
    /// Bytes of a staged row, in both stages and the sort.
    pub staged_row_bytes: usize,
    /// Rows of the first stages.
    pub small_stage_rows: usize,
    /// Rows of a stage that room is made for at the start.
    pub first_rows: usize,
    /// Rows handed to a file at once.
    pub chunk_rows: usize,
    /// Threads that gather, hash and write.
    pub threads: usize,
}

/// 1 GiB or a quarter of the machine's memory, whichever is less.
pub fn default_limit() -> u64 {
    total_memory().map_or(DEFAULT_LIMIT, |total| DEFAULT_LIMIT.min(total / 4))
}

#[cfg(target_os = "linux")]
fn total_memory() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let line = read("/proc/meminfo")?.lines().find(|l| l.starts_with("MemTotal:"))?.to_string();
    let total = line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024;
    // A container may have less than the machine.
    let cgroup = read("/sys/fs/cgroup/memory.max").and_then(|max| max.trim().parse::<u64>().ok());
    Some(cgroup.map_or(total, |max| max.min(total)))
}

#[cfg(not(target_os = "linux"))]
fn total_memory() -> Option<u64> {
    None
}

/// Bytes that a build keeps until its end.
#[derive(Debug, Clone, Copy, Default)]
pub struct Kept {
    /// Of the runs of all files.
    pub runs: usize,
    /// Of the pages of all files.
    pub pages: usize,
    /// That closing the file with the most pages takes.
    pub closing: usize,
}

impl Kept {
    /// What its end takes. Files are closed one at a time where there is no room for more, before runs become ranges.
    fn at_the_end(self) -> u64 {
        let runs = self.runs as u64;
        runs.saturating_mul(RUNS_AT_THE_END).max(runs.saturating_add(self.pages as u64).saturating_add(self.closing as u64))
    }
}

impl MemoryPlan {
    /// Rows of the stage that follows so many rows, whose runs are kept in so many bytes: few at first, so that a build takes no more
    /// memory than its rows are worth, then an eighth of what was written, so that its ranges are long, in what the runs leave.
    pub fn stage_after(&self, rows: u64, kept: Kept) -> Result<usize> {
        let most = self.stage_rows.saturating_sub((kept.runs + kept.pages) / self.staged_row_bytes);
        if most < MIN_STAGE_ROWS || kept.at_the_end() > self.limit {
            return Err(Error::invalid(format!(
                "memory_limit: the runs of {rows} rows take {} bytes, their pages {}, and what lists them does not fit in the writer's {}; \
                 build again with expected_rows, which says before it begins what is needed, with a higher memory_limit, or in shards",
                kept.runs, kept.pages, self.limit
            )));
        }
        // In steps of twice as much: stages that grow with every one leave as many blocks of memory that no later one fits.
        let wanted = usize::try_from(rows / 8).unwrap_or(usize::MAX);
        let mut stage_rows = self.small_stage_rows;
        while stage_rows <= wanted / 2 && stage_rows < most {
            stage_rows *= 2;
        }
        Ok(if stage_rows > most / 2 && wanted >= most { most } else { stage_rows.min(most) })
    }

    /// Choose the files, the size of their parts and the stages; refuse what cannot end well.
    pub fn choose(wanted: &Wanted) -> Result<Self> {
        let (partitions, fit) = (wanted.num_partitions, wanted.files_left.saturating_sub(OTHER_FILES));
        if fit == 0 {
            return Err(Error::Storage(format!(
                "this process may open {} more files, and a build needs {} beside those of the artifact; raise the limit (ulimit -n)",
                wanted.files_left, OTHER_FILES
            )));
        }
        let num_buckets = match wanted.num_buckets {
            Some(given) if given == 0 || given > partitions => {
                return Err(Error::invalid(format!("num_buckets: got {given}, expected 1 to num_partitions = {partitions}")));
            }
            Some(given) if given > fit => {
                return Err(Error::invalid(format!(
                    "num_buckets: got {given}, expected at most {fit}: each is an open file, and this process may open {} more, of which \
                     {OTHER_FILES} are for others; raise the limit (ulimit -n) or lower num_buckets",
                    wanted.files_left
                )));
            }
            Some(given) => given,
            None => Self::useful_buckets(wanted),
        };
        let needed = match Self::of_buckets(wanted, num_buckets) {
            Ok(plan) => return Ok(plan),
            Err(needed) => needed.next_multiple_of(1 << 20),
        };
        // With a higher limit there are more buckets, where nobody says how many, which need more.
        let needed = match wanted.num_buckets {
            Some(_) => needed,
            None => Self::with_its_buckets(wanted, needed),
        };
        let rows = match wanted.expected_rows {
            Some(rows) if wanted.uploads => format!(" and about {rows} rows in uploads of at most {MAX_PARTS} parts"),
            _ => String::new(),
        };
        // The most buckets that would do.
        let (mut fits, mut fails) = (0, num_buckets);
        while fails - fits > 1 {
            let middle = fits + (fails - fits) / 2;
            if Self::of_buckets(wanted, middle).is_ok() { fits = middle } else { fails = middle }
        }
        let lower = if fits > 0 { format!(" or lower num_buckets to {fits}") } else { String::new() };
        Err(Error::invalid(format!(
            "memory_limit: got {} bytes, expected at least {} for {partitions} partitions in {num_buckets} buckets with codes of {} bytes{rows}; raise memory_limit{lower}",
            wanted.limit + wanted.held,
            needed + wanted.held,
            wanted.code_width
        )))
    }

    /// As many as are useful and fit.
    fn useful_buckets(wanted: &Wanted) -> usize {
        let (partitions, fit) = (wanted.num_partitions, wanted.files_left.saturating_sub(OTHER_FILES));
        let open_file_bytes = if wanted.uploads { 2 * MIN_PART_BYTES } else { LOCAL_BUFFER_BYTES };
        // A reader of many small artifacts is better off with a few files of each.
        let bytes = wanted.expected_rows.map_or(u64::MAX, |rows| rows.saturating_mul(wanted.code_width as u64 + 12));
        let useful = usize::try_from(bytes / MIN_BUCKET_BYTES).unwrap_or(usize::MAX).max(1);
        partitions.min(DEFAULT_MAX_BUCKETS).min(useful).min(fit).min(Self::max_buckets(wanted.limit, open_file_bytes))
    }

    /// The limit that is enough for the buckets that it leads to.
    fn with_its_buckets(wanted: &Wanted, mut needed: u64) -> u64 {
        for _ in 0..30 {
            let at = Wanted { limit: needed, ..*wanted };
            match Self::of_buckets(&at, Self::useful_buckets(&at)) {
                Ok(_) => break,
                Err(more) => needed = more.max(needed + 1).next_multiple_of(1 << 20),
            }
        }
        needed
    }

    /// The plan for so many buckets, or the limit that they need.
    fn of_buckets(wanted: &Wanted, num_buckets: usize) -> std::result::Result<Self, u64> {
        if !wanted.uploads {
            return Self::of_files(wanted, num_buckets, LOCAL_BUFFER_BYTES, u64::MAX);
        }
        let row_bytes = wanted.code_width as u64 + 12;
        let of_parts = |part_bytes: usize| {
            let file_rows = ROW_PARTS.saturating_mul(part_bytes as u64) / row_bytes;
            Self::of_files(wanted, num_buckets, part_bytes.saturating_mul(2), file_rows).map(|plan| Self { part_bytes, ..plan })
        };
        let Some(rows) = wanted.expected_rows else {
            let share = usize::try_from(wanted.limit / 8).unwrap_or(usize::MAX) / num_buckets / PART_STEP * PART_STEP;
            let part_bytes = share.clamp(MIN_PART_BYTES, MAX_UNPLANNED_PART_BYTES);
            return of_parts(part_bytes).or_else(|_| of_parts(MIN_PART_BYTES));
        };
        // Buckets are not of one size: room for several times the mean, or for everything in one.
        let part_bytes = |times: u64| {
            let rows = rows.div_ceil(num_buckets as u64).saturating_mul(times).min(rows);
            let bytes = u128::from(rows) * u128::from(row_bytes);
            let part = usize::try_from(bytes.div_ceil(u128::from(ROW_PARTS))).unwrap_or(usize::MAX / 4);
            part.max(MIN_PART_BYTES).next_multiple_of(PART_STEP)
        };
        for times in [4, 3] {
            let part_bytes = part_bytes(times);
            if (part_bytes as u64).saturating_mul(2 * num_buckets as u64) <= wanted.limit / 2
                && let Ok(plan) = of_parts(part_bytes)
            {
                return Ok(plan);
            }
        }
        of_parts(part_bytes(2))
    }

    /// Share the limit between two stages, the sort and the threads that write to open files of `open_file_bytes` each.
    fn of_files(wanted: &Wanted, num_buckets: usize, open_file_bytes: usize, file_rows: u64) -> std::result::Result<Self, u64> {
        let (limit, threads) = (wanted.limit, wanted.threads);
        let row_bytes = 8 + 4 + wanted.code_width;
        let fixed = num_buckets
            .saturating_mul(open_file_bytes.saturating_add(FILE_OVERHEAD))
            .saturating_add(wanted.num_partitions * (PARTITION_OVERHEAD + 4 * (threads + 2)));
        // A gathered chunk per thread, which is to stay in its cache, and as much again for what its growth leaves behind.
        let chunk_of = |limit: usize| (limit / (16 * threads)).clamp(64 * 1024, MAX_CHUNK_BYTES);
        let per_row = 2 * row_bytes + 4;
        let rows = wanted.expected_rows.unwrap_or(0);
        let stage_rows_in = |limit: u64| {
            let usable = usize::try_from(limit).unwrap_or(usize::MAX);
            let writing = threads * 2 * chunk_of(usable);
            // Rows of a stage are counted in 32 bits.
            let stage_rows = (usable.saturating_sub(fixed.saturating_add(writing)) / per_row).min(u32::MAX as usize / 2);
            if stage_rows < MIN_STAGE_ROWS {
                return None;
            }
            // What runs and pages will take: about so many stages, each with a run of every partition and a page of every bucket. Buckets are
            // not of one size.
            let stages = (rows / stage_rows as u64) as f64;
            let run_bytes = if stage_rows / wanted.num_partitions.max(1) < 100 { 1 } else { 2 };
            let pages = stages * num_buckets as f64 + rows as f64 * row_bytes as f64 / chunk_of(usable) as f64;
            let of_largest = pages / num_buckets as f64 * num_buckets.min(2) as f64;
            let kept = Kept {
                runs: (stages * (wanted.num_partitions * run_bytes) as f64) as usize,
                pages: (pages * PAGE_OVERHEAD as f64) as usize,
                closing: (of_largest * (COLUMNS * CLOSING_PAGE_BYTES) as f64) as usize,
            };
            let fits = stages == 0.0 || kept.at_the_end() <= limit;
            fits.then_some(stage_rows)
        };
        let Some(stage_rows) = stage_rows_in(limit) else {
            let (mut fails, mut fits) = (limit, limit.max(1 << 20));
            while stage_rows_in(fits).is_none() {
                fails = fits;
                fits = fits.checked_mul(2).ok_or(u64::MAX / 2)?;
            }
            while fits - fails > 1 << 12 {
                let middle = fails + (fits - fails) / 2;
                if stage_rows_in(middle).is_some() { fits = middle } else { fails = middle }
            }
            return Err(fits);
        };
        let chunk_bytes = chunk_of(usize::try_from(limit).unwrap_or(usize::MAX));
        let expected = wanted.expected_rows.map_or(stage_rows, |rows| usize::try_from(rows).unwrap_or(usize::MAX));
        Ok(Self {
            limit,
            num_buckets,
            part_bytes: MIN_PART_BYTES,
            file_rows,
            stage_rows,
            staged_row_bytes: per_row,
            small_stage_rows: stage_rows.min((SMALL_STAGE_BYTES / row_bytes).max(MIN_STAGE_ROWS)),
            first_rows: stage_rows.min(expected).min((SMALL_STAGE_BYTES / row_bytes).max(MIN_STAGE_ROWS)),
            chunk_rows: (chunk_bytes / row_bytes).max(1),
            threads,
        })
    }

    /// The most buckets whose open files take at most a quarter of the limit.
    fn max_buckets(limit: u64, open_file_bytes: usize) -> usize {
        (usize::try_from(limit / 4).unwrap_or(usize::MAX) / (open_file_bytes + FILE_OVERHEAD)).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCAL: Wanted = Wanted {
        limit: 1 << 30,
        held: 0,
        code_width: 64,
        num_partitions: 1024,
        num_buckets: None,
        expected_rows: None,
        uploads: false,
        threads: 4,
        files_left: 1000,
    };

    fn used(wanted: &Wanted, plan: &MemoryPlan) -> u64 {
        let row = 12 + wanted.code_width;
        let open = if wanted.uploads { 2 * plan.part_bytes } else { LOCAL_BUFFER_BYTES };
        let writing = plan.threads * 2 * plan.chunk_rows * row;
        (plan.stage_rows * (2 * row + 4) + writing + plan.num_buckets * (open + FILE_OVERHEAD)) as u64
    }

    fn number_after(error: &str, words: &str) -> u64 {
        let rest = error.split(words).nth(1).unwrap_or_else(|| panic!("{error}"));
        rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
    }

    #[test]
    fn shares_stay_below_the_limit() {
        for limit in [32u64 << 20, 256 << 20, 1 << 30, 8 << 30] {
            for (code_width, num_partitions, buckets, threads) in [(64, 1024, 256, 4), (8, 65536, 256, 16), (96, 16, 16, 1)] {
                for (uploads, expected_rows) in [(false, None), (true, None), (true, Some(1_000)), (true, Some(20_000_000_000))] {
                    let num_buckets = (!uploads).then_some(buckets);
                    let wanted = Wanted { limit, code_width, num_partitions, num_buckets, uploads, expected_rows, threads, ..LOCAL };
                    match MemoryPlan::choose(&wanted) {
                        Ok(plan) => assert!(used(&wanted, &plan) <= limit, "{wanted:?} {plan:?} uses {}", used(&wanted, &plan)),
                        Err(error) => {
                            assert!(limit < 64 << 20 || expected_rows > Some(1_000), "{wanted:?}: {error}");
                            let needed = number_after(&error.to_string(), "at least ");
                            let wanted = Wanted { limit: needed, num_buckets: Some(wanted.num_buckets.unwrap_or(1)), ..wanted };
                            assert!(uploads || MemoryPlan::choose(&wanted).is_ok(), "{wanted:?}: {error}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_refused_is_refused_with_what_works() {
        for wanted in [
            Wanted { limit: 1 << 20, num_buckets: Some(256), ..LOCAL },
            Wanted { limit: 128 << 20, num_buckets: Some(256), uploads: true, ..LOCAL },
            Wanted { limit: 128 << 20, num_buckets: Some(64), uploads: true, expected_rows: Some(4_000_000_000), ..LOCAL },
            Wanted { limit: 512 << 20, num_buckets: Some(16), uploads: true, expected_rows: Some(90_000_000_000), ..LOCAL },
            Wanted { limit: 256 << 20, num_partitions: 1 << 18, expected_rows: Some(10_000_000_000), ..LOCAL },
            // Its pages alone would not fit.
            Wanted { limit: 64 << 20, num_partitions: 256, code_width: 96, expected_rows: Some(3_000_000_000), ..LOCAL },
            Wanted { limit: 64 << 20, num_partitions: 1, code_width: 96, expected_rows: Some(3_000_000_000), ..LOCAL },
        ] {
            let error = MemoryPlan::choose(&wanted).unwrap_err().to_string();
            let limit = number_after(&error, "at least ");
            assert!(MemoryPlan::choose(&Wanted { limit, ..wanted }).is_ok(), "{error}");
            if error.contains("lower num_buckets") {
                let num_buckets = Some(number_after(&error, "lower num_buckets to ") as usize);
                assert!(MemoryPlan::choose(&Wanted { num_buckets, ..wanted }).is_ok(), "{error}");
            }
        }
    }

    #[test]
    fn parts_take_the_rows_that_are_expected_and_more() {
        let row = 76;
        for (rows, limit) in [(1_000u64, 1u64 << 30), (1_000_000_000, 1 << 30), (20_000_000_000, 1 << 30), (100_000_000_000, 8 << 30)] {
            let wanted = Wanted { limit, uploads: true, expected_rows: Some(rows), ..LOCAL };
            let plan = MemoryPlan::choose(&wanted).unwrap();
            let mean = rows.div_ceil(plan.num_buckets as u64);
            assert!(plan.file_rows >= (2 * mean).min(rows), "{plan:?}");
            assert!(plan.part_bytes >= 5 << 20 && plan.file_rows * row <= 10_000 * plan.part_bytes as u64, "{plan:?}");
        }
        // Where memory allows, buckets may be four times the mean; where nobody said how many rows come, parts are as large as
        // a share of the limit allows.
        let ample = MemoryPlan::choose(&Wanted { limit: 64 << 30, uploads: true, expected_rows: Some(100_000_000_000), ..LOCAL }).unwrap();
        assert!(ample.file_rows >= 4 * 100_000_000_000u64.div_ceil(ample.num_buckets as u64));
        let unknown = MemoryPlan::choose(&Wanted { limit: 4 << 30, num_buckets: Some(16), uploads: true, ..LOCAL }).unwrap();
        assert_eq!((unknown.part_bytes, unknown.file_rows), (32 << 20, 9844 * (32 << 20) / 76));
    }

    #[test]
    fn files_fit_the_limit_on_open_files() {
        assert_eq!(MemoryPlan::choose(&LOCAL).unwrap().num_buckets, 256);
        let few = Wanted { files_left: 50, ..LOCAL };
        assert_eq!(MemoryPlan::choose(&few).unwrap().num_buckets, 26);
        let error = MemoryPlan::choose(&Wanted { num_buckets: Some(64), ..few }).unwrap_err().to_string();
        assert!(error.contains("at most 26") && error.contains("ulimit -n"), "{error}");
        assert!(matches!(MemoryPlan::choose(&Wanted { files_left: 20, ..LOCAL }), Err(Error::Storage(_))));
    }

    #[test]
    fn long_builds_fit_where_what_they_keep_is_not_there_at_once() {
        for wanted in [
            Wanted {
                limit: 256 << 20,
                num_partitions: 4096,
                code_width: 16,
                expected_rows: Some(10_000_000_000),
                uploads: true,
                threads: 16,
                ..LOCAL
            },
            Wanted { limit: 64 << 20, num_partitions: 4096, code_width: 16, expected_rows: Some(1_000_000_000), ..LOCAL },
            Wanted { num_partitions: 4096, code_width: 96, expected_rows: Some(10_000_000_000), threads: 16, ..LOCAL },
        ] {
            MemoryPlan::choose(&wanted).unwrap();
        }
    }

    #[test]
    fn stages_grow_with_what_was_written() {
        let plan = MemoryPlan::choose(&Wanted { limit: 4 << 30, ..LOCAL }).unwrap();
        assert_eq!(plan.stage_after(0, Kept::default()).unwrap(), SMALL_STAGE_BYTES / 76);
        assert_eq!(plan.stage_after(4_000_000, Kept::default()).unwrap(), plan.small_stage_rows);
        assert_eq!(plan.stage_after(80_000_000, Kept::default()).unwrap(), 4 * plan.small_stage_rows);
        assert_eq!(plan.stage_after(u64::MAX, Kept::default()).unwrap(), plan.stage_rows);
        let error = plan.stage_after(80_000_000, Kept { closing: 5 << 30, ..Kept::default() }).unwrap_err().to_string();
        assert!(error.contains("memory_limit"), "a file that could not be closed: {error}");
        let small = MemoryPlan::choose(&Wanted { limit: 64 << 20, ..LOCAL }).unwrap();
        assert_eq!((small.stage_after(0, Kept::default()).unwrap(), small.first_rows), (small.stage_rows, small.stage_rows));
    }

    #[test]
    fn only_what_the_rows_need_is_reserved_at_first() {
        let plan = MemoryPlan::choose(&Wanted { expected_rows: Some(50_000), ..LOCAL }).unwrap();
        assert_eq!(plan.first_rows, 50_000);
        // With fewer files there is room for more rows.
        let anybody = MemoryPlan::choose(&LOCAL).unwrap();
        assert!(plan.stage_rows >= anybody.stage_rows && (plan.num_buckets, anybody.num_buckets) == (3, 256), "{plan:?}");
    }
}
