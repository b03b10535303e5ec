//! What is read from the trees of machines.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that meets an error has failed"
)]

mod guards;
mod machine;

use std::path::Path;

use self::machine::{DWORDS, Machine};
use super::*;

#[test]
fn mounts_are_found_as_the_kernel_walks() {
    // Listed children before parents, mounts on top of others, and one hidden below another.
    let machine = Machine::bare().mounts(concat!(
        "30 24 0:30 / /dev/shm rw - tmpfs lower rw\n",
        "31 30 0:31 / /dev/shm rw - tmpfs upper rw\n",
        "24 27 0:6 / /dev rw - devtmpfs dev rw\n",
        "27 1 254:0 / / rw - ext4 /dev/vda rw\n",
        "40 27 0:40 / /data/deep rw - xfs hidden rw\n",
        "41 27 0:41 / /data rw - nfs4 host:/data rw\n",
        "42 27 0:42 / /with\\040space\\134 rw shared:3 master:4 - btrfs /dev/b rw\n",
        "43 43 0:43 / /self rw - tmpfs loop rw\n",
        "44 27 0:44 / /empty rw - tmpfs  rw\n",
    ));
    for (path, source) in [
        ("/", "/dev/vda"),
        ("/home", "/dev/vda"),
        ("/devices", "/dev/vda"),
        ("/dev/shm/a/b", "upper"),
        ("/dev/sda", "dev"),
        ("/data/deep/er", "host:/data"),
        ("/with space\\/x", "/dev/b"),
        ("/self", "/dev/vda"),
        ("/empty", ""),
    ] {
        let mount = Mount::of(&machine.view(), Path::new(path)).unwrap();
        assert_eq!(mount.source, source, "{path}");
    }
    let mount = Mount::of(&machine.view(), Path::new("/data")).unwrap();
    assert_eq!(mount.device.to_string(), "0:41");
    assert_eq!(mount.mount_point, Path::new("/data"));
    assert!(mount.has_option("rw") && !mount.has_option("r"));
}

#[test]
fn mounts_of_a_chroot_are_found_by_their_depth() {
    let machine = Machine::bare().mounts(
        "41 27 0:41 / /data rw - nfs4 host:/data rw\n42 41 0:42 / /data/x rw - xfs /dev/x rw\n",
    );
    let source = |path: &str| Some(Mount::of(&machine.view(), Path::new(path))?.source);
    assert_eq!(source("/data/x/y").as_deref(), Some("/dev/x"));
    assert_eq!(source("/data/z").as_deref(), Some("host:/data"));
    assert_eq!(source("/home"), None);
}

#[test]
fn gpus_are_listed_with_their_bar1() {
    // Resource 1 is the upper half of nothing on the first, and of resource 0 on the second.
    let classic = concat!(
        "0x00000000d0000000 0x00000000d0ffffff 0x0000000000040200\n",
        "0x000000e000000000 0x000000efffffffff 0x000000000014220c\n",
        "0x0000000000000000 0x0000000000000000 0x0000000000000000\n",
        "0x000000f000000000 0x000000f001ffffff 0x000000000014220c\n",
        "0x0000000000000000 0x0000000000000000 0x0000000000000000\n",
        "0x0000000000003000 0x000000000000307f 0x0000000000040101\n",
    );
    let wide = concat!(
        "0x00002a0000000000 0x00002a0000ffffff 0x000000000014220c\n",
        "0x0000000000000000 0x0000000000000000 0x0000000000000000\n",
        "0x0000280000000000 0x000029ffffffffff 0x000000000014220c\n",
    );
    let pci = "sys/bus/pci/devices";
    let machine = Machine::bare()
        .file(&format!("{pci}/0000:0a:00.0/vendor"), "0x10de\n")
        .file(&format!("{pci}/0000:0a:00.0/class"), "0x030000\n")
        .file(&format!("{pci}/0000:0a:00.0/resource"), classic)
        .file(&format!("{pci}/0000:65:00.0/vendor"), "0x10de\n")
        .file(&format!("{pci}/0000:65:00.0/class"), "0x030200\n")
        .file(&format!("{pci}/0000:65:00.0/resource"), wide)
        // A GPU's audio function, and a network card of the same vendor.
        .file(&format!("{pci}/0000:0a:00.1/vendor"), "0x10de\n")
        .file(&format!("{pci}/0000:0a:00.1/class"), "0x040300\n")
        .file(&format!("{pci}/0000:70:00.0/vendor"), "0x15b3\n")
        .file(&format!("{pci}/0000:70:00.0/class"), "0x030000\n")
        .file(
            "proc/driver/nvidia/gpus/0000:0A:00.0/information",
            "Model: \t\t NVIDIA L40S\nIRQ:   \t\t 5\n",
        )
        // Only the driver shows this one, and its description is damaged.
        .file(
            "proc/driver/nvidia/gpus/0000:b0:00.0/information",
            "\u{0}:\n",
        );
    let gpus = Gpu::list(&machine.view());
    let found: Vec<_> = gpus
        .iter()
        .map(|gpu| {
            let model = gpu.model.as_deref();
            (
                gpu.pci_address.as_str(),
                model,
                gpu.has_driver,
                gpu.bar1_bytes,
            )
        })
        .collect();
    assert_eq!(
        found,
        [
            ("0000:0a:00.0", Some("NVIDIA L40S"), true, Some(64 << 30)),
            ("0000:65:00.0", None, false, Some(2 << 40)),
            ("0000:b0:00.0", None, true, None),
        ]
    );
    assert!(Gpu::list(&Machine::bare().view()).is_empty());
}

#[test]
fn resources_that_make_no_sense_are_no_bar1() {
    for text in [
        "",
        "x",
        "0xff 0x0 0x200\n0xff 0x0 0x200\n",
        "1 2\n3 4\n",
        "0 ffffffffffffffff 200\n0 ffffffffffffffff 200",
    ] {
        let machine = Machine::bare()
            .file("sys/bus/pci/devices/0000:0a:00.0/resource", text)
            .file("proc/driver/nvidia/gpus/0000:0a:00.0/information", "");
        assert_eq!(Gpu::list(&machine.view())[0].bar1_bytes, None, "{text}");
    }
}

#[test]
fn the_driver_and_its_modules_are_read() {
    let machine = Machine::with_p2pdma();
    let driver = NvidiaDriver::read(&machine.view()).unwrap();
    assert_eq!(
        (driver.version.as_str(), driver.branch()),
        ("570.86.15", Some(570))
    );
    assert!(driver.open);
    assert_eq!(driver.architecture.as_deref(), Some("x86_64"));
    assert_eq!(driver.registry_dwords.as_deref(), Some(DWORDS));
    assert_eq!(NvidiaFs::read(&machine.view()), None);

    let odd = Machine::bare().file("proc/driver/nvidia/version", "NVRM version: unknown\n");
    let driver = NvidiaDriver::read(&odd.view()).unwrap();
    assert_eq!((driver.version.as_str(), driver.branch()), ("", None));
    assert_eq!(NvidiaDriver::read(&Machine::bare().view()), None);

    let module = NvidiaFs::read(&Machine::with_nvidia_fs().view()).unwrap();
    assert_eq!(module.version.as_deref(), Some("2.26"));
    assert_eq!((module.device_count, module.has_device), (Some(16), true));
}

#[test]
fn containers_are_told_by_what_their_engines_leave() {
    let root = |name: &str| format!("22 1 0:9 / / rw - {name} x rw\n");
    for (machine, expected) in [
        (Machine::bare().mounts(&root("ext4")), None),
        (Machine::bare(), None),
        (Machine::bare().mounts(&root("overlay")), Some("overlay")),
        (Machine::bare().file(".dockerenv", ""), Some("/.dockerenv")),
        (
            Machine::bare().file("run/.containerenv", ""),
            Some(".containerenv"),
        ),
        (
            Machine::bare().file("run/systemd/container", "lxc\n"),
            Some("says lxc"),
        ),
        (
            Machine::bare().file("proc/1/cgroup", "0::/kubepods/x\n"),
            Some("kubepods"),
        ),
        (
            Machine::bare().file("proc/1/cgroup", "0::/init.scope\n"),
            None,
        ),
    ] {
        let found = container_evidence(&machine.view());
        match (&found, expected) {
            (Some(found), Some(expected)) => assert!(found.contains(expected), "{found}"),
            (found, expected) => assert_eq!(found.is_some(), expected.is_some(), "{found:?}"),
        }
    }
}

#[test]
fn this_machine_is_read_without_trouble() {
    let view = SystemView::default();
    assert!(KernelRelease::read(&view).is_some());
    let mount = Mount::of(&view, &std::env::current_dir().unwrap()).unwrap();
    assert!(!mount.file_system.is_empty());
    drop((Gpu::list(&view), P2pdma::read(&view), NvidiaFs::read(&view)));
    drop((
        container_evidence(&view),
        BlockDevice::read(&view, mount.device),
    ));
    drop(cufile_guards(&view, Path::new(".")));
}

#[test]
fn the_alignment_of_direct_io_is_told_or_not() {
    let file = tempfile::tempfile().unwrap();
    if let Some(alignment) = direct_io_alignment(&file).unwrap() {
        assert!(alignment.offset_bytes <= 65_536, "{alignment:?}");
    }
}
