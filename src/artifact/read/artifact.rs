//! `Artifact`: a finished partition artifact, read by partition.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use arrow_schema::SchemaRef;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryStreamExt};

use super::files::BucketFiles;
use super::rows::{PartitionRows, WantedRange, merge_adjacent};
use super::sorted::read_sorted;
use crate::artifact::format::{
    CHECKSUM_KIND, MANIFEST_FILE, MAX_MANIFEST_BYTES, METADATA_FILE, Manifest, PARTITIONS_DIR, parse_model, partition_schema, to_hex,
};
use crate::error::{Error, Result};
use crate::lance::{LanceStore, StorageOptions};
use crate::model::IvfPqModel;

/// Files looked at at once for one artifact.
const CONCURRENT_FILES: usize = 16;

/// Artifacts opened or looked at at once.
pub const CONCURRENT_ARTIFACTS: usize = 32;

/// A finished artifact. Opening reads the manifest and the model, nothing else.
#[derive(Debug)]
pub struct Artifact {
    files: BucketFiles,
    manifest: Manifest,
    model: Option<Arc<IvfPqModel>>,
    code_width: usize,
}

/// The bytes of the manifest.
pub async fn read_manifest(store: &LanceStore) -> Result<Bytes> {
    if let Some(seen) = store.see_at_most(MANIFEST_FILE, MAX_MANIFEST_BYTES).await? {
        return Ok(seen.content);
    }
    let begun = if store.exists(METADATA_FILE).await? {
        format!(". {METADATA_FILE} is there: this is a build that has not finished")
    } else {
        String::new()
    };
    Err(Error::ArtifactNotFound(format!(
        "{}: no partition artifact here: {MANIFEST_FILE} does not exist; it appears when a build finishes{begun}",
        store.uri()
    )))
}

/// A manifest that was read, and the files that it is of.
struct ManifestFile {
    files: BucketFiles,
    manifest: Manifest,
}

impl ManifestFile {
    async fn read(store: LanceStore) -> Result<Self> {
        let bytes = match read_manifest(&store).await {
            // Nothing else is looked at where there is one.
            Err(none @ Error::ArtifactNotFound(_)) => {
                let (files, manifest) = read_sorted(store).await?.ok_or(none)?;
                return Ok(Self { files, manifest });
            }
            read => read?,
        };
        let manifest = Manifest::parse(&bytes).map_err(|e| e.context(store.uri()))?;
        let files = BucketFiles::new(&store, manifest.files.clone().unwrap_or_default());
        let Some(file) = manifest.unread_partitions().map(str::to_string) else {
            return Ok(Self { files, manifest });
        };
        let partitions = files.read_partitions(&file, manifest.bucket_files.clone()).await?;
        let manifest = manifest.with_partitions(partitions).map_err(|e| e.context(format!("{file} of {}", store.uri())))?;
        Ok(Self { files, manifest })
    }

    /// The model, or `None` where the artifact has none.
    async fn read_model(&self) -> Result<Option<IvfPqModel>> {
        let Self { files, manifest } = self;
        let uri = files.store().uri();
        // A file of the usual name that lies here is another artifact's.
        let Some(file) = manifest.metadata_file() else { return Ok(None) };
        if !files.store().exists(file).await? {
            if manifest.model.is_some() {
                return Err(Error::corrupt(format!("{uri}: {file} is missing; the manifest describes a model")));
            }
            return Ok(None);
        }
        let (metadata, batch) = files.read_row(file).await?;
        let model = parse_model(&metadata, &batch).map_err(|e| match e {
            // What is wrong here is the file, whatever the check that found it.
            Error::InvalidInput(m) | Error::CorruptArtifact(m) => Error::corrupt(format!("{file} of {uri}: {m}")),
            other => other,
        })?;
        if let Some(summary) = &manifest.model
            && summary.fingerprint != model.fingerprint()
        {
            return Err(Error::corrupt(format!(
                "{uri}: the model in {file} has fingerprint {}, the manifest says {}",
                model.fingerprint(),
                summary.fingerprint
            )));
        }
        Ok(Some(model.with_training(manifest.training)))
    }

    /// The artifact, with its model.
    async fn with_model(self, model: Option<IvfPqModel>) -> Result<Artifact> {
        let Self { files, manifest } = self;
        let uri = files.store().uri();
        if let Some(model) = &model
            && model.num_partitions() != manifest.num_partitions
        {
            return Err(Error::corrupt(format!(
                "{uri}: the model has {} partitions, the manifest {}",
                model.num_partitions(),
                manifest.num_partitions
            )));
        }
        let code_width = match (manifest.pq_code_width, &model) {
            (Some(width), Some(model)) if width != model.code_width() => {
                return Err(Error::corrupt(format!(
                    "{uri}: pq_code_width is {width}, the model's codes take {} bytes",
                    model.code_width()
                )));
            }
            (Some(width), _) => width,
            (None, Some(model)) => model.code_width(),
            // An artifact of another writer without a model: the first file tells.
            (None, None) => match manifest.partitions.files().next() {
                Some(path) => files.bucket(path).await?.code_width,
                None => 0,
            },
        };
        Ok(Artifact { files, manifest, model: model.map(Arc::new), code_width })
    }
}

impl Artifact {
    /// Open the artifact at `uri` and check its manifest and model.
    pub async fn open(uri: &str, storage_options: Option<&StorageOptions>) -> Result<Self> {
        Self::open_in(LanceStore::open(uri, storage_options).await?).await
    }

    /// The same, of a place that is known already.
    pub async fn open_in(store: LanceStore) -> Result<Self> {
        let manifest = ManifestFile::read(store).await?;
        let model = manifest.read_model().await?;
        manifest.with_model(model).await
    }

    /// Open several, side by side. Those whose manifests say that they have the same model share it, and it is read once.
    pub async fn open_all(places: &[(String, Option<StorageOptions>)]) -> Result<Vec<Self>> {
        let open = |(uri, options): &(String, Option<StorageOptions>)| {
            let (uri, options) = (uri.clone(), options.clone());
            async move { ManifestFile::read(LanceStore::open(&uri, options.as_ref()).await?).await }
        };
        let manifests: Vec<ManifestFile> =
            futures::stream::iter(places.iter().map(open)).buffered(CONCURRENT_ARTIFACTS).try_collect().await?;
        let mut models: HashMap<String, Arc<IvfPqModel>> = HashMap::new();
        let mut opened = Vec::with_capacity(manifests.len());
        for manifest in manifests {
            let fingerprint = manifest.manifest.model.as_ref().map(|model| model.fingerprint.clone());
            let known = fingerprint.as_ref().and_then(|fingerprint| models.get(fingerprint));
            let model = match known {
                Some(model) => Some(model.as_ref().clone().with_training(manifest.manifest.training)),
                None => manifest.read_model().await?,
            };
            let artifact = manifest.with_model(model).await?;
            if let (Some(fingerprint), Some(model)) = (fingerprint, artifact.model.clone()) {
                models.entry(fingerprint).or_insert(model);
            }
            opened.push(artifact);
        }
        Ok(opened)
    }

    /// The URI as it may be shown: without passwords, signatures and tokens.
    pub fn uri(&self) -> &str {
        self.files.store().uri()
    }

    /// The URI that opens the artifact again, from any working directory.
    pub fn true_uri(&self) -> &str {
        self.files.store().true_uri()
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub fn files(&self) -> &BucketFiles {
        &self.files
    }

    pub fn model(&self) -> Option<&Arc<IvfPqModel>> {
        self.model.as_ref()
    }

    pub fn num_rows(&self) -> u64 {
        self.manifest.num_rows()
    }

    pub fn num_partitions(&self) -> usize {
        self.manifest.num_partitions
    }

    /// Bytes of memory of what it knows of its partitions and files, without the model.
    pub fn held_bytes(&self) -> u64 {
        self.manifest.held_bytes()
    }

    /// Bytes of one code.
    pub fn pq_code_width(&self) -> usize {
        self.code_width
    }

    pub fn partition_rows(&self, partition: usize) -> u64 {
        self.manifest.partitions.get(partition).map_or(0, |p| p.num_rows())
    }

    /// `_rowid`, `__pq_code`.
    pub fn partition_schema(&self) -> SchemaRef {
        partition_schema(self.code_width)
    }

    /// Whether the rows read are checked against checksums of the manifest.
    pub fn has_checksums(&self) -> bool {
        self.manifest.checksum_kind.as_deref() == Some(CHECKSUM_KIND)
    }

    /// Every file that the manifest names exists and has the size it says. Reads no row.
    pub async fn check_files(&self) -> Result<()> {
        // One listing answers for the files of a folder; those that it does not show as they should be are looked at themselves.
        let mut listed: HashMap<String, u64> = HashMap::new();
        if self.manifest.partitions.files().nth(1).is_some() {
            let entries = self.files.store().list_folder(PARTITIONS_DIR).await?;
            listed.extend(entries.into_iter().filter(|entry| !entry.is_folder).map(|entry| (entry.path, entry.size)));
        }
        let described = |path: &str| self.manifest.files.as_ref().and_then(|files| files.get(path)).map(|file| file.size_bytes);
        let is_there = |path: &&str| listed.get(*path).is_some_and(|size| described(path).is_none_or(|expected| expected == *size));
        let mut checks: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
        let named = self.manifest.partitions.files().flat_map(|path| self.files.files_of(path));
        for path in named.filter(|path| !is_there(path)) {
            checks.push(self.check_file(path).boxed());
        }
        futures::stream::iter(checks).buffer_unordered(CONCURRENT_FILES).try_collect::<Vec<()>>().await?;
        Ok(())
    }

    async fn check_file(&self, path: &str) -> Result<()> {
        let described = self.manifest.files.as_ref().and_then(|files| files.get(path)).map(|f| f.size_bytes);
        match (self.files().store().size(path).await?, described) {
            (None, _) => Err(Error::corrupt(format!("{}: {path} is missing", self.uri()))),
            (Some(size), Some(described)) if size != described => {
                Err(Error::corrupt(format!("{}: {path} has {size} bytes, the manifest says {described}", self.uri())))
            }
            _ => Ok(()),
        }
    }

    /// The rows of consecutive partitions, each in the order of its ranges. Ranges are coalesced file by file and files are read at
    /// once; checksums are checked where there are any, and partition ids where there are none.
    pub async fn read_partitions(&self, partitions: Range<usize>) -> Result<PartitionRows> {
        self.read_checked(partitions, !self.has_checksums()).await
    }

    /// The same, with the partition ids of every row checked if `part_ids`.
    pub(super) async fn read_checked(&self, partitions: Range<usize>, part_ids: bool) -> Result<PartitionRows> {
        if partitions.end > self.num_partitions() || partitions.start > partitions.end {
            return Err(Error::invalid(format!("partitions {partitions:?}: expected within 0..{}", self.num_partitions())));
        }
        let mut by_file: BTreeMap<&str, Vec<WantedRange>> = BTreeMap::new();
        for (place, partition) in self.manifest.partitions.range(partitions.clone()).enumerate() {
            if let Some(path) = partition.path() {
                let wanted = partition.ranges().zip(0u32..);
                by_file.entry(path).or_default().extend(wanted.map(|(r, index)| WantedRange {
                    start: r.offset,
                    end: r.offset + r.num_rows,
                    partition: place as u32,
                    index,
                }));
            }
        }
        let rows = self.read_wanted(by_file, partitions.clone(), part_ids).await?;
        for (place, partition) in partitions.enumerate() {
            self.check_checksum(partition, rows.checksum(place, self.code_width))?;
        }
        Ok(rows)
    }

    /// The rows of ranges of files, coalesced; `window` are the partitions.
    pub(super) async fn read_wanted(
        &self,
        mut by_file: BTreeMap<&str, Vec<WantedRange>>,
        window: Range<usize>,
        part_ids: bool,
    ) -> Result<PartitionRows> {
        by_file.values_mut().for_each(|ranges| ranges.sort_unstable());
        let requests = by_file.iter().map(|(path, ranges)| (*path, merge_adjacent(ranges))).collect();
        let read = self.files.read_ranges(requests, part_ids).await?;
        let mut rows = PartitionRows::new(window);
        for ((path, ranges), batches) in by_file.iter().zip(read) {
            rows.add(ranges, batches, self.code_width).map_err(|e| e.context(format!("{path} of {}", self.uri())))?;
        }
        rows.sort();
        Ok(rows)
    }

    pub(super) fn check_checksum(&self, partition: usize, sum: u64) -> Result<()> {
        let Some(expected) = self.manifest.partitions.get(partition).map(|p| p.checksum()).filter(|_| self.has_checksums()) else {
            return Ok(());
        };
        if sum != expected {
            return Err(Error::corrupt(format!(
                "{}: partition {partition} has checksum {}, the manifest says {}: its rows or codes were changed after they were written",
                self.uri(),
                to_hex(sum),
                to_hex(expected)
            )));
        }
        Ok(())
    }
}
