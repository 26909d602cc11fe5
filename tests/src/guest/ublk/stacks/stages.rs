//! Where the longest requests of a server spent their time: `stats --watch` beside the load.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::super::device::{Device, PROGRAM};
use crate::guest::Ctx;

/// Watches a server; killed with its handle.
pub struct Stages {
    id: String,
    child: Child,
    output: PathBuf,
}

impl Stages {
    pub fn watch(ctx: &Ctx, server: &Device) -> Result<Self> {
        let id = server.id();
        let output = ctx.directory().join(format!("stages-{id}.json"));
        let child = Command::new(PROGRAM)
            .args(["stats", "-n", &id, "--watch", "--json", "--interval", "2"])
            .stdin(Stdio::null())
            .stdout(File::create(&output)?)
            .spawn()?;
        Ok(Self { id, child, output })
    }

    /// Ends it. Returns the longest time of a request in each stage.
    pub fn end(mut self) -> Result<String> {
        kill(Pid::from_raw(i32::try_from(self.child.id())?), Signal::SIGINT)?;
        ensure!(self.child.wait()?.success(), "the statistics of {} failed", self.id);
        let longest = longest(&fs::read_to_string(&self.output)?)?;
        let shown = ["queue", "plan", "backing", "commit"].map(|stage| {
            let nanoseconds = longest.get(stage).copied().unwrap_or(0);
            format!("{stage} {} ms", nanoseconds / 1_000_000)
        });
        Ok(format!("server {}: {}", self.id, shown.join(", ")))
    }
}

impl Drop for Stages {
    fn drop(&mut self) {
        // Both fail when it has ended, which is the usual case.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The greatest latency of each stage, of all kinds of requests in all reports.
fn longest(reports: &str) -> Result<BTreeMap<String, u64>> {
    let mut longest = BTreeMap::new();
    for line in reports.lines() {
        let report: Value = serde_json::from_str(line).context("a report")?;
        for latency in report["latencies"].as_array().context("latencies")? {
            let stage = latency["stage"].as_str().context("a stage")?;
            let max = latency["max_ns"].as_u64().context("a maximum")?;
            let known = longest.entry(stage.to_owned()).or_insert(0);
            *known = max.max(*known);
        }
    }
    Ok(longest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_of_all_reports_counts() {
        let report = |stage, max| {
            format!(r#"{{"latencies": [{{"kind": "read", "stage": "{stage}", "max_ns": {max}}}]}}"#)
        };
        let reports = [report("queue", 5), report("plan", 9), report("queue", 3)].join("\n");
        let longest = longest(&reports).unwrap();
        assert_eq!((longest["queue"], longest["plan"]), (5, 9));
    }
}
