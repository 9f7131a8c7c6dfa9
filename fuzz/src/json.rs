//! Changes of JSON that leave it JSON. The first byte of an input is the target's own.

use serde_json::{Map, Number, Value};

use crate::input::Input;

/// Texts that mean something to a reader of manifests.
const TEXTS: [&str; 31] = [
    "",
    "manifest.json",
    "metadata.lance",
    "partitions.lance",
    "partitions/bucket-00000.lance",
    "partitions/bucket-00001.lance",
    "partitions/bucket-00002.lance",
    "partitions",
    "partitions/user.bin",
    "notes.txt",
    "../outside/bucket.lance",
    "partitions/../../outside/bucket.lance",
    "link/bucket.lance",
    "linked.lance",
    "link",
    "link/empty/none.lance",
    "/etc/hostname",
    "file:///etc/hostname",
    "a\\b",
    "a%2fb",
    "a#b.lance",
    ".lance-artifact-claim",
    ".lance-artifact-lock",
    "xxh3-64-row-sum",
    "0000000000000000",
    "+000000000000001",
    "l2",
    "float32",
    "exact",
    "bucket-00000.lance",
    "386a43ea4f2a4c2d5c897569bee32651",
];

/// Keys that a reader of manifests knows.
const KEYS: [&str; 34] = [
    "version",
    "num_partitions",
    "num_buckets",
    "metadata_file",
    "total_loss",
    "pq_code_width",
    "checksum_kind",
    "model",
    "training",
    "assignment",
    "rows",
    "source",
    "writer",
    "files",
    "partitions_file",
    "bucket_files",
    "partitions",
    "path",
    "num_rows",
    "ranges",
    "offset",
    "checksum",
    "tail_bytes",
    "tail_checksum",
    "size_bytes",
    "seen",
    "written",
    "dropped",
    "method",
    "groups",
    "branch",
    "field_id",
    "fragment_ids",
    "fingerprint",
];

/// The next of the numbers that a seed gives.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn number(&mut self) -> u64 {
        let bytes: Vec<u8> = (0..9).map(|_| self.next() as u8).collect();
        Input::new(&bytes).number()
    }

    fn value(&mut self) -> Value {
        match self.next() % 12 {
            0 => Value::Null,
            1 => Value::Bool(self.next() & 1 == 0),
            2 => Value::Number(Number::from((self.number() as i64).wrapping_neg())),
            3 => Number::from_f64(f64::from_bits(self.next())).map_or(Value::Null, Value::Number),
            4 => Value::Array(Vec::new()),
            5 => Value::Object(Map::new()),
            6 | 7 => Value::String(TEXTS[self.below(TEXTS.len())].to_string()),
            _ => Value::Number(Number::from(self.number())),
        }
    }
}

/// An input with some changes of its JSON; `None` where it is none.
pub fn mutated(input: &[u8], seed: u32) -> Option<Vec<u8>> {
    let (first, json) = input.split_first()?;
    let mut value: Value = serde_json::from_slice(json).ok()?;
    let mut random = Random(u64::from(seed));
    let mut first = *first;
    if random.below(16) == 0 {
        first = b'0' + random.below(10) as u8;
    }
    for _ in 0..=random.below(4) {
        let nodes = count(&value);
        let mut at = random.below(nodes);
        change(&mut value, &mut at, &mut random);
    }
    let mut out = vec![first];
    serde_json::to_writer(&mut out, &value).ok()?;
    Some(out)
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(items) => items.values().map(count).sum::<usize>(),
        _ => 0,
    }
}

/// Change the node number `at`, in the order in which they are counted.
fn change(value: &mut Value, at: &mut usize, random: &mut Random) -> bool {
    if *at == 0 {
        change_this(value, random);
        return true;
    }
    *at -= 1;
    match value {
        Value::Array(items) => items.iter_mut().any(|item| change(item, at, random)),
        Value::Object(items) => items.values_mut().any(|item| change(item, at, random)),
        _ => false,
    }
}

fn change_this(value: &mut Value, random: &mut Random) {
    match value {
        Value::Array(items) if !items.is_empty() && random.below(8) > 0 => {
            let (a, b) = (random.below(items.len()), random.below(items.len()));
            match random.below(4) {
                0 => drop(items.remove(a)),
                1 => items.swap(a, b),
                2 if items.len() < 64 => items.push(items[a].clone()),
                _ => items.insert(a, random.value()),
            }
        }
        Value::Object(items) if random.below(8) > 0 => {
            let key = items.keys().nth(random.below(items.len())).cloned().unwrap_or_default();
            match random.below(4) {
                0 => drop(items.remove(&key)),
                1 => {
                    let name = if random.below(2) == 0 { KEYS[random.below(KEYS.len())] } else { TEXTS[random.below(TEXTS.len())] };
                    let moved = items.remove(&key).unwrap_or(Value::Null);
                    items.insert(name.to_string(), moved);
                }
                2 => drop(items.insert(KEYS[random.below(KEYS.len())].to_string(), random.value())),
                _ => drop(items.insert(key, random.value())),
            }
        }
        Value::Number(number) if random.below(2) == 0 => {
            let near = number.as_u64().unwrap_or(0).wrapping_add(random.below(5) as u64).wrapping_sub(2);
            *value = Value::Number(Number::from(near));
        }
        Value::Number(_) => *value = Value::Number(Number::from(random.number())),
        Value::String(text) => match random.below(3) {
            0 => *text = TEXTS[random.below(TEXTS.len())].to_string(),
            1 => {
                let mut chars: Vec<char> = text.chars().collect();
                let at = random.below(chars.len() + 1);
                chars.insert(at, char::from_u32(random.below(0x300) as u32).unwrap_or('/'));
                *text = chars.into_iter().collect();
            }
            _ => *value = random.value(),
        },
        _ => *value = random.value(),
    }
}
