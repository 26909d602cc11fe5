//! The median of a few figures, with a confidence interval.

/// The desired confidence of an interval, if there are enough figures.
const WANTED: f64 = 0.95;

/// The median of a few figures, and a confidence interval for the median of their distribution.
///
/// The interval is the narrowest symmetric pair of figures (the k-th smallest and the k-th largest)
/// that covers the true median with at least 95 % probability. This follows from the sign test,
/// which assumes only that the figures are independent. Fewer than six figures cannot reach 95 %;
/// then the interval is the whole range.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// The median.
    pub median: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
    /// Probability that the interval covers the true median, from 0 to 1.
    pub confidence: f64,
    /// How many figures there are.
    pub count: usize,
}

impl Estimate {
    /// The estimate for figures in any order. Figures that are not finite are left out. `None` if
    /// none is left.
    #[must_use]
    pub fn of(figures: &[f64]) -> Option<Self> {
        let mut sorted: Vec<f64> = figures.iter().copied().filter(|f| f.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let (skipped, confidence) = interval(sorted.len());
        let low = *sorted.get(skipped)?;
        let high = *sorted.get(sorted.len() - 1 - skipped)?;
        Some(Self { median: median(&sorted)?, low, high, confidence, count: sorted.len() })
    }

    /// Whether the interval excludes a figure, so that the true median differs from it with at
    /// least 95 % confidence.
    #[must_use]
    pub fn differs_from(&self, figure: f64) -> bool {
        self.confidence >= WANTED && (figure < self.low || figure > self.high)
    }
}

/// The median of figures in ascending order.
fn median(sorted: &[f64]) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    Some(f64::midpoint(sorted[last / 2], sorted[last.div_ceil(2)]))
}

/// The median of figures in any order; those that are not finite are left out.
#[must_use]
pub fn median_of(figures: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut sorted: Vec<f64> = figures.into_iter().filter(|figure| figure.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    median(&sorted)
}

/// How many of `count` figures the interval excludes at each end, and its confidence. The number of
/// figures below the true median has a binomial distribution with probability 1/2.
fn interval(count: usize) -> (usize, f64) {
    let Ok(exponent) = i32::try_from(count) else { return (0, 1.0) };
    // The probability of at most this many figures below the median, beginning with 0.
    let mut exactly = 0.5_f64.powi(exponent);
    let mut at_most = exactly;
    let mut found = (0, (1.0 - 2.0 * at_most).max(0.0));
    for skipped in 1..=count.saturating_sub(1) / 2 {
        exactly *= number(count - skipped + 1) / number(skipped);
        at_most += exactly;
        let confidence = 1.0 - 2.0 * at_most;
        if confidence < WANTED {
            break;
        }
        found = (skipped, confidence);
    }
    found
}

/// A count as a figure.
pub(crate) fn number(count: usize) -> f64 {
    // No run has this many of anything.
    u32::try_from(count).map_or(f64::INFINITY, f64::from)
}

/// The geometric mean of positive figures; `None` if there is none, or one is not positive.
#[must_use]
pub fn geometric_mean(figures: &[f64]) -> Option<f64> {
    let positive = |figure: &f64| figure.is_finite() && *figure > 0.0;
    if figures.is_empty() || !figures.iter().all(positive) {
        return None;
    }
    let logarithms: f64 = figures.iter().map(|figure| figure.ln()).sum();
    Some((logarithms / number(figures.len())).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_those_of_the_sign_test() {
        // Number of figures, number excluded at each end, confidence in percent: from a binomial
        // table.
        for (count, skipped, percent) in [
            (1, 0, 0.0),
            (2, 0, 50.0),
            (5, 0, 93.75),
            (6, 0, 96.875),
            (7, 0, 98.4375),
            (8, 0, 99.21875),
            (9, 1, 96.09375),
            (12, 2, 96.142_578_125),
            (20, 5, 95.861_053_466_796_88),
            (30, 9, 95.722_605_474_293_23),
        ] {
            let (found, confidence) = interval(count);
            assert_eq!(found, skipped, "of {count}");
            assert!((confidence * 100.0 - percent).abs() < 1e-9, "{count}: {confidence}");
        }
        assert!(interval(1000).1 > 0.95, "{:?}", interval(1000));
        assert!((460..=470).contains(&interval(1000).0), "{:?}", interval(1000));
    }

    #[test]
    fn figures_are_estimated() {
        let nine: Vec<f64> = [9.0, 1.0, 5.0, 3.0, 7.0, 2.0, 4.0, 8.0, 6.0].to_vec();
        let estimate = Estimate::of(&nine).unwrap();
        assert_eq!((estimate.low, estimate.median, estimate.high), (2.0, 5.0, 8.0));
        assert_eq!(estimate.count, 9);
        assert!(estimate.differs_from(1.9) && !estimate.differs_from(2.0));
        let two = Estimate::of(&[4.0, f64::NAN, 2.0, f64::INFINITY]).unwrap();
        assert_eq!((two.low, two.median, two.high, two.count), (2.0, 3.0, 4.0, 2));
        assert!(!two.differs_from(100.0), "two figures say nothing");
        assert_eq!(Estimate::of(&[]), None);
        assert_eq!(Estimate::of(&[f64::NAN]), None);
    }

    #[test]
    fn means_are_geometric() {
        assert_eq!(geometric_mean(&[]), None);
        assert_eq!(geometric_mean(&[1.0, 0.0]), None);
        assert!((geometric_mean(&[2.0, 8.0]).unwrap() - 4.0).abs() < 1e-12);
        assert_eq!(median_of([3.0, f64::NAN, 1.0]), Some(2.0));
    }
}
