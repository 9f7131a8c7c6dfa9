//! Changes of protobuf messages that leave them messages: of any schema, by their wire format alone.

use crate::input::Input;

/// How deep messages within messages are looked into.
const DEEPEST: usize = 12;

#[derive(Clone)]
enum Value {
    Varint(u64),
    Fixed(Vec<u8>),
    Bytes(Vec<u8>),
}

#[derive(Clone)]
struct Field {
    tag: u64,
    value: Value,
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for shift in (0..70).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

fn push_varint(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn parse(mut bytes: &[u8]) -> Option<Vec<Field>> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let tag = take_varint(&mut bytes)?;
        let mut take = |len: usize| {
            let (taken, rest) = bytes.split_at_checked(len)?;
            bytes = rest;
            Some(taken.to_vec())
        };
        let value = match tag & 7 {
            0 => Value::Varint(take_varint(&mut bytes)?),
            1 => Value::Fixed(take(8)?),
            5 => Value::Fixed(take(4)?),
            2 => {
                let len = usize::try_from(take_varint(&mut bytes)?).ok()?;
                let (taken, rest) = bytes.split_at_checked(len)?;
                bytes = rest;
                Value::Bytes(taken.to_vec())
            }
            _ => return None,
        };
        if tag >> 3 == 0 {
            return None;
        }
        fields.push(Field { tag, value });
    }
    Some(fields)
}

fn write(fields: &[Field]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for Field { tag, value } in fields {
        push_varint(&mut bytes, *tag);
        match value {
            Value::Varint(number) => push_varint(&mut bytes, *number),
            Value::Fixed(fixed) => bytes.extend_from_slice(fixed),
            Value::Bytes(inner) => {
                push_varint(&mut bytes, inner.len() as u64);
                bytes.extend_from_slice(inner);
            }
        }
    }
    bytes
}

/// The message with one change.
pub fn changed(message: &[u8], input: &mut Input<'_>) -> Vec<u8> {
    change(message, input, DEEPEST).unwrap_or_else(|| message.to_vec())
}

fn change(message: &[u8], input: &mut Input<'_>, deeper: usize) -> Option<Vec<u8>> {
    let mut fields = parse(message)?;
    let how = input.u8();
    let at = input.below(fields.len());
    if fields.is_empty() || how >= 0xf0 {
        // A field that was not there.
        let tag = u64::from(input.u8() % 20 + 1) << 3;
        let field = match how & 1 {
            0 => Field { tag, value: Value::Varint(input.number()) },
            _ => Field { tag: tag | 2, value: Value::Bytes(input.bytes(32).to_vec()) },
        };
        fields.insert(at, field);
        return Some(write(&fields));
    }
    match how {
        0xe0..=0xe7 => {
            fields.remove(at);
        }
        0xe8..=0xeb => {
            let again = fields[at].clone();
            fields.push(again);
        }
        0xec..=0xef => {
            let other = input.below(fields.len());
            fields.swap(at, other);
        }
        _ => match &mut fields[at].value {
            Value::Varint(number) => *number = if how & 1 == 0 { input.number() } else { number.wrapping_add_signed(i64::from(how as i8)) },
            Value::Fixed(fixed) => {
                let number = input.number().to_le_bytes();
                let len = fixed.len();
                fixed.copy_from_slice(&number[..len]);
            }
            Value::Bytes(inner) => {
                let within = if deeper > 0 && how & 3 != 3 { change(inner, input, deeper - 1) } else { None };
                *inner = match within {
                    Some(within) => within,
                    None => changed_bytes(inner, input),
                };
            }
        },
    }
    Some(write(&fields))
}

/// Of bytes that are no message, or are not to be taken for one.
fn changed_bytes(bytes: &[u8], input: &mut Input<'_>) -> Vec<u8> {
    match input.u8() % 7 {
        0 => input.number().to_string().into_bytes(),
        1 => input.bytes(64).to_vec(),
        2 => bytes[..input.below(bytes.len() + 1)].to_vec(),
        3 => [bytes, input.bytes(16)].concat(),
        4 => number_in_text(bytes, input),
        5 => word_in_text(bytes, input),
        _ => {
            let mut bytes = bytes.to_vec();
            let at = input.below(bytes.len());
            if let Some(byte) = bytes.get_mut(at) {
                *byte = input.u8();
            }
            bytes
        }
    }
}

/// Another number in place of one that is written in digits.
fn number_in_text(bytes: &[u8], input: &mut Input<'_>) -> Vec<u8> {
    let starts: Vec<usize> = (0..bytes.len())
        .filter(|at| bytes[*at].is_ascii_digit() && !at.checked_sub(1).is_some_and(|before| bytes[before].is_ascii_digit()))
        .collect();
    let Some(start) = starts.get(input.below(starts.len())).copied() else { return bytes.to_vec() };
    let digits = bytes[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    [&bytes[..start], input.number().to_string().as_bytes(), &bytes[start + digits..]].concat()
}

/// Another word in place of one that JSON, or a column's type, knows.
fn word_in_text(bytes: &[u8], input: &mut Input<'_>) -> Vec<u8> {
    const WORDS: [&str; 14] = [
        "true",
        "false",
        "null",
        "uint8",
        "uint32",
        "uint64",
        "float",
        "double",
        "halffloat",
        "list",
        "struct",
        "binary",
        "string",
        "fixed_size_list",
    ];
    let text = String::from_utf8_lossy(bytes);
    let there: Vec<&str> = WORDS.into_iter().filter(|word| text.contains(word)).collect();
    match there.get(input.below(there.len())) {
        Some(word) => text.replacen(word, input.pick(&WORDS), 1).into_bytes(),
        None => bytes.to_vec(),
    }
}
