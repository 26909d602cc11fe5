//! Errors of single steps, common to adding, recovering and serving.

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
    /// The step.
    pub doing: String,
    /// Its error.
    pub errno: Errno,
}

impl SetupError {
    pub(in crate::control) fn new(doing: impl Into<String>, errno: Errno) -> Self {
        Self { doing: doing.into(), errno }
    }

    /// The error of a read or write, with its errno or with its text.
    #[must_use]
    pub fn of_io(doing: &str, error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(_) => Self::new(doing, Errno::of(error)),
            None => Self::new(format!("{doing}: {error}"), Errno::EPERM),
        }
    }

    /// Whether a later attempt may succeed.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        is_passing(self.errno)
    }
}

/// Why a queue is not served.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// A lane failed, at its set-up or later.
    #[error("queue {}: {error}", qid.0)]
    Lane {
        /// The queue.
        qid: Qid,
        /// Its error.
        error: LaneError,
    },
    /// The kernel refused memory, perhaps because of a limit.
    #[error("queue {}: {error}: memory is short; {shortage}", qid.0)]
    Memory {
        /// The queue.
        qid: Qid,
        /// The error.
        error: LaneError,
        /// The limit.
        shortage: Shortage,
    },
    /// A lane could not be started, or is gone.
    #[error(transparent)]
    Setup(#[from] SetupError),
}

impl QueueError {
    /// The error of a lane's set-up. If memory was short, it names the limits.
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

    /// Whether a later attempt may succeed.
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
