//! The kernel as a witness: how often the driver copied a request's data, and how often it lent
//! the request's own pages.

use std::time::Duration;

use anyhow::Result;

use crate::guest::ublk::trace::CallCounter;

/// The driver copies between a request and the server's memory.
const COPY: &str = "ublk_copy_user_pages";
/// The driver enters a request's pages into the server's ring.
const LEND: &str = "io_buffer_register_bvec";

/// Counters on these two functions, removed when dropped.
#[derive(Debug)]
pub struct Witness(CallCounter);

impl Witness {
    /// Starts to count. To be done while the device is idle.
    pub fn new() -> Result<Self> {
        let counter = CallCounter::new(&[COPY, LEND])?;
        // The kernel turns the probes' breakpoints into jumps in the background. Old emulators
        // are at risk where code is patched while it runs.
        std::thread::sleep(Duration::from_millis(500));
        Ok(Self(counter))
    }

    /// Copies and loans so far.
    pub fn counts(&self) -> Result<(u64, u64)> {
        Ok((self.0.calls(COPY)?, self.0.calls(LEND)?))
    }
}
