//! The last check: which versions of compilers, kernels and tools were in use, beside those that are
//! known to work, so that a failure on a newer one is read as such. A newer version is no failure;
//! one that cannot be found out is, since nobody would see that the check says nothing.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::Selection;
use super::report::{Ending, Report};
use crate::config::Kernel;
use crate::image::{self, Image};
use crate::known_versions::known;
use crate::paths;

/// Name of the check.
pub const NAME: &str = "check_versions";

/// How a version is found out.
#[derive(Clone, Copy)]
enum Source {
    /// A program of this machine says it. Without it, something else fails.
    Program(&'static str),
    /// The same of one that not all runs need.
    OptionalProgram(&'static str),
    /// The distribution of this machine.
    Distribution,
    /// The kernel of this machine.
    HostKernel,
    /// A kernel of the guest.
    GuestKernel(Kernel),
    /// A package of the guest.
    GuestPackage(&'static str),
}

const ITEMS: &[(&str, Source)] = &[
    ("rustc", Source::Program("rustc")),
    ("cargo", Source::Program("cargo")),
    ("host", Source::Distribution),
    ("host's kernel", Source::HostKernel),
    ("qemu", Source::Program("qemu-system-x86_64")),
    ("mmdebstrap", Source::Program("mmdebstrap")),
    ("valgrind", Source::OptionalProgram("valgrind")),
    ("newest kernel", Source::GuestKernel(Kernel::Backports)),
    ("stable kernel", Source::GuestKernel(Kernel::Stable)),
    ("fio", Source::GuestPackage("fio")),
    ("bpftrace", Source::GuestPackage("bpftrace")),
];

impl Source {
    fn is_of_the_guest(self) -> bool {
        matches!(self, Self::GuestKernel(_) | Self::GuestPackage(_))
    }

    /// The version in use; `None` if the thing is not there and need not be.
    fn find(self, image: Option<&Image>) -> Result<Option<String>> {
        let image = || image.context("there is no guest image");
        let text = match self {
            Self::Program(name) => said_by(&program(name).context("it is not installed")?)?,
            Self::OptionalProgram(name) => match program(name) {
                Some(path) => said_by(&path)?,
                None => return Ok(None),
            },
            Self::Distribution => return distribution(&read("/etc/os-release")?).map(Some),
            Self::HostKernel => read("/proc/sys/kernel/osrelease")?,
            Self::GuestKernel(kernel) => image()?.kernel_release(kernel).to_owned(),
            Self::GuestPackage(name) => image()?.package_version(name)?,
        };
        version_in(&text).with_context(|| format!("no version in `{}`", text.trim())).map(Some)
    }
}

fn read(path: &str) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("read {path}"))
}

/// Cargo runs the compiler that is beside it.
fn program(name: &str) -> Option<PathBuf> {
    let cargo = paths::cargo();
    let beside = cargo.parent().map(|directory| directory.join(name)).filter(|path| path.is_file());
    match name {
        "cargo" => Some(cargo),
        "rustc" => beside.or_else(|| paths::program(name)),
        _ => paths::program(name),
    }
}

/// The first line that a program prints when it is asked for its version.
fn said_by(program: &Path) -> Result<String> {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("run {}", program.display()))?;
    ensure!(output.status.success(), "`{} --version`: {}", program.display(), output.status);
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
}

/// The first word that is a version, or ends with one: `1.95.0`, `valgrind-3.19.0`, `1:3.39-1`.
fn version_in(text: &str) -> Option<String> {
    let is_version = |rest: &str| {
        let number = rest.trim_start_matches(|c: char| c.is_ascii_digit());
        number.len() < rest.len() && number.strip_prefix('.').is_some_and(starts_with_digit)
    };
    text.split_whitespace().find_map(|word| {
        // What stands before it may have digits too: the epoch of a Debian version.
        let begins = word.char_indices().filter(|(at, c)| {
            c.is_ascii_digit() && !word[..*at].ends_with(|c: char| c.is_ascii_digit() || c == '.')
        });
        let version = begins.map(|(at, _)| &word[at..]).find(|rest| is_version(rest));
        version.map(str::to_owned)
    })
}

fn starts_with_digit(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_digit())
}

/// `debian 12`, of `/etc/os-release`; what has no releases is called by its name alone.
fn distribution(os_release: &str) -> Result<String> {
    let value = |name: &str| {
        let mut lines = os_release.lines().filter_map(|line| line.split_once('='));
        lines.find(|(key, _)| *key == name).map(|(_, value)| value.trim_matches('"'))
    };
    let name = value("ID").context("/etc/os-release has no ID")?;
    Ok(value("VERSION_ID").map_or(name.to_owned(), |version| format!("{name} {version}")))
}

/// What stands before the number (`debian `), and the number.
fn parts(version: &str) -> (&str, Vec<u64>) {
    let at = version.find(|c: char| c.is_ascii_digit()).unwrap_or(version.len());
    let (name, rest) = version.split_at(at);
    let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
    (name, rest[..end].split('.').map_while(|number| number.parse().ok()).collect())
}

/// What a version in use is, beside those that are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Known,
    Newer,
    Other,
}

impl Standing {
    fn of(version: &str, known: &[&str]) -> Self {
        let (name, number) = parts(version);
        let same = known.iter().map(|known| parts(known)).filter(|(other, _)| *other == name);
        let same: Vec<_> = same.map(|(_, known)| known).collect();
        if same.contains(&number) {
            Self::Known
        } else if !same.is_empty() && same.iter().all(|known| *known < number) {
            Self::Newer
        } else {
            Self::Other
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Known => "",
            Self::Newer => "newer than the last that was tried",
            Self::Other => "not among those that were tried",
        }
    }
}

/// A thing, and what was found out about it.
struct Row {
    name: &'static str,
    found: Result<Option<String>>,
    known: &'static [&'static str],
}

impl Row {
    fn standing(&self) -> Standing {
        match &self.found {
            Ok(Some(version)) => Standing::of(version, self.known),
            Ok(None) | Err(_) => Standing::Known,
        }
    }

    fn cells(&self) -> [String; 4] {
        let found = match &self.found {
            Ok(Some(version)) => version.clone(),
            Ok(None) => "not installed".to_owned(),
            Err(_) => "?".to_owned(),
        };
        let words = match &self.found {
            Err(error) => format!("cannot be found out: {error:#}"),
            Ok(_) => self.standing().words().to_owned(),
        };
        [self.name.to_owned(), found, self.known.join(", "), words]
    }
}

/// Makes the check, and prints what is in use below its line.
pub fn check(selection: &Selection, report: &Report) {
    if !selection.takes(NAME) {
        return;
    }
    let started = Instant::now();
    let image = selection.guest.then(image::ensure_image).and_then(Result::ok);
    let rows = ITEMS.iter().filter(|(_, source)| selection.guest || !source.is_of_the_guest());
    let rows: Vec<_> = rows
        .map(|(name, source)| Row {
            name,
            found: source.find(image.as_ref()),
            known: known(name).map_or(&[], |known| known.versions),
        })
        .collect();
    let ending = judge(&rows);
    let figures = if ending == Ending::Passed { block(&rows) } else { Vec::new() };
    report.add(NAME, &ending, Some(started.elapsed()), &figures);
}

fn judge(rows: &[Row]) -> Ending {
    let unknown: Vec<_> =
        rows.iter().filter(|row| row.found.is_err()).map(|row| row.name).collect();
    if unknown.is_empty() {
        return Ending::Passed;
    }
    let reason = format!("the version in use cannot be found out: {}", unknown.join(", "));
    Ending::Failed(reason, block(rows).join("\n"))
}

/// A table, and a sentence if there is something newer in it.
fn block(rows: &[Row]) -> Vec<String> {
    let head = ["", "in use", "known to work", ""].map(str::to_owned);
    let cells: Vec<_> = std::iter::once(head).chain(rows.iter().map(Row::cells)).collect();
    let width = |column: usize| cells.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths = [0, 1, 2, 3].map(width);
    let line = |row: &[String; 4]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let mut lines: Vec<_> = cells.iter().map(line).collect();
    let newer: Vec<_> =
        rows.iter().filter(|row| row.standing() == Standing::Newer).map(|row| row.name).collect();
    if !newer.is_empty() {
        lines.push(format!(
            "Newer than the last that was tried: {}. Look there first if something has failed \
             (docs/kernel-support.md).",
            newer.join(", ")
        ));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::known_versions::KNOWN;

    #[test]
    fn what_is_known_is_what_is_looked_for() {
        let names = |names: &mut dyn Iterator<Item = &'static str>| names.collect::<Vec<_>>();
        assert_eq!(
            names(&mut ITEMS.iter().map(|(name, _)| *name)),
            names(&mut KNOWN.iter().map(|known| known.name))
        );
        for known in KNOWN {
            assert!(!known.versions.is_empty(), "{}", known.name);
            let parts: Vec<_> = known.versions.iter().map(|version| parts(version)).collect();
            assert!(parts.iter().all(|(_, number)| !number.is_empty()), "{known:?}");
            // No version twice, and of one name the newest last.
            assert!(parts.is_sorted_by(|one, other| one < other), "{known:?}");
        }
    }

    #[test]
    fn versions_are_read_from_what_programs_say() {
        for (text, version) in [
            ("rustc 1.95.0 (59807616e 2026-04-14)", "1.95.0"),
            ("cargo 1.85.1 (d73d2caf9 2024-12-31) (built from a source tarball)", "1.85.1"),
            ("rustc 1.97.0-nightly (5b6e9c1a0 2026-05-01)", "1.97.0-nightly"),
            ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)", "7.2.22"),
            ("valgrind-3.19.0\n", "3.19.0"),
            ("mmdebstrap 1.3.5", "1.3.5"),
            ("7.3.4+deb13-cloud-amd64", "7.3.4+deb13-cloud-amd64"),
            ("1:3.39-1", "3.39-1"),
            ("0.23.2-1", "0.23.2-1"),
        ] {
            assert_eq!(version_in(text).as_deref(), Some(version), "{text}");
        }
        for text in ["", "unknown", "version 7", "1:", "7."] {
            assert_eq!(version_in(text), None, "{text}");
        }
    }

    #[test]
    fn a_distribution_is_its_name_and_release() {
        let debian =
            "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nVERSION_ID=\"12\"\nID=debian\n";
        assert_eq!(distribution(debian).unwrap(), "debian 12");
        assert_eq!(distribution("ID=arch\nID_LIKE=x\n").unwrap(), "arch");
        assert!(distribution("NAME=x\n").is_err());
    }

    #[test]
    fn newer_and_other_versions_are_told_apart() {
        let kernels = ["7.2.12", "7.3.4"];
        for (version, known, standing) in [
            ("7.3.4+deb13-cloud-amd64", &kernels[..], Standing::Known),
            ("7.2.12+deb13-cloud-amd64", &kernels, Standing::Known),
            ("7.3.10", &kernels, Standing::Newer),
            ("8.0", &kernels, Standing::Newer),
            ("7.2.13", &kernels, Standing::Other),
            ("6.12.9", &kernels, Standing::Other),
            ("3.39-1", &["3.39"], Standing::Known),
            ("debian 13", &["debian 12", "ubuntu 24.04"], Standing::Newer),
            ("ubuntu 24.04", &["debian 12", "ubuntu 24.04"], Standing::Known),
            ("arch", &["debian 12"], Standing::Other),
            ("fedora 44", &["debian 12"], Standing::Other),
        ] {
            assert_eq!(Standing::of(version, known), standing, "{version} of {known:?}");
        }
    }

    fn row(name: &'static str, found: Result<Option<String>>) -> Row {
        Row { name, found, known: &["1.2", "1.3"] }
    }

    #[test]
    fn newer_versions_are_marked_and_do_not_fail() {
        let rows = [
            row("old", Ok(Some("1.2-3".into()))),
            row("new", Ok(Some("1.4".into()))),
            row("absent", Ok(None)),
        ];
        assert_eq!(judge(&rows), Ending::Passed);
        let lines = block(&rows);
        assert_eq!(lines[0], "        in use         known to work");
        assert_eq!(lines[1], "old     1.2-3          1.2, 1.3");
        assert_eq!(
            lines[2],
            "new     1.4            1.2, 1.3       newer than the last that was tried"
        );
        assert_eq!(lines[3], "absent  not installed  1.2, 1.3");
        assert!(lines[4].starts_with("Newer than the last that was tried: new. "), "{lines:?}");
        assert_eq!(block(&rows[..1]).len(), 2);
    }

    #[test]
    fn a_version_that_cannot_be_found_out_fails() {
        let rows = [row("one", Ok(Some("1.3".into()))), row("other", Err(anyhow::anyhow!("why")))];
        let Ending::Failed(reason, details) = judge(&rows) else { panic!("it passes") };
        assert_eq!(reason, "the version in use cannot be found out: other");
        assert!(details.contains("cannot be found out: why"), "{details}");
        assert!(Source::GuestPackage("fio").find(None).is_err());
        assert!(Source::Program("no-such-program").find(None).is_err());
        assert_eq!(Source::OptionalProgram("no-such-program").find(None).unwrap(), None);
    }

    #[test]
    fn the_compilers_of_this_run_say_their_versions() {
        for name in ["rustc", "cargo"] {
            let version = Source::Program(name).find(None).unwrap().unwrap();
            assert!(starts_with_digit(&version), "{name}: {version}");
        }
    }
}
