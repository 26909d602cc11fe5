//! The trace of a run: a hash of everything that happens, and text if it is printed.

/// A trace.
#[derive(Clone, Debug)]
pub struct Trace {
    hash: u64,
    printing: bool,
}

impl Trace {
    /// A trace that prints its text if `printing`.
    #[must_use]
    pub const fn new(printing: bool) -> Self {
        Self { hash: 0xcbf2_9ce4_8422_2325, printing }
    }

    /// Adds an event to the hash.
    #[inline]
    pub const fn mix(&mut self, what: u64) {
        self.hash = (self.hash ^ what).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }

    /// Prints a text, which is built only if it is printed.
    #[inline]
    pub fn note(&self, words: impl FnOnce() -> String) {
        if self.printing {
            println!("    {}", words());
        }
    }

    /// The hash. It is equal for two runs if the same things happened.
    #[must_use]
    pub const fn hash(&self) -> u64 {
        self.hash
    }
}
