//! The program that runs in the guest: takes orders from the virtio port, runs
//! programs, reads the kernel log, finds what tests left behind.

mod job;
mod kmsg;
mod leaks;

use std::fs::{self, File, OpenOptions};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::proto::{self, Frame, PORT_NAME, ToGuest, ToHost};

use job::Running;

const HEARTBEAT: Duration = Duration::from_secs(2);

/// The line to the host, shared by all threads of the agent.
#[derive(Debug, Clone)]
struct Host(Arc<Mutex<File>>);

impl Host {
    /// Sends a frame. Without a host there is nobody to tell of an error, and
    /// the main loop ends by itself.
    fn send_frame(&self, frame: &Frame) {
        let _ = frame.write_to(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn send(&self, message: &ToHost) {
        if let Ok(frame) = Frame::message(message) {
            self.send_frame(&frame);
        }
    }
}

/// Serves the host until it says to power off, or is gone.
///
/// # Errors
/// When the port is not there or what comes from it makes no sense; the init
/// script then ends the guest.
pub fn serve() -> Result<()> {
    let mut from_host = open_port()?;
    let host = Host(Arc::new(Mutex::new(from_host.try_clone()?)));
    let mut kernel_log = kmsg::Reader::open()?;
    let mut baseline = leaks::State::now();
    let running: Arc<Mutex<Option<Running>>> = Arc::default();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
    host.send(&ToHost::Hello { version: proto::VERSION, kernel, uptime_ms: uptime_ms() });
    if !fs::read_to_string("/proc/cmdline")?.contains("vm_agent.heartbeat=off") {
        start_heartbeat(host.clone())?;
    }
    loop {
        let message = match Frame::read_from(&mut from_host)? {
            // The harness is gone: nobody will ever ask for anything again.
            None => power_off(),
            Some(Frame::Message(body)) => serde_json::from_slice(&body)?,
            Some(Frame::Stdin(bytes)) => {
                job::with(&running, |job| job.type_in(&bytes));
                continue;
            }
            Some(Frame::Stdout(_) | Frame::Stderr(_)) => bail!("output from the host"),
        };
        match message {
            ToGuest::Run(job) => {
                if let Err(error) = job::start(&job, &host, &running) {
                    host.send(&ToHost::Failed { reason: format!("{error:#}") });
                }
            }
            ToGuest::Kill => job::kill(&host, &running),
            ToGuest::Interrupt => job::with(&running, Running::interrupt),
            ToGuest::Resize(size) => job::with(&running, |job| job.resize(size)),
            ToGuest::ReadKmsg => host.send(&kernel_log.read_new()),
            ToGuest::TakeBaseline => {
                baseline = leaks::State::now();
                host.send(&ToHost::BaselineTaken);
            }
            ToGuest::FindLeaks => host.send(&leaks::find_and_remove(&baseline)),
            ToGuest::PowerOff => power_off(),
        }
    }
}

/// Opens the port by its name in sysfs; udev's link may not be there yet.
fn open_port() -> Result<File> {
    let ports = Path::new("/sys/class/virtio-ports");
    for port in fs::read_dir(ports).context("no virtio ports")?.flatten() {
        let name = fs::read_to_string(port.path().join("name")).unwrap_or_default();
        if name.trim() == PORT_NAME {
            let device = Path::new("/dev").join(port.file_name());
            let file = OpenOptions::new().read(true).write(true).open(&device);
            return file.with_context(|| format!("open {}", device.display()));
        }
    }
    bail!("no virtio port named {PORT_NAME}")
}

fn start_heartbeat(host: Host) -> Result<()> {
    std::thread::Builder::new().name("heartbeat".into()).spawn(move || {
        loop {
            host.send(&ToHost::Heartbeat { uptime_ms: uptime_ms() });
            std::thread::sleep(HEARTBEAT);
        }
    })?;
    Ok(())
}

fn uptime_ms() -> u64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = text.split_whitespace().next().unwrap_or("0");
    let (whole, hundredths) = seconds.split_once('.').unwrap_or((seconds, "0"));
    whole.parse::<u64>().unwrap_or(0) * 1000 + hundredths.parse::<u64>().unwrap_or(0) * 10
}

fn power_off() -> ! {
    nix::unistd::sync();
    let error = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_POWER_OFF);
    // Only reached when the kernel refuses; the init script tries another way.
    eprintln!("vm-agent: power-off: {}", error.unwrap_err());
    std::process::exit(1)
}

/// Runs a helper program for at most `limit`, and returns what it printed.
///
/// # Errors
/// When it cannot be started, does not end in time, or fails.
fn helper(argv: &[&str], limit: Duration) -> Result<String> {
    let started = Instant::now();
    let seconds = limit.as_secs().to_string();
    let output = std::process::Command::new("timeout")
        .args(["-k", "2", &seconds])
        .args(argv)
        .stdin(std::process::Stdio::null())
        .output()
        .context("run timeout")?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    if started.elapsed() >= limit {
        bail!("{}: not done after {seconds} s", argv.join(" "));
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    bail!("{}: {} {said}", argv.join(" "), output.status)
}
