//! The units of systemd: systemd understands them, and they order devices against their mounts.

use std::fs;
use std::path::Path;
use std::process::Command;

const UNITS: [&str; 3] =
    ["ublk-target@.service", "ublk-target-serve.service", "ublk-target-recover.service"];

fn unit(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dist").join(name);
    fs::read_to_string(path).unwrap()
}

/// The values of a setting, all its lines together.
fn values<'a>(unit: &'a str, setting: &str) -> Vec<&'a str> {
    let lines = unit.lines().filter_map(|line| line.strip_prefix(setting)?.strip_prefix('='));
    lines.flat_map(str::split_whitespace).collect()
}

#[test]
fn a_device_goes_after_its_mounts() {
    let unit = unit("ublk-target@.service");
    let target = "blockdev@dev-ublkb%i.target";
    // systemd orders a mount after the target of its device, which something has to want.
    assert!(values(&unit, "Before").contains(&target), "{unit}");
    assert!(values(&unit, "Wants").contains(&target), "{unit}");
}

#[test]
fn the_options_of_fstab_are_told() {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let readme = fs::read_to_string(readme).unwrap();
    for service in ["ublk-target@4.service", "ublk-target-serve.service"] {
        assert!(readme.contains(&format!("x-systemd.requires={service}")), "{service}");
    }
}

#[test]
fn systemd_understands_the_units() {
    let directory = tempfile::tempdir().unwrap();
    for name in UNITS {
        // What they start is not installed here.
        let text = unit(name).replace("/usr/local/bin/ublk-target", "/bin/true");
        fs::write(directory.path().join(name), &text).unwrap();
        fs::write(directory.path().join(name.replace('@', "@3")), text).unwrap();
    }
    for name in UNITS.map(|name| name.replace('@', "@3")) {
        let verified = Command::new("systemd-analyze")
            .arg("verify")
            .arg(directory.path().join(&name))
            .env("SYSTEMD_UNIT_PATH", format!("{}:", directory.path().display()))
            .output();
        let Ok(verified) = verified else {
            println!("skipped: there is no systemd-analyze");
            return;
        };
        let said = String::from_utf8_lossy(&verified.stderr);
        // Before systemd 253; the line before it is what those go by.
        let unknown = "Failed to parse service type, ignoring: notify-reload";
        let faults: Vec<_> = said.lines().filter(|line| !line.contains(unknown)).collect();
        // Faults of the machine's own units are none of ours.
        let faults = faults.iter().filter(|line| line.contains("ublk"));
        assert_eq!(faults.count(), 0, "{name}: {said}");
    }
}
