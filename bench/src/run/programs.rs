//! The programs that a run needs.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::args::RunArgs;
use super::commands::{Commands, find};

/// Programs that every run needs, and their Debian packages.
const ALWAYS: [(&str, &str); 2] = [("fio", "fio"), ("setpriv", "util-linux")];

/// Fails if one of the required programs is missing.
pub fn ensure_tools(more: &[(&str, &str)]) -> Result<()> {
    let lacking = ALWAYS.iter().chain(more).find(|(tool, _)| find(tool).is_none());
    let Some((tool, package)) = lacking else { return Ok(()) };
    anyhow::bail!("{tool} is missing; install it, in Debian with `apt install {package}`")
}

/// A server program: its path, or why it was not found.
type Found = Result<String, String>;

/// The servers.
#[derive(Debug)]
pub struct Programs {
    ublk_target: Found,
    rublk: Found,
    /// The help of `ublk-target add loop`.
    help: String,
}

impl Programs {
    /// Finds them. A program that the user names must exist.
    pub fn look(args: &RunArgs, commands: &Commands) -> Result<Self> {
        let beside = std::env::current_exe()?.with_file_name("ublk-target");
        let ublk_target = named("ublk-target", args.ublk_target.as_deref())?
            .or_else(|| Some(beside).filter(|path| path.is_file()))
            .or_else(|| find("ublk-target"));
        let ublk_target = found(
            ublk_target,
            "there is no ublk-target beside ublk-bench or in PATH; name it with --ublk-target",
        )?;
        let rublk = named("rublk", args.rublk.as_deref())?.or_else(|| find("rublk"));
        let rublk = found(
            rublk,
            "there is no rublk in PATH; `cargo install rublk` makes it, or name it with --rublk",
        )?;
        let help = match &ublk_target {
            Ok(program) => commands.run(&[program, "add", "loop", "--help"])?,
            Err(_) => String::new(),
        };
        Ok(Self { ublk_target, rublk, help })
    }

    /// ublk-target.
    pub fn ublk_target(&self) -> Result<&str> {
        self.ublk_target.as_deref().map_err(|why| anyhow::anyhow!("{why}"))
    }

    /// rublk.
    pub fn rublk(&self) -> Result<&str> {
        self.rublk.as_deref().map_err(|why| anyhow::anyhow!("{why}"))
    }

    /// Fails if this ublk-target lacks one of these options.
    pub fn ensure_known(&self, options: &[&str]) -> Result<()> {
        self.ublk_target()?;
        let unknown = options.iter().find(|word| word.starts_with("--") && !has(&self.help, word));
        ensure!(unknown.is_none(), "this ublk-target has no {}", unknown.unwrap_or(&""));
        Ok(())
    }
}

fn named(name: &str, path: Option<&Path>) -> Result<Option<PathBuf>> {
    let Some(path) = path else { return Ok(None) };
    let canonical = path.canonicalize().ok().filter(|path| path.is_file());
    canonical
        .map(Some)
        .with_context(|| format!("there is no {}; --{name} is wrong", path.display()))
}

fn found(path: Option<PathBuf>, otherwise: &str) -> Result<Found> {
    let Some(path) = path else { return Ok(Err(otherwise.to_owned())) };
    let text = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    Ok(Ok(text.to_owned()))
}

/// Whether a help text contains an option, not only a longer one.
fn has(help: &str, option: &str) -> bool {
    let ends = |rest: &str| !rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '-');
    help.match_indices(option).any(|(at, _)| ends(&help[at + option.len()..]))
}

/// The version that a program prints: `rublk 0.2.15` without the name.
pub fn version(commands: &Commands, program: &str) -> Option<String> {
    let said = commands.run(&[program, "--version"]).ok()?;
    said.split_whitespace().last().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_known_by_their_whole_name() {
        let help = "      --poll [<HOW>]\n  With --lend slot; --unpolled";
        for (option, is_known) in
            [("--poll", true), ("--unpolled", true), ("--pol", false), ("--batch", false)]
        {
            assert_eq!(has(help, option), is_known, "{option}");
        }
        let ours = |found: Found| Programs {
            ublk_target: found,
            rublk: Err("no rublk".into()),
            help: help.into(),
        };
        let programs = ours(Ok("x".into()));
        assert!(programs.ensure_known(&["--poll", "hybrid"]).is_ok());
        let error = programs.ensure_known(&["--poll", "--batch"]).unwrap_err().to_string();
        assert_eq!(error, "this ublk-target has no --batch");
        assert_eq!(ours(Err("gone".into())).ensure_known(&[]).unwrap_err().to_string(), "gone");
    }

    #[test]
    fn missing_tools_are_named_with_their_package() {
        assert!(ensure_tools(&[("no-such-tool", "some-package")]).is_err_and(|error| {
            let said = error.to_string();
            said.contains("is missing") && said.contains("apt install")
        }));
    }
}
