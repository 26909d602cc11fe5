//! Why a device could not be added, served or recovered.
//!
//! | error | of what |
//! |---|---|
//! | [`AddError`] | adding a device |
//! | [`ServeError`] | serving one that is there |
//! | [`RecoverError`] | a next server for one |
//! | [`LayersError`] | changing its layers while it is used |
//! | [`PlanError`], [`LayoutError`] | deciding what a device is, before the driver is asked |
//! | [`QueueError`], [`SetupError`] | single steps |
//!
//! The upper ones wrap the lower ones without adding words. `is_passing` says whether a later
//! attempt may succeed: something was lacking, such as memory, descriptors or space in a file
//! system, or another process had it.

mod add;
mod layers;
mod plan;
mod recover;
mod serve;
mod setup;

use uring_ext::Errno;
use uring_ext::control::ControlError;

pub use add::AddError;
pub use layers::LayersError;
pub use plan::{ExtentProblem, LayoutError, PlanError};
pub use recover::RecoverError;
pub use serve::{AnnounceError, ServeError};
pub use setup::{QueueError, SetupError};

/// Why a server failed while it added or recovered its device, or later.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Adding the device, or serving it afterwards.
    #[error(transparent)]
    Add(#[from] AddError),
    /// Recovering the device, or serving it afterwards.
    #[error(transparent)]
    Recover(#[from] RecoverError),
}

impl ServerError {
    /// Whether a later attempt may succeed.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Add(error) => error.is_passing(),
            Self::Recover(error) => error.is_passing(),
        }
    }
}

/// Whether a failed operation may succeed later.
fn is_passing(errno: Errno) -> bool {
    const PASSING: [i32; 9] = [
        libc::EAGAIN,
        libc::EINTR,
        libc::ENOMEM,
        libc::ENOSPC,
        libc::EDQUOT,
        libc::EMFILE,
        libc::ENFILE,
        libc::EBUSY,
        libc::ENOBUFS,
    ];
    PASSING.contains(&errno.number())
}

fn is_passing_control(error: &ControlError) -> bool {
    error.errno().is_some_and(is_passing)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ublk_engine::lane::LaneError;
    use ublk_engine::units::{Bytes, Qid};

    use super::*;
    use crate::backing::{BackingError, BackingProblem};
    use crate::os::memory::Shortage;

    fn setup(errno: Errno) -> SetupError {
        SetupError::new("writing", errno)
    }

    fn lane(error: LaneError) -> QueueError {
        QueueError::Lane { qid: Qid(0), error }
    }

    fn backing(problem: BackingProblem) -> LayoutError {
        LayoutError::Backing(BackingError { path: "/x".into(), problem })
    }

    /// A supervisor retries after the first ones, and gives up after the others. A wrapping error
    /// gives the same verdict and the same text.
    #[test]
    fn what_may_be_there_later_is_told_apart() {
        let shortage = || Shortage::Locked { limit: Bytes(8 << 20) };
        let ring = |errno| LaneError::Setup { doing: "making the ring", errno };
        let memory =
            QueueError::Memory { qid: Qid(0), error: ring(Errno::EFAULT), shortage: shortage() };
        let bytes = Bytes(16 << 20);
        let waited = Duration::from_secs(30);
        let stuck = || RecoverError::Stuck { what: "it".to_owned(), waited };
        let no_memory =
            || PlanError::NoMemory { needed: bytes, buffers: bytes, shortage: shortage() };
        let passing: [ServerError; 13] = [
            AddError::from(setup(Errno::ENOSPC)).into(),
            RecoverError::from(setup(Errno::EBUSY)).into(),
            AddError::from(lane(ring(Errno::ENOMEM))).into(),
            AddError::from(ServeError::from(memory)).into(),
            AddError::from(no_memory()).into(),
            RecoverError::from(no_memory()).into(),
            AddError::from(PlanError::from(backing(BackingProblem::InUse(Vec::new())))).into(),
            RecoverError::Below { id: 1, lower: 0 }.into(),
            stuck().into(),
            RecoverError::from(ServeError::from(stuck())).into(),
            AddError::OnUnserved(0).into(),
            AddError::from(ServeError::from(AnnounceError::from(setup(Errno::ENOSPC)))).into(),
            RecoverError::from(PlanError::from(backing(BackingProblem::Failed {
                doing: "opening",
                errno: Errno::EAGAIN,
            })))
            .into(),
        ];
        for error in passing {
            assert!(error.is_passing(), "{error}");
        }
        let lasting: [ServerError; 13] = [
            AddError::from(setup(Errno::EIO)).into(),
            RecoverError::from(QueueError::from(setup(Errno::EIO))).into(),
            AddError::from(lane(LaneError::Ring(Errno::EINVAL))).into(),
            AddError::from(PlanError::from(backing(BackingProblem::Missing))).into(),
            RecoverError::from(PlanError::from(backing(BackingProblem::Changed(
                "it is another".to_owned(),
            ))))
            .into(),
            RecoverError::from(PlanError::from(LayoutError::NoBackings)).into(),
            AddError::IdTaken(3).into(),
            AddError::Interrupted.into(),
            AddError::from(ServeError::from(AnnounceError::Abandoned)).into(),
            AddError::from(ServeError::NotStopped).into(),
            RecoverError::from(ServeError::from(RecoverError::NotStarted(3))).into(),
            RecoverError::NotRecovered.into(),
            RecoverError::Served { id: 3, server: "x (7)".to_owned() }.into(),
        ];
        for error in lasting {
            assert!(!error.is_passing(), "{error}");
        }
    }

    #[test]
    fn wrapping_an_error_adds_no_words() {
        let said = AddError::from(ServeError::from(RecoverError::from(setup(Errno::EIO))));
        assert_eq!(ServerError::from(said).to_string(), setup(Errno::EIO).to_string());
        assert_eq!(setup(Errno::EIO).to_string(), format!("writing: {}", Errno::EIO));
    }
}
