//! Waits for partitions before a command announces their device.

use std::process::{Child, ExitCode, Stdio};

use ublk_target::device::partitions;

use super::processes::own;

/// Waits for the end of the partition scan, for the server.
pub fn await_scan(id: u32) -> anyhow::Result<ExitCode> {
    partitions::await_scan(id)?;
    Ok(ExitCode::SUCCESS)
}

/// Waits for the partitions of the devices, by one process each, for a bounded time.
pub fn await_all(ids: impl Iterator<Item = u32>) {
    let mut wait = partitions::wait();
    let started: Vec<_> = ids.map(|id| (id, start(id))).collect();
    for (id, process) in started {
        match process.and_then(|mut process| partitions::await_process(&mut process, &mut wait)) {
            Ok(true) => {}
            Ok(false) => {
                log::warn!("the kernel has not yet scanned device {id} for partitions");
            }
            Err(error) => log::warn!("cannot wait for the partitions of device {id}: {error}"),
        }
    }
}

fn start(id: u32) -> std::io::Result<Child> {
    let mut command = own();
    command.args(["await-partitions", "-n", &id.to_string()]);
    // A reader of this command's output must not wait for it.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
}
