//! Plays many seeds and adds their results up.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::ending::Outcome;
use crate::world::{Options, play};
use crate::{lanes, stack};

/// A seed on which a check failed.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// The message of the check that failed.
    pub message: String,
}

/// Plays a seed's stack of devices. No device waits for another one of its process.
///
/// # Errors
/// [`Failure`] if a check failed or the stack deadlocked.
pub fn play_stack(seed: u64, options: &Options) -> Result<stack::Outcome, Failure> {
    caught(seed, || stack::play(seed, stack::Sharing::Apart, options))
}

/// Plays a seed of the lanes of one device.
///
/// # Errors
/// [`Failure`] if a check failed.
pub fn play_lanes(seed: u64, options: &Options) -> Result<lanes::Outcome, Failure> {
    caught(seed, || lanes::play(seed, options))
}

/// The result of a seed, or the message of its panic.
fn caught<T>(seed: u64, play: impl FnOnce() -> T) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(play)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        let text = text.unwrap_or("a panic without a message");
        // On one line, even if the assertion has several.
        Failure { seed, message: text.split_whitespace().collect::<Vec<_>>().join(" ") }
    })
}

/// The results of a number of seeds.
#[derive(Clone, Debug, Default)]
pub struct Campaign {
    /// Seeds played.
    pub seeds: u64,
    /// The sum of their results.
    pub total: Outcome,
}

impl Campaign {
    /// Plays a seed and adds its result.
    ///
    /// # Errors
    /// [`Failure`] if a check failed. Nothing is added then.
    pub fn play(&mut self, seed: u64, options: &Options) -> Result<(), Failure> {
        let outcome = caught(seed, || play(seed, options))?;
        self.add(&outcome);
        Ok(())
    }

    /// Adds the result of a run.
    pub fn add(&mut self, outcome: &Outcome) {
        self.seeds += 1;
        self.total.merge(outcome);
    }
}
