//! Where things are: the workspace, the cache, and programs that an ordinary
//! user does not have in `PATH`.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The workspace's root. Cargo says where the package is when it runs the
/// harness; else it is where it was built.
pub fn workspace() -> PathBuf {
    let package = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    package.parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// Where images and run directories are kept:
/// `${XDG_CACHE_HOME:-~/.cache}/ublk-target/vm`.
///
/// # Errors
/// When neither variable gives an absolute path.
pub fn cache() -> Result<PathBuf> {
    let absolute = |name: &str| env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let base = absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .context("neither XDG_CACHE_HOME nor HOME is set: no place for the guest image")?;
    Ok(base.join("ublk-target").join("vm"))
}

/// Where a program is: in `PATH`, or in the directories for administrators.
pub fn program(name: &str) -> Option<PathBuf> {
    program_below(Path::new("/"), name)
}

/// The same on a machine whose root directory is `root`.
pub fn program_below(root: &Path, name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .filter_map(|directory| directory.strip_prefix("/").map(|d| root.join(d)).ok())
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file())
}

/// Where cargo is: the one that runs the harness, else the one in `PATH`.
pub fn cargo() -> PathBuf {
    env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from)
}
