//! Many seeds, and what they came to together.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::ending::Outcome;
use crate::stack;
use crate::world::{Options, play};

/// A seed that broke a promise.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// What was found wrong.
    pub message: String,
}

/// Plays a seed's stack of devices, none of which waits for another one of its process.
///
/// # Errors
/// [`Failure`] if it broke a promise, or nothing moved any more.
pub fn play_stack(seed: u64, options: &Options) -> Result<stack::Outcome, Failure> {
    caught(seed, || stack::play(seed, stack::Sharing::Apart, options))
}

/// What a seed comes to, or why it panics.
fn caught<T>(seed: u64, play: impl FnOnce() -> T) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(play)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        let text = text.unwrap_or("a panic without a message");
        // On one line, however the assertion was worded.
        Failure { seed, message: text.split_whitespace().collect::<Vec<_>>().join(" ") }
    })
}

/// What a number of seeds came to.
#[derive(Clone, Debug, Default)]
pub struct Campaign {
    /// Seeds played.
    pub seeds: u64,
    /// All their runs together.
    pub total: Outcome,
}

impl Campaign {
    /// Plays a seed and adds what it came to.
    ///
    /// # Errors
    /// [`Failure`] if it broke a promise; nothing is added then.
    pub fn play(&mut self, seed: u64, options: &Options) -> Result<(), Failure> {
        let outcome = caught(seed, || play(seed, options))?;
        self.add(&outcome);
        Ok(())
    }

    /// Adds what a run came to.
    pub fn add(&mut self, outcome: &Outcome) {
        self.seeds += 1;
        self.total.merge(outcome);
    }
}
