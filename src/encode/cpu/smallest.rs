//! The smallest of many distances.

/// Into how many parts their range is divided.
const PARTS: usize = 256;

/// The `count` smallest of more `distances`, but for that of `own`, with their places, in no order.
pub fn smallest(distances: &[f32], own: Option<usize>, count: usize, found: &mut Vec<(f32, u32)>) {
    let (least, times, end) = range(distances, count + 1);
    // Without branches, of which half would be mispredicted.
    found.resize(distances.len() + 1, (0.0, 0));
    let mut kept = 0;
    for (place, distance) in (0u32..).zip(distances) {
        found[kept] = (*distance, place);
        kept += usize::from((distance - least) * times < end);
    }
    found.truncate(kept);
    found.retain(|(_, place)| Some(*place as usize) != own);
    if found.len() > count {
        found.select_nth_unstable_by(count - 1, |a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        found.truncate(count);
    }
    // Where distances are no numbers any others will do.
    let mut others = 0..distances.len();
    while found.len() < count {
        let other = others.find(|i| Some(*i) != own && found.iter().all(|(_, place)| *place as usize != *i));
        let Some(other) = other else { break };
        found.push((f32::INFINITY, other as u32));
    }
}

pub fn least(distances: &[f32]) -> f32 {
    let mut lanes = [f32::INFINITY; 8];
    let chunks = distances.chunks_exact(8);
    let rest = chunks.remainder().iter().copied().fold(f32::INFINITY, f32::min);
    for chunk in chunks {
        for (lane, d) in lanes.iter_mut().zip(chunk) {
            *lane = if *d < *lane { *d } else { *lane };
        }
    }
    lanes.into_iter().fold(rest, f32::min)
}

/// Least, times and end such that at least `count` of the distances are in the parts before the end, and few more.
fn range(distances: &[f32], count: usize) -> (f32, f32, f32) {
    let (mut least, mut most, mut odd) = ([f32::INFINITY; 8], [f32::NEG_INFINITY; 8], false);
    let chunks = distances.chunks_exact(8);
    for (i, d) in chunks.remainder().iter().enumerate() {
        (least[i], most[i]) = (*d, *d);
        odd |= d.is_nan();
    }
    for chunk in chunks {
        for (i, d) in chunk.iter().enumerate() {
            least[i] = if *d < least[i] { *d } else { least[i] };
            most[i] = if *d > most[i] { *d } else { most[i] };
            odd |= d.is_nan();
        }
    }
    let (least, most) = (least.into_iter().fold(f32::INFINITY, f32::min), most.into_iter().fold(f32::NEG_INFINITY, f32::max));
    let times = (PARTS - 1) as f32 / (most - least);
    if odd || !times.is_normal() {
        // All are the same, or some are infinite or no numbers: of the others all are kept.
        return (0.0, 0.0, 1.0);
    }
    let mut counts = [0u32; PARTS];
    for distance in distances {
        counts[((distance - least) * times) as usize % PARTS] += 1;
    }
    let (mut before, mut end) = (0, 0);
    while end < PARTS && before < count {
        before += counts[end] as usize;
        end += 1;
    }
    (least, times, end as f32)
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    #[test]
    fn they_are_the_smallest() {
        let mut rng = SmallRng::seed_from_u64(1);
        let mut found = Vec::new();
        for round in 0..200 {
            let many = rng.random_range(2..600);
            let spread = [1.0f32, 1e-3, 1e8, 0.0][round % 4];
            let distances: Vec<f32> = (0..many).map(|_| 5.0 + spread * rng.random_range(-1.0f32..1.0).powi(5)).collect();
            let count = rng.random_range(1..many);
            let own = (round % 3 == 0).then(|| rng.random_range(0..many));
            smallest(&distances, own, count, &mut found);
            let mut all: Vec<(f32, u32)> = distances.iter().copied().zip(0u32..).filter(|(_, i)| Some(*i as usize) != own).collect();
            all.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            found.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            assert_eq!(found, all[..count], "{many} {count} {own:?}");
        }
    }

    #[test]
    fn of_infinite_ones_any_will_do() {
        let mut found = Vec::new();
        for odd in [f32::NAN, f32::INFINITY, f32::MAX] {
            let distances: Vec<f32> = (0..50).map(|i| if i % 2 == 0 { odd } else { i as f32 }).collect();
            smallest(&distances, Some(7), 30, &mut found);
            assert_eq!(found.len(), 30);
            let finite = found.iter().filter(|(d, i)| *d == *i as f32).count();
            assert!(finite == 24 && found.iter().all(|(_, i)| *i != 7), "{found:?}");
        }
    }
}
