//! `manifest.json`, as it comes: a byte that says where the artifact lies and which one it was, and the JSON.

use super::Target;
use crate::bases::{Base, golden};
use crate::check::read_everything;
use crate::input::Input;
use crate::place::{Files, Ground, Where};

struct Manifest {
    ground: Ground,
    bases: [Base; 2],
}

pub fn make() -> Box<dyn Target> {
    let bases = [golden(1), golden(2)];
    Box::new(Manifest { ground: Ground::new(&bases[0].files), bases })
}

impl Target for Manifest {
    fn run(&mut self, input: &[u8]) {
        let turn = input.len();
        let mut input = Input::new(input);
        let how = input.u8();
        let mut files: Files = self.bases[usize::from(how >> 2 & 1)].files.clone();
        files.insert("manifest.json".into(), input.rest().to_vec());
        let uri = self.ground.lay(&files, Where::of(how));
        self.ground.block_on(read_everything(&uri, turn));
        self.ground.assert_stayed_inside();
    }
}
