use super::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut random = SmallRng::seed_from_u64(seed);
    (0..count).map(|_| random.random_range(-1.0..1.0)).collect()
}

fn isas() -> Vec<Isa> {
    let mut isas = vec![Isa::Plain, Isa::detect()];
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
        isas.push(Isa::Avx2);
    }
    isas
}

#[test]
fn finds_the_nearest_and_the_second_on_every_processor() {
    for isa in isas() {
        for (rows, count, dimension) in [(1, 1, 1), (7, 5, 3), (100, 256, 8), (193, 300, 33), (97, 65, 200), (6, 64, 4)] {
            let (vectors, codewords) = (random(rows * dimension, 1), random(count * dimension, 2));
            for form in [Form::L2, Form::Dot, Form::Exact] {
                let mut out = vec![Nearest { index: 0, distance: 0.0, second: 0.0 }; rows];
                Codewords::with_isa(&codewords, dimension, form, isa).nearest(&vectors, &mut out);
                for (vector, found) in vectors.chunks_exact(dimension).zip(&out) {
                    let mut distances: Vec<(f64, usize)> = codewords
                        .chunks_exact(dimension)
                        .map(|c| {
                            let pairs = vector.iter().zip(c).map(|(a, b)| (f64::from(*a), f64::from(*b)));
                            match form {
                                Form::Dot => pairs.map(|(a, b)| -a * b).sum::<f64>(),
                                Form::L2 | Form::Exact => pairs.map(|(a, b)| (a - b) * (a - b)).sum(),
                            }
                        })
                        .zip(0..)
                        .collect();
                    let chosen = distances[found.index as usize].0;
                    distances.sort_by(|a, b| a.0.total_cmp(&b.0));
                    assert!((chosen - distances[0].0).abs() < 1e-4, "{isa:?} {form:?}");
                    // L2 leaves out what is the same for all codewords.
                    let left_out = if form == Form::L2 { chosen - f64::from(found.distance) } else { 0.0 };
                    assert!((f64::from(found.distance) + left_out - chosen).abs() < 1e-4);
                    if count > 1 {
                        let second = f64::from(found.second) + left_out;
                        assert!((second - distances[1].0).abs() < 2e-4, "{isa:?} {form:?} {found:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn far_from_the_origin_differences_are_not_lost() {
    let (rows, count, dimension) = (300, 64, 16);
    let far = |values: Vec<f32>| values.iter().map(|v| v + 1000.0).collect::<Vec<_>>();
    let (vectors, codewords) = (far(random(rows * dimension, 5)), far(random(count * dimension, 6)));
    for isa in isas() {
        let packed = Codewords::with_isa(&codewords, dimension, Form::L2, isa);
        let mut found = vec![Nearest { index: 0, distance: 0.0, second: 0.0 }; rows];
        packed.nearest(&vectors, &mut found);
        let exact = Codewords::with_isa(&codewords, dimension, Form::Exact, isa);
        let mut expected = found.clone();
        exact.nearest(&vectors, &mut expected);
        let wrong = found.iter().zip(&expected).filter(|(a, b)| a.index != b.index && b.second - b.distance > 0.05).count();
        assert_eq!(wrong, 0, "{isa:?}");
    }
}

#[test]
fn of_equal_ones_the_first_and_of_infinite_ones_none() {
    for isa in isas() {
        let mut out = [Nearest { index: 0, distance: 0.0, second: 0.0 }; 2];
        let codewords = [1.0f32, 2.0].repeat(100);
        Codewords::with_isa(&codewords, 2, Form::Exact, isa).nearest(&[1.0, 2.0, 5.0, 5.0], &mut out);
        assert_eq!((out[0].index, out[0].distance, out[0].second, out[1].index), (0, 0.0, 0.0, 0));
        Codewords::with_isa(&codewords, 2, Form::Exact, isa).nearest(&[f32::MAX, 1.0, f32::NAN, 1.0], &mut out);
        assert_eq!((out[0].index, out[1].index), (u32::MAX, u32::MAX));
    }
}

#[test]
fn exact_is_bit_by_bit_what_lance_computes() {
    let (dimension, count) = (8, 256);
    let (vectors, codewords) = (random(500 * dimension, 3), random(count * dimension, 4));
    let prepared = crate::lance::kernels::ReferenceDistances::new(&codewords, dimension);
    for isa in isas() {
        let mut out = vec![Nearest { index: 0, distance: 0.0, second: 0.0 }; 500];
        Codewords::with_isa(&codewords, dimension, Form::Exact, isa).nearest(&vectors, &mut out);
        for (vector, found) in vectors.chunks_exact(dimension).zip(&out) {
            let (nearest, distances) = prepared.of(vector);
            assert_eq!(nearest, Some(found.index));
            assert_eq!(distances[found.index as usize], found.distance);
        }
    }
}

#[test]
fn all_distances_and_those_around_an_origin() {
    for (rows, count, dimension) in [(1, 1, 1), (7, 65, 3), (20, 300, 33)] {
        let (vectors, codewords) = (random(rows * dimension, 1), random(count * dimension, 2));
        let square = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        for isa in isas() {
            let packed = Codewords::with_isa(&codewords, dimension, Form::L2, isa);
            let mut found = vec![0f32; rows * packed.padded()];
            packed.distances(&vectors, &mut found);
            let center: Vec<f32> = packed.center().iter().map(|v| *v as f32).collect();
            for (vector, found) in vectors.chunks_exact(dimension).zip(found.chunks_exact(packed.padded())) {
                let left_out = square(vector, &center);
                for (codeword, found) in codewords.chunks_exact(dimension).zip(found) {
                    assert!((f64::from(*found) + left_out - square(vector, codeword)).abs() < 1e-4, "{isa:?}");
                }
                assert!(found[count..].iter().all(|d| d.is_infinite()));
            }
        }
        let origin = &vectors[..dimension];
        let residuals: Vec<f32> = vectors.iter().zip(origin.iter().cycle()).map(|(v, o)| v - o).collect();
        let around = Codewords::around(codewords.chunks_exact(dimension), origin);
        let mut found = vec![Nearest { index: 0, distance: 0.0, second: 0.0 }; rows];
        around.only_nearest(&residuals, &mut found);
        for (vector, found) in vectors.chunks_exact(dimension).zip(&found) {
            let nearest = codewords.chunks_exact(dimension).map(|c| square(vector, c)).fold(f64::INFINITY, f64::min);
            assert!((square(vector, &codewords[found.index as usize * dimension..][..dimension]) - nearest).abs() < 1e-4);
            assert!((f64::from(found.distance) + square(vector, origin) - nearest).abs() < 1e-4);
        }
    }
}

#[test]
fn tagged_distances_find_the_same_but_where_it_is_close() {
    for isa in isas() {
        for (rows, count, dimension) in [(1, 1, 1), (7, 5, 3), (100, 256, 8), (101, 250, 8), (50, 16, 16), (33, 256, 2), (40, 65, 24)] {
            let stride = dimension + 3;
            let (vectors, codewords) = (random(rows * stride, 1), random(count * dimension, 2));
            let codewords = Codewords::with_isa(&codewords, dimension, Form::L2, isa);
            assert!(codewords.can_tag());
            let none = Nearest { index: 0, distance: 0.0, second: 0.0 };
            let (mut plain, mut tagged, mut only) = (vec![none; rows], vec![none; rows], vec![none; rows]);
            codewords.nearest_of_parts(&vectors, stride, &mut plain);
            codewords.nearest_of_parts_tagged(&vectors, stride, &mut tagged);
            let gathered: Vec<f32> = vectors.chunks(stride).flat_map(|v| &v[..dimension]).copied().collect();
            codewords.only_nearest_tagged(&gathered, &mut only);
            let mut certain = 0;
            for ((vector, plain), (tagged, only)) in vectors.chunks(stride).zip(&plain).zip(tagged.iter().zip(&only)) {
                let blur = codewords.doubt_tagged() * codewords.magnitude(crate::encode::cpu::simd::square(&vector[..dimension]).sqrt());
                assert!((tagged.distance - plain.distance).abs() <= blur / 2.0 && tagged.index == only.index, "{isa:?}");
                assert!(count == 1 || (tagged.second - plain.second).abs() <= blur / 2.0, "{isa:?}: {tagged:?} {plain:?}");
                if tagged.second - tagged.distance > blur {
                    certain += 1;
                    assert_eq!(tagged.index, plain.index, "{isa:?}");
                }
            }
            assert!(certain > rows * 9 / 10, "{certain} of {rows}");
        }
    }
    let many = random(257 * 4, 3);
    assert!(!Codewords::new(&many, 4, Form::L2).can_tag() && !Codewords::new(&many[..64], 4, Form::Exact).can_tag());
    assert!(!Codewords::new(&[1.0, 2.0, -1.0, 3.0], 2, Form::L2).tags(1e38) && !Codewords::new(&[1.0, 3e38], 1, Form::L2).tags(1.0));
}

#[test]
fn nothing_that_can_be_tagged_is_found_beyond_the_codewords() {
    for isa in isas() {
        let codewords = Codewords::with_isa(&random(5 * 2, 1), 2, Form::L2, isa);
        let mut out = [Nearest { index: 0, distance: 0.0, second: 0.0 }; 5];
        let far = [1e30, 1.0, -1e30, 1e30, f32::MAX, -f32::MAX, f32::NAN, 0.0, f32::INFINITY, 1.0];
        codewords.nearest_of_parts_tagged(&far, 2, &mut out);
        assert!(out[..2].iter().all(|found| found.index < 5) && out[2..].iter().all(|found| found.index < 5 || found.index == u32::MAX));
    }
}
