//! Builds the programs for the guest and puts them on a disk.

use std::fs;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::signal::Signal;

use crate::artifact::{self, Artifact};
use crate::cargo_output::{self, Said};
use crate::cleanup::{self, Group};
use crate::{paths, ui};

/// The guest's architecture. Named even where it is the host's own, so that
/// the flags below do not touch build scripts.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// A program for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Program {
    package: &'static str,
    binary: &'static str,
}

const AGENT: Program = Program { package: "vm-harness", binary: "vm-agent" };
const GUEST_TESTS: Program = Program { package: "vm-harness", binary: "guest-tests" };
const DEMO_GUEST: Program = Program { package: "vm-harness", binary: "demo-guest" };
const BENCH_GUEST: Program = Program { package: "vm-harness", binary: "bench-guest" };
const UBLK_TARGET: Program = Program { package: "ublk-target", binary: "ublk-target" };
const UBLK_BENCH: Program = Program { package: "ublk-bench", binary: "ublk-bench" };

/// How programs are built: arguments of cargo.
type Profile = &'static [&'static str];
/// Fast, for programs whose speed does not matter.
const FAST: Profile = &["--profile", "guest"];
/// The same, for tests, which make loads and check what was read.
const FAST_TESTS: Profile =
    &["--profile", "guest", "--config", "profile.guest.package.vm-harness.opt-level=1"];
/// What the tests' `ublk-target` can do besides, and no user's.
const HOOKS: &str = "ublk-target/test-hooks";
/// As users install them.
const RELEASE: Profile = &["--profile", "release"];

/// Programs that a guest gets, and how they are built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Set {
    programs: &'static [Program],
    profile: Profile,
    has_hooks: bool,
}

/// What the demonstration runs.
pub const DEMO: Set =
    Set { programs: &[AGENT, DEMO_GUEST, UBLK_TARGET], profile: FAST, has_hooks: false };
/// What tests run.
pub const TESTS: Set = Set {
    programs: &[AGENT, GUEST_TESTS, UBLK_TARGET, UBLK_BENCH],
    profile: FAST_TESTS,
    has_hooks: true,
};
/// What a user finds in a guest's shell.
pub const SHELL: Set =
    Set { programs: &[AGENT, UBLK_TARGET, UBLK_BENCH], profile: FAST, has_hooks: false };
/// What a command of the user's finds that names no other program of ours.
const RUN: Set = Set { programs: &[AGENT, UBLK_TARGET], profile: FAST, has_hooks: false };
/// What is measured, and what measures it.
pub const BENCH: Set = Set {
    programs: &[AGENT, BENCH_GUEST, UBLK_TARGET, UBLK_BENCH],
    profile: RELEASE,
    has_hooks: false,
};

/// For a command that names programs of several sets.
const ALL: Set = Set {
    programs: &[AGENT, GUEST_TESTS, DEMO_GUEST, BENCH_GUEST, UBLK_TARGET, UBLK_BENCH],
    profile: FAST_TESTS,
    has_hooks: true,
};

impl Set {
    /// The first set that has what a command names.
    pub fn for_command(words: &[String]) -> Self {
        let is_named = |program: &&Program| words.iter().any(|word| word.contains(program.binary));
        let named: Vec<_> = ALL.programs.iter().filter(is_named).collect();
        let sets = [RUN, SHELL, DEMO, TESTS, BENCH];
        let has_all = |set: &Self| named.iter().all(|program| set.programs.contains(program));
        sets.into_iter().find(has_all).unwrap_or(ALL)
    }

    /// The same programs as users install them.
    #[must_use]
    pub fn released(self) -> Self {
        Self { profile: RELEASE, ..self }
    }
}

/// Builds programs for the guest, statically, so that they run on any C library, and returns where
/// they are. What the compiler says goes to the user.
///
/// # Errors
/// When a program does not build.
pub fn build(set: &Set) -> Result<Vec<PathBuf>> {
    let mut command = cargo_build(set.profile);
    link_statically(&mut command);
    for program in set.programs {
        command.args(["-p", program.package, "--bin", program.binary]);
    }
    if set.has_hooks {
        command.args(["--features", HOOKS]);
    }
    let built = run_cargo(command, "building the programs for the guest")?;
    set.programs.iter().map(|program| pick(&built, program.binary)).collect()
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
    let mut command = cargo_build(RELEASE);
    command.args(["-p", name, "--bin", name]);
    pick(&run_cargo(command, &format!("building {name}"))?, name)
}

fn cargo_build(profile: Profile) -> Command {
    let mut command = cleanup::command(paths::cargo(), Signal::SIGTERM);
    command.current_dir(paths::workspace()).arg("build").args(profile);
    command.args(["--message-format", "json-render-diagnostics"]);
    command
}

/// Runs a build and returns the executables it reports. `doing` says what it is for.
fn run_cargo(mut command: Command, doing: &str) -> Result<Vec<Artifact>> {
    ui::step(doing);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    cargo_output::want_progress(&mut command);
    let mut group = Group::spawn(&mut command, Signal::SIGTERM)?;
    let stdout = group.child().stdout.take().context("cargo's standard output")?;
    let stderr = group.child().stderr.take().context("cargo's standard error")?;
    // In a thread, for cargo may wait until either of them is read.
    let messages = std::thread::Builder::new()
        .name("cargo".into())
        .spawn(move || artifact::read(BufReader::new(stdout)))?;
    cargo_output::read(BufReader::new(stderr), |said| match said {
        Said::Doing(now) => ui::progress(&format!("{doing}: {now}")),
        Said::Diagnostic(line) => ui::note(&line),
    })?;
    let built = messages.join().map_err(|_| anyhow!("cargo's messages could not be read"))??;
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
    fn a_command_finds_the_programs_that_it_names() {
        for (command, set) in [
            ("uname -r", RUN),
            ("ublk-target features", RUN),
            ("sh -c ublk-bench_--help", SHELL),
            ("demo-guest tcg", DEMO),
            ("guest-tests", TESTS),
            ("/payload/bench-guest prepare", BENCH),
            ("cat demo-guest guest-tests", ALL),
        ] {
            let words: Vec<_> = command.split(' ').map(String::from).collect();
            assert_eq!(Set::for_command(&words), set, "{command}");
        }
    }

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
