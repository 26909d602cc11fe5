//! A root directory with the Rust of Debian stable, in which the workspace is built as a user of
//! that release builds it. It is made once and kept beside the guest image.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::cleanup;
use crate::mmdebstrap;
use crate::recipe::{self, Privilege};
use crate::{paths, ui};

/// What a user of the release installs, and what the harness would install then.
const PACKAGES: &[&str] = &["ca-certificates", "cargo", "gcc", "libc6-dev", "libclang1"];

/// Files of packages that no build needs.
const EXCLUDED: &[&str] =
    &["/usr/lib/llvm-*/lib/*.a", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/man/*"];

const ENTER_SH: &str = include_str!("../rust-root/enter.sh");

/// Names of the root and of the directory that it is made in.
const PREFIX: &str = "rust-root-";
const BUILDING: &str = "rust-building-";
/// Written last.
const COMPLETE: &str = "complete";

/// A finished root.
#[derive(Debug)]
pub struct RustRoot {
    directory: PathBuf,
}

/// Makes the root if it is not there yet.
///
/// # Errors
/// When it cannot be made; the message says what to do.
pub fn ensure_root() -> Result<RustRoot> {
    let cache = paths::cache()?;
    let name = format!("{PREFIX}{}", hash());
    let root = RustRoot { directory: cache.join(&name) };
    if root.is_complete() {
        return Ok(root);
    }
    fs::create_dir_all(&cache).with_context(|| format!("make {}", cache.display()))?;
    let _lock = cleanup::lock_file(&cache.join("rust-lock"))?;
    if root.is_complete() {
        return Ok(root);
    }
    // Whoever holds the lock is the only one to build: others are dead, or of an older recipe.
    for entry in fs::read_dir(&cache)?.flatten() {
        let other = entry.file_name().to_string_lossy().into_owned();
        if other.starts_with(BUILDING) || other.starts_with(PREFIX) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    ui::note("making a root with Debian's own Rust (some minutes, once)");
    root.build(&cache).context("make a root with Debian's own Rust")?;
    Ok(root)
}

/// The name of what shapes the root.
fn hash() -> String {
    recipe::hash_of(&mmdebstrap_args(Privilege::Root, "MIRROR", "ROOT").join("\n"))
}

fn mmdebstrap_args(privilege: Privilege, mirror: &str, target: &str) -> Vec<String> {
    let mut args = vec![
        format!("--mode={}", privilege.mode()),
        "--variant=essential".into(),
        "--architectures=amd64".into(),
        "--format=tar".into(),
        format!("--keyring={}", mmdebstrap::KEYRING),
        format!("--include={}", PACKAGES.join(",")),
        // unshare mode cannot use the default for the apt sandbox user
        "--aptopt=APT::Sandbox::User \"root\"".into(),
    ];
    args.extend(EXCLUDED.iter().map(|path| format!("--dpkgopt=path-exclude={path}")));
    args.extend([recipe::SUITE.into(), target.into()]);
    args.push(format!("deb {mirror} {} main", recipe::SUITE));
    args
}

impl RustRoot {
    fn is_complete(&self) -> bool {
        self.directory.join(COMPLETE).is_file()
    }

    fn build(&self, cache: &Path) -> Result<()> {
        let building = tempfile::Builder::new().prefix(BUILDING).tempdir_in(cache)?;
        let scratch =
            tempfile::Builder::new().prefix("ublk-rust-").tempdir_in(mmdebstrap::unpack_parent())?;
        // A signal leaves none of their gigabytes.
        for directory in [building.path(), scratch.path()] {
            cleanup::remember_directory(directory);
        }
        let mirror = mmdebstrap::find_mirror(scratch.path())?;
        let packed = building.path().join("root.tar");
        // In a user namespace, root is somebody else: it writes where it may, and the files are
        // unpacked as this user's own.
        let args = mmdebstrap_args(mmdebstrap::privilege(), &mirror, &packed.to_string_lossy());
        mmdebstrap::run("Debian's own Rust", &args, &[])?;
        let root = building.path().join("root");
        fs::create_dir(&root)?;
        let mut tar = cleanup::command("tar", Signal::SIGTERM);
        tar.args(["--no-same-owner", "--exclude=./dev/*", "-xf"]).arg(&packed).arg("-C").arg(&root);
        let output = tar.stdin(Stdio::null()).output()?;
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "tar ended with {}: {complaint}", output.status);
        fs::remove_file(&packed)?;
        for point in ["cargo", "target", "proc", "dev"] {
            fs::create_dir_all(root.join(point))?;
        }
        fs::create_dir(building.path().join("target"))?;
        File::create(building.path().join(COMPLETE))?;
        let built = building.keep();
        fs::rename(&built, &self.directory).context("put the root in its place")?;
        cleanup::forget_directory(&built);
        Ok(())
    }

    /// A command for `program` of the root, to be run in the workspace, with a target directory of
    /// its own and what cargo has downloaded for this user.
    ///
    /// # Errors
    /// When there is no place for what cargo downloads.
    pub fn command(&self, program: &str) -> Result<Command> {
        let home = cargo_home()?;
        fs::create_dir_all(&home)?;
        let mut command = cleanup::command("unshare", Signal::SIGTERM);
        command.arg("--mount");
        if mmdebstrap::privilege() == Privilege::Unshare {
            command.args(["--user", "--map-root-user"]);
        }
        command.args(["--", "nice", "-n", "10", "sh", "-c", ENTER_SH, "enter"]);
        command.arg(self.directory.join("root")).arg(paths::workspace()).arg(home);
        command.arg(self.directory.join("target")).arg(program);
        command.stdin(Stdio::null());
        Ok(command)
    }
}

/// Cargo's home of this user, so that nothing is downloaded twice.
fn cargo_home() -> Result<PathBuf> {
    let given = env::var_os("CARGO_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    given
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")))
        .context("neither CARGO_HOME nor HOME is set")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_is_named_after_its_packages_not_the_machine() {
        assert_eq!((hash(), hash().len()), (hash(), 16));
        let args = mmdebstrap_args(Privilege::Unshare, "http://m/", "/out");
        assert!(args.contains(&"--mode=unshare".into()));
        assert!(args.iter().any(|arg| arg.starts_with("--include=") && arg.contains("cargo,gcc")));
        assert!(args.ends_with(&[
            "trixie".into(),
            "/out".into(),
            "deb http://m/ trixie main".into()
        ]));
    }
}
