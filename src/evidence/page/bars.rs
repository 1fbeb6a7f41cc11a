//! Bars side by side, with their names and numbers. Pure.

use super::html::grouped;
use super::svg::{Anchor, Svg};

const WIDTH: f64 = 720.0;
const ROW: f64 = 26.0;
/// Where the bars begin; names stand before it.
const LEFT: f64 = 250.0;
/// Room for the number behind the longest bar.
const RIGHT: f64 = 150.0;
/// Characters of a name that have room; the table has all.
const LONGEST_NAME: usize = 36;

/// A bar.
pub(super) struct Bar {
    pub(super) name: String,
    pub(super) count: u64,
    pub(super) tone: Tone,
}

/// What a bar stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tone {
    Good,
    Plain,
    Warn,
    Bad,
}

impl Tone {
    /// By its word in a document.
    pub(super) fn of(word: &str) -> Self {
        match word {
            "good" => Self::Good,
            "warn" => Self::Warn,
            "bad" => Self::Bad,
            _ => Self::Plain,
        }
    }

    fn class(self) -> &'static str {
        match self {
            Self::Good => "bar good",
            Self::Plain => "bar plain",
            Self::Warn => "bar warn",
            Self::Bad => "bar bad",
        }
    }
}

/// Draws them; nothing where there is none.
pub(super) fn draw(id: &str, title: &str, bars: &[Bar]) -> String {
    let most = bars.iter().map(|bar| bar.count).max().unwrap_or(0);
    let sum: u64 = bars.iter().map(|bar| bar.count).sum();
    if bars.is_empty() {
        return String::new();
    }
    let told: Vec<String> = bars.iter().map(|bar| format!("{}: {}", bar.name, grouped(bar.count))).collect();
    let height = ROW * bars.len() as f64 + 6.0;
    let mut svg = Svg::new(id, title, &told.join("; "), WIDTH, height);
    for (row, bar) in bars.iter().enumerate() {
        let top = ROW * row as f64 + 4.0;
        let middle = top + 13.0;
        svg.text("label", (LEFT - 10.0, middle), Anchor::End, &short(&bar.name));
        let share = if most == 0 { 0.0 } else { bar.count as f64 / most as f64 };
        // What is there at all must be seen.
        let length = if bar.count == 0 { 0.0 } else { (share * (WIDTH - LEFT - RIGHT)).max(2.0) };
        svg.rect("track", LEFT, top, WIDTH - LEFT - RIGHT, 18.0);
        svg.rect(bar.tone.class(), LEFT, top, length, 18.0);
        let percent = if sum == 0 { 0.0 } else { 100.0 * bar.count as f64 / sum as f64 };
        let number = format!("{} ({})", grouped(bar.count), percentage(percent, bar.count));
        svg.text("value", (WIDTH - RIGHT + 10.0, middle), Anchor::Start, &number);
    }
    svg.line("axis", (LEFT, 0.0), (LEFT, height));
    svg.finish()
}

/// Never `0 %` where there is one, nor `100 %` where one is missing.
fn percentage(percent: f64, count: u64) -> String {
    match percent {
        _ if count > 0 && percent < 0.1 => "< 0.1 %".into(),
        _ if percent < 100.0 && percent > 99.9 => "> 99.9 %".into(),
        _ => format!("{percent:.1} %"),
    }
}

fn short(name: &str) -> String {
    if name.chars().count() <= LONGEST_NAME {
        return name.to_owned();
    }
    name.chars().take(LONGEST_NAME - 1).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bar_has_its_name_and_number() {
        let bar = |name: &str, count| Bar { name: name.into(), count, tone: Tone::of("bad") };
        let drawn = draw("b", "Bars", &[bar("first", 1_000_000), bar("second", 1), bar("none", 0)]);
        assert_eq!(drawn.matches("class=\"bar bad\"").count(), 3);
        assert!(drawn.contains("first: 1,000,000; second: 1; none: 0"), "{drawn}");
        assert!(drawn.contains("1 (&lt; 0.1 %)") && drawn.contains("(&gt; 99.9 %)"), "{drawn}");
        assert!(drawn.contains("width=\"2.0\"") && drawn.contains("width=\"0.0\""), "{drawn}");
        assert_eq!(draw("b", "Bars", &[]), "");
        assert!(draw("b", "Bars", &[bar("none", 0)]).contains("0 (0.0 %)"));
    }

    #[test]
    fn long_names_are_cut_between_characters() {
        assert_eq!(short(&"가".repeat(50)).chars().count(), LONGEST_NAME);
    }
}
