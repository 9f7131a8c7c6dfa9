//! What is broken on purpose: `scripts/fuzz --planted` expects each to be found, so that a run that finds nothing means something.

use super::Target;
use crate::bases::golden;
use crate::place::{Ground, Where};

struct Planted {
    ground: Ground,
}

pub fn make() -> Box<dyn Target> {
    Box::new(Planted { ground: Ground::new(&golden(1).files) })
}

impl Target for Planted {
    fn run(&mut self, input: &[u8]) {
        match input {
            b"panic" => panic!("planted"),
            // As a panic that is caught on the way would be.
            b"caught" => drop(std::panic::catch_unwind(|| panic!("planted"))),
            b"memory" => drop(std::hint::black_box(vec![1u8; 1 << 30])),
            b"bounds" => {
                let block = std::hint::black_box(vec![1u8; 10]);
                // SAFETY: none; only a sanitizer sees it.
                std::hint::black_box(unsafe { block.as_ptr().add(block.len() + usize::from(input[0] & 1)).read_volatile() });
            }
            b"hang" => loop {
                std::thread::sleep(std::time::Duration::from_millis(10));
            },
            b"outside" => drop(std::fs::read(self.ground.root(Where::Disk).join("link/bucket-00000.lance"))),
            _ => {}
        }
        self.ground.assert_stayed_inside();
    }
}
