//! Builds the programs for the guest and puts them on a disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::artifact::{self, Artifact};
use crate::cleanup::{self, Group};
use crate::{paths, ui};

/// The guest's architecture. Named even where it is the host's own, so that
/// the flags below do not touch build scripts.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// A program for the guest.
struct Program {
    package: &'static str,
    binary: &'static str,
    /// Path of its main file below the workspace: a program that is not
    /// written yet is left out.
    source: &'static str,
}

const PROGRAMS: &[Program] = &[
    Program { package: "vm-harness", binary: "vm-agent", source: "tests/src/bin/vm-agent.rs" },
    Program {
        package: "vm-harness",
        binary: "guest-tests",
        source: "tests/src/bin/guest-tests.rs",
    },
    Program { package: "vm-harness", binary: "demo-guest", source: "tests/src/bin/demo-guest.rs" },
    Program {
        package: "vm-harness",
        binary: "bench-guest",
        source: "tests/src/bin/bench-guest.rs",
    },
    Program { package: "ublk-target", binary: "ublk-target", source: "ublk-target/src/main.rs" },
    Program { package: "ublk-bench", binary: "ublk-bench", source: "bench/src/main.rs" },
];

/// Builds all programs for the guest, statically, so that they run on any C
/// library, and returns where they are. Cargo's output goes to the user.
///
/// # Errors
/// When a program does not build.
pub fn build() -> Result<Vec<PathBuf>> {
    let workspace = paths::workspace();
    let programs: Vec<_> =
        PROGRAMS.iter().filter(|program| workspace.join(program.source).is_file()).collect();
    ui::step("building the programs for the guest");
    let mut command = release_build();
    link_statically(&mut command);
    for program in &programs {
        command.args(["-p", program.package, "--bin", program.binary]);
    }
    let built = run_cargo(command)?;
    programs.iter().map(|program| pick(&built, program.binary)).collect()
}

/// Has a build of cargo's make programs for the guest.
pub fn link_statically(command: &mut Command) {
    command.args(["--target", TARGET, "--config"]);
    command.arg(format!("target.{TARGET}.rustflags=[\"-C\", \"target-feature=+crt-static\"]"));
    // These would take the place of the flags above.
    command.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
}

/// Builds a program for this machine, of the package of the same name, and returns where it is.
///
/// # Errors
/// When it does not build.
pub fn build_for_host(name: &str) -> Result<PathBuf> {
    ui::step(&format!("building {name}"));
    let mut command = release_build();
    command.args(["-p", name, "--bin", name]);
    pick(&run_cargo(command)?, name)
}

fn release_build() -> Command {
    let mut command = cleanup::command(paths::cargo(), Signal::SIGTERM);
    command.current_dir(paths::workspace()).args(["build", "--release", "--quiet"]);
    command.args(["--message-format", "json-render-diagnostics"]);
    command
}

/// Runs a build and returns the executables it reports.
fn run_cargo(mut command: Command) -> Result<Vec<Artifact>> {
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut group = Group::spawn(&mut command, Signal::SIGTERM)?;
    let stdout = group.child().stdout.take().context("cargo's standard output")?;
    let built = artifact::read(std::io::BufReader::new(stdout))?;
    let status = group.wait()?;
    ui::clear();
    ensure!(status.success(), "the build failed");
    Ok(built)
}

fn pick(built: &[Artifact], name: &str) -> Result<PathBuf> {
    let found = built.iter().find(|artifact| artifact.name == name);
    let found = found.with_context(|| format!("cargo did not say where {name} is"))?;
    Ok(found.executable.clone())
}

/// Makes a disk image that holds `programs`, at `image`.
///
/// # Errors
/// When a program cannot be read or mkfs.ext4 fails.
pub fn make_disk(programs: &[PathBuf], image: &Path) -> Result<()> {
    let parent = image.parent().context("path of the payload disk")?;
    let staging = tempfile::Builder::new().prefix("payload-").tempdir_in(parent)?;
    let mut bytes = 0;
    for program in programs {
        let name = program.file_name().context("path of a program")?;
        bytes += fs::copy(program, staging.path().join(name))
            .with_context(|| format!("copy {}", program.display()))?;
    }
    let mkfs = paths::program("mkfs.ext4").context("mkfs.ext4 is missing")?;
    // Room for the file system's own structures; the file is sparse.
    let mib = bytes / (1 << 20) + 16;
    let output = Command::new(mkfs)
        .args(["-q", "-F", "-L", "payload", "-O", "^has_journal", "-m", "0"])
        .args(["-E", "root_owner=0:0,nodiscard", "-d"])
        .arg(staging.path())
        .arg(image)
        .arg(format!("{mib}M"))
        .output()?;
    if !output.status.success() {
        bail!("mkfs.ext4: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_picked_by_their_whole_name() {
        let built = [Artifact {
            package: "/w/tests".into(),
            name: "vm-agent".into(),
            kind: "bin".into(),
            is_test: false,
            executable: "/t/release/vm-agent".into(),
        }];
        assert_eq!(pick(&built, "vm-agent").unwrap(), Path::new("/t/release/vm-agent"));
        assert!(pick(&built, "agent").is_err());
    }
}
