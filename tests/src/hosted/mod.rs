//! Tests that run on the host and drive guests from there.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::config::{DEFAULT, VmConfig};
use crate::guest::{Outcome, TestCase};
use crate::image::Image;
use crate::proto::{ExitState, Job};
use crate::vm::{Disks, Stream, Vm, VmDown};

/// What a test on the host gets.
pub struct HostCtx<'a> {
    /// The running VM of the test's group.
    pub vm: &'a mut Vm,
    /// The guest image, to boot further VMs.
    pub image: &'a Image,
    /// The disk with the guest's programs.
    pub payload: &'a Path,
    /// The user asked for long tests.
    pub long: bool,
}

impl HostCtx<'_> {
    /// Boots another VM.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn boot(&self, config: &VmConfig) -> Result<Vm> {
        Vm::boot(config, self.image, self.payload)
    }

    /// Boots another VM on drives that may have been used before.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn boot_on(&self, config: &VmConfig, disks: &Disks) -> Result<Vm> {
        Vm::boot_on(config, self.image, self.payload, disks)
    }
}

/// Time for a trivial program in an emulated guest.
const SHORT: Duration = Duration::from_secs(60);

/// The tests of this module.
pub const TESTS: &[TestCase] = &[
    TestCase::host("agent_returns_exit_states", DEFAULT, exit_states),
    TestCase::host("agent_streams_output", DEFAULT, output),
    TestCase::host("agent_kills_what_runs_over_its_time", DEFAULT, timeout),
    TestCase::host("vm_kernel_panic_is_told_with_its_text", DEFAULT, panic),
    TestCase::host("vm_hung_guest_is_ended", DEFAULT, hang),
    TestCase::host("vm_slow_boot_is_ended", DEFAULT, slow_boot),
    TestCase::host("vm_drives_outlive_a_power_cut", DEFAULT, power_cut),
];

fn exit_states(ctx: &mut HostCtx) -> Result<Outcome> {
    for (script, expected) in [
        ("exit 0", ExitState::Code(0)),
        ("exit 3", ExitState::Code(3)),
        ("kill -9 $$", ExitState::Signal(9)),
        ("no-such-program", ExitState::Code(127)),
    ] {
        let (result, _) = ctx.vm.capture(&["sh", "-c", script], SHORT)?;
        ensure!(result.state == expected, "`{script}`: {}", result.state);
        ensure!(result.timed_out.is_none(), "`{script}` timed out");
    }
    Ok(Outcome::Pass)
}

fn output(ctx: &mut HostCtx) -> Result<Outcome> {
    let script = "echo out; echo err >&2; head -c 3000000 /dev/zero; setsid sleep 5 &";
    let job = Job {
        argv: ["sh", "-c", script].map(String::from).to_vec(),
        env: vec![("NAME".into(), "value".into())],
        terminal: None,
    };
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let result = ctx.vm.run(&job, SHORT, &mut |stream, bytes| match stream {
        Stream::Stdout => out.extend_from_slice(bytes),
        Stream::Stderr => err.extend_from_slice(bytes),
    })?;
    ensure!(result.state == ExitState::Code(0), "{}", result.state);
    ensure!(out.starts_with(b"out\n\0") && out.len() == 3_000_004, "{} bytes", out.len());
    ensure!(err == b"err\n", "standard error: {err:?}");
    // The daemon held the pipes open, and is not a leak of the next test.
    let (_, stuck) = ctx.vm.leaks()?;
    ensure!(stuck.is_empty(), "{stuck:?}");
    Ok(Outcome::Pass)
}

fn timeout(ctx: &mut HostCtx) -> Result<Outcome> {
    let started = Instant::now();
    let script = "setsid sleep 54321 & trap '' TERM INT; sleep 12345";
    let (result, _) = ctx.vm.capture(&["sh", "-c", script], Duration::from_secs(3))?;
    ensure!(started.elapsed() < Duration::from_secs(60), "took {:?}", started.elapsed());
    let Some(report) = result.timed_out else { bail!("it did not time out") };
    ensure!(result.state == ExitState::Signal(9), "{}", result.state);
    for needle in ["sleep 54321", "sleep 12345", "hrtimer_nanosleep"] {
        ensure!(report.contains(needle), "no {needle} in the report:\n{report}");
    }
    let (left, text) = ctx.vm.capture(&["pgrep", "-a", "sleep"], SHORT)?;
    ensure!(left.state == ExitState::Code(1), "left over: {text}");
    Ok(Outcome::Pass)
}

fn small() -> VmConfig {
    VmConfig { memory_mib: 1024, ..VmConfig::default() }
}

fn panic(ctx: &mut HostCtx) -> Result<Outcome> {
    let mut vm = ctx.boot(&small())?;
    let script = "echo c > /proc/sysrq-trigger";
    let Err(down) = vm.capture(&["sh", "-c", script], SHORT) else { bail!("it lives") };
    ensure!(down.reason.contains("panicked"), "{}", down.reason);
    let text = down.to_string();
    ensure!(text.contains("sysrq triggered crash"), "no cause in:\n{text}");
    ensure!(text.contains("sysrq_handle_crash"), "no stack in:\n{text}");
    Ok(Outcome::Pass)
}

fn hang(ctx: &mut HostCtx) -> Result<Outcome> {
    let mut vm = ctx.boot(&small())?;
    vm.watch_silence(Some(Duration::from_secs(6)));
    let started = Instant::now();
    let script = "sleep 1; kill -STOP $(pidof vm-agent); sleep 1000";
    let Err(down) = vm.capture(&["sh", "-c", script], Duration::from_secs(120)) else {
        bail!("it lives")
    };
    ensure!(down.reason.contains("no sign of life for 6 s"), "{}", down.reason);
    ensure!(started.elapsed() < Duration::from_secs(60), "took {:?}", started.elapsed());
    Ok(Outcome::Pass)
}

fn slow_boot(ctx: &mut HostCtx) -> Result<Outcome> {
    let config = VmConfig { boot_timeout: Duration::from_secs(1), ..small() };
    let Err(error) = ctx.boot(&config) else { bail!("booted within a second") };
    let Some(down) = error.downcast_ref::<VmDown>() else { return Err(error) };
    ensure!(down.reason.contains("did not boot within 1 s"), "{}", down.reason);
    Ok(Outcome::Pass)
}

fn power_cut(ctx: &mut HostCtx) -> Result<Outcome> {
    let config = small().drives(1);
    let disks = Disks::create(&config)?;
    let mut vm = ctx.boot_on(&config, &disks)?;
    let device = "/dev/disk/by-id/nvme-QEMU_NVMe_Ctrl_drive0";
    let write = format!("echo survives | dd of={device} conv=fsync");
    let (result, text) = vm.capture(&["sh", "-c", &write], SHORT)?;
    ensure!(result.state == ExitState::Code(0), "{text}");
    vm.cut_power();
    let mut vm = ctx.boot_on(&config, &disks)?;
    let (_, text) = vm.capture(&["head", "-n", "1", device], SHORT)?;
    ensure!(text == "survives\n", "read back {text:?}");
    vm.power_off()?;
    Ok(Outcome::Pass)
}
