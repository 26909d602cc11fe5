//! Progress and remaining time: a bar on a terminal, otherwise a line for each load.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Shows the progress.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    steps: u32,
    done: u32,
    began: Instant,
    /// The last line that was printed without a terminal.
    said: String,
}

impl Progress {
    /// Progress of this many steps. The first begins now.
    pub fn new(steps: u32) -> Self {
        let bar = ProgressBar::new(u64::from(steps));
        let style = ProgressStyle::with_template("[{bar:24}] {pos}/{len} {wide_msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        // No bar on terminals that cannot move the cursor back.
        let bar = Some(bar).filter(|bar| !bar.is_hidden());
        if let Some(bar) = &bar {
            bar.enable_steady_tick(Duration::from_millis(250));
        }
        Self { bar, steps, done: 0, began: Instant::now(), said: String::new() }
    }

    /// Shows the next step. `part` is the group of steps that it belongs to.
    pub fn step(&mut self, part: &str, step: &str) {
        let left = time_left(self.began.elapsed(), self.done, self.steps);
        let left = left.map(|left| format!(", {} left", words(left))).unwrap_or_default();
        match &self.bar {
            Some(bar) => {
                bar.set_position(u64::from(self.done));
                bar.set_message(format!("{part}, {step}{left}"));
            }
            None if self.said != part => {
                let percent = u64::from(self.done) * 100 / u64::from(self.steps.max(1));
                eprintln!("{part} ({percent} % done{left})");
                self.said = part.to_owned();
            }
            None => {}
        }
        self.done += 1;
    }

    /// Reduces the number of steps.
    pub fn skip(&mut self, steps: u32) {
        self.steps = self.steps.saturating_sub(steps);
        if let Some(bar) = &self.bar {
            bar.set_length(u64::from(self.steps));
        }
    }

    /// Prints a line above the bar.
    pub fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// The remaining time, by the mean duration of the steps so far; `None` before the first one is
/// done.
fn time_left(elapsed: Duration, done: u32, steps: u32) -> Option<Duration> {
    (done > 0).then(|| elapsed / done * steps.saturating_sub(done))
}

/// A duration in words.
pub fn words(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..90 => format!("{seconds} s"),
        seconds @ 90..5400 => format!("{} min", seconds.div_ceil(60)),
        seconds => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_follows_from_the_time_taken() {
        let seconds = Duration::from_secs;
        assert_eq!(time_left(seconds(0), 0, 10), None);
        assert_eq!(time_left(seconds(40), 4, 10), Some(seconds(60)));
        assert_eq!(time_left(seconds(40), 10, 8), Some(seconds(0)));
        let said = [5, 89, 90, 3600, 5400, 9000].map(|time| words(seconds(time)));
        assert_eq!(said, ["5 s", "89 s", "2 min", "60 min", "1 h 30 min", "2 h 30 min"]);
    }
}
