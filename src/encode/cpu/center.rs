//! A point amid codewords.

/// Codewords that are looked at: more tell nothing more.
const LOOKED_AT: usize = 255;

/// The median of each coordinate. The mean would go after a codeword that is far from all others, and the differences to it of all
/// others would then be lost in rounding.
pub fn center(codewords: &[f32], dimension: usize) -> Vec<f64> {
    let count = codewords.len() / dimension.max(1);
    let step = count.div_ceil(LOOKED_AT).max(1);
    let mut column = Vec::with_capacity(count.div_ceil(step));
    let median = |d: usize| {
        column.clear();
        column.extend(codewords[d..].iter().step_by(step * dimension));
        let middle = column.len() / 2;
        f64::from(*column.select_nth_unstable_by(middle, f32::total_cmp).1)
    };
    if count == 0 { vec![0.0; dimension] } else { (0..dimension).map(median).collect() }
}

#[cfg(test)]
mod tests {
    use super::center;

    #[test]
    fn a_codeword_far_from_all_others_does_not_move_it() {
        let mut codewords: Vec<f32> = (0..3000).map(|i| (i / 2 % 100) as f32 + if i % 2 == 0 { 0.0 } else { 1000.0 }).collect();
        codewords[..4].copy_from_slice(&[1e30, -1e30, f32::MAX, -f32::MAX]);
        let found = center(&codewords, 2);
        assert!((30.0..70.0).contains(&found[0]) && (1030.0..1070.0).contains(&found[1]), "{found:?}");
        assert_eq!(center(&[], 3), [0.0; 3]);
        assert_eq!(center(&[5.0, -7.0], 2), [5.0, -7.0]);
    }
}
