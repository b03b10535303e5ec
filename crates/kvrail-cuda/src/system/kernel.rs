//! The kernel's release, and what was built into it.

use std::fmt;
use std::io::{BufRead, BufReader, Read};

use super::view::SystemView;

/// What is read of `/proc/kallsyms` at most: it has some 300,000 lines of 50 bytes.
const SYMBOLS_BYTES_MAX: u64 = 64 << 20;

/// A function that the kernel has if, and only if, it was built with `CONFIG_PCI_P2PDMA`
/// (drivers/pci/p2pdma.c; without, it is an inline stub).
const P2PDMA_FUNCTION: &[u8] = b"pci_p2pdma_add_resource";

/// The kernel's release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelRelease {
    /// The text of `uname -r`.
    pub text: String,
    /// Major and minor version.
    pub version: (u32, u32),
}

impl KernelRelease {
    /// Reads it from `/proc/sys/kernel/osrelease`.
    pub fn read(view: &SystemView) -> Option<Self> {
        let text = view.line("/proc/sys/kernel/osrelease")?;
        let mut numbers = text.split(|c: char| !c.is_ascii_digit());
        let major = numbers.next()?.parse().ok()?;
        let minor = numbers.next()?.parse().ok()?;
        Some(Self {
            version: (major, minor),
            text,
        })
    }
}

impl fmt::Display for KernelRelease {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.text)
    }
}

/// Returns whether the kernel was built with `CONFIG_PCI_P2PDMA`, `None` where nothing tells.
///
/// From `/boot/config-<release>`, else from the names in `/proc/kallsyms`, which a container sees,
/// too. `/proc/config.gz` is not read: it is compressed, and where it exists, kallsyms says the same.
pub fn has_p2pdma_support(view: &SystemView) -> Option<bool> {
    from_config(view).or_else(|| from_symbols(view))
}

fn from_config(view: &SystemView) -> Option<bool> {
    let release = KernelRelease::read(view)?;
    let text = view.text(format!("/boot/config-{}", release.text))?;
    Some(
        text.lines()
            .any(|line| line.trim() == "CONFIG_PCI_P2PDMA=y"),
    )
}

fn from_symbols(view: &SystemView) -> Option<bool> {
    let file = view.open("/proc/kallsyms")?;
    let mut reader = BufReader::new(file.take(SYMBOLS_BYTES_MAX));
    let (mut line, mut is_empty) = (Vec::new(), true);
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line).ok()? == 0 {
            return (!is_empty).then_some(false);
        }
        is_empty = false;
        // "ffffffff8141a220 T name", with the module's name behind a tab for modules.
        let mut words = line.split(u8::is_ascii_whitespace);
        if words.nth(2) == Some(P2PDMA_FUNCTION) {
            return Some(true);
        }
    }
}
