//! What a target reads of the fuzzer's bytes. Behind the end there are zeros, so that every input means something.

/// Numbers on the edges of what readers count with.
const EDGES: [u64; 32] = [
    0,
    1,
    2,
    7,
    8,
    9,
    63,
    64,
    65,
    127,
    128,
    255,
    256,
    4095,
    4096,
    65_535,
    65_536,
    (1 << 24) - 1,
    1 << 30,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    1 << 40,
    1 << 53,
    (1 << 61) + 1,
    1 << 62,
    (1 << 63) - 1,
    1 << 63,
    (1 << 63) + 1,
    u64::MAX - 1,
    u64::MAX,
];

/// Reads an input from its start.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn u8(&mut self) -> u8 {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => 0,
        }
    }

    pub fn bool(&mut self) -> bool {
        self.u8() & 1 == 1
    }

    /// Less than `end`, which may be 0.
    pub fn below(&mut self, end: usize) -> usize {
        match end {
            0 | 1 => 0,
            2..=256 => usize::from(self.u8()) % end,
            _ => (usize::from(self.u8()) << 8 | usize::from(self.u8())) % end,
        }
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// A number that is mostly small, or on an edge, or any.
    pub fn number(&mut self) -> u64 {
        match self.u8() {
            small @ 0..=0x9f => u64::from(small),
            edge @ 0xa0..=0xdf => EDGES[usize::from(edge) % EDGES.len()],
            0xe0..=0xef => u64::from(self.u8()) << 8 | u64::from(self.u8()),
            _ => (0..8).fold(0, |number, _| number << 8 | u64::from(self.u8())),
        }
    }

    /// Up to `most` bytes.
    pub fn bytes(&mut self, most: usize) -> &'a [u8] {
        let len = self.below(most + 1).min(self.0.len());
        let (bytes, rest) = self.0.split_at(len);
        self.0 = rest;
        bytes
    }

    /// Text of up to `most` bytes.
    pub fn text(&mut self, most: usize) -> String {
        String::from_utf8_lossy(self.bytes(most)).into_owned()
    }

    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }
}
