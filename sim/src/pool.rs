//! The process's only real buffer pool.
//!
//! The engine's copy modes need addresses that only a [`BufferPool`] makes, and a pool stays mapped
//! until the process ends. So all seeds share one. Its memory is never used, since the model keeps
//! the bytes elsewhere.

use std::cell::Cell;
use std::sync::Mutex;

use uring_ext::nvme::{Namespace, RangeAddr, Ranges};
use uring_ext::pool::{BufferPool, PoolAddr};

use crate::MAX_REQUEST;
use crate::setup::{MAX_DEPTH, MAX_POOL};

static POOL: Mutex<Option<BufferPool>> = Mutex::new(None);

thread_local! {
    static RANGES: Cell<Option<Ranges>> = const { Cell::new(None) };
}

/// Stores a range, in memory of this thread that is never unmapped.
///
/// # Panics
/// If the memory, a few pages, cannot be mapped.
#[must_use]
pub fn range(index: u16, namespace: Namespace, offset: u64, len: u64) -> RangeAddr {
    const COUNT: u16 = MAX_DEPTH * 8;
    let new = || Ranges::new(COUNT).unwrap_or_else(|errno| panic!("ranges: {errno}"));
    let mut ranges = RANGES.get().unwrap_or_else(new);
    RANGES.set(Some(ranges));
    ranges.set(index, namespace, offset, len)
}

/// Addresses in the pool, and back.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    pool: BufferPool,
    base: u64,
    stride: u64,
}

impl Addresses {
    /// The addresses in the process's pool.
    ///
    /// # Panics
    /// If the pool, a few hundred KiB, cannot be mapped.
    #[must_use]
    pub fn of_process() -> Self {
        let mut pool = POOL.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let pool = *pool.get_or_insert_with(|| {
            BufferPool::new(MAX_POOL, MAX_REQUEST).unwrap_or_else(|errno| panic!("pool: {errno}"))
        });
        let base = pool.addr(0, 0).get();
        Self { pool, base, stride: pool.addr(1, 0).get() - base }
    }

    /// The address of a byte.
    #[must_use]
    pub fn of(&self, buffer: u16, offset: u32) -> PoolAddr {
        self.pool.addr(buffer, offset)
    }

    /// Buffer and offset of an address.
    ///
    /// # Panics
    /// If it is outside the pool.
    #[must_use]
    pub fn find(&self, addr: u64) -> (u16, usize) {
        let distance = addr.checked_sub(self.base).unwrap_or_else(|| panic!("address {addr:#x}"));
        let buffer = u16::try_from(distance / self.stride).unwrap_or(u16::MAX);
        assert!(buffer < self.pool.count(), "address {addr:#x} is not of the pool");
        (buffer, usize::try_from(distance % self.stride).unwrap_or(usize::MAX))
    }
}
