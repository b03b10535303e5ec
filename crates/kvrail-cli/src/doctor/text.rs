//! The report for people.

use std::io::{self, Write};

use kvrail_cuda::system::RefusalKind;

use super::directory::{DirectIo, Directory, MountInfo};
use super::machine::{DirectPath, Found, GpuDevice, Machine, System};
use super::measure::Measurement;
use crate::output::{Align, Table, human_bytes};

/// Writes what was found out about the machine.
pub(super) fn write_machine(out: &mut impl Write, machine: &Machine) -> io::Result<()> {
    let system = &machine.system;
    let or_unknown = |text: &Option<String>, unknown: &str| {
        let text = text.as_deref();
        text.unwrap_or(unknown).to_owned()
    };
    writeln!(out, "machine")?;
    line(out, "kernel", &or_unknown(&system.kernel, "unknown"))?;
    let container = or_unknown(&system.container, "no sign of one");
    line(out, "container", &container)?;
    if let Some(error) = &system.error {
        line(out, "problem", error)?;
    }
    line(out, "driver", &driver(system))?;
    if system.gpus.is_empty() {
        line(out, "GPU", "none on the bus")?;
    }
    for device in &system.gpus {
        line(out, "GPU", &gpu(device, machine))?;
    }
    line(out, "libcuda", &libcuda(machine))?;
    line(out, "libcufile", &libcufile(machine))?;
    line(out, "nvidia-fs", &nvidia_fs(system))?;
    let p2pdma = match system.p2pdma.possible {
        true => "possible".to_owned(),
        false => format!("no: {}", system.p2pdma.missing.join(", ")),
    };
    line(out, "P2PDMA", &p2pdma)?;
    line(out, "cuFile", &path(machine))?;
    // What the lines above do not show already.
    let refusal = system.refusal.as_ref().filter(|refusal| {
        machine.path == DirectPath::None && refusal.kind != RefusalKind::NoDirectPath.name()
    });
    if let Some(refusal) = refusal {
        line(out, "", &format!("and besides: {}", refusal.reason))?;
    }
    for advice in &machine.advice {
        line(out, "to do", advice)?;
    }
    Ok(())
}

fn driver(system: &System) -> String {
    match &system.driver {
        Some(driver) => {
            let kind = if driver.open { "open" } else { "proprietary" };
            format!("NVIDIA {}, {kind} kernel modules", driver.version)
        }
        None => "no NVIDIA driver is loaded".to_owned(),
    }
}

fn gpu(gpu: &GpuDevice, machine: &Machine) -> String {
    let devices = machine
        .libcuda
        .library()
        .map(|library| library.devices.as_slice());
    let mut devices = devices.unwrap_or_default().iter();
    let device = devices.find(|device| device.pci_address == gpu.pci_address);
    let model = device.map(|device| &device.name).or(gpu.model.as_ref());
    let model = model.map_or("NVIDIA GPU", String::as_str);
    let mut text = format!("{} {model}", gpu.pci_address);
    if let Some(device) = device {
        let memory = human_bytes(device.memory_bytes);
        text.push_str(&format!(", cuda:{}, {memory}", device.ordinal));
    }
    if let Some(bytes) = gpu.bar1_bytes {
        text.push_str(&format!(", BAR1 {}", human_bytes(bytes)));
    }
    if !gpu.has_driver {
        text.push_str(", without NVIDIA's driver");
    }
    text
}

fn libcuda(machine: &Machine) -> String {
    match &machine.libcuda {
        Found::Library(library) => {
            let count = library.devices.len();
            format!("CUDA {}, {count} device(s)", library.cuda_version)
        }
        Found::Error(error) => format!("no: {error}"),
    }
}

fn libcufile(machine: &Machine) -> String {
    match &machine.libcufile {
        Found::Library(library) => {
            let version = library.version.as_deref().unwrap_or("of unknown version");
            let vectored = if library.vectored {
                ", vectored calls"
            } else {
                ""
            };
            format!("{version}, {}{vectored}", library.path.display())
        }
        Found::Error(error) => format!("no: {error}"),
    }
}

fn nvidia_fs(system: &System) -> String {
    let Some(module) = &system.nvidia_fs else {
        return "not loaded".to_owned();
    };
    let version = module.version.as_deref().unwrap_or("of unknown version");
    match module.has_device {
        true => version.to_owned(),
        false => format!("{version}, but /dev/nvidia-fs0 is not here"),
    }
}

fn path(machine: &Machine) -> String {
    let system = &machine.system;
    match machine.path {
        DirectPath::NvidiaFs => "direct, through nvidia-fs".to_owned(),
        DirectPath::P2pdma => "direct, through P2PDMA".to_owned(),
        DirectPath::None => "not usable: it takes a GPU and libcufile".to_owned(),
        DirectPath::Compat => {
            let guard = system.refusal.as_ref().map(|refusal| &refusal.reason);
            let reason = guard.or(system.error.as_ref());
            let reason = reason.map_or("", String::as_str);
            format!("no direct path, so kvrail does without: {reason}")
        }
    }
}

/// Writes what was found out about a directory.
pub(super) fn write_directory(out: &mut impl Write, directory: &Directory) -> io::Result<()> {
    writeln!(out)?;
    let path = directory.path.display().to_string();
    writeln!(out, "{}", path.replace('\n', " "))?;
    if let Some(mount) = &directory.mount {
        line(out, "mount", &mount_text(mount))?;
    }
    if let Some(space) = directory.space {
        let (available, total) = (
            human_bytes(space.available_bytes),
            human_bytes(space.total_bytes),
        );
        line(out, "free", &format!("{available} of {total}"))?;
    }
    if let Some(direct) = &directory.direct_io {
        line(out, "O_DIRECT", &direct_text(direct))?;
    }
    if let Some(uring) = &directory.uring {
        let works = if uring.works { "works" } else { "no" };
        line(out, "io_uring", &format!("{works}: {}", uring.reason))?;
    }
    if let Some(weight) = &directory.weight {
        line(out, "weight", &weight.text())?;
    }
    if let Some(cufile) = &directory.cufile {
        line(out, "cuFile", &cufile.reason)?;
        let refusal = cufile.refusal.as_ref();
        if let Some(refusal) = refusal.filter(|refusal| !cufile.reason.contains(&refusal.reason)) {
            line(out, "", &format!("and besides: {}", refusal.reason))?;
        }
    }
    if let Some(engine) = &directory.engine {
        let how = if engine.direct {
            "with O_DIRECT"
        } else {
            "through the page cache"
        };
        line(
            out,
            "engine",
            &format!("{} {how} ({})", engine.name, engine.reason),
        )?;
    }
    if let Some(problem) = &directory.problem {
        line(out, "problem", problem)?;
    }
    if let Some(reason) = &directory.not_measured {
        line(out, "measured", &format!("no: {reason}"))?;
    }
    for advice in &directory.advice {
        line(out, "to do", advice)?;
    }
    if !directory.measurements.is_empty() {
        writeln!(out)?;
        write_measurements(out, &directory.measurements)?;
    }
    Ok(())
}

fn mount_text(mount: &MountInfo) -> String {
    let mut text = format!("{} on {}", mount.file_system, mount.mount_point.display());
    if !mount.source.is_empty() {
        text.push_str(&format!(", from {}", mount.source));
    }
    match &mount.device {
        Some(device) => {
            let detail = device.detail.as_ref().map(|detail| format!(", {detail}"));
            let detail = detail.unwrap_or_default();
            let kind = match device.kind {
                "other" => String::new(),
                kind => format!(", {kind}"),
            };
            text.push_str(&format!(
                " ({} {}{kind}{detail})",
                device.name, mount.device_number
            ));
        }
        None => text.push_str(" (no block device)"),
    }
    text
}

fn direct_text(direct: &DirectIo) -> String {
    if !direct.works {
        return format!("no: {}", direct.reason);
    }
    match (direct.memory_alignment_bytes, direct.offset_alignment_bytes) {
        (Some(memory), Some(offset)) if memory > 0 && offset > 0 => {
            format!("works, memory aligned to {memory} bytes, offsets to {offset}")
        }
        (Some(_), Some(_)) => "works, though the file system says that it does not".to_owned(),
        _ => "works, the file system does not tell its alignment".to_owned(),
    }
}

fn write_measurements(out: &mut impl Write, measurements: &[Measurement]) -> io::Result<()> {
    let mut table = Table::new(&[
        ("  ENGINE", Align::Left),
        ("BYTES", Align::Right),
        ("WRITE GB/S", Align::Right),
        ("READ GB/S", Align::Right),
    ]);
    for found in measurements {
        let how = if found.direct {
            "O_DIRECT"
        } else {
            "page cache"
        };
        table.row(vec![
            format!("  {}, {how}", found.engine),
            human_bytes(found.bytes),
            format!("{:.2}", found.write_gb_per_second),
            format!("{:.2}", found.read_gb_per_second),
        ]);
    }
    table.write(out)
}

/// Writes a name and a value, which stays on one line whatever a system call put into it.
fn line(out: &mut impl Write, name: &str, value: &str) -> io::Result<()> {
    writeln!(out, "  {name:<10}  {}", value.replace('\n', " "))
}
