//! Runs tests that need a guest: one boot for many, and a fresh one whenever a
//! test has ended the guest or left it in a state that cannot be undone.

use std::path::Path;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};

use super::Selection;
use super::report::{Ending, Report};
use super::schedule::{Claim, Schedule};
use crate::config::{GROUPS, Group};
use crate::guest::{
    self, Code, FIGURE, LONG_VARIABLE, Outcome, SEED_VARIABLE, SKIP_EXIT_CODE, TestCase,
};
use crate::hosted::HostCtx;
use crate::image::Image;
use crate::klog::{self, Finding};
use crate::proto::{ExitState, Job, KmsgRecord};
use crate::vm::{Vm, VmDown};
use crate::{payload, shell, ui};

/// Lines of a test's output shown with its failure.
const OUTPUT_LINES: usize = 60;

/// How often a test is run if the emulator's own bug ends the guest.
const ATTEMPTS: u32 = 3;

/// Runs the selected tests of all groups, as many guests at the same time as there are processors
/// for.
///
/// # Errors
/// When the image or the guest's programs cannot be made.
pub fn run(selection: &Selection, report: &Report) -> Result<()> {
    let selected: Vec<_> =
        guest::all().filter(|test| selection.takes_guest_test(test.name)).collect();
    if selected.is_empty() {
        return Ok(());
    }
    let began = Instant::now();
    let (image, _directory, disk) = shell::prepare(&payload::TESTS, &[])?;
    report.time("the image and the programs for the guests", began.elapsed());
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let processors = u32::try_from(processors).unwrap_or(u32::MAX);
    let schedule = Schedule::new(GROUPS, &selected, processors);
    let most = GROUPS.iter().map(|group| group.guests).sum();
    let lane = || {
        while let Some(claim) = schedule.claim() {
            run_claim(&claim, selection, &image, &disk, report);
        }
    };
    thread::scope(|scope| {
        let lanes: Vec<_> = (0..processors.min(most)).map(|_| scope.spawn(lane)).collect();
        let ended: Vec<_> = lanes.into_iter().map(|lane| lane.join()).collect();
        let all_well = ended.iter().all(|end| end.is_ok());
        all_well.then_some(()).ok_or_else(|| anyhow!("a thread that runs guests has panicked"))
    })
}

/// Runs tests of a group in one guest after the other until there are none left.
fn run_claim(claim: &Claim, selection: &Selection, image: &Image, disk: &Path, report: &Report) {
    let group = claim.group;
    let mut runner = Runner {
        group,
        image,
        payload: disk,
        long: selection.long,
        report,
        vm: None,
        figures: Vec::new(),
    };
    while let Some((test, before, of)) = (!report.stopped()).then(|| claim.next()).flatten() {
        ui::status(&format!("{} [{}/{of}] {}", group.name, before + 1, test.name));
        let started = Instant::now();
        let ending = runner.run(test);
        let figures = std::mem::take(&mut runner.figures);
        let figures = if ending == Ending::Passed { figures } else { Vec::new() };
        report.add(test.name, &ending, Some(started.elapsed()), &figures);
    }
    if let Some(vm) = runner.vm.take() {
        ui::status(&format!("{}: powering off", group.name));
        let name = format!("vm_group_{}_powers_off", group.name);
        report.check(&name, || match vm.power_off() {
            Ok(()) => Ending::Passed,
            Err(down) => failed("the guest did not power off", &down.to_string()),
        });
    }
}

struct Runner<'a> {
    group: &'a Group,
    image: &'a Image,
    payload: &'a Path,
    long: bool,
    report: &'a Report,
    vm: Option<Vm>,
    /// What the last test measured.
    figures: Vec<String>,
}

/// An emulated drive that did not see its doorbell (see `vm::emulator`): the guest's driver gave
/// up on commands of the drive itself, which no program in the guest can bring about.
fn is_lost_doorbell(ending: &Ending) -> bool {
    matches!(ending, Ending::Failed(_, details) if details.contains("timeout, aborting req_op"))
}

impl Runner<'_> {
    fn run(&mut self, test: &TestCase) -> Ending {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let error = match self.try_run(test) {
                Ok(ending) if attempts < ATTEMPTS && is_lost_doorbell(&ending) => {
                    self.vm = None;
                    ui::note(&format!(
                        "{}: the emulator lost a doorbell, running it again",
                        test.name
                    ));
                    continue;
                }
                Ok(ending) => return ending,
                Err(error) => error,
            };
            self.vm = None;
            let emulator_bug = error.downcast_ref::<VmDown>().is_some_and(VmDown::is_emulator_bug);
            if emulator_bug && attempts < ATTEMPTS {
                ui::note(&format!("{}: the emulator's int3 bug, running it again", test.name));
                continue;
            }
            return error.into();
        }
    }

    /// Runs a test and the checks after it. An error means that the guest is
    /// not to be used any more.
    fn try_run(&mut self, test: &TestCase) -> Result<Ending> {
        let mut vm = match self.vm.take() {
            Some(vm) => vm,
            None => self.boot()?,
        };
        vm.kernel_log()?; // what came before is not this test's
        let (verdict, output) = self.judge(test, &mut vm)?;
        self.figures = figures(&output);
        let (left, stuck) = vm.leaks()?;
        let log = vm.kernel_log()?;
        if stuck.is_empty() {
            self.vm = Some(vm); // else it is dropped, and the next test boots
        }
        let mut problems = Vec::new();
        let mut details = String::new();
        if let Err(reason) = &verdict {
            problems.push(reason.clone());
            details.push_str(&tail(&output));
            details.push_str(&log_tail(&log));
        }
        check_log(test, &log, &mut problems, &mut details);
        check_leaks(test, &left, &stuck, &mut problems);
        Ok(match verdict {
            _ if !problems.is_empty() => failed(&problems.join("; "), &details),
            Ok(Outcome::Skip(reason)) => Ending::Skipped(reason),
            _ => Ending::Passed,
        })
    }

    fn boot(&self) -> Result<Vm> {
        let config = (self.group.config)();
        let began = Instant::now();
        let mut vm = Vm::boot(&config, self.image, self.payload).context("boot the guest")?;
        self.report.boot(self.group.name, began.elapsed());
        if !config.icount {
            vm.watch_silence(Some(config.silence_timeout));
        }
        let boot_log = vm.kernel_log()?;
        if let Some(finding) = klog::findings(&boot_log, &[]).first() {
            anyhow::bail!("trouble while booting: {}\n{}", finding.text, context(finding));
        }
        vm.take_baseline()?;
        Ok(vm)
    }

    /// The test's own verdict, and its output.
    fn judge(
        &self,
        test: &TestCase,
        vm: &mut Vm,
    ) -> Result<(Result<Outcome, String>, String), VmDown> {
        match test.code {
            Code::Guest(_) => self.judge_in_guest(test, vm),
            Code::Host(code) => {
                let mut ctx =
                    HostCtx { vm, image: self.image, payload: self.payload, long: self.long };
                match code(&mut ctx) {
                    Ok(outcome) => Ok((Ok(outcome), String::new())),
                    Err(error) => match error.downcast::<VmDown>() {
                        Ok(down) => Err(down),
                        Err(error) => {
                            let text = format!("{error:#}");
                            let reason = text.lines().next().unwrap_or("failed").to_owned();
                            Ok((Err(reason), text))
                        }
                    },
                }
            }
        }
    }

    fn judge_in_guest(
        &self,
        test: &TestCase,
        vm: &mut Vm,
    ) -> Result<(Result<Outcome, String>, String), VmDown> {
        let mut env = vec![("RUST_BACKTRACE".to_owned(), "1".to_owned())];
        if self.long {
            env.push((LONG_VARIABLE.to_owned(), "1".to_owned()));
        }
        env.extend(std::env::var(SEED_VARIABLE).map(|seed| (SEED_VARIABLE.to_owned(), seed)));
        let argv = vec!["guest-tests".to_owned(), test.name.to_owned()];
        let job = Job { argv, env, terminal: None };
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let result = vm.run(&job, test.timeout, &mut |stream, bytes| match stream {
            crate::vm::Stream::Stdout => out.extend_from_slice(bytes),
            crate::vm::Stream::Stderr => err.extend_from_slice(bytes),
        })?;
        let out = String::from_utf8_lossy(&out).into_owned();
        let err = String::from_utf8_lossy(&err).into_owned();
        let verdict = verdict(result.state, result.timed_out.is_some(), test, &out, &err);
        let hang = result.timed_out.map(|report| format!("it was at:\n{report}"));
        Ok((verdict, format!("{out}{err}{}", hang.unwrap_or_default())))
    }
}

fn verdict(
    state: ExitState,
    timed_out: bool,
    test: &TestCase,
    out: &str,
    err: &str,
) -> Result<Outcome, String> {
    if timed_out {
        return Err(format!("killed after {} s", test.timeout.as_secs()));
    }
    match state {
        ExitState::Code(0) => Ok(Outcome::Pass),
        ExitState::Code(code) if code == i32::from(SKIP_EXIT_CODE) => {
            Ok(Outcome::Skip(out.lines().last().unwrap_or("no reason given").to_owned()))
        }
        ExitState::Code(_) | ExitState::Signal(_) => {
            Err(err.lines().next().map_or_else(|| state.to_string(), str::to_owned))
        }
    }
}

fn figures(output: &str) -> Vec<String> {
    output.lines().filter_map(|line| line.strip_prefix(FIGURE)).map(str::to_owned).collect()
}

fn failed(reason: &str, details: &str) -> Ending {
    Ending::Failed(reason.to_owned(), details.to_owned())
}

fn check_log(
    test: &TestCase,
    log: &[KmsgRecord],
    problems: &mut Vec<String>,
    details: &mut String,
) {
    let found = klog::findings(log, test.allow_in_log);
    for expected in test.expect_in_log {
        if !found.iter().any(|finding| finding.text.contains(expected)) {
            problems.push(format!("the kernel did not log `{expected}`"));
        }
    }
    let is_expected =
        |finding: &&Finding| test.expect_in_log.iter().any(|text| finding.text.contains(text));
    if let Some(finding) = found.iter().find(|finding| !is_expected(finding)) {
        problems.push(format!("kernel log, {}: {}", finding.kind, finding.text));
        details.push_str(&context(finding));
    }
}

fn check_leaks(test: &TestCase, left: &[String], stuck: &[String], problems: &mut Vec<String>) {
    for expected in test.expect_leaks {
        if !left.iter().any(|thing| thing.contains(expected)) {
            problems.push(format!("nothing found left behind with `{expected}`"));
        }
    }
    let is_expected = |thing: &&String| test.expect_leaks.iter().any(|text| thing.contains(text));
    for thing in left.iter().filter(|thing| !is_expected(thing)) {
        problems.push(format!("left behind: {thing}"));
    }
    if !stuck.is_empty() {
        problems.push(format!("could not be removed: {}", stuck.join(", ")));
    }
}

fn context(finding: &Finding) -> String {
    format!("kernel log:\n{}\n", finding.context.join("\n"))
}

fn tail(output: &str) -> String {
    let lines: Vec<_> = output.lines().collect();
    let start = lines.len().saturating_sub(OUTPUT_LINES);
    let mut text = lines[start..].join("\n");
    text.push('\n');
    text
}

fn log_tail(log: &[KmsgRecord]) -> String {
    let start = log.len().saturating_sub(OUTPUT_LINES);
    let lines: Vec<_> = log[start..].iter().map(klog::line).collect();
    if lines.is_empty() { String::new() } else { format!("kernel log:\n{}\n", lines.join("\n")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test() -> TestCase {
        TestCase::guest("x", "default", |_| Ok(Outcome::Pass))
    }

    fn log(texts: &[&str]) -> Vec<KmsgRecord> {
        texts
            .iter()
            .map(|text| KmsgRecord { seq: 0, time_us: 0, level: 4, text: (*text).into() })
            .collect()
    }

    #[test]
    fn exit_codes_become_verdicts() {
        let of = |state, out, err| verdict(state, false, &test(), out, err);
        assert_eq!(of(ExitState::Code(0), "", "noise"), Ok(Outcome::Pass));
        assert_eq!(
            of(ExitState::Code(77), "a\nno such thing\n", ""),
            Ok(Outcome::Skip("no such thing".into()))
        );
        assert_eq!(of(ExitState::Code(1), "", "why\nmore"), Err("why".into()));
        assert_eq!(of(ExitState::Signal(11), "", ""), Err("killed by SIGSEGV".into()));
        let late = verdict(ExitState::Signal(9), true, &test(), "", "");
        assert_eq!(late, Err("killed after 120 s".into()));
    }

    #[test]
    fn figures_are_picked_from_the_output() {
        assert_eq!(figures("noise\nfigure: 3 s\nmore figure: 4\n"), ["3 s"]);
    }

    fn log_problems(test: &TestCase, texts: &[&str]) -> Vec<String> {
        let mut problems = Vec::new();
        check_log(test, &log(texts), &mut problems, &mut String::new());
        problems
    }

    #[test]
    fn the_kernel_log_fails_a_test_unless_expected() {
        let warning = "WARNING: CPU: 0 PID: 1 at a.c:1";
        assert_eq!(log_problems(&test(), &[warning]), [format!("kernel log, warning: {warning}")]);
        assert!(log_problems(&test().expect_in_log(&["at a.c:1"]), &[warning]).is_empty());
        assert!(log_problems(&test().allow_in_log(&["at a.c:1"]), &[warning]).is_empty());
        assert!(log_problems(&test().allow_in_log(&["at a.c:1"]), &[]).is_empty());
        assert_eq!(log_problems(&test().expect_in_log(&["at a.c:1"]), &[]).len(), 1);
        assert_eq!(log_problems(&test().expect_in_log(&["other"]), &[warning]).len(), 2);
    }

    #[test]
    fn leaks_fail_a_test_unless_expected() {
        let problems = |test: &TestCase, left: &[&str], stuck: &[&str]| {
            let strings =
                |texts: &[&str]| texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>();
            let mut problems = Vec::new();
            check_leaks(test, &strings(left), &strings(stuck), &mut problems);
            problems
        };
        assert!(problems(&test(), &[], &[]).is_empty());
        assert_eq!(problems(&test(), &["dm device: a"], &[]), ["left behind: dm device: a"]);
        let leaky = test().expect_leaks(&["dm device: a"]);
        assert!(problems(&leaky, &["dm device: a"], &[]).is_empty());
        assert_eq!(problems(&leaky, &["dm device: a"], &["dm device: a"]).len(), 1);
        assert_eq!(problems(&leaky, &["dm device: b"], &[]).len(), 2);
    }
}
