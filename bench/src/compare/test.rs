//! Tests whether two runs differ by more than noise.

use libm::erfc;

use crate::summary::estimate::number;

/// Up to this many figures of both runs together, the probability is exact. Above, the normal
/// distribution is as good.
const MAX_EXACT: usize = 40;

/// The probability that figures from the same distribution are at least as far apart as these
/// (Mann–Whitney rank test, two-sided; equal figures share their ranks). `None` if a side has no
/// figures.
#[must_use]
pub fn mann_whitney(one: &[f64], other: &[f64]) -> Option<f64> {
    if one.is_empty() || other.is_empty() {
        return None;
    }
    let ranks = doubled_ranks(one, other);
    let sum: usize = ranks[..one.len()].iter().sum();
    let p = if ranks.len() <= MAX_EXACT {
        exact(&ranks, one.len(), sum)
    } else {
        normal(&ranks, one.len(), sum)
    };
    Some(p.clamp(0.0, 1.0))
}

/// Twice the rank, from 1, of each figure among all, so that shared ranks are integers too. The
/// figures of `one` come first.
fn doubled_ranks(one: &[f64], other: &[f64]) -> Vec<usize> {
    let all: Vec<f64> = one.iter().chain(other).copied().collect();
    let mut order: Vec<usize> = (0..all.len()).collect();
    order.sort_by(|a, b| all[*a].total_cmp(&all[*b]));
    let mut ranks = vec![0; all.len()];
    let mut from = 0;
    while from < order.len() {
        let same = |index: &&usize| all[**index].total_cmp(&all[order[from]]).is_eq();
        let to = from + order[from..].iter().take_while(same).count();
        for index in &order[from..to] {
            ranks[*index] = from + 1 + to;
        }
        from = to;
    }
    ranks
}

/// The fraction of all choices of `count` ranks with a sum at least as far from the mean.
fn exact(ranks: &[usize], count: usize, sum: usize) -> f64 {
    let greatest: usize = ranks.iter().sum();
    // ways[k][s]: in how many ways k of the ranks so far have the sum s.
    let mut ways = vec![vec![0.0_f64; greatest + 1]; count + 1];
    ways[0][0] = 1.0;
    for rank in ranks {
        for chosen in (1..=count).rev() {
            let (fewer, more) = ways.split_at_mut(chosen);
            let (from, to) = (&fewer[chosen - 1], &mut more[0]);
            for total in *rank..=greatest {
                to[total] += from[total - rank];
            }
        }
    }
    // The mean of the sum is greatest * count / ranks.len(); all times ranks.len() to stay whole.
    let distance = |sum: usize| (sum * ranks.len()).abs_diff(greatest * count);
    let far = distance(sum);
    let all: f64 = ways[count].iter().sum();
    let as_far: f64 = (0..=greatest)
        .filter(|total| distance(*total) >= far)
        .map(|total| ways[count][total])
        .sum();
    as_far / all
}

/// The same by the normal distribution, with corrections for ties and for continuity.
fn normal(ranks: &[usize], count: usize, sum: usize) -> f64 {
    let (all, one) = (number(ranks.len()), number(count));
    let other = all - one;
    let mean = one * (all + 1.0);
    // The variance of doubled ranks already accounts for ties.
    let squares: f64 = ranks.iter().map(|rank| (number(*rank) - (all + 1.0)).powi(2)).sum();
    let variance = squares * one * other / (all * (all - 1.0));
    if variance <= 0.0 {
        return 1.0;
    }
    // A step of the sum is 2 in doubled ranks.
    let distance = ((number(sum) - mean).abs() - 1.0).max(0.0);
    erfc(distance / (2.0 * variance).sqrt())
}

/// The minimum probability for this many figures on each side.
#[must_use]
pub fn least(one: usize, other: usize) -> f64 {
    // Two of all choices are the farthest apart.
    let ways = (1..=other).fold(1.0, |ways, n| ways * number(one + n) / number(n));
    (2.0 / ways).min(1.0)
}

/// Probabilities corrected for their number (Benjamini and Hochberg): of those up to 0.05, about
/// one in twenty is noise.
#[must_use]
pub fn corrected(probabilities: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..probabilities.len()).collect();
    order.sort_by(|a, b| probabilities[*b].total_cmp(&probabilities[*a]));
    let mut corrected = vec![1.0; probabilities.len()];
    let mut least = 1.0_f64;
    for (after, index) in order.into_iter().enumerate() {
        let rank = probabilities.len() - after;
        least = least.min(probabilities[index] * number(probabilities.len()) / number(rank));
        corrected[index] = least;
    }
    corrected
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-9, "{found} is not {expected}");
    }

    #[test]
    fn few_figures_are_counted_out() {
        // Of the 20 choices of 3 of 6, two are the farthest apart.
        about(mann_whitney(&[1.0, 2.0, 3.0], &[4.0, 5.0, 6.0]).unwrap(), 0.1);
        about(mann_whitney(&[4.0, 5.0, 6.0], &[1.0, 2.0, 3.0]).unwrap(), 0.1);
        about(mann_whitney(&[1.0, 2.0, 4.0], &[3.0, 5.0, 6.0]).unwrap(), 0.2);
        about(mann_whitney(&[1.0, 2.0, 5.0], &[3.0, 4.0, 6.0]).unwrap(), 0.4);
        about(mann_whitney(&[1.0, 4.0, 6.0], &[2.0, 3.0, 5.0]).unwrap(), 1.0);
        about(mann_whitney(&[1.0], &[2.0]).unwrap(), 1.0);
        about(mann_whitney(&[7.0; 5], &[7.0; 4]).unwrap(), 1.0);
        // 1, 1 against 1, 2: of the six choices, three have the 2 and three do not.
        about(mann_whitney(&[1.0, 1.0], &[1.0, 2.0]).unwrap(), 1.0);
        assert_eq!(mann_whitney(&[], &[1.0]), None);
        let apart: Vec<f64> = (0..7).map(f64::from).collect();
        let above: Vec<f64> = apart.iter().map(|figure| figure + 10.0).collect();
        about(mann_whitney(&apart, &above).unwrap(), 2.0 / 3432.0);
        about(least(7, 7), 2.0 / 3432.0);
        about(least(1, 1), 1.0);
    }

    #[test]
    fn many_figures_come_to_nearly_the_same_by_the_normal_distribution() {
        for shift in [0.0, 3.3, 7.7, 12.0] {
            let one: Vec<f64> = (0..20).map(|n| f64::from(n * 7 % 20)).collect();
            let other: Vec<f64> = (0..20).map(|n| f64::from(n) * 1.1 + shift).collect();
            let ranks = doubled_ranks(&one, &other);
            let sum = ranks[..20].iter().sum();
            let (exact, normal) = (exact(&ranks, 20, sum), normal(&ranks, 20, sum));
            assert!((exact - normal).abs() < 0.01, "{shift}: {exact} and {normal}");
        }
        let many: Vec<f64> = (0..100).map(f64::from).collect();
        assert!(mann_whitney(&many, &many).unwrap() > 0.99);
        assert!(mann_whitney(&many, &[200.0; 50]).unwrap() < 1e-10);
        about(mann_whitney(&[1.0; 50], &[1.0; 50]).unwrap(), 1.0);
    }

    #[test]
    fn probabilities_are_corrected_for_their_number() {
        let found = corrected(&[0.01, 0.5, 0.02, 0.03]);
        for (found, expected) in found.into_iter().zip([0.04, 0.5, 0.04, 0.04]) {
            about(found, expected);
        }
        assert!(corrected(&[]).is_empty());
        assert_eq!(corrected(&[1.0, 1.0]), [1.0, 1.0]);
    }
}
