//! What happens in a run: a hash of all of it, and words for those who ask.

/// A trace.
#[derive(Clone, Debug)]
pub struct Trace {
    hash: u64,
    printing: bool,
}

impl Trace {
    /// A trace that prints what happens, or does not.
    #[must_use]
    pub const fn new(printing: bool) -> Self {
        Self { hash: 0xcbf2_9ce4_8422_2325, printing }
    }

    /// Something happened.
    #[inline]
    pub const fn mix(&mut self, what: u64) {
        self.hash = (self.hash ^ what).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }

    /// In words, which are made only if they are printed.
    #[inline]
    pub fn note(&self, words: impl FnOnce() -> String) {
        if self.printing {
            println!("    {}", words());
        }
    }

    /// A number that two runs have in common only if all that happened was the same.
    #[must_use]
    pub const fn hash(&self) -> u64 {
        self.hash
    }
}
