//! The host's part: boots the guest, has it measure row after row, and clears up after each.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::column::COLUMNS;
use super::guest::{PREPARE, QUICK};
use super::results::{Cell, RowResult};
use super::row::Row;
use crate::config::VmConfig;
use crate::image::Image;
use crate::klog;
use crate::proto::{ExitState, Job};
use crate::ui;
use crate::vm::{JobResult, Stream, Vm};

/// The guest's program.
pub(super) const PROGRAM: &str = "bench-guest";
/// Wall time that a row may take.
pub(super) const ROW_TIMEOUT: Duration = Duration::from_secs(15 * 60);
pub(super) const PREPARE_TIMEOUT: Duration = Duration::from_secs(120);

/// Measures rows in a guest, and in a new one where that has gone.
#[derive(Debug)]
pub struct Bench {
    image: Image,
    payload: PathBuf,
    quick: bool,
    vm: Option<Vm>,
    /// The guest's kernel, fio and ublk-target.
    pub versions: Option<[String; 3]>,
}

impl Bench {
    /// Prepares for measuring; nothing is booted yet.
    pub fn new(image: Image, payload: PathBuf, quick: bool) -> Self {
        Self { image, payload, quick, vm: None, versions: None }
    }

    /// Boots the guest; without this the first row does.
    ///
    /// # Errors
    /// When it does not come up or cannot do what every row needs.
    pub fn boot(&mut self) -> Result<()> {
        self.vm = Some(self.booted()?);
        Ok(())
    }

    /// Measures a row. What goes wrong is its result.
    pub fn measure(&mut self, row: &Row) -> RowResult {
        let mut cells = Vec::new();
        let done = self.measure_in_guest(row, &mut cells);
        let failure = done.err().map(|error| format!("{error:#}"));
        RowResult { row: row.name, cells, failure }
    }

    fn measure_in_guest(&mut self, row: &Row, cells: &mut Vec<Cell>) -> Result<()> {
        let mut vm = match self.vm.take() {
            Some(vm) => vm,
            None => self.booted()?,
        };
        let mut argv = vec![PROGRAM, row.name];
        argv.extend(self.quick.then_some(QUICK));
        let progress = |cells: &[Cell]| {
            if let Some(column) = COLUMNS.get(cells.len()) {
                ui::status(&format!("{}: {}", row.title, column.title.join(" ")));
            }
        };
        progress(cells);
        let done = run(&mut vm, &argv, ROW_TIMEOUT, |line| {
            cells.push(serde_json::from_str(line).with_context(|| format!("not a cell: {line}"))?);
            progress(cells);
            Ok(())
        });
        let state = state_of(&mut vm)?;
        if !state.is_stuck {
            self.vm = Some(vm); // for the next row
        }
        done?;
        state.trouble.map_or(Ok(()), |trouble| Err(anyhow::anyhow!(trouble)))?;
        ensure!(cells.len() == COLUMNS.len(), "{PROGRAM} measured {} columns", cells.len());
        Ok(())
    }

    fn booted(&mut self) -> Result<Vm> {
        ui::step("booting the guest");
        let config = VmConfig { icount: true, cpus: 1, ..VmConfig::default() };
        let mut vm = Vm::boot(&config, &self.image, &self.payload)?;
        let mut printed = Vec::new();
        run(&mut vm, &[PROGRAM, PREPARE], PREPARE_TIMEOUT, |line| {
            printed.push(line.to_owned());
            Ok(())
        })
        .context("prepare the guest")?;
        let [fio, ublk_target] = <[String; 2]>::try_from(printed)
            .map_err(|printed| anyhow::anyhow!("{PROGRAM} said {printed:?}"))?;
        self.versions = Some([vm.kernel().to_owned(), fio, ublk_target]);
        vm.take_baseline()?;
        ui::clear();
        Ok(vm)
    }

    /// Switches the guest off.
    ///
    /// # Errors
    /// When it does not go down in order.
    pub fn finish(self) -> Result<()> {
        self.vm.map_or(Ok(()), |vm| Ok(vm.power_off()?))
    }
}

/// What a guest is like after a program.
pub struct State {
    /// What was left, or what the kernel complained about.
    pub trouble: Option<String>,
    /// What was left cannot be removed: nothing else can be done with this guest.
    pub is_stuck: bool,
}

/// Looks what is left in a guest beyond its baseline, and removes it.
///
/// # Errors
/// When the guest has gone.
pub fn state_of(vm: &mut Vm) -> Result<State> {
    let (left, stuck) = vm.leaks()?;
    let log = vm.kernel_log()?;
    let left = (!left.is_empty()).then(|| format!("this was left: {}", left.join(", ")));
    let findings = klog::findings(&log, &[]);
    let complaint = findings.first().map(|finding| {
        let (kind, text) = (&finding.kind, &finding.text);
        format!("the kernel complained ({kind}): {text}")
    });
    Ok(State { trouble: left.or(complaint), is_stuck: !stuck.is_empty() })
}

/// Runs a program that has to succeed, and hands over each line that it prints. What it says on
/// standard error is why it fails.
///
/// # Errors
/// When it fails or is not done in time, or what the line was handed to does.
pub fn run(
    vm: &mut Vm,
    argv: &[&str],
    timeout: Duration,
    line: impl FnMut(&str) -> Result<()>,
) -> Result<()> {
    run_and_tell(vm, argv, timeout, line, |_| {})
}

/// The same, with each line of standard error given to `tell` as it comes.
///
/// # Errors
/// As [`run()`].
pub fn run_and_tell(
    vm: &mut Vm,
    argv: &[&str],
    timeout: Duration,
    mut line: impl FnMut(&str) -> Result<()>,
    mut tell: impl FnMut(&str),
) -> Result<()> {
    let job = Job { argv: argv.iter().map(ToString::to_string).collect(), ..Job::default() };
    let (mut out, mut err) = (Lines::default(), Lines::default());
    let (mut said, mut trouble) = (Vec::new(), None);
    let result = vm.run(&job, timeout, &mut |stream, bytes| match stream {
        Stream::Stdout => out.push(bytes, |text| {
            if let Err(error) = line(text) {
                trouble.get_or_insert(error);
            }
        }),
        Stream::Stderr => {
            said.extend_from_slice(bytes);
            err.push(bytes, &mut tell);
        }
    })?;
    ensure_well(&result, timeout, &said)?;
    trouble.map_or(Ok(()), Err)
}

/// The whole of a file in the guest.
///
/// # Errors
/// When it cannot be read, or is no text.
pub fn read_file(vm: &mut Vm, path: &str, timeout: Duration) -> Result<String> {
    let job = Job { argv: vec!["cat".to_owned(), path.to_owned()], ..Job::default() };
    let (mut text, mut said) = (Vec::new(), Vec::new());
    let result = vm.run(&job, timeout, &mut |stream, bytes| match stream {
        Stream::Stdout => text.extend_from_slice(bytes),
        Stream::Stderr => said.extend_from_slice(bytes),
    })?;
    ensure_well(&result, timeout, &said)?;
    Ok(String::from_utf8(text)?)
}

fn ensure_well(result: &JobResult, timeout: Duration, said: &[u8]) -> Result<()> {
    ensure!(result.timed_out.is_none(), "not done after {} s", timeout.as_secs());
    let said = String::from_utf8_lossy(said);
    ensure!(result.state == ExitState::Code(0), "{}", one_line(&said, result.state));
    Ok(())
}

/// What a program said before it failed, in one line.
fn one_line(said: &str, state: ExitState) -> String {
    let lines: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if lines.is_empty() { format!("it ended without a word: {state}") } else { lines.join("; ") }
}

/// Puts lines together of the pieces in which they come.
#[derive(Debug, Default)]
struct Lines(Vec<u8>);

impl Lines {
    fn push(&mut self, piece: &[u8], mut whole: impl FnMut(&str)) {
        self.0.extend_from_slice(piece);
        while let Some(end) = self.0.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.0.drain(..=end).collect();
            whole(String::from_utf8_lossy(&line).trim_end());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_put_together() {
        let (mut lines, mut seen) = (Lines::default(), Vec::new());
        for piece in ["{\"a\"", ": 1}\n{", "}\n\nrest"] {
            lines.push(piece.as_bytes(), |line| seen.push(line.to_owned()));
        }
        assert_eq!(seen, ["{\"a\": 1}", "{}", ""]);
    }

    #[test]
    fn a_failure_is_one_line() {
        assert_eq!(one_line("no disk\n\n  really\n", ExitState::Code(1)), "no disk; really");
        assert_eq!(one_line("", ExitState::Code(3)), "it ended without a word: exit code 3");
    }
}
