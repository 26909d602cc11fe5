//! Runs the programs of the demonstration, with a sign of life while one takes long.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use crate::cleanup::{self, Group, RunDir};
use crate::{paths, ui};

/// What a program may not be interrupted in: a signal waits for its end. (This one does nothing
/// to a program that does not ask for it.)
const LET_IT_END: Signal = Signal::SIGURG;

/// Runs programs; they and their output have a directory that goes with it.
#[derive(Debug)]
pub struct Commands {
    directory: RunDir,
}

impl Commands {
    /// Makes the directory.
    pub fn new() -> Result<Self> {
        Ok(Self { directory: RunDir::create(&paths::cache()?.join("run"))? })
    }

    /// A path in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Runs a program that has to succeed, and returns its standard output. A signal kills it.
    pub fn run(&self, doing: &str, argv: &[&str]) -> Result<String> {
        self.run_until(Signal::SIGKILL, doing, argv)
    }

    /// The same for a program that must not stop half-way: one that changes devices or mounts.
    pub fn run_to_the_end(&self, doing: &str, argv: &[&str]) -> Result<String> {
        self.run_until(LET_IT_END, doing, argv)
    }

    fn run_until(&self, end: Signal, doing: &str, argv: &[&str]) -> Result<String> {
        let (program, arguments) = argv.split_first().context("no program given")?;
        let path = paths::program(program).with_context(|| format!("{program} is missing"))?;
        // Files, so that nobody has to empty a pipe.
        let (out, err) = (self.path("stdout"), self.path("stderr"));
        let mut command = cleanup::command(path, end);
        command.args(arguments).current_dir("/").stdin(Stdio::null());
        command.stdout(File::create(&out)?).stderr(File::create(&err)?);
        let mut group = Group::spawn(&mut command, end)?;
        let began = Instant::now();
        let status = loop {
            if let Some(status) = group.try_wait()? {
                break status;
            }
            // What is over at once would only flicker.
            match began.elapsed() {
                spent if spent >= Duration::from_secs(1) => {
                    ui::status(&format!("   {doing} … {} s", spent.as_secs()));
                }
                spent if spent >= Duration::from_millis(200) => {
                    ui::status(&format!("   {doing} …"));
                }
                _ => {}
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        ui::clear();
        if !status.success() {
            let name = Path::new(program).file_name().unwrap_or_default().to_string_lossy();
            let command = match name.as_ref() {
                "sh" => doing.to_owned(), // a script says little
                name => format!("`{}`", [&[name], arguments].concat().join(" ")),
            };
            bail!("{command} ended with {status}: {}", why(&out, &err));
        }
        fs::read_to_string(&out).with_context(|| format!("output of {program}"))
    }
}

/// The last thing that a program said.
fn why(out: &Path, err: &Path) -> String {
    let last = |path: &Path| {
        let text = String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
        text.lines().map(str::trim).rfind(|line| !line.is_empty()).map(str::to_owned)
    };
    last(err).or_else(|| last(out)).unwrap_or_else(|| "it said nothing".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_line_with_the_last_that_was_said() {
        let scratch = tempfile::tempdir().unwrap();
        let commands = Commands { directory: RunDir::create(scratch.path()).unwrap() };
        assert_eq!(commands.run("asking", &["echo", "hi"]).unwrap(), "hi\n");
        let script = ["sh", "-c", "echo out; echo first >&2; echo 'no disk' >&2; echo >&2; exit 3"];
        let error = commands.run("trying", &script).unwrap_err().to_string();
        assert_eq!(error, "trying ended with exit status: 3: no disk");
        let error = commands.run("trying", &["false", "x"]).unwrap_err().to_string();
        assert_eq!(error, "`false x` ended with exit status: 1: it said nothing");
        let error = commands.run("trying", &["no-such-program"]).unwrap_err().to_string();
        assert_eq!(error, "no-such-program is missing");
    }
}
