//! Scales: from figures to coordinates.

/// A linear scale from 0.
#[derive(Debug, Clone, PartialEq)]
pub struct Linear {
    /// The figures with marks, in ascending order. The last is the end of the scale.
    pub marks: Vec<f64>,
    from: f64,
    to: f64,
}

impl Linear {
    /// From 0 to at least `most`, at coordinates `from` to `to`.
    #[must_use]
    pub fn new(most: f64, from: f64, to: f64) -> Self {
        let most = if most.is_finite() && most > 0.0 { most } else { 1.0 };
        let power = 10.0_f64.powf(most.log10().floor());
        // At least four marks, at most eight.
        let step =
            [0.1, 0.2, 0.5].map(|part| part * power).into_iter().find(|step| most / step <= 7.0);
        let step = step.unwrap_or(power * if most / power <= 7.0 { 1.0 } else { 2.0 });
        let count = (1..=12_u32).find(|count| f64::from(*count) * step >= most * 0.9999);
        let marks = (0..=count.unwrap_or(12)).map(|count| f64::from(count) * step).collect();
        Self { marks, from, to }
    }

    /// The coordinate of a figure.
    #[must_use]
    pub fn at(&self, figure: f64) -> f64 {
        let end = self.marks.last().copied().unwrap_or(1.0);
        self.from + (self.to - self.from) * (figure / end).clamp(0.0, 1.0)
    }
}

/// A logarithmic scale.
#[derive(Debug, Clone, PartialEq)]
pub struct Logarithmic {
    /// The figures with marks, in ascending order.
    pub marks: Vec<f64>,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Logarithmic {
    /// From `low` to `high`, both extended to the next mark, at coordinates `from` to `to`.
    #[must_use]
    pub fn new(low: f64, high: f64, from: f64, to: f64) -> Self {
        let low = if low.is_finite() && low > 0.0 { low } else { 1.0 };
        let high = if high.is_finite() && high > low { high } else { low * 10.0 };
        let all =
            (-1..=16).flat_map(|power| [1.0, 2.0, 5.0].map(|first| first * 10.0_f64.powi(power)));
        let all: Vec<f64> = all.collect();
        let begin = all.iter().rposition(|mark| *mark <= low).unwrap_or(0).min(all.len() - 2);
        let end = all.iter().position(|mark| *mark >= high).unwrap_or(all.len() - 1);
        let mut marks = all[begin..=end.max(begin + 1).min(all.len() - 1)].to_vec();
        let (low, high) = (marks[0], marks[marks.len() - 1]);
        // If there are many, only powers of ten have marks.
        if marks.len() > 8 {
            marks.retain(|mark| (mark.log10() - mark.log10().round()).abs() < 1e-9);
        }
        Self { marks, low, high, from, to }
    }

    /// The coordinate of a figure.
    #[must_use]
    pub fn at(&self, figure: f64) -> f64 {
        let part = (figure / self.low).ln() / (self.high / self.low).ln();
        let part = if part.is_finite() { part.clamp(0.0, 1.0) } else { 0.0 };
        self.from + (self.to - self.from) * part
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_scales_begin_at_zero_and_hold_the_greatest() {
        for most in [0.003, 0.9, 1.0, 1.04, 1.2, 4.9, 5.1, 99.0, 1e9, f64::NAN, 0.0, -3.0] {
            let scale = Linear::new(most, 100.0, 300.0);
            assert!((3..=12).contains(&scale.marks.len()), "{most}: {:?}", scale.marks);
            assert_eq!((scale.marks[0], scale.at(0.0)), (0.0, 100.0));
            let end = *scale.marks.last().unwrap();
            assert!(most.is_nan() || most <= end, "{most}: {:?}", scale.marks);
            assert!((scale.at(end / 2.0) - 200.0).abs() < 1e-9 && scale.at(end * 9.0) == 300.0);
        }
        let marks = Linear::new(1.04, 0.0, 1.0).marks;
        assert!(marks.len() == 7 && (marks[6] - 1.2).abs() < 1e-9, "{marks:?}");
    }

    #[test]
    fn logarithmic_scales_hold_both_ends() {
        for (low, high) in [(45e3, 3.1e6), (10.0, 11.0), (1e3, 1e9), (0.0, f64::NAN), (5.0, 5.0)] {
            let scale = Logarithmic::new(low, high, 200.0, 0.0);
            assert!((2..=8).contains(&scale.marks.len()), "{low}: {:?}", scale.marks);
            assert!(scale.at(low) > scale.at(low * 2.0) || low == 0.0);
            for figure in [low, high, 0.0, f64::NAN, f64::INFINITY] {
                assert!((0.0..=200.0).contains(&scale.at(figure)), "{figure}");
            }
        }
        assert_eq!(Logarithmic::new(1e300, 1e301, 0.0, 1.0).marks.len(), 2);
    }
}
