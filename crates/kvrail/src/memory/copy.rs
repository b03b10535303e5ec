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

/// Copies `source` to the ranges of `plan`, in payload order. One pass over the bytes.
///
/// # Errors
/// As [`gather`].
pub fn scatter(plan: &TransferPlan, regions: &[Region], source: &[u8]) -> Result<()> {
    check_length(plan, source.len())?;
    let mut rest = source;
    for range in plan.ranges() {
        let (piece, left) = rest.split_at_checked(range.bytes).ok_or_else(mismatch)?;
        region(regions, range.region)?.copy_in(range.offset, piece)?;
        rest = left;
    }
    Ok(())
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
        scatter(&elsewhere, &target, &staged).unwrap();
        let mut again = vec![0; plan.bytes()];
        gather(&elsewhere, &target, &mut again).unwrap();
        assert_eq!(staged, again);
        assert!(gather(&plan, &source, &mut staged[1..]).is_err());
        assert!(gather(&plan, &source[..1], &mut staged).is_err());
    }
}
