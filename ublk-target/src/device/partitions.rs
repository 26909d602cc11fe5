//! Waits until the kernel has scanned a newly started device for partitions.
//!
//! From Linux 7.0 on the driver scans after it has answered `START_DEV`
//! (`ublk_partition_scan_work`), and does not report the end. Two signs help: the disk's attribute
//! `partscan` becomes 1 when the scan begins, and opening a disk waits for the scan, since both
//! take the disk's `open_mutex`. The scan waits for the server. So another process than the server
//! opens the disk.

use std::fs::{self, File};
use std::io;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Child;
use std::time::Duration;

use crate::device::paths;
use crate::os::process::PidFd;
use crate::os::wait::Wait;

/// The longest wait of a server. A scan reads only some blocks.
const PATIENCE: Duration = Duration::from_secs(10);
/// The interval of checks: nothing reports when `partscan` changes.
const PAUSE: Duration = Duration::from_millis(1);

/// Waits until the kernel has scanned for partitions, without a limit. Only a process that is not
/// the device's server may call it. Returns at once if the device is gone.
///
/// # Errors
/// The device cannot be opened.
pub fn await_scan(id: u32) -> io::Result<()> {
    let attribute = format!("/sys/block/ublkb{id}/partscan");
    await_scan_by(Path::new(&attribute), &paths::block_path(id))
}

fn await_scan_by(attribute: &Path, disk: &Path) -> io::Result<()> {
    loop {
        match fs::read_to_string(attribute) {
            Ok(value) if value.trim() == "0" => std::thread::sleep(PAUSE),
            Ok(_) => break,
            // Before Linux 6.10 the attribute does not exist, and the scan is over when the device
            // is started.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    match File::open(disk) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Waits at most a bounded time for a process that runs [`await_scan`]. Returns whether it has
/// succeeded.
///
/// # Errors
/// The process cannot be waited for.
pub fn await_process(process: &mut Child, wait: &mut Wait<'_>) -> io::Result<bool> {
    let pidfd = PidFd::of_child(process)?;
    let ended = wait.until_or(Some(pidfd.as_fd()), || match process.try_wait() {
        Ok(None) => ControlFlow::Continue("the scan for partitions"),
        Ok(Some(status)) => ControlFlow::Break(Ok(status.success())),
        Err(error) => ControlFlow::Break(Err(error)),
    });
    ended.unwrap_or_else(|_| {
        // The process ends when the scan does.
        process.kill()?;
        Ok(false)
    })
}

/// The wait of a server for all its devices.
pub fn wait<'a>() -> Wait<'a> {
    Wait::at_most(PATIENCE)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_scan_is_awaited_by_its_attribute() {
        let directory = tempfile::tempdir_in(".").unwrap();
        let (attribute, disk) = (directory.path().join("partscan"), directory.path().join("disk"));
        await_scan_by(&attribute, &disk).unwrap();
        fs::write(&attribute, "0\n").unwrap();
        let waiting = std::thread::spawn({
            let (attribute, disk) = (attribute.clone(), disk.clone());
            move || await_scan_by(&attribute, &disk)
        });
        std::thread::sleep(Duration::from_millis(20));
        assert!(!waiting.is_finished(), "it has not begun");
        fs::write(directory.path().join("next"), "1\n").unwrap();
        fs::rename(directory.path().join("next"), &attribute).unwrap();
        // The disk does not exist any more.
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn a_process_is_awaited_for_a_bounded_time() {
        let start = |what: &str| Command::new("sh").args(["-c", what]).spawn().unwrap();
        let mut soon = Wait::at_most(Duration::from_millis(50));
        assert!(await_process(&mut start("exit 0"), &mut wait()).unwrap());
        assert!(!await_process(&mut start("exit 1"), &mut wait()).unwrap());
        let mut endless = start("exec sleep 600");
        assert!(!await_process(&mut endless, &mut soon).unwrap());
        assert!(!endless.wait().unwrap().success());
    }
}
