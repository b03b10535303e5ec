//! Gather and scatter: between the ranges of a plan and contiguous staging memory.

use super::region::Region;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::TransferPlan;

/// Copies the ranges of `plan` into `target`, in payload order. One pass over the bytes.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] when `target` is not as long as the plan, or the plan was made
/// for other regions.
pub fn gather(plan: &TransferPlan, regions: &[Region], target: &mut [u8]) -> Result<()> {
    check_length(plan, target.len())?;
    let mut rest = target;
    for range in plan.ranges() {
        let (piece, left) = rest
            .split_at_mut_checked(range.bytes)
            .ok_or_else(mismatch)?;
        region(regions, range.region)?.copy_out(range.offset, piece)?;
        rest = left;
    }
    Ok(())
}

/// Copies bytes to the ranges of a plan, piece by piece, in payload order.
///
/// So that what was just verified is copied while it is still in the CPU's cache.
#[derive(Debug)]
pub struct Scatter<'a> {
    plan: &'a TransferPlan,
    regions: &'a [Region],
    /// The range that is written next, and how much of it is.
    range: usize,
    written: usize,
}

impl<'a> Scatter<'a> {
    /// Begins a scatter to the ranges of `plan`.
    pub fn new(plan: &'a TransferPlan, regions: &'a [Region]) -> Self {
        Self {
            plan,
            regions,
            range: 0,
            written: 0,
        }
    }

    /// Writes the next bytes of the payload.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for more bytes than the plan has left, or a plan that was
    /// made for other regions.
    pub fn write(&mut self, source: &[u8]) -> Result<()> {
        let mut rest = source;
        while !rest.is_empty() {
            let range = self.plan.ranges().get(self.range).ok_or_else(mismatch)?;
            let bytes = rest.len().min(range.bytes - self.written);
            let (piece, left) = rest.split_at_checked(bytes).ok_or_else(mismatch)?;
            region(self.regions, range.region)?.stream_in(range.offset + self.written, piece)?;
            self.written += bytes;
            if self.written == range.bytes {
                (self.range, self.written) = (self.range + 1, 0);
            }
            rest = left;
        }
        Ok(())
    }

    /// Returns whether every range of the plan is written.
    pub fn is_complete(&self) -> bool {
        self.range == self.plan.ranges().len()
    }
}

fn region(regions: &[Region], index: usize) -> Result<&Region> {
    regions.get(index).ok_or_else(mismatch)
}

fn check_length(plan: &TransferPlan, bytes: usize) -> Result<()> {
    if plan.bytes() == bytes {
        return Ok(());
    }
    let message = format!(
        "plan of {} bytes against {bytes} bytes of staging",
        plan.bytes()
    );
    Err(Error::new(ErrorKind::InvalidArgument, message))
}

fn mismatch() -> Error {
    Error::new(
        ErrorKind::InvalidArgument,
        "plan and memory regions do not belong together",
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::layout::{KvLayout, LayerSpan};

    #[test]
    fn what_is_gathered_can_be_scattered_elsewhere() {
        let layers = (0..3)
            .map(|l| LayerSpan {
                region: l % 2,
                offset: l * 640,
                block_stride: 80,
                block_bytes: 64,
            })
            .collect();
        let layout = KvLayout::new(layers, 8, &[4096, 4096]).unwrap();
        let [source, target] = [0_u8, 1].map(|poison| {
            [Region::zeroed(4096).unwrap(), Region::zeroed(4096).unwrap()].map(|region| {
                let bytes: Vec<u8> = (0..4096).map(|i| (i * 7 % 253) as u8 ^ poison).collect();
                region.copy_in(0, &bytes).unwrap();
                region
            })
        });
        let plan = TransferPlan::new(&layout, &[5, 0, 3]).unwrap();
        let mut staged = vec![0; plan.bytes()];
        gather(&plan, &source, &mut staged).unwrap();
        let elsewhere = TransferPlan::new(&layout, &[1, 2, 7]).unwrap();
        let mut scatter = Scatter::new(&elsewhere, &target);
        scatter.write(&staged).unwrap();
        assert!(scatter.is_complete());
        let mut again = vec![0; plan.bytes()];
        gather(&elsewhere, &target, &mut again).unwrap();
        assert_eq!(staged, again);
        assert!(gather(&plan, &source, &mut staged[1..]).is_err());
        assert!(gather(&plan, &source[..1], &mut staged).is_err());
    }

    proptest! {
        #[test]
        fn pieces_of_any_length_arrive_where_the_whole_does(
            cuts in proptest::collection::vec(0_usize..192 * 3, 0..20),
        ) {
            let layers = (0..3)
                .map(|l| LayerSpan {
                    region: 0,
                    offset: l * 1000,
                    block_stride: 100,
                    block_bytes: 64,
                })
                .collect();
            let layout = KvLayout::new(layers, 8, &[4096]).unwrap();
            let plan = TransferPlan::new(&layout, &[6, 1, 2]).unwrap();
            let source: Vec<u8> = (0..plan.bytes()).map(|i| (i * 7 % 251) as u8).collect();
            let regions = [Region::zeroed(4096).unwrap()];
            let mut pieces = Scatter::new(&plan, &regions);
            let mut cuts = cuts;
            cuts.extend([0, source.len()]);
            cuts.sort_unstable();
            for pair in cuts.windows(2) {
                pieces.write(&source[pair[0]..pair[1]]).unwrap();
            }
            prop_assert!(pieces.is_complete());
            prop_assert!(pieces.write(&[1]).is_err(), "more than the plan has");
            let mut back = vec![0; source.len()];
            gather(&plan, &regions, &mut back).unwrap();
            prop_assert_eq!(back, source);
        }
    }
}
