//! Named steps of the control path, for tests that kill a process at each step. Without the feature
//! `test-hooks` of this package, a step does nothing.
//!
//! The environment variable `UBLK_TARGET_STEP` is `STEP WHOM SIGNAL FILE`. The first process that
//! reaches the step removes the file and sends the signal, to itself (`self`) or to its parent
//! (`parent`). Later calls find no file and continue. After killing its parent, the process
//! continues only when the parent has closed its files, as if it had reached the step later.

/// The process has come to a step.
#[cfg(not(feature = "test-hooks"))]
#[inline]
pub const fn step(_name: &str) {}

#[cfg(feature = "test-hooks")]
pub use asked::step;

#[cfg(any(test, feature = "test-hooks"))]
mod asked {
    use std::path::PathBuf;
    use std::str::FromStr;

    use nix::sys::signal::Signal;
    use nix::unistd::Pid;

    struct Asked {
        step: String,
        whom: Pid,
        signal: Signal,
        file: PathBuf,
    }

    impl Asked {
        fn parse(text: &str) -> Option<Self> {
            let mut words = text.split(' ');
            let step = words.next()?.to_owned();
            let whom = match words.next()? {
                "self" => Pid::this(),
                "parent" => Pid::parent(),
                _ => return None,
            };
            let signal = Signal::from_str(words.next()?).ok()?;
            Some(Self { step, whom, signal, file: PathBuf::from(words.next()?) })
        }
    }

    /// The process has come to a step.
    #[cfg(feature = "test-hooks")]
    pub fn step(name: &str) {
        use std::sync::OnceLock;
        use std::time::Duration;

        use nix::sys::signal::kill;

        use crate::os::process::Watch;

        static ASKED: OnceLock<Option<Asked>> = OnceLock::new();
        let asked = ASKED.get_or_init(|| Asked::parse(&std::env::var("UBLK_TARGET_STEP").ok()?));
        let Some(asked) = asked.as_ref().filter(|asked| asked.step == name) else { return };
        if std::fs::remove_file(&asked.file).is_ok() {
            log::debug!("{name}: {} to {}", asked.signal, asked.whom);
            let victim = u32::try_from(asked.whom.as_raw()).map(Watch::on);
            let _ = kill(asked.whom, asked.signal);
            if let (Ok(victim), Signal::SIGKILL) = (victim, asked.signal) {
                let _ = victim.has_ended(Duration::from_secs(5));
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn what_is_asked_for_is_read() {
            let asked = Asked::parse("added self SIGTERM /tmp/x").unwrap();
            assert_eq!((asked.step.as_str(), asked.whom), ("added", Pid::this()));
            assert_eq!((asked.signal, asked.file), (Signal::SIGTERM, PathBuf::from("/tmp/x")));
            for wrong in
                ["", "added", "added me SIGTERM f", "added self TERM f", "added self SIGTERM"]
            {
                assert!(Asked::parse(wrong).is_none(), "{wrong}");
            }
        }
    }
}
