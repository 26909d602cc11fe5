//! Latency curves, from the median to the slowest request of ten thousand.

use maud::{Markup, html};

use super::look::Look;
use super::plot::{WIDTH, n, svg};
use super::scale::Logarithmic;
use crate::summary::Summary;
use crate::summary::check::clean;
use crate::summary::figure::time;
use crate::table::columns::cut;

/// Percentiles that have marks.
const MARKS: [(f64, &str); 5] =
    [(50.0, "50 %"), (90.0, "90 %"), (99.0, "99 %"), (99.9, "99.9 %"), (99.99, "99.99 %")];
const LEFT: f64 = 76.0;
const RIGHT: f64 = WIDTH - 22.0;
const TOP: f64 = 8.0;
const BOTTOM: f64 = 208.0;
/// Height of a line of the legend.
const LINE: f64 = 18.0;

struct Curve {
    title: String,
    look: Look,
    /// Percentile and nanoseconds.
    points: Vec<(f64, f64)>,
}

/// The plot of a load; `None` if there are no percentiles. One device for each role, since more
/// curves could not be distinguished. The tables have all devices.
#[must_use]
pub fn plot(summary: &Summary, load: usize) -> Option<Markup> {
    let curves = curves(summary, load);
    let all = || curves.iter().flat_map(|curve| curve.points.iter().map(|(_, ns)| *ns));
    let least = all().reduce(f64::min)?;
    let greatest = all().reduce(f64::max)?;
    let up = Logarithmic::new(least, greatest, BOTTOM, TOP);
    let title = format!("Latency, {}", summary.results().loads[load].title);
    let mut y = BOTTOM + 46.0;
    let content = html! {
        @for mark in &up.marks {
            line class="grid" x1=(n(LEFT)) x2=(n(RIGHT)) y1=(n(up.at(*mark))) y2=(n(up.at(*mark))) {}
            text class="mark" x=(n(LEFT - 6.0)) y=(n(up.at(*mark) + 4.0)) text-anchor="end" {
                (short_time(*mark))
            }
        }
        @for (percentile, text) in MARKS {
            line class="grid" x1=(n(across(percentile))) x2=(n(across(percentile)))
                y1=(n(TOP)) y2=(n(BOTTOM)) {}
            text class="mark" x=(n(across(percentile))) y=(n(BOTTOM + 15.0)) text-anchor="middle" {
                (text)
            }
        }
        text class="mark" text-anchor="middle" transform={ "translate(11 " (n(f64::midpoint(TOP, BOTTOM))) ") rotate(-90)" } {
            "time that a request takes"
        }
        text class="mark" x=(n(f64::midpoint(LEFT, RIGHT))) y=(n(BOTTOM + 31.0)) text-anchor="middle" {
            "part of the requests that take no longer"
        }
        @for curve in &curves {
            g class=(curve.look.class()) {
                polyline class="curve" points=(points(curve, &up)) {}
                @for (percentile, ns) in &curve.points {
                    (curve.look.mark("point", across(*percentile), up.at(*ns), 3.0))
                }
                line class="curve" x1=(n(LEFT)) x2=(n(LEFT + 28.0)) y1=(n(y)) y2=(n(y)) {}
                (curve.look.mark("point", LEFT + 14.0, y, 3.5))
                text class="name" x=(n(LEFT + 36.0)) y=(n(y + 4.0)) { (cut(&clean(&curve.title), 44)) }
            }
            ({ y += LINE; "" })
        }
    };
    Some(svg(&format!("latency-{load}"), y - 4.0, &title, &description(&curves), content))
}

/// The curves of the raw backing, the kernel's mapping, the best rival of the load, ours, and ours
/// with a copy.
fn curves(summary: &Summary, load: usize) -> Vec<Curve> {
    let floor = summary.measured().find(|(_, subject)| Look::of(subject) == Look::Floor);
    let floor = floor.map(|(index, _)| index);
    let chosen =
        [summary.raw(), floor, summary.best_rival(load), summary.copying(), summary.ours()];
    let curves = chosen.into_iter().flatten().filter_map(|subject| {
        let described = &summary.results().subjects[subject];
        let mut points = summary.cell(subject, load)?.curve();
        points.retain(|(percentile, ns)| (50.0..=99.99).contains(percentile) && *ns > 0.0);
        let (title, look) = (described.title.clone(), Look::of(described));
        (!points.is_empty()).then_some(Curve { title, look, points })
    });
    curves.collect()
}

/// The x coordinate of a percentile. Each further nine takes the same width.
fn across(percentile: f64) -> f64 {
    let rest = |percentile: f64| ((100.0 - percentile) / 100.0).max(1e-4).log10();
    let part = (rest(50.0) - rest(percentile)) / (rest(50.0) - rest(99.99));
    LEFT + (RIGHT - LEFT) * part.clamp(0.0, 1.0)
}

fn points(curve: &Curve, up: &Logarithmic) -> String {
    let points = curve.points.iter().map(|(percentile, ns)| (across(*percentile), up.at(*ns)));
    points.map(|(x, y)| format!("{},{}", n(x), n(y))).collect::<Vec<_>>().join(" ")
}

/// The time of a mark: `50 µs`.
fn short_time(ns: f64) -> String {
    let text = time(ns);
    match text.split_once(' ') {
        Some((figure, unit)) if figure.contains('.') => {
            format!("{} {unit}", figure.trim_end_matches('0').trim_end_matches('.'))
        }
        Some(_) | None => text,
    }
}

fn description(curves: &[Curve]) -> String {
    let said = curves.iter().map(|curve| {
        let points = curve.points.iter();
        let points =
            points.filter(|(percentile, _)| MARKS.iter().any(|(mark, _)| mark == percentile));
        let points = points.map(|(percentile, ns)| format!("{percentile} % {}", time(*ns)));
        format!("{}: {}", curve.title, points.collect::<Vec<_>>().join(", "))
    });
    said.collect::<Vec<_>>().join(". ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_nine_takes_the_same_room() {
        let nines = [90.0, 99.0, 99.9, 99.99].map(across);
        for pair in nines.windows(3) {
            assert!((pair[2] - 2.0 * pair[1] + pair[0]).abs() < 1e-6, "{nines:?}");
        }
        assert_eq!((across(50.0), across(99.99), across(100.0)), (LEFT, RIGHT, RIGHT));
        assert_eq!(across(1.0), LEFT);
    }

    #[test]
    fn marks_are_short() {
        for (ns, expected) in [(50_000.0, "50 µs"), (2e6, "2 ms"), (500.0, "500 ns"), (1e9, "1 s")]
        {
            assert_eq!(short_time(ns), expected);
        }
    }
}
