//! What `stats --json` prints.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::guest::process;
use crate::guest::ublk::device::{Device, PROGRAM};

/// One report, over a short interval.
pub fn report(device: &Device) -> Result<Value> {
    let argv = [PROGRAM, "stats", "-n", &device.id(), "--json", "--interval", "0.1", "--slots"];
    Ok(serde_json::from_str(&process::run(&argv)?.stdout)?)
}

/// A number in a report.
pub fn number(report: &Value, pointer: &str) -> Result<u64> {
    let value = report.pointer(pointer).and_then(Value::as_u64);
    value.with_context(|| format!("no number at {pointer} in {}", report["total"]))
}

/// `stats --watch --json`, which goes on until it is ended.
pub struct Watch {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Watch {
    pub fn start(device: &Device) -> Result<Self> {
        let mut child = Command::new(PROGRAM)
            .args(["stats", "-n", &device.id(), "--watch", "--json", "--interval", "0.5"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(child.stdout.take().context("piped")?);
        Ok(Self { child, lines })
    }

    /// The next report.
    pub fn next(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.lines.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("not a report: {line}"))
    }

    /// Interrupts it, as Ctrl-C does.
    pub fn interrupt(&self) -> Result<()> {
        let pid = i32::try_from(self.child.id())?;
        Ok(kill(Pid::from_raw(pid), Signal::SIGINT)?)
    }

    /// Waits until it has ended with success; returns what it said on standard error.
    pub fn end(mut self) -> Result<String> {
        let mut said = String::new();
        self.child.stderr.take().context("piped")?.read_to_string(&mut said)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "{status}: {said}");
        Ok(said)
    }
}
