//! The log: to the terminal, or to the file of a device, which can be reopened and has a size
//! limit.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use env_logger::{Builder, Env, Target, WriteStyle};
use nix::unistd::{dup2_stderr, dup2_stdout};
use ublk_target::device::paths::{LOG_DIR, RUN_DIR};
use ublk_target::os::own_files;
use ublk_target::os::text::Printable;

/// A longer file is renamed to `ID.log.1`, and replaces an older one of that name.
const MAX_BYTES: u64 = 4 << 20;

/// The log file; `None` while the log goes to the terminal.
static FILE: Mutex<Option<PathBuf>> = Mutex::new(None);

/// The first destination of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    /// Standard error, permanently.
    Terminal,
    /// Standard error, until a file is opened.
    File,
    /// The caller's standard error until there is a file. Without `-v` it gets only warnings and errors.
    UserFirst,
}

/// Starts logging. `default` is the level without `-v`.
pub fn start(verbose: u8, default: &str, to: To) {
    let level = match verbose {
        0 => default,
        1 => "info",
        _ => "debug",
    };
    let mut builder = Builder::from_env(Env::default().default_filter_or(level));
    builder.format(|to, record| {
        let (level, time) = (record.level(), to.timestamp());
        let style = to.default_level_style(level);
        let (target, said) = (record.target(), Printable(record.args()));
        writeln!(to, "[{time} {style}{level:<5}{style:#} {target}] {said}")
    });
    if to != To::Terminal {
        // Colours are for terminals.
        builder.write_style(WriteStyle::Never).target(Target::Pipe(Box::new(Bounded)));
    }
    builder.init();
    if to == To::UserFirst && verbose == 0 {
        log::set_max_level(log::LevelFilter::Warn);
    }
}

/// Standard error, with rotation of the file behind it.
struct Bounded;

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Ok(file) = FILE.lock() {
            if let Some(path) = file.as_deref() {
                // A file that cannot be replaced stays in use.
                let _ = bound(path);
            }
        }
        io::stderr().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// Rotates the file if it is too long. Several processes may log to it, so each checks for itself.
fn bound(path: &Path) -> io::Result<()> {
    let own = File::from(io::stderr().as_fd().try_clone_to_owned()?).metadata()?;
    if own.len() < MAX_BYTES {
        return Ok(());
    }
    let is_own = |there: &fs::Metadata| (there.dev(), there.ino()) == (own.dev(), own.ino());
    if fs::symlink_metadata(path).is_ok_and(|there| is_own(&there)) {
        fs::rename(path, path.with_extension("log.1"))?;
    }
    redirect(path)
}

/// Redirects standard output and error to the log of a device. Returns the former standard output,
/// and a problem if the log is not at its usual path. The device is served anyway.
///
/// # Errors
/// `EMFILE` and the like.
pub fn to_file_of(id: u32) -> io::Result<(File, Option<String>)> {
    let user = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let mut problem = None;
    let mut opened = Err(io::Error::from(io::ErrorKind::NotFound));
    for directory in [LOG_DIR, RUN_DIR] {
        let directory = Path::new(directory);
        let path = directory.join(format!("{id}.log"));
        opened = own_files::directory(directory).and_then(|()| redirect(&path));
        match &opened {
            Ok(()) => {
                if let Some(problem) = &mut problem {
                    *problem = format!("{problem}; the log is {}", path.display());
                }
                if let Ok(mut file) = FILE.lock() {
                    *file = Some(path);
                }
                break;
            }
            Err(error) => {
                let said = format!("cannot log to {}: {error}", path.display());
                problem.get_or_insert(said);
            }
        }
    }
    if opened.is_err() {
        let null = File::options().write(true).open("/dev/null")?;
        dup2_stdout(&null)?;
        dup2_stderr(&null)?;
        problem = problem.map(|said| format!("{said}; there is no log"));
    }
    Ok((user, problem))
}

/// Reopens the log of a device: it may have been moved, or its usual path may be writable now.
pub fn reopen(id: u32) {
    match to_file_of(id) {
        Ok((_, None)) => log::info!("SIGHUP: the log is open again"),
        Ok((_, Some(problem))) => log::warn!("SIGHUP: {problem}"),
        Err(error) => log::error!("SIGHUP: the log cannot be opened again: {error}"),
    }
}

fn redirect(path: &Path) -> io::Result<()> {
    let log = own_files::append(path, 0o640)?;
    dup2_stdout(&log)?;
    dup2_stderr(&log)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From the first line on, whatever a process says of itself as it begins.
    #[test]
    fn a_user_is_told_only_what_is_wrong() {
        start(0, "info", To::UserFirst);
        assert_eq!(log::max_level(), log::LevelFilter::Warn);
    }
}
