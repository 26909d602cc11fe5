//! QEMU's command line, and the choice between KVM and emulation.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

use crate::config::{NvmeDrive, VmConfig};
use crate::proto::PORT_NAME;
use crate::recipe::DISK_SIGNATURE;

/// Serial number of the controller with the root disk and the payload.
pub const ROOT_SERIAL: &str = "ublk-root";

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// The processor.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl Accel {
    /// KVM if the processor virtualizes and the user may use it. A device node
    /// alone says little: where the flags are missing, stock kernels die in
    /// emulation errors.
    pub fn detect() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let usable = virtualizes(&cpuinfo)
            && OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
        if usable { Self::Kvm } else { Self::Tcg }
    }
}

fn virtualizes(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

/// The files of a VM.
#[derive(Debug, Clone)]
pub struct Files {
    /// The kernel.
    pub kernel: PathBuf,
    /// The root disk, never written to.
    pub root: PathBuf,
    /// The disk with the guest's programs, read only.
    pub payload: PathBuf,
    /// Where the console goes.
    pub console: PathBuf,
    /// One backing file per namespace of each drive of the configuration.
    pub drives: Vec<Vec<PathBuf>>,
}

/// The kernel's command line.
pub fn kernel_args(config: &VmConfig, accel: Accel) -> String {
    let mut args: Vec<String> = [
        "console=ttyS0",
        "loglevel=5",
        "log_buf_len=8M",
        // What programs write to the log must not be dropped.
        "printk.devkmsg=on",
        "rootfstype=ext4",
        // No writes of its own while tests measure.
        "rootflags=noinit_itable",
        "rw",
        "rootwait",
        "init=/vm-init",
        // An oops ends the run with its text on the console, instead of a
        // guest that hangs on the locks of the dead task.
        "oops=panic",
        "panic=-1",
        // Timer checks assume real time, which emulation cannot promise.
        "no_timer_check",
        "sysctl.kernel.hung_task_timeout_secs=60",
        "rcupdate.rcu_cpu_stall_timeout=60",
    ]
    .map(String::from)
    .to_vec();
    // Controllers are probed in parallel, so the root disk's name is not
    // known; the partition's identity is.
    args.push(format!("root=PARTUUID={DISK_SIGNATURE:08x}-01"));
    args.push(format!("nvme.poll_queues={}", config.poll_queues));
    if accel == Accel::Tcg {
        // While a guest boots it patches its code all the time, and QEMU up to
        // 8.0 may run a breakpoint of such a patch after its end, on another
        // CPU ("Oops: int3"). The init script starts the other CPUs.
        args.push("maxcpus=1".into());
    }
    if config.icount {
        // Idle guest time jumps ahead, so periodic messages would never end.
        args.push("vm_agent.heartbeat=off".into());
    }
    args.extend(config.kernel_args.iter().cloned());
    args.join(" ")
}

/// All arguments of QEMU. The agent's port is on its standard input and output.
pub fn args(config: &VmConfig, files: &Files, accel: Accel) -> Vec<String> {
    let mut args = Vec::new();
    let mut add = |name: &str, value: String| args.extend([name.to_owned(), value]);
    for (name, value) in machine(config, accel) {
        add(name, value);
    }
    if let Some(plugin) = &config.plugin {
        add("-plugin", plugin.clone());
    }
    add("-m", format!("{}M", config.memory_mib));
    add("-smp", config.cpus.to_string());
    add("-kernel", files.kernel.display().to_string());
    add("-append", kernel_args(config, accel));
    add("-chardev", format!("file,id=console,path={}", escaped(&files.console)));
    add("-serial", "chardev:console".into());
    add("-device", "virtio-serial-pci".into());
    add("-chardev", "stdio,id=agent,signal=off".into());
    add("-device", format!("virtserialport,chardev=agent,name={PORT_NAME}"));
    add("-drive", format!("{},snapshot=on", drive("root", &files.root)));
    add("-drive", format!("{},readonly=on", drive("payload", &files.payload)));
    add("-device", format!("nvme,id=system,serial={ROOT_SERIAL},max_ioqpairs=4"));
    add("-device", "nvme-ns,bus=system,nsid=1,drive=root".into());
    add("-device", "nvme-ns,bus=system,nsid=2,drive=payload".into());
    for (n, (nvme, backings)) in config.nvme.iter().zip(&files.drives).enumerate() {
        for (name, value) in nvme_args(n, nvme, backings) {
            add(name, value);
        }
    }
    args.extend(
        ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none"]
            .map(String::from),
    );
    args
}

/// Each copy between kernel and program switches SMAP off and on again, for which the translator
/// ends a block and forgets addresses: a guest without these takes a seventh less of the host's time.
const NO_PROTECTION: &str = ",-smap,-smep,-pku,-umip";

/// QEMU 7.2 emulates CMPXCHG16B with wrong flags now and then, which the slab
/// allocator of kernel 6.12 does not survive. Kernels do without.
const NO_CMPXCHG16B: &str = ",-cx16";

fn machine(config: &VmConfig, accel: Accel) -> Vec<(&'static str, String)> {
    let mut args = vec![("-machine", "q35,usb=off,vmport=off".to_owned())];
    match accel {
        _ if config.icount => {
            args.push(("-accel", "tcg,thread=single".into()));
            args.push(("-icount", "shift=0,sleep=off".into()));
            // One `rep movsb` counts one instruction a byte, and copying
            // would look worse than it is.
            args.push(("-cpu", format!("max,-erms,-fsrm{NO_CMPXCHG16B}")));
        }
        Accel::Tcg => {
            args.push(("-accel", "tcg,thread=multi".into()));
            args.push(("-cpu", format!("max{NO_PROTECTION}{NO_CMPXCHG16B}")));
        }
        Accel::Kvm => {
            args.push(("-accel", "kvm".into()));
            args.push(("-cpu", "host".into()));
        }
    }
    args
}

fn nvme_args(n: usize, nvme: &NvmeDrive, backings: &[PathBuf]) -> Vec<(&'static str, String)> {
    let mut args = Vec::new();
    let mut controller =
        format!("nvme,id=nvme{n},serial={},max_ioqpairs={}", nvme.serial, nvme.max_ioqpairs);
    for (key, value) in &nvme.properties {
        controller.push_str(&format!(",{key}={value}"));
    }
    args.push(("-device", controller));
    for (index, (namespace, backing)) in nvme.namespaces.iter().zip(backings).enumerate() {
        let nsid = index + 1;
        let block = namespace.block_bytes;
        let id = format!("nvme{n}n{nsid}");
        let mut device = format!(
            "nvme-ns,bus=nvme{n},nsid={nsid},drive={id},\
             logical_block_size={block},physical_block_size={block}"
        );
        for (key, value) in &namespace.properties {
            device.push_str(&format!(",{key}={value}"));
        }
        args.push(("-drive", drive(&id, backing)));
        args.push(("-device", device));
    }
    args
}

/// A raw file that need not survive the host's crash.
fn drive(id: &str, path: &Path) -> String {
    format!(
        "if=none,id={id},format=raw,cache=unsafe,aio=threads,discard=unmap,file={}",
        escaped(path)
    )
}

/// QEMU splits option lists at commas; a doubled one stands for itself.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(drives: Vec<Vec<PathBuf>>) -> Files {
        Files {
            kernel: "/c/vmlinuz".into(),
            root: "/c/a,b/root.img".into(),
            payload: "/r/payload.img".into(),
            console: "/r/console".into(),
            drives,
        }
    }

    fn values(args: &[String], name: &str) -> Vec<String> {
        args.windows(2).filter(|pair| pair[0] == name).map(|pair| pair[1].clone()).collect()
    }

    #[test]
    fn kvm_needs_the_processor_flag() {
        assert!(virtualizes("processor : 0\nflags\t\t: fpu vmx sse\n"));
        assert!(virtualizes("flags\t\t: svm\n"));
        assert!(!virtualizes("flags\t\t: fpu vmxoff\nbugs : vmx\n"));
    }

    #[test]
    fn commas_in_paths_are_escaped() {
        let drives = values(&args(&VmConfig::default(), &files(vec![]), Accel::Tcg), "-drive");
        assert!(drives[0].contains("file=/c/a,,b/root.img,snapshot=on"), "{drives:?}");
        assert!(drives[1].ends_with("readonly=on"), "{drives:?}");
    }

    #[test]
    fn every_namespace_gets_its_backing() {
        let mut config = VmConfig { poll_queues: 3, ..VmConfig::default() };
        config.nvme = vec![
            NvmeDrive::new("a", 1 << 20).namespace(1 << 20, 4096),
            NvmeDrive::new("b", 1 << 20).property("mdts", "5"),
        ];
        let files = files(vec![vec!["/a1".into(), "/a2".into()], vec!["/b1".into()]]);
        let args = args(&config, &files, Accel::Tcg);
        let devices = values(&args, "-device");
        assert!(devices.contains(
            &"nvme-ns,bus=nvme0,nsid=2,drive=nvme0n2,logical_block_size=4096,physical_block_size=4096"
                .into()
        ));
        assert!(devices.contains(&"nvme,id=nvme1,serial=b,max_ioqpairs=64,mdts=5".into()));
        let drives = values(&args, "-drive").join("\n");
        for (id, file) in [("nvme0n1", "/a1"), ("nvme0n2", "/a2"), ("nvme1n1", "/b1")] {
            assert!(drives.contains(&format!("id={id},")) && drives.contains(file), "{drives}");
        }
        assert!(kernel_args(&config, Accel::Kvm).contains("nvme.poll_queues=3"));
    }

    #[test]
    fn deterministic_time_never_uses_kvm() {
        let config = VmConfig { icount: true, cpus: 1, ..VmConfig::default() };
        let args = args(&config, &files(vec![]), Accel::Kvm);
        assert_eq!(values(&args, "-accel"), ["tcg,thread=single"]);
        assert_eq!(values(&args, "-icount"), ["shift=0,sleep=off"]);
        assert!(kernel_args(&config, Accel::Tcg).contains("vm_agent.heartbeat=off"));
    }
}
