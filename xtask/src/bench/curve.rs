//! A figure over time: drawn, and judged by whether it still grows when it should not.

use std::fmt;
use std::time::Duration;

use super::report::Spread;

/// Looks that a verdict takes: fewer say more about the start than about growth.
const LEAST_LOOKS: usize = 32;
/// What memory may grow by between the second and the last quarter: this much, and this part of it.
const GROWTH_MIB: f64 = 4.0;
const GROWTH_PART: f64 = 0.02;
/// Lines of a drawing, and its widest bar.
const LINES: usize = 24;
const WIDTH: f64 = 60.0;
const MIB: f64 = 1_048_576.0;

/// Memory over time.
#[derive(Debug, Default)]
pub(super) struct Curve {
    /// When, and how many MiB.
    points: Vec<(Duration, f64)>,
}

/// Whether it grows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Verdict {
    /// Too few looks to say.
    TooShort,
    /// Medians of the second and the last quarter, MiB, which are about the same, or falling.
    Steady(f64, f64),
    /// The same, which are not.
    Grows(f64, f64),
}

impl Verdict {
    pub(super) fn is_growth(self) -> bool {
        matches!(self, Self::Grows(..))
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooShort => write!(f, "too short to say whether the monitor grows ({LEAST_LOOKS} looks are needed)"),
            Self::Steady(second, last) => {
                write!(f, "the monitor does not grow: {second:.1} MiB in the second quarter, {last:.1} MiB in the last")
            }
            Self::Grows(second, last) => {
                write!(f, "the monitor grows: {second:.1} MiB in the second quarter, {last:.1} MiB in the last")
            }
        }
    }
}

impl Curve {
    /// Adds a point.
    pub(super) fn note(&mut self, when: Duration, bytes: u64) {
        self.points.push((when, bytes as f64 / MIB));
    }

    /// The last, MiB.
    pub(super) fn last(&self) -> Option<f64> {
        self.points.last().map(|(_, mib)| *mib)
    }

    /// Compares the second quarter, when all has been used once, with the last.
    pub(super) fn verdict(&self) -> Verdict {
        let length = self.points.len();
        let median = |from: usize, to: usize| {
            let figures: Vec<f64> = self.points[from..to].iter().map(|(_, mib)| *mib).collect();
            Spread::of(&figures).map(|spread| spread.median)
        };
        let medians = median(length / 4, length / 2).zip(median(length * 3 / 4, length));
        match medians.filter(|_| length >= LEAST_LOOKS) {
            None => Verdict::TooShort,
            Some((second, last)) if last > second * (1.0 + GROWTH_PART) + GROWTH_MIB => Verdict::Grows(second, last),
            Some((second, last)) => Verdict::Steady(second, last),
        }
    }

    /// A drawing, a bar for each of some points.
    pub(super) fn print(&self, name: &str) -> String {
        let most = self.points.iter().map(|(_, mib)| *mib).fold(1.0, f64::max);
        let mut text = format!("{name}: minutes, and MiB of the monitor beyond guest RAM\n");
        for (when, mib) in self.points.iter().step_by(self.points.len().div_ceil(LINES).max(1)) {
            let bar = "#".repeat((mib / most * WIDTH).round() as usize);
            text += &format!("{:>7.1} {mib:>8.1} {bar}\n", when.as_secs_f64() / 60.0);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(points: usize, mib: impl Fn(usize) -> f64) -> Curve {
        let point = |at: usize| (Duration::from_secs(10 * at as u64), mib(at));
        Curve { points: (0..points).map(point).collect() }
    }

    #[test]
    fn what_fills_up_is_steady_and_what_leaks_grows() {
        let fills = |at: usize| (60.0 + at as f64).min(90.0);
        assert_eq!(curve(360, fills).verdict(), Verdict::Steady(90.0, 90.0));
        // 20 MiB an hour.
        let leaks = |at: usize| fills(at) + at as f64 / 18.0;
        let verdict = curve(360, leaks).verdict();
        assert!(verdict.is_growth(), "{verdict}");
        assert!(verdict.to_string().starts_with("the monitor grows: 97.5 MiB"), "{verdict}");
        // A saw's teeth are not growth.
        assert!(!curve(360, |at| 80.0 + (at % 20) as f64).verdict().is_growth());
        assert_eq!(curve(31, leaks).verdict(), Verdict::TooShort);
        assert_eq!(Curve::default().verdict(), Verdict::TooShort);
    }

    #[test]
    fn a_drawing_has_a_bar_for_some_points() {
        let mut curve = Curve::default();
        curve.note(Duration::from_secs(30), 50 << 20);
        curve.note(Duration::from_secs(90), 100 << 20);
        let text = curve.print("x");
        assert_eq!(text.lines().nth(1), Some(format!("    0.5     50.0 {}", "#".repeat(30)).as_str()));
        assert_eq!((text.lines().count(), curve.last()), (3, Some(100.0)));
        assert!(Curve { points: vec![(Duration::ZERO, 1.0); 1000] }.print("x").lines().count() <= LINES + 1);
    }
}
