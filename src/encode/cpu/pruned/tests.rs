use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::head::Head;
use super::rounded::{PANEL, Pruned};
use crate::encode::cpu::nearest::{Codewords, Form, Nearest};

fn numbers(rng: &mut SmallRng, count: usize, offset: f32) -> Vec<f32> {
    (0..count).map(|_| offset + (0..4).map(|_| rng.random_range(-1.0f32..1.0)).sum::<f32>()).collect()
}

/// Whatever the numbers are, the answer is that of a search through all of them, or the gap says that it is not certain: with the
/// processor's instructions and without, one after the other and in groups.
fn agrees(codewords: &[f32], vectors: &[f32], dimension: usize, form: Form) -> usize {
    let count = (codewords.len() / dimension) as u32;
    let groups: Vec<Vec<u32>> = (0..5).map(|group| (0..count).filter(|i| i * i % 5 == group).collect()).collect();
    let one = Pruned::new(codewords, dimension, form);
    let (grouped, ends) = Pruned::in_groups(codewords, dimension, form, &groups);
    assert_eq!(ends.last().map(|end| end * PANEL), Some(grouped.places.len()));
    let plain = Pruned { wide: false, ..Pruned::new(codewords, dimension, form) };
    let uncertain: Vec<usize> =
        [&one, &grouped, &plain].map(|pruned| agrees_with_full(pruned, None, codewords, vectors, dimension, form)).into();
    if let Some(head) = Head::of(&one) {
        assert_eq!(agrees_with_full(&one, Some(&head), codewords, vectors, dimension, form), uncertain[0]);
    }
    uncertain[0]
}

fn agrees_with_full(pruned: &Pruned, head: Option<&Head>, codewords: &[f32], vectors: &[f32], dimension: usize, form: Form) -> usize {
    let full = Codewords::new(codewords, dimension, form);
    let none = Nearest { index: 7, distance: 0.0, second: 0.0 };
    let (mut expected, mut found) = (vec![none; vectors.len() / dimension], vec![none; vectors.len() / dimension]);
    full.nearest(vectors, &mut expected);
    let doubt = |length: f32| 4e-6 * full.magnitude(length);
    pruned.nearest_by(head, vectors, doubt, &mut found);
    let mut uncertain = 0;
    for (row, (expected, found)) in expected.iter().zip(&found).enumerate() {
        let length = vectors[row * dimension..][..dimension].iter().map(|v| v * v).sum::<f32>().sqrt();
        let certain = |n: &Nearest| n.second - n.distance > doubt(length);
        assert_eq!(certain(expected), certain(found), "row {row}: {expected:?} {found:?}");
        if certain(expected) {
            assert_eq!(expected.index, found.index, "row {row}: {expected:?} {found:?}");
        } else {
            uncertain += 1;
        }
    }
    uncertain
}

#[test]
fn the_answer_is_that_of_a_full_search() {
    let mut rng = SmallRng::seed_from_u64(5);
    for form in [Form::L2, Form::Dot] {
        for (count, dimension, rows, offset) in [
            (1000, 16, 400, 0.0),
            (513, 100, 301, 3.0),
            (2000, 128, 97, 0.0),
            (700, 33, 250, -50.0),
            (640, 768, 98, 0.5),
            (512, 17, 1, 0.0),
        ] {
            let (codewords, vectors) = (numbers(&mut rng, count * dimension, offset), numbers(&mut rng, rows * dimension, offset));
            assert!(agrees(&codewords, &vectors, dimension, form) < rows / 20 + 1);
        }
    }
}

#[test]
fn equal_and_nearly_equal_codewords() {
    let mut rng = SmallRng::seed_from_u64(6);
    let (count, dimension) = (600, 32);
    let mut codewords = numbers(&mut rng, count * dimension, 0.0);
    for i in (0..count).step_by(3) {
        let (a, b) = (i * dimension, (i + 1) * dimension);
        codewords.copy_within(a..b, b);
        codewords[b] += if i % 2 == 0 { 0.0 } else { 1e-7 };
    }
    let vectors: Vec<f32> = codewords.iter().map(|v| v + rng.random_range(-0.05f32..0.05)).collect();
    assert!(agrees(&codewords, &vectors, dimension, Form::L2) > 100);
    // Vectors that are codewords, and the middle of all.
    agrees(&codewords, &codewords, dimension, Form::L2);
    agrees(&codewords, &vec![0.0; dimension * 5], dimension, Form::L2);
}

#[test]
fn numbers_of_all_sizes() {
    let mut rng = SmallRng::seed_from_u64(7);
    let (count, dimension) = (530, 48);
    for scale in [1e-30f32, 1e-12, 1e6, 1e15] {
        let codewords: Vec<f32> = numbers(&mut rng, count * dimension, 0.0).iter().map(|v| v * scale).collect();
        let vectors: Vec<f32> = numbers(&mut rng, 50 * dimension, 0.0).iter().map(|v| v * scale).collect();
        if scale > 1e-20 {
            agrees(&codewords, &vectors, dimension, Form::L2);
        }
        // Codewords of very different lengths.
        let uneven: Vec<f32> =
            codewords.chunks_exact(dimension).enumerate().flat_map(|(i, c)| c.iter().map(move |v| v * (1.0 + (i % 50) as f32))).collect();
        if scale > 1e-20 {
            agrees(&uneven, &vectors, dimension, Form::L2);
            agrees(&uneven, &vectors, dimension, Form::Dot);
        }
    }
    // What cannot be computed in float32 is nobody's.
    let codewords = vec![3e38f32; count * dimension];
    let pruned = Pruned::new(&codewords, dimension, Form::Dot);
    let mut found = [Nearest { index: 7, distance: 0.0, second: 0.0 }; 2];
    pruned.nearest(&vec![3e38; 2 * dimension], |_| 0.0, &mut found);
    assert!(found.iter().all(|n| n.index == u32::MAX), "{found:?}");
}

/// Where codewords lie along few directions a first look leaves few panels, and nothing else changes.
#[test]
fn a_first_look_along_few_axes() {
    let mut rng = SmallRng::seed_from_u64(8);
    let (count, dimension, rows) = (1100, 128, 500);
    let directions = numbers(&mut rng, 20 * dimension, 0.0);
    let mut lie_along = |count: usize| {
        let mut values = numbers(&mut rng, count * dimension, 0.0).iter().map(|v| v * 0.05 + 2.0).collect::<Vec<f32>>();
        for value in values.chunks_exact_mut(dimension) {
            for direction in directions.chunks_exact(dimension) {
                let weight = rng.random_range(-1.0f32..1.0);
                value.iter_mut().zip(direction).for_each(|(value, direction)| *value += weight * direction);
            }
        }
        values
    };
    let (codewords, vectors) = (lie_along(count), lie_along(rows));
    for form in [Form::L2, Form::Dot] {
        let pruned = Pruned::new(&codewords, dimension, form);
        let none = Nearest { index: 7, distance: 0.0, second: 0.0 };
        let (mut plain, mut looked) = (vec![none; rows], vec![none; rows]);
        pruned.nearest(&vectors, |_| 1e-3, &mut plain);
        let Some(head) = Head::of(&pruned) else { return };
        pruned.nearest_by(Some(&head), &vectors, |_| 1e-3, &mut looked);
        for (plain, looked) in plain.iter().zip(&looked) {
            assert_eq!((plain.index, plain.distance, plain.second), (looked.index, looked.distance, looked.second));
        }
        let (met, passed) = head.counted();
        assert_eq!(met, (rows * count.div_ceil(PANEL)) as u64);
        assert!(form == Form::Dot || passed * 4 < met, "{passed} of {met}");
    }
    // Fewer directions than axes, and none at all.
    let few = [&codewords[..dimension], &codewords[dimension..2 * dimension]].concat().repeat(300);
    agrees(&few, &vectors, dimension, Form::L2);
    agrees(&vec![1.0; 600 * dimension], &vectors[..50 * dimension], dimension, Form::L2);
}

#[test]
fn what_a_first_look_costs_is_its_bounds_and_what_it_leaves() {
    let mut rng = SmallRng::seed_from_u64(11);
    let (count, dimension) = (600, 768);
    let codewords = Pruned::new(&numbers(&mut rng, count * dimension, 0.0), dimension, Form::L2);
    let Some(head) = Head::of(&codewords) else { return };
    // Nothing is known yet.
    assert_eq!(head.cost(), 1.0);
    head.count(1000, 0);
    let bounds = head.cost();
    assert!(bounds > 0.0 && bounds < 0.5, "{bounds}");
    head.count(1000, 100);
    assert!((head.cost() - bounds - 0.05).abs() < 1e-9);
    head.count(0, 300);
    assert_eq!(head.cost(), 1.0);

    // So many vectors are looked at before it is switched off, and no more, where it leaves everything.
    let Some(head) = Head::of(&codewords) else { return };
    let panels = count.div_ceil(PANEL) as u64;
    let looked = Head::tried(count) as u64 * panels;
    head.count(looked, looked);
    assert!(head.is_worth_it());
    head.count(panels, panels);
    assert!(!head.is_worth_it());
}
