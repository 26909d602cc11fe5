//! The demonstration on this machine, on a backing that the user names.

use std::fs;
use std::io::{BufRead, IsTerminal, Seek, SeekFrom, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};

use super::DemoArgs;
use super::device::claim;
use super::environment::{DemoTarget, Environment};
use super::show::show;
use crate::numbers::size;
use crate::{paths, payload, setup, ui};

/// The least that the demonstration fits on.
const LEAST_BYTES: u64 = 512 << 20;
/// The driver's control device.
const CONTROL: &str = "/dev/ublk-control";
/// Programs that are run, and the Debian packages that have them.
const TOOLS: [(&str, &str); 8] = [
    ("fio", "fio"),
    ("mkfs.ext4", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("wipefs", "util-linux"),
    ("mount", "mount"),
    ("setpriv", "util-linux"),
    ("xargs", "findutils"),
    ("sha256sum", "coreutils"),
];

/// Checks everything, asks, then shows.
pub fn run(args: &DemoArgs) -> Result<ExitCode> {
    let named = args.file.as_deref().context(
        "--native overwrites a block device or regular file of this machine: name it with -f PATH",
    )?;
    ensure!(nix::unistd::geteuid().is_root(), "--native needs root: ublk devices are root's");
    let (backing, bytes) = examine(named)?;
    load_driver()?;
    let packages = missing_packages(|tool| paths::program(tool).is_some());
    ensure!(packages.is_empty(), "--native needs these packages: {}", packages.join(" "));
    drop(claim(&backing)?);
    let consent = consent(args, &signatures(&backing)?, std::io::stdin().is_terminal())
        .with_context(|| format!("{} is not touched", named.display()))?;

    ui::out("ublk-target serves block devices from user space, without copying their data.");
    let program = match &args.program {
        Some(program) => fs::canonicalize(program).with_context(|| missing(program))?,
        None => {
            setup::ensure_only(&["util-linux", "libclang1", "gcc"])?;
            payload::build_for_host("ublk-target")?
        }
    };
    if consent == Consent::Ask {
        ask(named, &backing, bytes)?;
    }
    ui::out(&format!(
        "This shows it on this machine: `ublk-target` is {}, and {} is overwritten.",
        program.display(),
        backing.display()
    ));
    ui::out("");
    show(&DemoTarget { environment: Environment::Host, backing, program })?;
    Ok(ExitCode::SUCCESS)
}

fn missing(path: &Path) -> String {
    format!("there is no {}", path.display())
}

/// The canonical path and size of what can be served.
fn examine(named: &Path) -> Result<(PathBuf, u64)> {
    let path = fs::canonicalize(named).with_context(|| missing(named))?;
    let kind = fs::metadata(&path)?.file_type();
    if !kind.is_block_device() && !kind.is_file() {
        bail!("{} is neither a block device nor a regular file", named.display());
    }
    let mut file = fs::File::open(&path).with_context(|| format!("open {}", named.display()))?;
    let bytes = file.seek(SeekFrom::End(0))?;
    if bytes < LEAST_BYTES {
        let (has, needs) = (size(bytes), size(LEAST_BYTES));
        bail!("{} has {has}, and the demonstration needs {needs}", named.display());
    }
    Ok((path, bytes))
}

fn load_driver() -> Result<()> {
    if Path::new(CONTROL).exists() {
        return Ok(());
    }
    let why = match paths::program("modprobe") {
        None => "there is no modprobe".to_owned(),
        Some(modprobe) => {
            let output = Command::new(modprobe).arg("ublk_drv").stdin(Stdio::null()).output()?;
            if output.status.success() && Path::new(CONTROL).exists() {
                return Ok(());
            }
            String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ")
        }
    };
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    bail!(
        "this kernel ({}) has no ublk driver ({why}); --native needs Linux 6.16 or newer with \
         CONFIG_BLK_DEV_UBLK; `cargo demo` without --native brings its own kernel",
        release.trim()
    )
}

fn missing_packages(is_there: impl Fn(&str) -> bool) -> Vec<&'static str> {
    let lacking = TOOLS.iter().filter(|(tool, _)| !is_there(tool));
    let mut packages: Vec<_> = lacking.map(|(_, package)| *package).collect();
    packages.dedup();
    packages
}

/// File systems, partition tables and the like on the backing.
fn signatures(backing: &Path) -> Result<Vec<String>> {
    let wipefs = paths::program("wipefs").context("wipefs is missing")?;
    let mut command = Command::new(wipefs);
    command.args(["--no-act", "--noheadings", "--output", "TYPE"]).arg(backing);
    let output = command.stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "cannot tell what {} holds: {said}", backing.display());
    let mut types: Vec<_> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| line.trim().to_owned())
        .filter(|line| !line.is_empty())
        .collect();
    types.dedup();
    Ok(types)
}

/// Whether the user has agreed to lose what the backing holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Consent {
    Given,
    Ask,
}

fn consent(args: &DemoArgs, signatures: &[String], has_terminal: bool) -> Result<Consent> {
    if args.yes_overwrite {
        return Ok(Consent::Given);
    }
    if !signatures.is_empty() {
        bail!("it holds {}; say --yes-overwrite if that may be lost", signatures.join(", "));
    }
    match (args.yes, has_terminal) {
        (true, _) => Ok(Consent::Given),
        (false, true) => Ok(Consent::Ask),
        (false, false) => bail!("all on it would be overwritten; say --yes if it may be"),
    }
}

fn ask(named: &Path, backing: &Path, bytes: u64) -> Result<()> {
    let also =
        if named == backing { String::new() } else { format!(", that is {}", backing.display()) };
    ui::clear();
    let mut out = std::io::stdout();
    write!(
        out,
        "Everything on {}{also} ({}) will be overwritten; type its name to go on: ",
        named.display(),
        size(bytes)
    )?;
    out.flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    ensure!(is_name(&answer, named), "not confirmed; {} is not touched", named.display());
    Ok(())
}

fn is_name(answer: &str, named: &Path) -> bool {
    named.to_str().is_some_and(|name| answer.trim() == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(yes: bool, yes_overwrite: bool) -> DemoArgs {
        DemoArgs { native: true, yes, yes_overwrite, ..DemoArgs::default() }
    }

    #[test]
    fn nothing_is_overwritten_without_consent() {
        let (nothing, ext4): (Vec<String>, _) = (Vec::new(), vec!["ext4".to_owned()]);
        for (yes, overwrite, holds, terminal, expected) in [
            (false, false, &nothing, true, Some(Consent::Ask)),
            (false, false, &nothing, false, None),
            (true, false, &nothing, false, Some(Consent::Given)),
            (false, false, &ext4, true, None),
            (true, false, &ext4, true, None),
            (true, false, &ext4, false, None),
            (false, true, &ext4, false, Some(Consent::Given)),
            (true, true, &ext4, true, Some(Consent::Given)),
        ] {
            let consent = consent(&args(yes, overwrite), holds, terminal);
            assert_eq!(consent.ok(), expected, "{yes} {overwrite} {holds:?} {terminal}");
        }
    }

    #[test]
    fn the_name_must_be_typed_in_full() {
        let named = Path::new("/dev/nvme1n1");
        assert!(is_name("/dev/nvme1n1\n", named));
        for answer in ["", "\n", "y\n", "yes\n", "nvme1n1\n", "/dev/nvme1n1p1\n"] {
            assert!(!is_name(answer, named), "{answer:?}");
        }
    }

    #[test]
    fn what_cannot_be_served_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let small = directory.path().join("small");
        fs::File::create(&small).unwrap().set_len(LEAST_BYTES - 1).unwrap();
        for (path, word) in [
            (directory.path().join("none"), "there is no"),
            (directory.path().to_owned(), "neither a block device"),
            (PathBuf::from("/dev/null"), "neither a block device"),
            (small, "needs 512 MiB"),
        ] {
            let error = examine(&path).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        let large = directory.path().join("large");
        fs::File::create(&large).unwrap().set_len(LEAST_BYTES).unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink("large", &link).unwrap();
        assert_eq!(examine(&link).unwrap(), (fs::canonicalize(large).unwrap(), LEAST_BYTES));
    }

    #[test]
    fn a_path_has_to_be_named() {
        let error = run(&args(true, true)).unwrap_err().to_string();
        assert!(error.contains("-f PATH"), "{error}");
    }

    #[test]
    fn packages_are_named_once() {
        assert!(missing_packages(|_| true).is_empty());
        assert_eq!(missing_packages(|tool| tool != "fio"), ["fio"]);
        let both = missing_packages(|tool| !tool.contains("ext4") && tool != "e2fsck");
        assert_eq!(both, ["e2fsprogs"]);
    }

    #[test]
    fn signatures_are_recognised() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        assert!(signatures(file.path()).unwrap().is_empty());
        // A partition table of the old kind.
        let mut table = [0; 512];
        table[446 + 4] = 0x83;
        table[446 + 8] = 1;
        table[446 + 12] = 8;
        table[510..].copy_from_slice(&[0x55, 0xaa]);
        fs::write(file.path(), table).unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        assert_eq!(signatures(file.path()).unwrap(), ["dos"]);
    }
}
