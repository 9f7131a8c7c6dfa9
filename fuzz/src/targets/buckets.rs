//! Bucket files, flat and encoded: one of an artifact's is damaged, where its manifest has checksums for it and where it has none.

use super::Target;
use crate::bases::{Base, Layout, Rows, foreign, golden};
use crate::check::{read_everything, sorted};
use crate::input::Input;
use crate::lance_file::{VERSIONS, damaged};
use crate::place::{Ground, Where};

struct Buckets {
    ground: Ground,
    bases: Vec<Base>,
}

pub fn make() -> Box<dyn Target> {
    let golden = [golden(1), golden(2)];
    let ground = Ground::new(&golden[0].files);
    let mut bases: Vec<Base> = golden.into();
    for version in VERSIONS {
        for (part_ids, checksums) in [(true, true), (true, false), (false, false)] {
            bases.push(foreign(&ground.runtime, Layout { version, part_ids, checksums, constant: false }));
        }
        bases.push(foreign(&ground.runtime, Layout { version, part_ids: true, checksums: false, constant: true }));
    }
    Box::new(Buckets { ground, bases })
}

impl Target for Buckets {
    fn run(&mut self, input: &[u8]) {
        let turn = input.len();
        let mut input = Input::new(input);
        let (how, which) = (input.u8(), input.u8());
        let mut base = self.bases[usize::from(which) % self.bases.len()].clone();
        if how & 4 > 0 {
            // Nothing but the frame of the file stands between it and its reader, and no model says how wide codes are.
            let manifest = base.manifest.as_object_mut().unwrap();
            for key in ["files", "checksum_kind", "pq_code_width", "model", "rows"] {
                manifest.remove(key);
            }
            manifest.insert("metadata_file".into(), serde_json::Value::Null);
        }
        let names: Vec<String> = base.files.keys().filter(|name| name.starts_with("partitions/")).cloned().collect();
        let name = &names[input.below(names.len())];
        // Without checksums only what is in files can be compared.
        let has_checksums = base.manifest.get("checksum_kind").is_some();
        let bytes = damaged(&base.files[name], &mut input);
        let uri = self.ground.lay(&base.with(name, bytes, how & 8 == 0), if how & 1 > 0 { Where::Memory } else { Where::Disk });
        if let Some((_, read)) = self.ground.block_on(read_everything(&uri, turn))
            && has_checksums
        {
            for (partition, (found, written)) in read.into_iter().zip(&base.rows).enumerate() {
                let same = |found: Rows| sorted(found) == sorted(written.clone());
                assert!(found.is_none_or(same), "partition {partition} has other rows than were written, and its checksum is right");
            }
        }
        self.ground.assert_stayed_inside();
    }
}
