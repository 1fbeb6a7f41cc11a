//! What a sample proves about all documents. Pure.
//!
//! The bounds are those of Clopper and Pearson, which hold for every share and
//! every size of a sample. Drawing without replacement, as is done here, only
//! makes them safer.

use serde_json::{Value, json};

/// How certain a bound is.
const LEVEL: f64 = 0.95;
/// Halvings until a bound is as exact as it is printed.
const HALVINGS: u32 = 100;

/// What was found in a sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sampled {
    /// Documents that were compared.
    pub compared: u64,
    /// Those that differ.
    pub different: u64,
    /// Whether these were all documents that there are.
    pub is_all: bool,
}

impl Sampled {
    /// The share of all documents that differs, from and to, at 95% confidence:
    /// with no difference the upper bound alone takes up what may be wrong.
    pub fn bounds(&self) -> (f64, f64) {
        let (compared, different) = (self.compared as f64, self.different as f64);
        if self.compared == 0 {
            return (0.0, 1.0);
        }
        if self.is_all {
            return (different / compared, different / compared);
        }
        if self.different == 0 {
            return (0.0, 1.0 - (1.0 - LEVEL).powf(1.0 / compared));
        }
        let tail = (1.0 - LEVEL) / 2.0;
        // P(at least k) grows with the share; so does P(more than k).
        let at_least = |least: f64| {
            move |share: f64| {
                if least > compared { 0.0 } else { beta(least, compared - least + 1.0, share) }
            }
        };
        let upper =
            if self.different == self.compared { 1.0 } else { solve(at_least(different + 1.0), 1.0 - tail) };
        (solve(at_least(different), tail), upper)
    }

    /// For people.
    pub fn text(&self) -> String {
        let (compared, different) = (grouped(self.compared), grouped(self.different));
        let (lower, upper) = self.bounds();
        match (self.different, self.is_all) {
            (0, true) => format!("0 of {compared} differ; that is all of them"),
            (0, false) => format!("0 of {compared} differ: below {} at 95%", percent_at_most(upper)),
            (_, true) => format!("{different} of {compared} differ; that is all of them"),
            (_, false) => {
                let share = self.different as f64 / self.compared as f64;
                format!(
                    "{different} of {compared} differ: about {}, from {} to {} at 95%",
                    percent(share),
                    percent(lower),
                    percent(upper)
                )
            }
        }
    }

    /// For the result.
    pub fn json(&self) -> Value {
        let (lower, upper) = self.bounds();
        json!({
            "compared": self.compared,
            "different": self.different,
            "all": self.is_all,
            "level": LEVEL,
            "share_from": lower,
            "share_to": upper,
        })
    }
}

/// Where a rising function of a share has that value.
fn solve(function: impl Fn(f64) -> f64, value: f64) -> f64 {
    let (mut lower, mut upper) = (0.0, 1.0);
    for _ in 0..HALVINGS {
        let middle = f64::midpoint(lower, upper);
        if function(middle) < value { lower = middle } else { upper = middle }
    }
    upper
}

/// The regularized incomplete beta function, which for whole `a` and `b` is the
/// probability of at least `a` hits among `a + b - 1` at this share of hits.
fn beta(a: f64, b: f64, x: f64) -> f64 {
    if x <= 0.0 || x >= 1.0 {
        return x.clamp(0.0, 1.0);
    }
    let front = (log_gamma(a + b) - log_gamma(a) - log_gamma(b) + a * x.ln() + b * (1.0 - x).ln()).exp();
    // The fraction converges fast on this side of the mean, and the other side mirrors it.
    if x < (a + 1.0) / (a + b + 2.0) {
        front * fraction(a, b, x) / a
    } else {
        1.0 - front * fraction(b, a, 1.0 - x) / b
    }
}

/// The continued fraction of the incomplete beta function, by Lentz's method.
fn fraction(a: f64, b: f64, x: f64) -> f64 {
    const TINY: f64 = 1e-300;
    const STEPS: u32 = 100_000;
    let away_from_zero = |value: f64| if value.abs() < TINY { TINY } else { value };
    let mut c = 1.0;
    let mut d = 1.0 / away_from_zero(1.0 - (a + b) * x / (a + 1.0));
    let mut result = d;
    for step in 1..STEPS {
        let m = f64::from(step);
        let even = m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m));
        d = 1.0 / away_from_zero(1.0 + even * d);
        c = away_from_zero(1.0 + even / c);
        result *= d * c;
        let odd = -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0));
        d = 1.0 / away_from_zero(1.0 + odd * d);
        c = away_from_zero(1.0 + odd / c);
        let change = d * c;
        result *= change;
        if (change - 1.0).abs() < 1e-15 {
            break;
        }
    }
    result
}

/// The logarithm of the gamma function, by Lanczos's approximation.
fn log_gamma(x: f64) -> f64 {
    const COEFFICIENTS: [f64; 8] = [
        676.520_368_121_885_1,
        -1_259.139_216_722_402_8,
        771.323_428_777_653_1,
        -176.615_029_162_140_6,
        12.507_343_278_686_905,
        -0.138_571_095_265_720_12,
        9.984_369_578_019_572e-6,
        1.505_632_735_149_311_6e-7,
    ];
    let x = x - 1.0;
    let base = x + 7.5;
    let sum = (1_u32..).zip(COEFFICIENTS).fold(0.999_999_999_999_809_9, |sum, (index, coefficient)| {
        sum + coefficient / (x + f64::from(index))
    });
    (2.0 * std::f64::consts::PI).sqrt().ln() + (x + 0.5) * base.ln() - base + sum.ln()
}

/// A share in percent, with two digits that mean something.
fn percent(share: f64) -> String {
    let decimals = decimals(share);
    shortened(format!("{:.decimals$}", share * 100.0))
}

/// The same, rounded up: what is below it is below the share.
fn percent_at_most(share: f64) -> String {
    let decimals = decimals(share);
    let scale = 10_f64.powi(i32::try_from(decimals).unwrap_or(0));
    shortened(format!("{:.decimals$}", (share * 100.0 * scale).ceil() / scale))
}

fn decimals(share: f64) -> usize {
    match share {
        share if share >= 0.1 => 1,
        share if share >= 0.0001 => 2,
        _ => 4,
    }
}

fn shortened(text: String) -> String {
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}%")
}

/// A number with its thousands apart.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampled(compared: u64, different: u64) -> Sampled {
        Sampled { compared, different, is_all: false }
    }

    #[test]
    fn a_sample_says_what_it_proves() {
        assert_eq!(sampled(5_000, 0).text(), "0 of 5,000 differ: below 0.06% at 95%");
        assert_eq!(sampled(100, 0).text(), "0 of 100 differ: below 2.96% at 95%");
        let all = Sampled { is_all: true, ..sampled(10, 0) };
        assert_eq!(all.text(), "0 of 10 differ; that is all of them");
        let some = Sampled { is_all: true, ..sampled(1_234_567, 2) };
        assert_eq!(some.text(), "2 of 1,234,567 differ; that is all of them");
        assert_eq!(sampled(1_000, 50).text(), "50 of 1,000 differ: about 5%, from 3.73% to 6.54% at 95%");
        assert_eq!(sampled(0, 0).bounds(), (0.0, 1.0));
    }

    /// From published tables of the Clopper-Pearson interval.
    #[test]
    fn bounds_are_the_exact_ones() {
        for (compared, different, lower, upper) in [
            (10, 1, 0.002_528_6, 0.445_016_1),
            (20, 5, 0.086_571_5, 0.491_046_2),
            (100, 50, 0.398_321_1, 0.601_678_9),
            (10, 10, 0.691_502_9, 1.0),
        ] {
            let bounds = sampled(compared, different).bounds();
            assert!((bounds.0 - lower).abs() < 1e-6 && (bounds.1 - upper).abs() < 1e-6, "{bounds:?}");
        }
        let (lower, upper) = sampled(4_000_000, 1_000_000).bounds();
        assert!(lower > 0.249 && lower < 0.25 && upper > 0.25 && upper < 0.251, "{lower} {upper}");
    }

    #[test]
    fn without_a_difference_the_bound_is_about_three_in_the_sample() {
        for compared in [100_u64, 5_000, 1_000_000] {
            let (lower, upper) = sampled(compared, 0).bounds();
            let three = 3.0 / compared as f64;
            assert!(lower == 0.0 && upper < three && upper > 0.98 * three, "{upper}");
        }
    }
}
