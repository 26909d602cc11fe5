//! The description of the machine.

use std::fs;

use crate::results::Machine;

use super::commands::Commands;

/// Describes this machine. Unknown facts are left empty.
pub fn describe(commands: &Commands) -> Machine {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let cpuinfo = read("/proc/cpuinfo");
    let vendor = read("/sys/class/dmi/id/sys_vendor");
    let governor = read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor");
    let fio = commands.run(&["fio", "--version"]).unwrap_or_default();
    Machine {
        kernel: read("/proc/sys/kernel/osrelease"),
        cpu: field(&cpuinfo, "model name").unwrap_or_default().to_owned(),
        cpus: online(&cpuinfo),
        memory_bytes: memory(&read("/proc/meminfo")).unwrap_or_default(),
        virtualization: virtualization(&cpuinfo, &vendor),
        governor: Some(governor).filter(|governor| !governor.is_empty()),
        fio: fio.trim().trim_start_matches("fio-").to_owned(),
    }
}

/// The first field of this name.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    fields
        .map(|(key, value)| (key.trim(), value.trim()))
        .find_map(|(k, v)| (k == name).then_some(v))
}

fn online(cpuinfo: &str) -> u32 {
    let processors = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    u32::try_from(processors).unwrap_or(u32::MAX)
}

fn memory(meminfo: &str) -> Option<u64> {
    let kib: u64 = field(meminfo, "MemTotal")?.strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// A flag of the processor shows a hypervisor; the machine's vendor tells which.
fn virtualization(cpuinfo: &str, vendor: &str) -> Option<String> {
    let flags = field(cpuinfo, "flags")?;
    let is_virtual = flags.split(' ').any(|flag| flag == "hypervisor");
    let vendor = if vendor.is_empty() { "unknown" } else { vendor };
    is_virtual.then(|| vendor.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CPUINFO: &str = "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nflags\t\t: fpu hypervisor\n\
                           \nprocessor\t: 1\nmodel name\t: Other\nflags\t\t: fpu\n";

    #[test]
    fn files_of_the_kernel_are_read() {
        assert_eq!(field(CPUINFO, "model name"), Some("Some CPU @ 3 GHz"));
        assert_eq!(online(CPUINFO), 2);
        assert_eq!(memory("MemTotal:       16307144 kB\nMemFree: 1 kB\n"), Some(16_307_144 << 10));
        assert_eq!(virtualization(CPUINFO, "QEMU").as_deref(), Some("QEMU"));
        assert_eq!(virtualization(CPUINFO, "").as_deref(), Some("unknown"));
        assert_eq!(virtualization("flags : fpu vmx", "Dell"), None);
    }
}
