//! Relative paths, as manifests name files: those that are taken stay below the artifact, and name the same file to everybody.

use std::fs;
use std::path::{Component, Path};

use lance_artifact::artifact::format::ours;
use lance_artifact::io::check_relative_path;
use lance_artifact::lance::LanceStore;

use super::Target;
use crate::bases::golden;
use crate::check::typed;
use crate::place::{Files, Ground, Where};

/// The longest name that disks take.
const LONGEST: usize = 255;

struct Paths {
    ground: Ground,
    store: LanceStore,
}

pub fn make() -> Box<dyn Target> {
    let mut ground = Ground::new(&golden(1).files);
    let uri = ground.lay(&Files::new(), Where::Disk);
    let store = ground.block_on(LanceStore::open(&uri, None)).unwrap();
    Box::new(Paths { ground, store })
}

/// Names that the local store refuses: of files that it is about to rename, and such as end like drives.
fn is_refused(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    let is_staged = name.split_once('#').is_some_and(|(_, number)| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()));
    let is_drive = matches!(name.as_bytes(), [.., letter, b'|'] if letter.is_ascii_alphabetic());
    is_staged || is_drive
}

impl Target for Paths {
    fn run(&mut self, input: &[u8]) {
        let Ok(path) = std::str::from_utf8(input) else { return };
        let _ = ours(path);
        if let Err(error) = check_relative_path(path) {
            return typed(&error);
        }
        assert!(Path::new(path).components().all(|part| matches!(part, Component::Normal(_))), "{path:?}");
        let root = self.ground.root(Where::Disk);
        let full = root.join(path);
        assert!(full.starts_with(&root), "{path:?}");
        // Through the link nothing is written here, and nothing may be read there.
        let through_link = ["link", "linked.lance"].contains(&path.split('/').next().unwrap_or_default());
        let written = !through_link
            && path.split('/').all(|name| name.len() <= LONGEST)
            && full.parent().is_some_and(|parent| fs::create_dir_all(parent).is_ok())
            && fs::write(&full, path).is_ok();
        match self.ground.block_on(self.store.read(path)) {
            Ok(found) => assert_eq!(found.as_deref(), written.then_some(path.as_bytes()), "{path:?}"),
            Err(error) => {
                typed(&error);
                assert!(!written || is_refused(path), "{path:?}: {error}");
            }
        }
        if written && !is_refused(path) {
            let listed = self.ground.block_on(self.store.list_folder(path.rsplit_once('/').map_or("", |(folder, _)| folder)));
            assert!(listed.is_ok_and(|entries| entries.iter().any(|entry| entry.path == path)), "{path:?} is not listed");
            assert!(self.ground.block_on(self.store.delete(&[path.to_string()])).is_ok() && !full.exists(), "{path:?} cannot be deleted");
            // The folders of names; the links stay.
            let first = root.join(path.split('/').next().unwrap_or_default());
            if first.is_dir() {
                let _ = fs::remove_dir_all(first);
            }
        }
        self.ground.assert_stayed_inside();
    }
}
