//! Pieces of a chunk that lie at regular places, so few numbers that they go with a launch.

use std::mem::offset_of;

use super::CopyDescriptor;

/// Rows of a [`PieceGrid`] at most: the arguments of a launch may have 4096 bytes (PTX ISA 8.0).
pub const GRID_ROWS_MAX: usize = 256;
/// Bytes that a thread accesses at once; addresses and lengths are multiples of it.
const GRANULE_BYTES: u64 = 16;

/// Pieces of one length in rows and columns, in the order of the pages: all of the first row, then
/// all of the second. A row begins anywhere; its pieces lie at equal steps.
///
/// A block of a KV cache is a row, a layer a column.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PieceGrid {
    stride: u64,
    columns: u32,
    piece_granules: u32,
    granules: u32,
    skipped: u32,
    rows: [u64; GRID_ROWS_MAX],
}

impl PieceGrid {
    /// Makes a grid of `columns` pieces of `bytes` bytes in each row, `stride` bytes from one to the
    /// next, the first of each at its address in `rows`. On the side of the pages they begin
    /// `skipped` bytes behind the start of the first page.
    ///
    /// Returns `None` for what a launch cannot carry: no piece, more than [`GRID_ROWS_MAX`] rows,
    /// anything that is no multiple of 16 bytes, or more of these than 32 bits count.
    pub fn new(
        rows: &[u64],
        columns: usize,
        stride: u64,
        bytes: usize,
        skipped: usize,
    ) -> Option<Self> {
        let count = |bytes: usize| {
            let granules = (bytes as u64).is_multiple_of(GRANULE_BYTES);
            granules.then(|| u32::try_from(bytes as u64 / GRANULE_BYTES).ok())?
        };
        let all = bytes.checked_mul(columns)?.checked_mul(rows.len())?;
        // The kernels count from the first page's start to the last page's end without a carry.
        count(all.checked_add(skipped)?.checked_add(super::PAGE_BYTES)?)?;
        let mut grid = Self {
            stride,
            columns: u32::try_from(columns).ok()?,
            piece_granules: count(bytes)?,
            granules: count(all)?,
            skipped: count(skipped)?,
            rows: [0; GRID_ROWS_MAX],
        };
        grid.rows.get_mut(..rows.len())?.copy_from_slice(rows);
        let aligned = rows.iter().chain([&stride]);
        let aligned = aligned.fold(0, |bits, address| bits | address) % GRANULE_BYTES == 0;
        (aligned && all > 0).then_some(grid)
    }

    /// Returns the bytes of all pieces together.
    pub fn bytes(&self) -> u64 {
        u64::from(self.granules) * GRANULE_BYTES
    }

    /// Returns the bytes between the start of the first page and the first piece.
    pub fn skipped(&self) -> u64 {
        u64::from(self.skipped) * GRANULE_BYTES
    }

    /// Returns the pieces one by one: as copies to pages from address `pages` on, or from there.
    pub fn copies(&self, pages: u64, gathers: bool) -> Vec<CopyDescriptor> {
        let bytes = u64::from(self.piece_granules) * GRANULE_BYTES;
        let count = self.granules.checked_div(self.piece_granules);
        let piece = |number: u32| {
            let row = self.rows.get((number / self.columns) as usize)?;
            let memory = row + u64::from(number % self.columns) * self.stride;
            let image = pages + self.skipped() + u64::from(number) * bytes;
            let (source, target) = match gathers {
                true => (memory, image),
                false => (image, memory),
            };
            Some(CopyDescriptor {
                source,
                target,
                bytes,
            })
        };
        (0..count.unwrap_or(0)).filter_map(piece).collect()
    }
}

// As the structure in `kvrail.cu`.
const _: () = assert!(
    size_of::<PieceGrid>() == 24 + 8 * GRID_ROWS_MAX
        && offset_of!(PieceGrid, columns) == 8
        && offset_of!(PieceGrid, skipped) == 20
        && offset_of!(PieceGrid, rows) == 24
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_launch_can_carry_is_no_grid() {
        let grid = |rows: usize, columns, stride, bytes, skipped| {
            let rows: Vec<u64> = (0..rows as u64).map(|row| row * 4096).collect();
            PieceGrid::new(&rows, columns, stride, bytes, skipped)
        };
        assert!(grid(GRID_ROWS_MAX, 3, 64, 32, 48).is_some());
        assert_eq!(grid(GRID_ROWS_MAX + 1, 3, 64, 32, 0), None, "too many rows");
        assert_eq!(grid(2, 3, 72, 32, 0), None, "stride of no granules");
        assert_eq!(grid(2, 3, 64, 24, 0), None, "length of no granules");
        assert_eq!(
            grid(2, 3, 64, 32, 8),
            None,
            "place in a page of no granules"
        );
        assert_eq!(grid(0, 3, 64, 32, 0), None, "no rows");
        assert_eq!(grid(2, 0, 64, 32, 0), None, "no columns");
        assert_eq!(grid(2, 3, 64, 0, 0), None, "no bytes");
        assert_eq!(grid(16, 1, 64, 1 << 32, 0), None, "2^32 granules");
        assert_eq!(
            PieceGrid::new(&[8], 1, 64, 32, 0),
            None,
            "row of no granules"
        );
    }

    #[test]
    fn pieces_are_those_of_rows_and_columns() {
        let grid = PieceGrid::new(&[1 << 20, 1 << 16], 3, 4096, 32, 48).unwrap();
        assert_eq!((grid.bytes(), grid.skipped()), (192, 48));
        let copies = grid.copies(1 << 30, true);
        let memory: Vec<u64> = copies.iter().map(|copy| copy.source).collect();
        let [first, second] = [1 << 20, 1 << 16];
        let row = |start: u64| [start, start + 4096, start + 8192];
        assert_eq!(memory, [row(first), row(second)].concat());
        let image: Vec<u64> = copies.iter().map(|copy| copy.target - (1 << 30)).collect();
        assert_eq!(image, [48, 80, 112, 144, 176, 208]);
        let back = grid.copies(1 << 30, false);
        assert!(copies.iter().zip(back).all(|(to, from)| {
            (to.source, to.target, to.bytes) == (from.target, from.source, from.bytes)
        }));
    }
}
