//! Trees of machines, and what is read from them.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that meets an error has failed"
)]

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::*;

/// A machine as files in a folder.
struct Machine {
    folder: TempDir,
}

const NVME: &str = "devices/pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1";
const DWORDS: &str = "RMForceStaticBar1=1;RmForceDisableIomapWC=1;";
const OPEN_DRIVER: &str =
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (x@y)\n";

impl Machine {
    /// A machine with nothing to read.
    fn bare() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// A machine with an NVMe disk at `/` (ext4) and the modules list; no GPU.
    fn with_nvme() -> Self {
        Self::bare()
            .file("proc/modules", "nvme 1 2 - Live 0x0\n")
            .file("proc/sys/kernel/osrelease", "6.8.0-51-generic\n")
            .mounts("22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw\n")
            .nvme("pcie")
            .file("run/udev/data/b259:2", "E:ID_FS_TYPE=ext4\n")
    }

    /// The above with nvidia-fs.
    fn with_nvidia_fs() -> Self {
        Self::with_nvme()
            .file("proc/driver/nvidia-fs/version", "version: 2.26\n")
            .file("proc/driver/nvidia-fs/devcount", "16\n")
            .file("dev/nvidia-fs0", "")
    }

    /// The NVMe machine set up for P2PDMA.
    fn with_p2pdma() -> Self {
        Self::with_nvme()
            .file("boot/config-6.8.0-51-generic", "CONFIG_PCI_P2PDMA=y\n")
            .file("proc/driver/nvidia/version", OPEN_DRIVER)
            .params(DWORDS)
    }

    fn params(self, dwords: &str) -> Self {
        let text = format!("ResmanDebugLevel: 4294967295\nRegistryDwords: \"{dwords}\"\n");
        self.file("proc/driver/nvidia/params", &text)
    }

    fn nvme(self, transport: &str) -> Self {
        let controller = Path::new("/sys").join(NVME).parent().unwrap().to_path_buf();
        self.file(&format!("sys/{NVME}/nvme0n1p2/partition"), "2\n")
            .file(controller.join("transport").to_str().unwrap(), transport)
            .link(&format!("sys/{NVME}/device"), "../../nvme0")
            .link("sys/dev/block/259:2", &format!("../../{NVME}/nvme0n1p2"))
    }

    /// Adds a whole device with folders in it, and `/` on it.
    fn disk(self, name: &str, files: &[(&str, &str)]) -> Self {
        let mut machine = self
            .mounts(&format!("22 1 9:7 / / rw - xfs /dev/{name} rw\n"))
            .file("run/udev/data/b9:7", "")
            .file(&format!("sys/devices/virtual/block/{name}/size"), "8\n")
            .link("sys/dev/block/9:7", &format!("../../devices/virtual/block/{name}"));
        for (file, text) in files {
            machine = machine.file(&format!("sys/devices/virtual/block/{name}/{file}"), text);
        }
        machine
    }

    fn mounts(self, text: &str) -> Self {
        self.file("proc/self/mountinfo", text)
    }

    fn place(&self, path: &str) -> PathBuf {
        let path = self.folder.path().join(path.trim_start_matches('/'));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    }

    fn file(self, path: &str, text: &str) -> Self {
        std::fs::write(self.place(path), text).unwrap();
        self
    }

    fn link(self, path: &str, target: &str) -> Self {
        symlink(target, self.place(path)).unwrap();
        self
    }

    fn without(self, path: &str) -> Self {
        let path = self.place(path);
        if path.is_dir() {
            std::fs::remove_dir_all(path).unwrap();
        } else {
            std::fs::remove_file(path).unwrap();
        }
        self
    }

    fn view(&self) -> SystemView {
        SystemView {
            root: self.folder.path().to_path_buf(),
        }
    }

    /// What the guards say of a directory that exists: `ok`, or the kind and the reason.
    fn guards(&self) -> (&'static str, String) {
        match cufile_guards(&self.view(), &std::env::temp_dir()) {
            Ok(()) => ("ok", String::new()),
            Err(refusal) => (refusal.kind().name(), refusal.to_string()),
        }
    }
}

/// Asserts what the guards say of each machine: the kind, and a part of the reason.
fn assert_guards(cases: Vec<(&str, Machine, &str, &str)>) {
    for (name, machine, kind, reason) in cases {
        let found = machine.guards();
        assert_eq!(found.0, kind, "{name}: {}", found.1);
        assert!(found.1.contains(reason), "{name}: {}", found.1);
        assert!(!found.1.contains('\n'), "{name}: one line");
    }
}

#[test]
fn the_machine_is_guarded_in_order() {
    let no_modules = "no /proc/modules: libcufile 1.16 and newer never return";
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
        refused("proprietary modules", version(proprietary), "not the open ones"),
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
                .file("sys/bus/pci/devices/0000:65:00.0/p2pmem/size", "85899345920\n"),
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
    let without_module = |rest: &str| {
        Machine::with_p2pdma().mounts(&format!("22 1 0:44 / / rw - {rest}\n"))
    };
    assert_guards(vec![
        ("xfs", on_nvme("xfs /dev/nvme0n1p2 rw"), "ok", ""),
        ("ordered", on_nvme("ext4 /dev/nvme0n1p2 rw,data=ordered"), "ok", ""),
        (
            "journal",
            on_nvme("ext4 /dev/nvme0n1p2 rw,data=journal"),
            "file_system",
            "data=journal",
        ),
        ("btrfs", on_nvme("btrfs /dev/nvme0n1p2 rw"), "file_system", "btrfs is not known"),
        ("tmpfs", network("tmpfs tmpfs rw"), "no_device", "tmpfs has no device behind it"),
        ("ramfs", network("ramfs none rw"), "no_device", "ramfs"),
        (
            "overlay",
            network("overlay overlay rw,lowerdir=/a,upperdir=/b"),
            "overlay",
            "a container's own",
        ),
        ("fuse", network("fuse.sshfs a:/b rw"), "file_system", "fuse.sshfs is not known"),
        ("no name", network(""), "mount_unknown", "no mount is known"),
        ("lustre", network("lustre 10.0.0.1@o2ib:/fs rw"), "ok", ""),
        ("lustre alone", without_module("lustre a:/fs rw"), "file_system", "only with nvidia-fs"),
        ("rdma", network("nfs4 a:/b rw,vers=4.2,proto=rdma,port=20049"), "ok", ""),
        ("tcp", network("nfs4 a:/b rw,proto=tcp"), "file_system", "only over RDMA"),
        (
            "rdma alone",
            without_module("nfs a:/b rw,proto=rdma"),
            "file_system",
            "only with nvidia-fs",
        ),
        ("no mounts", with(""), "mount_unknown", "no mount is known for"),
        ("no list", with("").without("proc/self"), "mount_unknown", "no mount"),
        ("noise", with("22 1 zzz / / rw\n\n\u{0}\n- - -\n"), "mount_unknown", ""),
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
    let on_p2pdma = |transport: &str| {
        Machine::with_p2pdma()
            .without("sys")
            .nvme(transport)
    };
    assert_guards(vec![
        (
            "device-mapper",
            Machine::with_nvidia_fs().disk("dm-0", &[("dm/name", "vg-kv\n")]),
            "device_mapper",
            "dm-0 is a device-mapper volume",
        ),
        ("raid 0", raid("raid0\n", &["nvme0n1", "nvme1n1"]), "ok", ""),
        ("raid 5", raid("raid5\n", &["nvme0n1", "nvme1n1"]), "raid", "md0 is raid5 of nvme0n1"),
        ("slow members", raid("raid0\n", &["nvme0n1", "sda"]), "raid", "sda"),
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
        ("virtio", Machine::with_nvidia_fs().disk("vda", &[]), "device", "vda is not an NVMe"),
        ("scsi", Machine::with_nvidia_fs().disk("sda", &[]), "device", "sda is not an NVMe"),
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
        ("fabrics with nvidia-fs", Machine::with_nvidia_fs().without("sys").nvme("rdma"), "ok", ""),
        ("fabrics with P2PDMA", on_p2pdma("tcp\n"), "device", "NVMe over tcp"),
        ("no transport", on_p2pdma(""), "device", "NVMe over multipath"),
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
        ("/empty", "rw"),
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
        .file("proc/driver/nvidia/gpus/0000:b0:00.0/information", "\u{0}:\n");
    let gpus = Gpu::list(&machine.view());
    let found: Vec<_> = gpus
        .iter()
        .map(|gpu| {
            let model = gpu.model.as_deref();
            (gpu.pci_address.as_str(), model, gpu.has_driver, gpu.bar1_bytes)
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
    for text in ["", "x", "0xff 0x0 0x200\n0xff 0x0 0x200\n", "1 2\n3 4\n", "0 ffffffffffffffff 200\n0 ffffffffffffffff 200"] {
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
    assert_eq!((driver.version.as_str(), driver.branch()), ("570.86.15", Some(570)));
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
        (Machine::bare().file("run/.containerenv", ""), Some(".containerenv")),
        (Machine::bare().file("run/systemd/container", "lxc\n"), Some("says lxc")),
        (Machine::bare().file("proc/1/cgroup", "0::/kubepods/x\n"), Some("kubepods")),
        (Machine::bare().file("proc/1/cgroup", "0::/init.scope\n"), None),
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
    drop((container_evidence(&view), BlockDevice::read(&view, mount.device)));
    drop(cufile_guards(&view, Path::new(".")));
}

#[test]
fn the_alignment_of_direct_io_is_told_or_not() {
    let file = tempfile::tempfile().unwrap();
    if let Some(alignment) = direct_io_alignment(&file).unwrap() {
        assert!(alignment.offset_bytes <= 65_536, "{alignment:?}");
    }
}
