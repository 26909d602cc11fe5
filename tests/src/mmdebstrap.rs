//! Unpacks packages of the Debian archive into a root directory, with mmdebstrap.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::cleanup::{self, Group};
use crate::recipe::{self, Privilege};
use crate::ui;

/// The keys that the archive is signed with.
pub const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Lines of its output shown when it fails.
const TAIL_LINES: usize = 30;

/// How this process gets root in the chroot.
pub fn privilege() -> Privilege {
    if nix::unistd::geteuid().is_root() { Privilege::Root } else { Privilege::Unshare }
}

/// Where mmdebstrap may unpack a gigabyte: a disk, rather than `/tmp`, which often is memory.
pub fn unpack_parent() -> PathBuf {
    std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from)
}

/// Runs mmdebstrap with these arguments and variables; `what` is named in its progress.
///
/// # Errors
/// When it cannot be started or fails; the message ends with its last lines.
pub fn run(what: &str, args: &[String], env: &[(&str, OsString)]) -> Result<()> {
    ensure!(Path::new(KEYRING).is_file(), "{KEYRING} is missing (package debian-archive-keyring)");
    // SIGTERM, for it unmounts and removes what it made.
    let mut command = cleanup::command("mmdebstrap", Signal::SIGTERM);
    command
        .args(args)
        .envs(env.iter().map(|(name, value)| (name, value)))
        .env("TMPDIR", unpack_parent())
        .env("LC_ALL", "C.UTF-8")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut group = Group::spawn(&mut command, Signal::SIGTERM)?;
    let stderr = group.child().stderr.take().context("mmdebstrap's standard error")?;
    let mut log = Vec::new();
    for line in BufReader::new(stderr).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).trim_end().to_owned();
        if let Some(step) = progress(&line) {
            ui::step(&format!("{what}: {step}"));
        }
        log.push(line);
    }
    let status = group.wait()?;
    ui::clear();
    if !status.success() {
        let tail = log[log.len().saturating_sub(TAIL_LINES)..].join("\n");
        bail!("mmdebstrap ended with {status}; its last lines:\n{tail}");
    }
    Ok(())
}

/// The part of mmdebstrap's (or our hook's) output that says what it does now.
fn progress(line: &str) -> Option<&str> {
    if let Some(step) = line.strip_prefix("STEP ") {
        return Some(step);
    }
    let step = line.strip_prefix("I: ")?.trim_end_matches('.');
    let verbs = ["downloading", "extracting", "installing", "running apt-get", "cleaning"];
    verbs.iter().any(|verb| step.starts_with(verb)).then_some(step)
}

/// A mirror of the Debian archive: the user's word, or one that this machine's apt is set up with.
///
/// # Errors
/// When there is none; the message says what to set.
pub fn find_mirror(scratch: &Path) -> Result<String> {
    if let Some(mirror) = std::env::var("UBLK_VM_MIRROR").ok().filter(|m| !m.is_empty()) {
        return Ok(mirror);
    }
    let output = Command::new("apt-get")
        .args(["indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)"])
        .output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    for mirror in mirror_candidates(&text) {
        if serves_guest_release(&mirror, scratch) {
            return Ok(mirror);
        }
    }
    bail!(
        "no mirror of the Debian archive with {} in this machine's apt configuration: \
         set UBLK_VM_MIRROR to the address of one",
        recipe::SUITE
    )
}

/// Repositories that may be the Debian archive, likely ones first. Origin and label are empty where
/// apt has no lists yet.
fn mirror_candidates(indextargets: &str) -> Vec<String> {
    let mut sure = Vec::new();
    let mut maybe = Vec::new();
    for line in indextargets.lines() {
        let mut fields = line.splitn(3, '|');
        let (Some(origin), Some(label), Some(uri)) = (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let list = match (origin, label) {
            ("Debian", "Debian") => &mut sure,
            ("", "") if !uri.contains("security") => &mut maybe,
            _ => continue,
        };
        if !list.iter().any(|known| known == uri) {
            list.push(uri.to_owned());
        }
    }
    sure.append(&mut maybe);
    sure
}

/// Asks through apt's own downloader, which knows the machine's proxies.
fn serves_guest_release(mirror: &str, scratch: &Path) -> bool {
    let address = format!("{}/dists/{}/InRelease", mirror.trim_end_matches('/'), recipe::SUITE);
    Command::new("/usr/lib/apt/apt-helper")
        .args(["download-file", &address])
        .arg(scratch.join("InRelease"))
        .output()
        .is_ok_and(|output| output.status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_that_serve_the_archive_come_first() {
        let text = "||http://a.example/unknown/\n\
             Debian|Debian-Security|http://s.example/debian-security/\n\
             Debian|Debian|http://m.example/d/\n\
             ||http://s.example/security/\n\
             Node|Node|http://n.example/\n\
             Debian|Debian|http://m.example/d/\n";
        assert_eq!(mirror_candidates(text), ["http://m.example/d/", "http://a.example/unknown/"]);
        assert!(mirror_candidates("Ubuntu|Ubuntu|http://u.example/ubuntu/\n").is_empty());
    }

    #[test]
    fn progress_lines_are_picked() {
        assert_eq!(
            progress("I: downloading packages with apt..."),
            Some("downloading packages with apt")
        );
        assert_eq!(progress("STEP making the file system"), Some("making the file system"));
        assert_eq!(progress("Unpacking fio (3.39-1) ..."), None);
        assert_eq!(progress("I: success in 41 seconds"), None);
    }
}
