//! Figures as text: three digits and a unit.

use ublk_engine::units::Bytes;

use super::estimate::Estimate;
use crate::results::Load;

/// The text where nothing was measured.
pub const NONE: &str = "-";

/// Requests a second: `7.25k`.
#[must_use]
pub fn rate(per_s: f64) -> String {
    scaled(per_s, 1000.0, &["", "k", "M", "G"])
}

/// Bytes a second: `3.40 GB/s`, in powers of 1000 as drives are sold.
#[must_use]
pub fn bandwidth(bytes_per_s: f64) -> String {
    scaled(bytes_per_s, 1000.0, &[" B/s", " kB/s", " MB/s", " GB/s", " TB/s"])
}

/// A time: `85.2 µs`.
#[must_use]
pub fn time(ns: f64) -> String {
    scaled(ns, 1000.0, &[" ns", " µs", " ms", " s"])
}

/// A ratio: `0.934`, `12.3`.
#[must_use]
pub fn ratio(ratio: f64) -> String {
    if ratio >= 1000.0 { format!("{ratio:.0}") } else { digits(ratio, 3) }
}

/// A ratio with its interval: `0.934 [0.921–0.945]`.
#[must_use]
pub fn with_interval(estimate: &Estimate) -> String {
    let [median, low, high] = [estimate.median, estimate.low, estimate.high].map(ratio);
    format!("{median} [{low}–{high}]")
}

/// A fraction as a percentage: `93.4 %`.
#[must_use]
pub fn percent(part: f64) -> String {
    format!("{} %", digits(part * 100.0, 1))
}

/// A number of bytes: `128 KiB`.
#[must_use]
pub fn bytes(bytes: u64) -> String {
    Bytes(bytes).to_string()
}

/// Whether to show a load's bandwidth, not its requests a second.
#[must_use]
pub fn is_large(load: &Load) -> bool {
    load.block_bytes >= 64 << 10
}

/// A load in two short lines, for the head of a column: `4K randread`, `QD 32`.
#[must_use]
pub fn short(load: &Load) -> [String; 2] {
    let size = bytes(load.block_bytes).replace(" KiB", "K").replace(" MiB", "M").replace(" B", "B");
    let rw: String = load.rw.chars().take(9).collect();
    let mixed = load.read_percent.map(|percent| format!(" {percent}%r")).unwrap_or_default();
    [format!("{size} {rw}"), format!("QD {}{mixed}", load.depth)]
}

/// A figure with this many decimal digits.
fn digits(figure: f64, behind: usize) -> String {
    format!("{figure:.behind$}")
}

/// Three digits and a unit.
fn scaled(mut figure: f64, step: f64, units: &[&str]) -> String {
    let mut units = units.iter();
    let mut unit = units.next().copied().unwrap_or_default();
    // A figure that would be rounded up to the next unit uses that unit.
    while figure >= step * 0.9995 {
        let Some(next) = units.next() else { break };
        (figure, unit) = (figure / step, next);
    }
    let behind = match figure {
        0.0 => 0,
        figure if figure < 9.995 => 2,
        figure if figure < 99.95 => 1,
        _ => 0,
    };
    format!("{}{unit}", digits(figure, behind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_digits() {
        for (figure, expected) in [
            (0.0, "0"),
            (7.249, "7.25"),
            (9.996, "10.0"),
            (42.0, "42.0"),
            (999.4, "999"),
            (999.6, "1.00k"),
            (23_456.0, "23.5k"),
            (1_234_567.0, "1.23M"),
            (1e15, "1000000G"),
        ] {
            assert_eq!(rate(figure), expected);
        }
        assert_eq!(time(85_210.0), "85.2 µs");
        assert_eq!(time(999.7), "1.00 µs");
        assert_eq!(time(3.2e9), "3.20 s");
        assert_eq!(bandwidth(3.4e9), "3.40 GB/s");
        assert_eq!(percent(0.9344), "93.4 %");
        assert_eq!(ratio(12.3456), "12.346");
    }

    #[test]
    fn loads_have_short_heads() {
        let mut load = crate::sample::load("qd32", "randread", 4096, 32);
        assert_eq!(short(&load), ["4K randread", "QD 32"]);
        (load.block_bytes, load.rw, load.read_percent) = (1 << 20, "randrw".into(), Some(70));
        assert_eq!(short(&load), ["1M randrw", "QD 32 70%r"]);
    }
}
