//! What has to be undone when the demonstration ends early, by a failure or a signal.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::environment::DemoTarget;
use crate::witness::Witness;
use crate::{cleanup, ui};

#[derive(Default)]
struct Undo {
    target: Option<DemoTarget>,
    mount: Option<PathBuf>,
    witness: Option<Witness>,
}

static UNDO: Mutex<Undo> = Mutex::new(Undo { target: None, mount: None, witness: None });

fn state() -> MutexGuard<'static, Undo> {
    UNDO.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From now on devices on this target's backing are deleted; `None` says that none is left.
pub fn remember_target(target: Option<DemoTarget>) {
    state().target = target;
    cleanup::on_stop(Some(all));
}

/// A mount point that is to be unmounted, or that it is no more.
pub fn remember_mount(point: Option<&Path>) {
    state().mount = point.map(Path::to_owned);
}

/// Probes in the kernel that are to be removed.
pub fn remember_witness(witness: Witness) {
    state().witness = Some(witness);
}

/// Does something with the probes.
pub fn with_witness<T>(action: impl FnOnce(&Witness) -> T) -> Option<T> {
    state().witness.as_ref().map(action)
}

/// Removes the probes.
pub fn forget_witness() {
    state().witness = None;
}

/// Undoes all that there is to undo, and says so.
pub fn all() {
    let Undo { target, mount, witness } = std::mem::take(&mut *state());
    drop(witness);
    if let Some(point) = mount {
        if retry(|| run("umount", &[&point.to_string_lossy()])).is_ok() {
            ui::note(&format!("unmounted {}", point.display()));
        }
    }
    let Some(target) = target else { return };
    let program = target.program.to_string_lossy();
    let Ok(list) = run(&program, &["list", "--json"]) else { return };
    for (id, device) in devices_on(&list, &target.backing) {
        match retry(|| run(&program, &["del", "-n", &id.to_string()])) {
            Ok(_) => ui::note(&format!("deleted {device}")),
            Err(why) => ui::note(&format!("{device} is left: {}", why.trim())),
        }
    }
}

/// Tries for some seconds: what was killed may still be about to let go.
fn retry(attempt: impl Fn() -> Result<String, String>) -> Result<String, String> {
    let mut result = attempt();
    for _ in 0..20 {
        if result.is_ok() {
            break;
        }
        std::thread::sleep(Duration::from_millis(200));
        result = attempt();
    }
    result
}

fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let command = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match command {
        Ok(Output { status, stdout, .. }) if status.success() => Ok(text(&stdout)),
        Ok(Output { stderr, .. }) => Err(text(&stderr)),
        Err(error) => Err(error.to_string()),
    }
}

/// Ids and names of the devices that serve a backing, of what `list --json` printed. Nobody else
/// can serve it: it is opened exclusively.
pub fn devices_on(list: &str, backing: &Path) -> Vec<(u64, String)> {
    let list: Vec<serde_json::Value> = serde_json::from_str(list).unwrap_or_default();
    let serves = |device: &&serde_json::Value| {
        let backings = device["backings"].as_array().map_or([].as_slice(), Vec::as_slice);
        backings.iter().any(|one| one.as_str().map(Path::new) == Some(backing))
    };
    let named = list.iter().filter(serves);
    named
        .filter_map(|device| Some((device["id"].as_u64()?, device["device"].as_str()?.to_owned())))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_devices_on_the_backing_are_found() {
        let list = r#"[{"id": 3, "device": "/dev/ublkb3", "backings": ["/dev/nvme1n1"]},
            {"id": 4, "device": "/dev/ublkb4", "backings": ["/dev/nvme1n1p1"]},
            {"id": 5, "device": "/dev/ublkb5", "backings": []}]"#;
        let found = devices_on(list, Path::new("/dev/nvme1n1"));
        assert_eq!(found, [(3, "/dev/ublkb3".to_owned())]);
        assert!(devices_on("nonsense", Path::new("/dev/nvme1n1")).is_empty());
    }
}
