//! How a VM is made up, and the configurations that tests share: one boot
//! serves all tests of a group.

use std::time::Duration;

/// Which of the image's kernels to boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// The newest, with all ublk features.
    Backports,
    /// The release's own, which has ublk without zero copy.
    Stable,
}

/// A namespace of an emulated NVMe drive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    /// Size in bytes; its backing file is sparse.
    pub size_bytes: u64,
    /// Logical (and physical) block size in bytes: 512 or 4096.
    pub block_bytes: u32,
    /// Further properties of QEMU's `nvme-ns` device, for instance
    /// `("zoned", "on")`, `("ms", "8")`.
    pub properties: Vec<(String, String)>,
}

/// An emulated NVMe drive: one controller with a volatile write cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvmeDrive {
    /// Serial number, at most 20 characters: how tests find the drive.
    pub serial: String,
    /// Its namespaces, numbered from 1.
    pub namespaces: Vec<Namespace>,
    /// I/O queue pairs that the controller offers.
    pub max_ioqpairs: u32,
    /// Further properties of QEMU's `nvme` device, for instance
    /// `("mdts", "5")`.
    pub properties: Vec<(String, String)>,
}

impl NvmeDrive {
    /// A drive with one namespace of `size_bytes` and blocks of 512 bytes.
    pub fn new(serial: &str, size_bytes: u64) -> Self {
        Self { serial: serial.into(), namespaces: Vec::new(), max_ioqpairs: 64, properties: vec![] }
            .namespace(size_bytes, 512)
    }

    /// Gives the first namespace another block size, in bytes.
    #[must_use]
    pub fn block_bytes(mut self, block_bytes: u32) -> Self {
        if let Some(first) = self.namespaces.first_mut() {
            first.block_bytes = block_bytes;
        }
        self
    }

    /// Adds a namespace.
    #[must_use]
    pub fn namespace(mut self, size_bytes: u64, block_bytes: u32) -> Self {
        self.namespaces.push(Namespace { size_bytes, block_bytes, properties: Vec::new() });
        self
    }

    /// Sets a property of the controller.
    #[must_use]
    pub fn property(mut self, key: &str, value: &str) -> Self {
        self.properties.push((key.into(), value.into()));
        self
    }
}

/// How a VM is made up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmConfig {
    /// The kernel to boot.
    pub kernel: Kernel,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// The drives beside the root disk.
    pub nvme: Vec<NvmeDrive>,
    /// NVMe queues without interrupts, of each controller (`nvme.poll_queues`).
    pub poll_queues: u32,
    /// Deterministic time: one instruction is one nanosecond of guest time, on
    /// one CPU. For counting instructions, see docs on measuring.
    pub icount: bool,
    /// A plugin of QEMU with its arguments: `FILE,NAME=VALUE,…`.
    pub plugin: Option<String>,
    /// Further arguments of the kernel.
    pub kernel_args: Vec<String>,
    /// Wall time until the agent answers.
    pub boot_timeout: Duration,
    /// Wall time without a sign of life after which the VM counts as hung.
    pub silence_timeout: Duration,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            kernel: Kernel::Backports,
            cpus: 2,
            memory_mib: 2048,
            nvme: Vec::new(),
            poll_queues: 0,
            icount: false,
            plugin: None,
            kernel_args: Vec::new(),
            boot_timeout: Duration::from_secs(180),
            silence_timeout: Duration::from_secs(90),
        }
    }
}

const GIB: u64 = 1 << 30;

impl VmConfig {
    /// `count` drives named `drive0`, `drive1`, … of 1 GiB each.
    #[must_use]
    pub fn drives(mut self, count: u32) -> Self {
        self.nvme = (0..count).map(|n| NvmeDrive::new(&format!("drive{n}"), GIB)).collect();
        self
    }
}

/// A configuration that tests share.
#[derive(Debug, Clone, Copy)]
pub struct Group {
    /// Its name, as tests give it.
    pub name: &'static str,
    /// What it is for, for `vm test --list`.
    pub about: &'static str,
    /// Makes the configuration.
    pub config: fn() -> VmConfig,
    /// How many guests may share its tests, side by side.
    pub guests: u32,
    /// How many of the host's processors a guest keeps busy. Tests wait more than they compute, so a
    /// guest of two CPUs needs one, but for those that measure how long something takes.
    pub processors: u32,
}

/// The group of tests that need nothing special: three drives of 512-byte
/// blocks; one of 4096, with a second namespace whose blocks have metadata; two poll queues.
pub const DEFAULT: &str = "default";
/// The group of tests that patch the running kernel (probes, trace points): on one CPU, since
/// emulators are not to be trusted with code that changes under another CPU.
pub const TRACING: &str = "tracing";
/// The group of tests of devices on devices, under memory pressure.
pub const STACKS: &str = "stacks";
/// The group of tests on the release's own kernel.
pub const STABLE: &str = "stable";
/// The group of tests with deterministic time.
pub const ICOUNT: &str = "icount";

/// All groups, in the order in which they are booted. The one that needs most processors comes first,
/// so that in the end none is left without a guest.
pub const GROUPS: &[Group] = &[
    Group {
        name: STACKS,
        about: "newest kernel, 2 CPUs, 512 MiB of memory, four NVMe drives",
        config: || VmConfig { memory_mib: 512, ..for_tests() }.drives(4),
        guests: 1,
        processors: 2,
    },
    Group {
        name: DEFAULT,
        about: "newest kernel, 2 CPUs, four NVMe drives",
        config: || {
            let mut config = VmConfig { poll_queues: 2, ..for_tests() }.drives(3);
            let mut metadata = Namespace { size_bytes: GIB, block_bytes: 512, properties: vec![] };
            metadata.properties.push(("ms".into(), "8".into()));
            let mut drive = NvmeDrive::new("big-blocks", GIB).block_bytes(4096);
            drive.namespaces.push(metadata);
            config.nvme.push(drive);
            config
        },
        guests: 2,
        processors: 1,
    },
    Group {
        name: TRACING,
        about: "newest kernel, 1 CPU, four NVMe drives",
        config: || VmConfig { cpus: 1, ..for_tests() }.drives(4),
        guests: 1,
        processors: 1,
    },
    Group {
        name: STABLE,
        about: "the release's kernel, 2 CPUs, two NVMe drives",
        config: || VmConfig { kernel: Kernel::Stable, ..for_tests() }.drives(2),
        guests: 1,
        processors: 1,
    },
    Group {
        name: ICOUNT,
        about: "newest kernel, 1 CPU, deterministic time",
        config: || VmConfig { icount: true, cpus: 1, ..VmConfig::default() },
        guests: 1,
        processors: 1,
    },
];

/// The kernel does not clear memory before it hands it out: that takes emulated guests a tenth of
/// their time, and would hide a read that reports more than it has filled.
fn for_tests() -> VmConfig {
    VmConfig { kernel_args: vec!["init_on_alloc=0".into()], ..VmConfig::default() }
}

/// Finds a group by name.
pub fn group(name: &str) -> Option<&'static Group> {
    GROUPS.iter().find(|group| group.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_names_are_unique_and_serials_fit() {
        for (n, one) in GROUPS.iter().enumerate() {
            assert!(GROUPS[n + 1..].iter().all(|other| other.name != one.name), "{}", one.name);
            for drive in (one.config)().nvme {
                assert!(drive.serial.len() <= 20 && drive.serial != "ublk-root");
            }
        }
    }

    #[test]
    fn deterministic_time_needs_one_cpu() {
        for group in GROUPS {
            let config = (group.config)();
            assert!(!config.icount || config.cpus == 1, "{}", group.name);
        }
    }
}
