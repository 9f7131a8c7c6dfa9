//! Codes from one row after the other to one byte of all rows after the other, as an index holds a partition.

/// Rows whose bytes of one column fill a cache line: a block is written line by line while it is in the first cache.
const BLOCK_ROWS: usize = 64;

/// Write `codes`, rows of `width` bytes, as rows `first..` of a partition of `num_rows` rows: byte `b` of row `r` goes to
/// `partition[b * num_rows + r]`.
pub fn transpose_into(codes: &[u8], width: usize, partition: &mut [u8], num_rows: usize, first: usize) {
    let rows = codes.len() / width;
    let whole = width / 8 * 8;
    for start in (0..rows).step_by(BLOCK_ROWS) {
        let block = &codes[start * width..(start + BLOCK_ROWS).min(rows) * width];
        let eights = block.len() / width / 8 * 8;
        let at = first + start;
        for column in (0..whole).step_by(8) {
            for row in (0..eights).step_by(8) {
                let mut square = [0u64; 8];
                for (i, line) in square.iter_mut().enumerate() {
                    if let Some(bytes) = block[(row + i) * width + column..].first_chunk::<8>() {
                        *line = u64::from_le_bytes(*bytes);
                    }
                }
                transpose_square(&mut square);
                for (i, line) in square.iter().enumerate() {
                    if let Some(bytes) = partition[(column + i) * num_rows + at + row..].first_chunk_mut::<8>() {
                        *bytes = line.to_le_bytes();
                    }
                }
            }
        }
        // What does not fill squares: the last bytes of every row, and the last rows.
        for (row, code) in block.chunks_exact(width).enumerate() {
            let from = if row < eights { whole } else { 0 };
            for (column, byte) in code.iter().enumerate().skip(from) {
                partition[column * num_rows + at + row] = *byte;
            }
        }
    }
}

/// Eight rows of eight bytes, the first byte lowest, to eight columns: blocks of 4, 2 and 1 bytes change places across the
/// diagonal.
#[inline(always)]
fn transpose_square(rows: &mut [u64; 8]) {
    macro_rules! swap {
        ($step:literal, $mask:literal, $($row:literal)*) => {$(
            let swap = ((rows[$row] >> (8 * $step)) ^ rows[$row + $step]) & $mask;
            rows[$row] ^= swap << (8 * $step);
            rows[$row + $step] ^= swap;
        )*};
    }
    swap!(4, 0x0000_0000_ffff_ffff_u64, 0 1 2 3);
    swap!(2, 0x0000_ffff_0000_ffff_u64, 0 1 4 5);
    swap!(1, 0x00ff_00ff_00ff_00ff_u64, 0 2 4 6);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_the_definition() {
        for width in [1, 4, 8, 12, 48, 64, 96] {
            for parts in [vec![1], vec![7, 1], vec![64, 65], vec![200, 3, 61]] {
                let num_rows: usize = parts.iter().sum();
                let codes: Vec<u8> = (0..num_rows * width).map(|i| (i * 7 + i / 251) as u8).collect();
                let mut transposed = vec![0; codes.len()];
                let mut first = 0;
                for rows in parts {
                    transpose_into(&codes[first * width..(first + rows) * width], width, &mut transposed, num_rows, first);
                    first += rows;
                }
                for row in 0..num_rows {
                    for byte in 0..width {
                        assert_eq!(transposed[byte * num_rows + row], codes[row * width + byte], "width {width}, row {row}, byte {byte}");
                    }
                }
            }
        }
    }
}
