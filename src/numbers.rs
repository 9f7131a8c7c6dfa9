//! Numbers that are mostly small, in a byte or a few each.

/// Append one.
pub fn push_number(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// The first one, which is taken off; `None` where there is no whole one.
pub fn take_number(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// A list of them.
#[derive(Debug, Default)]
pub struct SmallNumbers(Vec<u8>);

impl SmallNumbers {
    /// Bytes that they take.
    pub fn bytes(&self) -> usize {
        self.0.capacity()
    }

    pub fn push(&mut self, number: u64) {
        push_number(&mut self.0, number);
    }

    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        let mut bytes = self.0.as_slice();
        std::iter::from_fn(move || take_number(&mut bytes))
    }
}
