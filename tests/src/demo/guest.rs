//! The demonstration in a guest: the host's part and the guest's.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use super::environment::{DemoTarget, Environment};
use super::show::show;
use crate::config::{NvmeDrive, VmConfig};
use crate::guest::drives::Drive;
use crate::image::Image;
use crate::proto::{ExitState, Job};
use crate::qemu::Accel;
use crate::vm::{Vm, VmDown, pass_on};
use crate::{cleanup, klog, payload, shell, ui};

/// The guest's program.
const PROGRAM: &str = "demo-guest";
/// Serial number of the drive that is served.
const SERIAL: &str = "demo";
/// Its size in bytes.
const DRIVE_BYTES: u64 = 2 << 30;
/// Wall time after which something hangs.
const TIMEOUT: Duration = Duration::from_secs(20 * 60);
/// How often it is tried if the emulator's own bug ends the guest.
const ATTEMPTS: u32 = 3;

/// The host's part.
pub fn run() -> Result<ExitCode> {
    ui::out("ublk-target serves block devices from user space, without copying their data.");
    ui::out("This shows it in a virtual machine: nothing on this machine's own drives is touched.");
    let (image, _directory, payload) = shell::prepare(&payload::DEMO, &[])?;
    let is_emulator_bug =
        |error: &anyhow::Error| error.downcast_ref::<VmDown>().is_some_and(VmDown::is_emulator_bug);
    for _ in 1..ATTEMPTS {
        match in_vm(&image, &payload) {
            Err(error) if is_emulator_bug(&error) => {
                ui::note("A known bug of this emulator ended the guest; once more:");
            }
            result => return result,
        }
    }
    in_vm(&image, &payload)
}

fn in_vm(image: &Image, payload: &std::path::Path) -> Result<ExitCode> {
    let config =
        VmConfig { nvme: vec![NvmeDrive::new(SERIAL, DRIVE_BYTES)], ..VmConfig::default() };
    let began = Instant::now();
    ui::step("booting the guest");
    let mut vm = Vm::boot(&config, image, payload)?;
    vm.watch_silence(Some(config.silence_timeout));
    let (cpus, how) = match vm.accel() {
        Accel::Kvm => ("virtual CPUs (KVM)", "kvm"),
        Accel::Tcg => ("emulated CPUs (no KVM here)", "tcg"),
    };
    ui::out(&format!(
        "Guest: Debian with {} {cpus}, {} MiB of memory and an NVMe drive of 2 GiB; up in {} s.",
        config.cpus,
        config.memory_mib,
        began.elapsed().as_secs()
    ));
    ui::out("");
    let has_terminal = std::io::stdout().is_terminal() && std::io::stderr().is_terminal();
    let job = Job {
        argv: vec![PROGRAM.into(), how.into()],
        // Its progress goes to the user's terminal as it is, if there is one.
        terminal: has_terminal.then(shell::window_size),
        ..Job::default()
    };
    let result = vm.run(&job, TIMEOUT, &mut pass_on)?;
    if let Some(report) = result.timed_out {
        bail!("not done after {} minutes; it was at:\n{report}", TIMEOUT.as_secs() / 60);
    }
    let log = vm.kernel_log()?;
    vm.power_off()?;
    if result.state != ExitState::Code(0) {
        // The program has said why, unless it could not.
        ensure!(matches!(result.state, ExitState::Code(1)), "{PROGRAM} ended: {}", result.state);
        return Ok(ExitCode::FAILURE);
    }
    if let Some(finding) = klog::findings(&log, &[]).first() {
        bail!("the guest's kernel complained ({}): {}", finding.kind, finding.text);
    }
    ui::out("The guest's kernel log has no complaint; the guest is switched off.");
    Ok(ExitCode::SUCCESS)
}

/// The guest's part; its argument says what executes the guest.
pub fn in_guest() -> ExitCode {
    let environment = match std::env::args().nth(1).as_deref() {
        Some("kvm") => Environment::VirtualizedGuest,
        _ => Environment::EmulatedGuest,
    };
    let result = cleanup::handle_signals().and_then(|()| {
        let backing = Drive::by_serial(SERIAL)?.path();
        show(&DemoTarget { environment, backing, program: "ublk-target".into() })
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            ui::note(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
