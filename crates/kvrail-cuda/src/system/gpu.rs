//! GPUs as PCI devices.

use super::view::SystemView;

const DEVICES: &str = "/sys/bus/pci/devices";
const GPUS: &str = "/proc/driver/nvidia/gpus";
/// NVIDIA's PCI vendor number.
const VENDOR: &str = "0x10de";
/// The class of display controllers: VGA (`0x0300..`) and 3D (`0x0302..`).
const DISPLAY_CLASS: &str = "0x03";
/// The flag of a memory resource (`IORESOURCE_MEM`, linux/ioport.h).
const RESOURCE_MEMORY: u64 = 0x200;
/// The first lines of `resource` are the six base address registers.
const BASE_ADDRESS_REGISTERS: usize = 6;

/// An NVIDIA GPU, as the bus and the driver show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// The place on the PCI bus, as `0000:65:00.0`, in lower case.
    pub pci_address: String,
    /// The product's name, where the driver tells it.
    pub model: Option<String>,
    /// Whether NVIDIA's driver drives it.
    pub has_driver: bool,
    /// The size of BAR1, the window to the GPU's memory on the bus, through which storage writes.
    ///
    /// From `/sys/bus/pci/devices/<address>/resource`. NVIDIA's driver counts a device's memory
    /// apertures from 0 and takes number 1 for the frame buffer (`NV_GPU_BAR_INDEX_FB` in its open
    /// source); on the bus that is resource 1 on most GPUs and resource 2 where aperture 0 has 64
    /// bits, too.
    pub bar1_bytes: Option<u64>,
    /// The part of BAR1 that the kernel may use for P2PDMA (`p2pmem/size`). The driver registers it
    /// when a first CUDA context is made; before, it is absent.
    pub p2pdma_bytes: Option<u64>,
}

impl Gpu {
    /// Lists the GPUs that the bus or the driver shows, by address.
    pub fn list(view: &SystemView) -> Vec<Self> {
        let driven = view.names(GPUS);
        let mut addresses: Vec<String> = view
            .names(DEVICES)
            .into_iter()
            .filter(|address| is_gpu(view, address))
            .chain(driven.iter().cloned())
            .map(|address| address.to_ascii_lowercase())
            .collect();
        addresses.sort();
        addresses.dedup();
        let by_driver = |address: &str| {
            driven
                .iter()
                .find(|name| name.eq_ignore_ascii_case(address))
        };
        addresses
            .into_iter()
            .map(|address| Self {
                model: by_driver(&address).and_then(|name| model(view, name)),
                has_driver: by_driver(&address).is_some(),
                bar1_bytes: bar1_bytes(view, &address),
                p2pdma_bytes: view
                    .line(format!("{DEVICES}/{address}/p2pmem/size"))
                    .and_then(|text| text.parse().ok()),
                pci_address: address,
            })
            .collect()
    }
}

fn is_gpu(view: &SystemView, address: &str) -> bool {
    let value = |name: &str| view.line(format!("{DEVICES}/{address}/{name}"));
    value("vendor").is_some_and(|vendor| vendor == VENDOR)
        && value("class").is_some_and(|class| class.starts_with(DISPLAY_CLASS))
}

fn model(view: &SystemView, address: &str) -> Option<String> {
    let text = view.text(format!("{GPUS}/{address}/information"))?;
    let mut fields = text.lines().filter_map(|line| line.split_once(':'));
    let (_, model) = fields.find(|(name, _)| name.trim() == "Model")?;
    let model = model.trim();
    (!model.is_empty()).then(|| model.to_owned())
}

fn bar1_bytes(view: &SystemView, address: &str) -> Option<u64> {
    let text = view.text(format!("{DEVICES}/{address}/resource"))?;
    text.lines()
        .take(BASE_ADDRESS_REGISTERS)
        .filter_map(memory_bytes)
        .nth(1)
}

/// Returns the size of a resource, `None` where the line is not one of memory.
fn memory_bytes(line: &str) -> Option<u64> {
    let mut numbers = line
        .split_whitespace()
        .map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok());
    let (first, last, flags) = (numbers.next()??, numbers.next()??, numbers.next()??);
    let bytes = last.checked_sub(first)?.checked_add(1)?;
    (flags & RESOURCE_MEMORY != 0 && last != 0).then_some(bytes)
}
