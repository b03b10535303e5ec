//! What the guards say of each machine.

use std::os::unix::fs::symlink;

use super::super::{RefusalKind, cufile_guards};
use super::machine::{Machine, OPEN_DRIVER};

/// Returns what the guards say of a directory that exists: `ok`, or the kind and the reason.
fn guards(machine: &Machine) -> (&'static str, String) {
    match cufile_guards(&machine.view(), &std::env::temp_dir()) {
        Ok(()) => ("ok", String::new()),
        Err(refusal) => (refusal.kind().name(), refusal.to_string()),
    }
}

/// Asserts what the guards say of each machine: the kind, and a part of the reason.
fn assert_guards(cases: Vec<(&str, Machine, &str, &str)>) {
    for (name, machine, kind, reason) in cases {
        let found = guards(&machine);
        assert_eq!(found.0, kind, "{name}: {}", found.1);
        assert!(found.1.contains(reason), "{name}: {}", found.1);
        assert!(!found.1.contains('\n'), "{name}: one line");
    }
}

#[test]
fn the_machine_is_guarded_in_order() {
    let no_modules = "no /proc/modules: libcufile never returns";
    assert_guards(vec![
        ("nothing", Machine::bare(), "no_proc_modules", no_modules),
        (
            "no modules beside all else",
            Machine::with_nvidia_fs().without("proc/modules"),
            "no_proc_modules",
            no_modules,
        ),
        (
            "modules is a folder",
            Machine::with_nvidia_fs()
                .without("proc/modules")
                .file("proc/modules/x", ""),
            "no_proc_modules",
            no_modules,
        ),
        (
            "no driver",
            Machine::with_nvme(),
            "no_direct_path",
            "neither nvidia-fs nor P2PDMA (no NVIDIA driver is loaded)",
        ),
        (
            "the device is not in the container",
            Machine::with_nvidia_fs().without("dev/nvidia-fs0"),
            "nvidia_fs_device_missing",
            "/proc/driver/nvidia-fs is there but /dev/nvidia-fs0 is not",
        ),
        (
            "the device is missing, and P2PDMA does not make up for it",
            Machine::with_p2pdma().file("proc/driver/nvidia-fs/devcount", "0\n"),
            "nvidia_fs_device_missing",
            "nvidia-fs0",
        ),
        ("nvidia-fs", Machine::with_nvidia_fs(), "ok", ""),
        ("P2PDMA", Machine::with_p2pdma(), "ok", ""),
    ]);
}

#[test]
fn p2pdma_needs_all_of_its_parts() {
    let without_config = || Machine::with_p2pdma().without("boot");
    let version = |text: &str| Machine::with_p2pdma().file("proc/driver/nvidia/version", text);
    let proprietary = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Fri Jan 10\n";
    let symbols = "ffffffff81 T dma_pci_p2pdma_supported\n";
    let refused = |name, machine, reason| (name, machine, "no_direct_path", reason);
    assert_guards(vec![
        refused(
            "old kernel",
            Machine::with_p2pdma().file("proc/sys/kernel/osrelease", "5.15.0-1\n"),
            "kernel 5.15.0-1 is older than 6.2",
        ),
        refused(
            "no release",
            Machine::with_p2pdma().without("proc/sys"),
            "release cannot be read",
        ),
        refused(
            "proprietary modules",
            version(proprietary),
            "not the open ones",
        ),
        refused(
            "old driver",
            version(&OPEN_DRIVER.replace("570.86.15", "550.54")),
            "driver 550.54 is older than 565",
        ),
        refused(
            "another architecture",
            version(&OPEN_DRIVER.replace("x86_64", "aarch64")),
            "aarch64 is not x86_64",
        ),
        refused(
            "no registry setting",
            Machine::with_p2pdma().params(""),
            "lacks RMForceStaticBar1=1, NVreg_RegistryDwords lacks RmForceDisableIomapWC=1",
        ),
        refused(
            "half of it",
            Machine::with_p2pdma().params("RMForceStaticBar1=1;RmForceDisableIomapWC=0"),
            "(NVreg_RegistryDwords lacks RmForceDisableIomapWC=1)",
        ),
        (
            "another case, another value",
            Machine::with_p2pdma().params("rmforcestaticbar1=0x2; RmForceDisableIomapWC=1"),
            "ok",
            "",
        ),
        refused(
            "not built in",
            Machine::with_p2pdma().file(
                "boot/config-6.8.0-51-generic",
                "# CONFIG_PCI_P2PDMA is not set\n",
            ),
            "built without CONFIG_PCI_P2PDMA",
        ),
        refused(
            "not built in, by the functions",
            without_config().file("proc/kallsyms", symbols),
            "built without CONFIG_PCI_P2PDMA",
        ),
        (
            "built in, by the functions",
            without_config().file(
                "proc/kallsyms",
                &format!("{symbols}0 T pci_p2pdma_add_resource\n"),
            ),
            "ok",
            "",
        ),
        refused("nobody knows", without_config(), "cannot be seen"),
        (
            "registered by the driver, whatever the settings look like",
            Machine::with_nvme()
                .file("sys/bus/pci/devices/0000:65:00.0/vendor", "0x10de\n")
                .file("sys/bus/pci/devices/0000:65:00.0/class", "0x030200\n")
                .file(
                    "sys/bus/pci/devices/0000:65:00.0/p2pmem/size",
                    "85899345920\n",
                ),
            "ok",
            "",
        ),
    ]);
}

#[test]
fn each_file_system_has_its_answer() {
    let with = |line: &str| Machine::with_nvidia_fs().mounts(line);
    let on_nvme = |rest: &str| with(&format!("22 1 259:2 / / rw - {rest}\n"));
    let network = |rest: &str| with(&format!("22 1 0:44 / / rw - {rest}\n"));
    let without_module =
        |rest: &str| Machine::with_p2pdma().mounts(&format!("22 1 0:44 / / rw - {rest}\n"));
    assert_guards(vec![
        ("xfs", on_nvme("xfs /dev/nvme0n1p2 rw"), "ok", ""),
        (
            "ordered",
            on_nvme("ext4 /dev/nvme0n1p2 rw,data=ordered"),
            "ok",
            "",
        ),
        (
            "journal",
            on_nvme("ext4 /dev/nvme0n1p2 rw,data=journal"),
            "file_system",
            "data=journal",
        ),
        (
            "btrfs",
            on_nvme("btrfs /dev/nvme0n1p2 rw"),
            "file_system",
            "btrfs is not known",
        ),
        (
            "tmpfs",
            network("tmpfs tmpfs rw"),
            "no_device",
            "tmpfs has no device behind it",
        ),
        ("ramfs", network("ramfs none rw"), "no_device", "ramfs"),
        (
            "overlay",
            network("overlay overlay rw,lowerdir=/a,upperdir=/b"),
            "overlay",
            "a container's own",
        ),
        (
            "fuse",
            network("fuse.sshfs a:/b rw"),
            "file_system",
            "fuse.sshfs is not known",
        ),
        ("no name", network(""), "mount_unknown", "no mount is known"),
        ("lustre", network("lustre 10.0.0.1@o2ib:/fs rw"), "ok", ""),
        (
            "lustre alone",
            without_module("lustre a:/fs rw"),
            "file_system",
            "only with nvidia-fs",
        ),
        (
            "rdma",
            network("nfs4 a:/b rw,vers=4.2,proto=rdma,port=20049"),
            "ok",
            "",
        ),
        (
            "tcp",
            network("nfs4 a:/b rw,proto=tcp"),
            "file_system",
            "only over RDMA",
        ),
        (
            "rdma alone",
            without_module("nfs a:/b rw,proto=rdma"),
            "file_system",
            "only with nvidia-fs",
        ),
        (
            "no mounts",
            with(""),
            "mount_unknown",
            "no mount is known for",
        ),
        (
            "no list",
            with("").without("proc/self"),
            "mount_unknown",
            "no mount",
        ),
        (
            "noise",
            with("22 1 zzz / / rw\n\n\u{0}\n- - -\n"),
            "mount_unknown",
            "",
        ),
    ]);
}

#[test]
fn each_device_has_its_answer() {
    let raid = |level: &str, members: &[&str]| {
        let files: Vec<String> = members.iter().map(|m| format!("slaves/{m}")).collect();
        let mut files: Vec<(&str, &str)> = files.iter().map(|f| (f.as_str(), "")).collect();
        files.push(("md/level", level));
        Machine::with_nvidia_fs().disk("md0", &files)
    };
    let on_p2pdma = |transport: &str| Machine::with_p2pdma().without("sys").nvme(transport);
    assert_guards(vec![
        (
            "device-mapper",
            Machine::with_nvidia_fs().disk("dm-0", &[("dm/name", "vg-kv\n")]),
            "device_mapper",
            "dm-0 is a device-mapper volume",
        ),
        ("raid 0", raid("raid0\n", &["nvme0n1", "nvme1n1"]), "ok", ""),
        (
            "raid 5",
            raid("raid5\n", &["nvme0n1", "nvme1n1"]),
            "raid",
            "md0 is raid5 of nvme0n1",
        ),
        (
            "slow members",
            raid("raid0\n", &["nvme0n1", "sda"]),
            "raid",
            "sda",
        ),
        ("no members", raid("raid0\n", &[]), "raid", "md0"),
        (
            "raid 0 without the module",
            Machine::with_p2pdma().disk("md0", &[("md/level", "raid0"), ("slaves/nvme0n1", "")]),
            "raid",
            "with nvidia-fs",
        ),
        (
            "loop",
            Machine::with_nvidia_fs().disk("loop3", &[("loop/backing_file", "/image")]),
            "device",
            "loop3 is a file mounted as a device",
        ),
        (
            "virtio",
            Machine::with_nvidia_fs().disk("vda", &[]),
            "device",
            "vda is not an NVMe",
        ),
        (
            "scsi",
            Machine::with_nvidia_fs().disk("sda", &[]),
            "device",
            "sda is not an NVMe",
        ),
        (
            "not in sysfs",
            Machine::with_nvidia_fs().without("sys"),
            "device",
            "device 259:2 of this mount is not in /sys/dev/block",
        ),
        (
            "a link to nowhere",
            Machine::with_nvidia_fs().without("sys/devices"),
            "device",
            "259:2",
        ),
        (
            "fabrics with nvidia-fs",
            Machine::with_nvidia_fs().without("sys").nvme("rdma"),
            "ok",
            "",
        ),
        (
            "fabrics with P2PDMA",
            on_p2pdma("tcp\n"),
            "device",
            "NVMe over tcp",
        ),
        (
            "no transport",
            on_p2pdma(""),
            "device",
            "NVMe over multipath",
        ),
        (
            "multipath",
            Machine::with_p2pdma().file("sys/module/nvme_core/parameters/multipath", "Y\n"),
            "device",
            "nvme_core.multipath=N",
        ),
        (
            "no multipath",
            Machine::with_p2pdma().file("sys/module/nvme_core/parameters/multipath", "N\n"),
            "ok",
            "",
        ),
        (
            "no udev",
            Machine::with_nvidia_fs().without("run"),
            "no_udev_record",
            "no udev record for this mount's device 259:2 (/run/udev/data/b259:2): running in a container?",
        ),
    ]);
}

#[test]
fn a_directory_that_is_not_there_is_refused() {
    let machine = Machine::with_nvidia_fs();
    let missing = machine.folder.path().join("missing");
    let refusal = cufile_guards(&machine.view(), &missing).unwrap_err();
    assert_eq!(refusal.kind(), RefusalKind::DirectoryUnknown);
    assert!(refusal.reason().contains("missing"), "{refusal}");
}

#[test]
fn a_link_is_judged_by_where_it_leads() {
    let machine = Machine::with_nvidia_fs();
    let real = tempfile::tempdir().unwrap();
    let link = real.path().join("link");
    std::fs::create_dir(real.path().join("memory")).unwrap();
    symlink("memory", &link).unwrap();
    let memory = real.path().canonicalize().unwrap().join("memory");
    let machine = machine.mounts(&format!(
        "22 1 259:2 / / rw - ext4 /dev/nvme0n1p2 rw\n23 22 0:9 / {} rw - tmpfs t rw\n",
        memory.display()
    ));
    let refusal = cufile_guards(&machine.view(), &link).unwrap_err();
    assert_eq!(refusal.kind(), RefusalKind::NoDevice);
}

#[test]
fn each_refusal_has_a_name_and_advice_of_its_own() {
    use RefusalKind as Kind;
    let kinds = [
        Kind::NoModules,
        Kind::NvidiaFsDeviceMissing,
        Kind::NoDirectPath,
        Kind::DirectoryUnknown,
        Kind::MountUnknown,
        Kind::NoDevice,
        Kind::Overlay,
        Kind::FileSystem,
        Kind::DeviceMapper,
        Kind::Raid,
        Kind::Device,
        Kind::NoUdevRecord,
    ];
    let mut texts: Vec<&str> = kinds.iter().flat_map(|k| [k.name(), k.advice()]).collect();
    texts.sort_unstable();
    texts.dedup();
    assert_eq!(texts.len(), 2 * kinds.len());
}
