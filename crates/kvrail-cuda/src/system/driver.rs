//! NVIDIA's kernel driver.

use super::view::SystemView;

/// The driver's own description of itself: it is 64 columns and a compiler's name long.
const VERSION: &str = "/proc/driver/nvidia/version";

/// NVIDIA's kernel driver, from `/proc/driver/nvidia`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvidiaDriver {
    /// The version, as `570.86.15`; empty where the text has none.
    pub version: String,
    /// Whether these are the open kernel modules.
    pub open: bool,
    /// What it was built for, as `x86_64`.
    pub architecture: Option<String>,
    /// The setting `NVreg_RegistryDwords`. `/sys/module/nvidia/parameters` shows it empty even when
    /// it is in force; `/proc/driver/nvidia/params` has it.
    pub registry_dwords: Option<String>,
}

impl NvidiaDriver {
    /// Reads it; `None` where the driver is not loaded.
    pub fn read(view: &SystemView) -> Option<Self> {
        let text = view.text(VERSION)?;
        let line = text.lines().find(|line| line.contains("NVRM"))?;
        // "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  565.77  Release Build ..." or
        // "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.135  Fri Jan 10 ...".
        let words = || line.split_whitespace();
        let version = words().find(|word| {
            word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.')
        });
        let architecture = words().find(|word| matches!(*word, "x86_64" | "aarch64" | "ppc64le"));
        Some(Self {
            version: version.unwrap_or_default().to_owned(),
            open: line.contains("Open Kernel Module"),
            architecture: architecture.map(str::to_owned),
            registry_dwords: registry_dwords(view),
        })
    }

    /// Returns the first number of the version, the release branch.
    pub fn branch(&self) -> Option<u32> {
        self.version.split('.').next()?.parse().ok()
    }

    /// Returns a value of the registry setting; keys are compared without regard to case.
    pub(super) fn registry_dword(&self, key: &str) -> Option<u64> {
        let settings = self.registry_dwords.as_deref()?.split(';');
        let found = settings
            .filter_map(|setting| setting.split_once('='))
            .find(|(name, _)| name.trim().eq_ignore_ascii_case(key))?;
        let value = found.1.trim();
        match value.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => value.parse().ok(),
        }
    }
}

fn registry_dwords(view: &SystemView) -> Option<String> {
    let text = view.text("/proc/driver/nvidia/params")?;
    let values = text.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = values
        .into_iter()
        .find(|(name, _)| name.trim() == "RegistryDwords")?;
    let value = value.trim().trim_matches('"');
    (!value.is_empty()).then(|| value.to_owned())
}
