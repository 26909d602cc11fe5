//! One drive: the server of an NBD device.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow, ensure};
use rand::{RngExt as _, SeedableRng as _};
use rand_xoshiro::SplitMix64;

use super::medium::{Lost, Medium, Survival};
use super::power::{Power, When};
use super::wire::{self, Command, Request};
use super::{Asked, Shape};
use crate::guest::nbd::NbdDevice;

/// A drive. Its contents live as long as its handle.
#[derive(Debug)]
pub struct Drive {
    shape: Shape,
    shared: Arc<Shared>,
    plugged: Option<Plugged>,
}

#[derive(Debug)]
struct Plugged {
    device: NbdDevice,
    threads: Vec<JoinHandle<Result<()>>>,
}

#[derive(Debug)]
struct Shared {
    power: Arc<Power>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    medium: Medium,
    /// Commands that were received and not carried out.
    pending: Vec<Request>,
    /// The kernel will send nothing more.
    hung_up: bool,
    rng: SplitMix64,
    asked: Asked,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes commands from the kernel, until it hangs up.
    fn receive(&self, mut socket: &UnixStream) -> Result<()> {
        let ending = loop {
            match Request::receive(&mut socket) {
                Ok(Some(request)) => self.lock().pending.push(request),
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
            self.changed.notify_all();
        };
        self.lock().hung_up = true;
        self.changed.notify_all();
        // A drive without power does not mind that a connection ends amid a request.
        if self.power.is_on() { ending.context("receive from the kernel") } else { Ok(()) }
    }

    /// Carries commands out, until the power is cut or nobody wants anything any more.
    fn serve(&self, mut socket: &UnixStream) -> Result<()> {
        let mut data = Vec::new();
        loop {
            let mut state = self.lock();
            while self.power.is_on() && state.pending.is_empty() && !state.hung_up {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            let Some(cookie) = state.carry_one_out(&self.power, &mut data) else { return Ok(()) };
            drop(state);
            let replied = wire::reply(&mut socket, cookie, &data);
            if replied.is_err() && self.power.is_on() {
                return replied.context("answer the kernel");
            }
        }
    }
}

impl State {
    /// Carries any command out; what was read is in `data`. Returns whom to answer, nobody if
    /// there is nothing to do or no power.
    fn carry_one_out(&mut self, power: &Power, data: &mut Vec<u8>) -> Option<u64> {
        if self.pending.is_empty() {
            return None;
        }
        let chosen = self.rng.random_range(0..self.pending.len());
        let Request { cookie, command } = self.pending.swap_remove(chosen);
        let is_flush = command == Command::Flush;
        let is_on = |when| power.stays_on(when, self.medium.cached());
        if !is_on(if is_flush { When::BeforeFlush } else { When::Before }) {
            return None;
        }
        data.clear();
        let when = match command {
            Command::Read { offset, len } => {
                data.resize(len, 0);
                self.medium.read(offset, data);
                When::Before
            }
            Command::Write { offset, data, fua } => {
                self.asked.writes += 1;
                self.asked.fua += u64::from(fua);
                self.medium.write(offset, &data, fua);
                if fua { When::AfterFua } else { When::AfterWrite }
            }
            Command::Flush => {
                self.asked.flushes += 1;
                self.medium.flush();
                When::Before
            }
        };
        power.stays_on(when, self.medium.cached()).then_some(cookie)
    }
}

impl Drive {
    /// A drive that reads as zeros and is not plugged in yet.
    pub fn new(shape: Shape, power: Arc<Power>, rng: &mut SplitMix64) -> Result<Self> {
        let state = State {
            medium: Medium::new(usize::try_from(shape.block_bytes)?),
            pending: Vec::new(),
            hung_up: false,
            rng: rng.fork(),
            asked: Asked::default(),
        };
        let shared = Shared { power, state: Mutex::new(state), changed: Condvar::new() };
        Ok(Self { shape, shared: Arc::new(shared), plugged: None })
    }

    /// Gives the kernel a device, while there is power.
    pub fn plug_in(&mut self) -> Result<()> {
        ensure!(self.plugged.is_none(), "the drive is plugged in already");
        let (kernel, server) = UnixStream::pair()?;
        self.shared.lock().hung_up = false;
        let shared = Arc::clone(&self.shared);
        let socket = server.try_clone()?;
        let receiver = thread::Builder::new()
            .name("drive-receiver".into())
            .spawn(move || shared.receive(&socket))?;
        let shared = Arc::clone(&self.shared);
        let worker =
            thread::Builder::new().name("drive".into()).spawn(move || shared.serve(&server))?;
        // If that fails, the kernel's end is closed here, which ends the threads.
        let device = NbdDevice::connect(kernel, self.shape)?;
        self.plugged = Some(Plugged { device, threads: vec![receiver, worker] });
        Ok(())
    }

    pub fn path(&self) -> Result<PathBuf> {
        Ok(self.plugged.as_ref().context("a drive without a device")?.device.path())
    }

    pub fn asked(&self) -> Asked {
        self.shared.lock().asked
    }

    /// Loses what is in the cache, while there is no power.
    pub fn lose(&self, survival: Survival) -> Lost {
        let mut state = self.shared.lock();
        let State { medium, pending, rng, .. } = &mut *state;
        pending.clear();
        let lost = medium.cut(survival, rng);
        drop(state);
        self.shared.changed.notify_all();
        lost
    }

    /// Ends the device, while there is no power: what is in flight fails.
    pub fn unplug(&mut self) -> Result<()> {
        let plugged = self.plugged.as_mut().context("a drive without a device")?;
        plugged.device.disconnect()?;
        for thread in plugged.threads.drain(..) {
            thread.join().map_err(|_| anyhow!("a thread of a drive has panicked"))??;
        }
        self.shared.lock().pending.clear();
        Ok(())
    }

    /// Waits until nobody has the device open any more.
    pub fn wait_until_gone(&mut self) -> Result<()> {
        let plugged = self.plugged.take().context("a drive without a device")?;
        plugged.device.wait_until_gone()
    }
}

impl Drop for Drive {
    fn drop(&mut self) {
        if self.plugged.is_some() {
            // The test has failed already; what this leaves is found by the check for leaks.
            self.shared.power.cut();
            self.lose(Survival::Nothing);
            let _ = self.unplug();
            let _ = self.wait_until_gone();
        }
    }
}
