//! Other namespaces, other users, and what callers leave to a server.

pub mod backings;
pub mod callers;
pub mod endings;
pub mod namespaces;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

const PATIENCE: Duration = Duration::from_secs(20);

/// A process that is killed with its handle.
pub(super) struct Background(Child);

impl Background {
    fn start(argv: &[&str]) -> Result<Self> {
        let (program, arguments) = argv.split_first().context("a program")?;
        let child = Command::new(program).args(arguments).stdout(Stdio::null()).spawn()?;
        Ok(Self(child))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

trait CustomExclusive {
    fn custom_exclusive(&mut self) -> &mut Self;
}

impl CustomExclusive for fs::OpenOptions {
    fn custom_exclusive(&mut self) -> &mut Self {
        std::os::unix::fs::OpenOptionsExt::custom_flags(self, nix::libc::O_EXCL)
    }
}

fn drive_name(path: &Path) -> Result<String> {
    Ok(path.file_name().and_then(|name| name.to_str()).context("a name")?.to_owned())
}
