//! Artifacts that are deleted or replaced: whatever their manifest says, only what it names goes, and nothing outside.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use lance_artifact::Error;
use lance_artifact::artifact::{Artifact, BuilderOptions, Encoding, PartitionArtifactBuilder, delete_artifact};
use serde_json::Value;

use super::Target;
use crate::bases::{Base, encoded, golden};
use crate::check::typed;
use crate::input::Input;
use crate::place::{Files, Ground};

struct Overwrite {
    ground: Ground,
    bases: [Base; 2],
}

pub fn make() -> Box<dyn Target> {
    let bases = [golden(1), golden(2)];
    Box::new(Overwrite { ground: Ground::new(&bases[0].files), bases })
}

/// What lies in a folder; links are not followed.
fn content(folder: &Path, within: &str, found: &mut Files) {
    for entry in fs::read_dir(folder.join(within)).into_iter().flatten() {
        let entry = entry.unwrap();
        let name = format!("{within}{}", entry.file_name().to_string_lossy());
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            content(folder, &format!("{name}/"), found);
        } else if kind.is_symlink() {
            found.insert(name, b"a link".to_vec());
        } else {
            found.insert(name, fs::read(entry.path()).unwrap());
        }
    }
}

/// Every text of a document: all that it can name.
fn texts(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::String(text) => drop(found.insert(text.clone())),
        Value::Array(items) => items.iter().for_each(|item| texts(item, found)),
        Value::Object(items) => items.iter().for_each(|(key, item)| {
            found.insert(key.clone());
            texts(item, found);
        }),
        _ => {}
    }
}

impl Target for Overwrite {
    fn run(&mut self, input: &[u8]) {
        let mut input = Input::new(input);
        let how = input.u8();
        let json = input.rest();
        let folder = self.ground.beside("target");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(folder.join("partitions")).unwrap();
        for (name, bytes) in &self.bases[usize::from(how >> 4 & 1)].files {
            fs::write(folder.join(name), bytes).unwrap();
        }
        fs::write(folder.join("manifest.json"), json).unwrap();
        if how & 1 > 0 {
            symlink("../outside", folder.join("link")).unwrap();
            symlink("../outside/bucket-00000.lance", folder.join("linked.lance")).unwrap();
        }
        if how & 2 > 0 {
            fs::write(folder.join("notes.txt"), b"mine").unwrap();
            fs::write(folder.join("partitions/user.bin"), b"mine").unwrap();
        }
        let (mut before, mut after) = (Files::new(), Files::new());
        content(&folder, "", &mut before);
        let uri = folder.to_str().unwrap().to_string();
        let result = self.ground.block_on(async {
            match how >> 2 & 3 {
                0 | 3 => delete_artifact(&uri, None).await.map_err(|error| (error, false)),
                action => replace(&uri, action == 1).await,
            }
        });
        content(&folder, "", &mut after);
        let mut named = BTreeSet::from(["manifest.json".to_string()]);
        match serde_json::from_slice::<Value>(json) {
            Ok(value) => {
                texts(&value, &mut named);
                if value.get("metadata_file").is_none() {
                    named.insert("metadata.lance".to_string());
                }
            }
            // A number that no type holds may stand where nobody looks: what such a one names is not known here.
            Err(_) => named.extend(before.keys().cloned()),
        }
        let unchanged = match &result {
            Err((error, begun)) => {
                typed(error);
                // A disk that refuses to delete what is no file leaves some of it.
                !begun && !matches!(error, Error::Storage(_))
            }
            Ok(()) => how >> 2 & 3 == 2,
        };
        if unchanged {
            assert_eq!(before, after, "something was changed by what was refused or aborted");
        }
        for (name, bytes) in before.iter().filter(|(name, _)| !named.contains(*name)) {
            assert_eq!(after.get(name), Some(bytes), "{name} is not what it was, and the manifest does not name it");
        }
        assert!(!after.keys().any(|name| name.contains(".lance-artifact-")), "left: {:?}", after.keys());
        self.ground.assert_stayed_inside();
    }
}

/// Put another artifact in its place, or give that up; with an error whether it was begun.
async fn replace(uri: &str, finish: bool) -> Result<(), (Error, bool)> {
    let options = BuilderOptions { overwrite: true, sync: false, memory_limit: Some(4 << 20), num_buckets: Some(2), ..Default::default() };
    let shape = Encoding::Shape { num_partitions: 5, pq_code_width: 3 };
    let builder = PartitionArtifactBuilder::try_new(uri, shape, options).await.map_err(|error| (error, false))?;
    let rows = 20;
    let part_ids = (0..rows).map(|row| row % 5).collect();
    let batch = encoded((0..u64::from(rows)).collect(), Some(part_ids), vec![9; rows as usize * 3], 3);
    builder.append_batch(&batch).map_err(|error| (error, true))?;
    if !finish {
        return builder.abort().map_err(|error| (error, true));
    }
    builder.finish(None).map_err(|error| (error, true))?;
    let artifact = Artifact::open(uri, None).await.map_err(|error| (error, true))?;
    let report = artifact.verify(|_| {}).await.map_err(|error| (error, true))?;
    assert!(report.ok() && report.num_rows == u64::from(rows), "{report:?}");
    Ok(())
}
