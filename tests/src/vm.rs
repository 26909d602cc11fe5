//! A running VM: starts QEMU, talks to the agent, and notices when the guest
//! panics, hangs or vanishes. Nothing waits without a limit.

mod console;
mod disks;
mod down;
mod link;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::cleanup::{self, Group, RunDir};
use crate::config::VmConfig;
use crate::image::Image;
use crate::proto::{self, ExitState, Frame, Job, KmsgRecord, ToGuest, ToHost};
use crate::qemu::{self, Accel, Files};
use crate::ui;

use console::Console;
pub use disks::Disks;
pub use down::VmDown;
use link::{Event, receive};
pub use link::{Sink, Stream, pass_on};

/// How often the console is looked at while the agent is silent.
const TICK: Duration = Duration::from_millis(100);
/// How long the agent may take over what needs no program to be run.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a killed program may take to die.
const KILL_TIMEOUT: Duration = Duration::from_secs(60);
/// Silence on the console after which KVM counts as not working.
const KVM_PATIENCE: Duration = Duration::from_secs(20);
/// Console lines shown with a VM's end.
const TAIL_LINES: usize = 40;

static KVM_FAILED: AtomicBool = AtomicBool::new(false);

/// How a program in the guest went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobResult {
    /// How it ended.
    pub state: ExitState,
    /// It was killed for running over its time; what it hung on.
    pub timed_out: Option<String>,
}

/// A running VM. Dropping it kills QEMU and removes its files.
#[derive(Debug)]
pub struct Vm {
    qemu: Group,
    sink: Sink,
    events: Receiver<Event>,
    console: Console,
    stderr: PathBuf,
    silence_timeout: Option<Duration>,
    last_sign: Instant,
    last_look: Instant,
    kernel: String,
    accel: Accel,
    /// Last, so that it goes when QEMU has gone.
    _files: Arc<RunDir>,
}

impl Vm {
    /// Boots a VM with fresh drives and waits for its agent.
    ///
    /// # Errors
    /// [`VmDown`] when the guest does not come up, else what could not be
    /// made or started.
    pub fn boot(config: &VmConfig, image: &Image, payload: &Path) -> Result<Self> {
        Self::boot_on(config, image, payload, &Disks::create(config)?)
    }

    /// Boots a VM on drives that may have been used before.
    ///
    /// # Errors
    /// As [`Vm::boot`].
    pub fn boot_on(
        config: &VmConfig,
        image: &Image,
        payload: &Path,
        disks: &Disks,
    ) -> Result<Self> {
        let mut accel = Accel::detect();
        if config.icount || KVM_FAILED.load(Ordering::Relaxed) {
            accel = Accel::Tcg;
        }
        let mut vm = Self::start(config, image, payload, disks, accel)?;
        match vm.wait_for_agent(config.boot_timeout) {
            Ok(()) => Ok(vm),
            Err(down) if accel == Accel::Kvm && vm.console.is_empty() => {
                ui::note(&format!("KVM does not work here ({}): emulating instead", down.reason));
                KVM_FAILED.store(true, Ordering::Relaxed);
                drop(vm);
                let mut vm = Self::start(config, image, payload, disks, Accel::Tcg)?;
                vm.wait_for_agent(config.boot_timeout)?;
                Ok(vm)
            }
            Err(down) => Err(down.into()),
        }
    }

    fn start(
        config: &VmConfig,
        image: &Image,
        payload: &Path,
        disks: &Disks,
        accel: Accel,
    ) -> Result<Self> {
        let directory = disks.directory.path();
        let console = directory.join("console.log");
        let stderr = directory.join("qemu.log");
        File::create(&console)?;
        let files = Files {
            kernel: image.kernel(config.kernel),
            root: image.root_disk(),
            payload: payload.to_owned(),
            console: console.clone(),
            drives: disks.drives.clone(),
        };
        let mut command = emulator(config, accel);
        command
            .args(qemu::args(config, &files, accel))
            // The overlay that takes the guest's writes to its root disk.
            .env("TMPDIR", directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&stderr)?);
        let mut group = Group::spawn(&mut command, Signal::SIGKILL)?;
        let stdin = group.child().stdin.take().context("QEMU's standard input")?;
        let stdout = group.child().stdout.take().context("QEMU's standard output")?;
        let (sender, events) = mpsc::channel();
        std::thread::Builder::new()
            .name("from-guest".into())
            .spawn(move || receive(stdout, &sender))?;
        Ok(Self {
            qemu: group,
            sink: Sink::new(stdin),
            events,
            console: Console::new(&console)?,
            stderr,
            silence_timeout: None,
            last_sign: Instant::now(),
            last_look: Instant::now(),
            kernel: String::new(),
            accel,
            _files: Arc::clone(&disks.directory),
        })
    }

    fn wait_for_agent(&mut self, timeout: Duration) -> Result<(), VmDown> {
        let deadline = Instant::now() + timeout;
        let kvm_deadline = Instant::now() + KVM_PATIENCE;
        let doubtful = self.accel == Accel::Kvm;
        loop {
            match self.next(if doubtful { deadline.min(kvm_deadline) } else { deadline })? {
                Some(Event::Message(ToHost::Hello { version, kernel, .. })) => {
                    if version != proto::VERSION {
                        return Err(self.down(format!("the agent speaks version {version}")));
                    }
                    self.kernel = kernel;
                    return Ok(());
                }
                Some(_) => {}
                None if Instant::now() >= deadline => {
                    let seconds = timeout.as_secs();
                    return Err(self.down(format!("the guest did not boot within {seconds} s")));
                }
                None if self.console.is_empty() => {
                    return Err(self.down("no output for 20 s".into()));
                }
                None => {}
            }
        }
    }

    /// The release of the kernel that runs.
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// What executes the guest.
    pub fn accel(&self) -> Accel {
        self.accel
    }

    /// Takes silence of this length for a hang. For guests whose agent sends
    /// heartbeats, that is all but those with deterministic time.
    pub fn watch_silence(&mut self, timeout: Option<Duration>) {
        self.last_sign = Instant::now();
        self.silence_timeout = timeout;
    }

    /// The console's last lines.
    pub fn console_tail(&self) -> Vec<String> {
        self.console.tail(TAIL_LINES)
    }

    /// Where to send what the user types.
    pub fn sink(&self) -> Sink {
        self.sink.clone()
    }

    /// Runs a program; `output` gets what it prints, piece by piece. A program
    /// that runs over `timeout` is killed with all that it started.
    ///
    /// # Errors
    /// When the VM goes down, or the program cannot be killed.
    pub fn run(
        &mut self,
        job: &Job,
        timeout: Duration,
        output: &mut dyn FnMut(Stream, &[u8]),
    ) -> Result<JobResult, VmDown> {
        self.send(&ToGuest::Run(job.clone()))?;
        let program = job.argv.first().map_or("", String::as_str);
        let mut deadline = Instant::now().checked_add(timeout);
        let mut timed_out = None;
        loop {
            let far = Instant::now() + Duration::from_secs(3600);
            match self.next(deadline.unwrap_or(far))? {
                Some(Event::Output(stream, bytes)) => output(stream, &bytes),
                Some(Event::Message(ToHost::Exited { state })) => {
                    return Ok(JobResult { state, timed_out });
                }
                Some(Event::Message(ToHost::HangReport { text })) => timed_out = Some(text),
                Some(Event::Message(ToHost::Failed { reason })) => {
                    return Err(self.down(format!("the agent cannot run {program}: {reason}")));
                }
                Some(Event::Message(other)) => return Err(self.unexpected(&other)),
                Some(Event::Closed(_)) | None if deadline.is_none() => {}
                Some(Event::Closed(_)) | None if timed_out.is_none() => {
                    timed_out = Some(String::new());
                    self.send(&ToGuest::Kill)?;
                    deadline = Some(Instant::now() + KILL_TIMEOUT);
                }
                Some(Event::Closed(_)) | None => {
                    let report = timed_out.unwrap_or_default();
                    return Err(self.down(format!("{program} cannot be killed\n{report}")));
                }
            }
        }
    }

    /// Runs a program and collects its output, both streams in one text.
    ///
    /// # Errors
    /// As [`Vm::run`].
    pub fn capture(
        &mut self,
        argv: &[&str],
        timeout: Duration,
    ) -> Result<(JobResult, String), VmDown> {
        let argv = argv.iter().map(|arg| (*arg).to_owned()).collect();
        let job = Job { argv, ..Job::default() };
        let mut bytes = Vec::new();
        let result = self.run(&job, timeout, &mut |_, piece| bytes.extend_from_slice(piece))?;
        Ok((result, String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// What the kernel logged since this was last asked.
    ///
    /// # Errors
    /// When the VM goes down.
    pub fn kernel_log(&mut self) -> Result<Vec<KmsgRecord>, VmDown> {
        let mut all = Vec::new();
        loop {
            let answer = self.ask(&ToGuest::ReadKmsg)?;
            let ToHost::Kmsg { records, more } = answer else {
                return Err(self.unexpected(&answer));
            };
            all.extend(records);
            if !more {
                return Ok(all);
            }
        }
    }

    /// Takes the guest's present state as what tests have to leave behind.
    ///
    /// # Errors
    /// When the VM goes down.
    pub fn take_baseline(&mut self) -> Result<(), VmDown> {
        let answer = self.ask(&ToGuest::TakeBaseline)?;
        if answer == ToHost::BaselineTaken { Ok(()) } else { Err(self.unexpected(&answer)) }
    }

    /// What is there beyond the baseline, and what of it could not be removed.
    ///
    /// # Errors
    /// When the VM goes down.
    pub fn leaks(&mut self) -> Result<(Vec<String>, Vec<String>), VmDown> {
        let answer = self.ask(&ToGuest::FindLeaks)?;
        let ToHost::Leaks { found, stuck } = answer else {
            return Err(self.unexpected(&answer));
        };
        Ok((found, stuck))
    }

    /// Switches the guest off in order and waits for QEMU's end.
    ///
    /// # Errors
    /// When the guest does not go down by itself; it is ended then.
    pub fn power_off(mut self) -> Result<(), VmDown> {
        self.send(&ToGuest::PowerOff)?;
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        loop {
            match self.qemu.try_wait() {
                Ok(Some(status)) if status.success() => return Ok(()),
                Ok(Some(status)) => return Err(self.down(format!("QEMU ended with {status}"))),
                Ok(None) if Instant::now() < deadline => {
                    // Its end closes the pipe, and so wakes this.
                    let _ = self.events.recv_timeout(TICK);
                }
                _ => return Err(self.down("the guest does not switch itself off".into())),
            }
        }
    }

    /// Cuts the power: the guest ends in the middle of whatever it does. What
    /// its drives had acknowledged is kept by the host.
    pub fn cut_power(mut self) {
        self.qemu.kill();
    }

    fn ask(&mut self, question: &ToGuest) -> Result<ToHost, VmDown> {
        self.send(question)?;
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        loop {
            match self.next(deadline)? {
                Some(Event::Message(answer)) => return Ok(answer),
                Some(Event::Output(..)) => {} // of a process that outlived its job
                Some(Event::Closed(_)) | None => {
                    return Err(self.down("the agent does not answer".into()));
                }
            }
        }
    }

    fn send(&mut self, message: &ToGuest) -> Result<(), VmDown> {
        let sent = Frame::message(message).and_then(|frame| self.sink.send(&frame));
        sent.map_err(|error| self.down(format!("cannot reach the agent: {error}")))
    }

    fn unexpected(&mut self, message: &ToHost) -> VmDown {
        self.down(format!("unexpected message from the agent: {message:?}"))
    }

    /// The next event but heartbeats, or `None` at the deadline.
    fn next(&mut self, deadline: Instant) -> Result<Option<Event>, VmDown> {
        loop {
            if self.last_look.elapsed() >= TICK {
                self.look_after_guest()?;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left.min(TICK)) {
                Ok(Event::Closed(why)) => return Err(self.closed(&why)),
                Ok(event) => {
                    self.last_sign = Instant::now();
                    if !matches!(event, Event::Message(ToHost::Heartbeat { .. })) {
                        return Ok(Some(event));
                    }
                }
                Err(RecvTimeoutError::Timeout) if left.is_zero() => return Ok(None),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(self.closed("")),
            }
        }
    }

    /// Looks for a panic, for the end of QEMU, and for signs of life.
    fn look_after_guest(&mut self) -> Result<(), VmDown> {
        self.last_look = Instant::now();
        if self.console.read_new() {
            self.last_sign = Instant::now();
        }
        if self.console.panicked() {
            // The panic resets the machine, which ends QEMU: all is written then.
            let deadline = Instant::now() + Duration::from_secs(10);
            while Instant::now() < deadline && matches!(self.qemu.try_wait(), Ok(None)) {
                std::thread::sleep(Duration::from_millis(10));
            }
            self.console.read_new();
            self.qemu.kill();
            return Err(VmDown {
                reason: "the guest's kernel panicked".into(),
                console: self.console.panic_text(),
            });
        }
        match self.silence_timeout {
            Some(limit) if self.last_sign.elapsed() > limit => {
                Err(self.down(format!("no sign of life for {} s", limit.as_secs())))
            }
            _ => Ok(()),
        }
    }

    /// The line to the agent is closed: QEMU has ended, or the bytes make no
    /// sense.
    fn closed(&mut self, why: &str) -> VmDown {
        if let Err(down) = self.look_after_guest() {
            return down;
        }
        let said = std::fs::read_to_string(&self.stderr).unwrap_or_default();
        let status = match self.qemu.try_wait() {
            Ok(Some(status)) => format!("QEMU ended: {status}"),
            _ => "the line to the agent closed".into(),
        };
        self.down([&status, why, said.trim()].join(" ").trim_end().to_owned())
    }

    /// Ends the VM and says why.
    fn down(&mut self, reason: String) -> VmDown {
        self.qemu.kill();
        self.console.read_new();
        VmDown { reason, console: self.console_tail() }
    }
}
/// The command that runs QEMU, without its arguments. A guest of one emulated CPU gets one CPU of
/// the host: QEMU 7.2 loses doorbells of its NVMe drives when the guest rings just as the drive
/// goes idle on another CPU, and the guest then waits until its driver gives up. That hit every
/// run of lock-step writes with probes in place, and none with both threads on one CPU.
fn emulator(config: &VmConfig, accel: Accel) -> Command {
    const QEMU: &str = "qemu-system-x86_64";
    let own = sched_getaffinity(Pid::from_raw(0)).ok();
    let last =
        own.and_then(|own| (0..CpuSet::count()).rev().find(|cpu| own.is_set(*cpu) == Ok(true)));
    match last {
        Some(cpu) if accel == Accel::Tcg && config.cpus == 1 => {
            let mut command = cleanup::command("taskset", Signal::SIGKILL);
            command.args(["-c", &cpu.to_string(), QEMU]);
            command
        }
        _ => cleanup::command(QEMU, Signal::SIGKILL),
    }
}
