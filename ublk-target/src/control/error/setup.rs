//! Errors of single steps that all of a device's life has in common.

use std::io;

use ublk_engine::lane::LaneError;
use ublk_engine::units::Qid;
use uring_ext::Errno;

use super::is_passing;
use crate::os::memory::{self, Shortage};

/// A step of the set-up failed.
#[derive(Debug, thiserror::Error)]
#[error("{doing}: {errno}")]
pub struct SetupError {
    /// What was tried.
    pub doing: String,
    /// Why it failed.
    pub errno: Errno,
}

impl SetupError {
    pub(in crate::control) fn new(doing: impl Into<String>, errno: Errno) -> Self {
        Self { doing: doing.into(), errno }
    }

    /// A step failed in reading or writing, with an errno or in words of our own.
    #[must_use]
    pub fn of_io(doing: &str, error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(_) => Self::new(doing, Errno::of(error)),
            None => Self::new(format!("{doing}: {error}"), Errno::EPERM),
        }
    }

    /// Whether what was lacking may be there later.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        is_passing(self.errno)
    }
}

/// Why a queue is not served.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// A lane could not serve, or failed later.
    #[error("queue {}: {error}", qid.0)]
    Lane {
        /// The queue.
        qid: Qid,
        /// Why.
        error: LaneError,
    },
    /// The kernel refused memory, perhaps for a limit.
    #[error("queue {}: {error}: memory is short; {shortage}", qid.0)]
    Memory {
        /// The queue.
        qid: Qid,
        /// What was refused.
        error: LaneError,
        /// The limit.
        shortage: Shortage,
    },
    /// A lane could not be made, or has gone.
    #[error(transparent)]
    Setup(#[from] SetupError),
}

impl QueueError {
    /// A lane could not be set up. Where that is for lack of memory, the limits are told.
    pub(in crate::control) fn of_lane(qid: Qid, error: LaneError) -> Self {
        let errno = match error {
            LaneError::Setup { errno, .. } => Some(errno),
            LaneError::Refused { .. } | LaneError::Ring(_) => None,
        };
        match errno.and_then(memory::suspect) {
            Some(shortage) => Self::Memory { qid, error, shortage },
            None => Self::Lane { qid, error },
        }
    }

    /// Whether what was lacking may be there later.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Lane {
                error: LaneError::Setup { errno, .. } | LaneError::Ring(errno), ..
            } => is_passing(*errno),
            Self::Lane { error: LaneError::Refused { .. }, .. } => false,
            Self::Memory { .. } => true,
            Self::Setup(error) => error.is_passing(),
        }
    }
}
