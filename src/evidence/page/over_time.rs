//! Lines over time, with axes and a legend. Pure.

use serde_json::Value;

use super::svg::{Anchor, Svg, axis, scale};

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 34.0;
/// Moments that are named on the time axis.
const MOMENTS: u32 = 4;

/// A line: its name, its class, and what it shows of a sample.
pub(super) struct Line {
    pub(super) name: &'static str,
    pub(super) class: &'static str,
    pub(super) is_area: bool,
    pub(super) value: fn(&Value) -> Option<f64>,
}

/// A sample with its moment in seconds since 1970.
struct Point<'a> {
    from: f64,
    at: f64,
    sample: &'a Value,
}

/// Draws lines of the samples of a series; nothing where there are none.
pub(super) fn draw(id: &str, title: &str, unit: &str, samples: &[Value], lines: &[Line]) -> String {
    let points: Vec<Point<'_>> = samples.iter().filter_map(point).collect();
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return String::new() };
    let values =
        |line: &Line| points.iter().filter_map(|point| (line.value)(point.sample)).collect::<Vec<_>>();
    let most = lines.iter().flat_map(values).fold(0.0, f64::max);
    let (end, step) = scale(most);
    let (from, until) = (first.from, last.at.max(first.from + 0.001));
    let x = |at: f64| LEFT + (at - from) / (until - from) * (WIDTH - LEFT - RIGHT);
    let y = |value: f64| HEIGHT - BOTTOM - value / end * (HEIGHT - TOP - BOTTOM);
    let told: Vec<String> = lines.iter().filter_map(|line| told(line, &values(line), unit)).collect();
    let mut svg = Svg::new(id, title, &told.join("; "), WIDTH, HEIGHT);
    grid(&mut svg, end, step, y);
    moments(&mut svg, from, until, x);
    svg.text("unit", (4.0, TOP - 18.0), Anchor::Start, unit);
    for line in lines {
        for stretch in stretches(&points, line) {
            let drawn: Vec<(f64, f64)> = stretch.iter().map(|(at, value)| (x(*at), y(*value))).collect();
            if let (true, Some(first), Some(last)) = (line.is_area, drawn.first(), drawn.last()) {
                let below = [(last.0, y(0.0)), (first.0, y(0.0))];
                let area: Vec<(f64, f64)> = drawn.iter().copied().chain(below).collect();
                svg.area(&format!("area {}", line.class), &area);
            }
            svg.path(&format!("line {}", line.class), &drawn);
        }
    }
    legend(&mut svg, lines);
    svg.finish()
}

fn point(sample: &Value) -> Option<Point<'_>> {
    let at: jiff::Timestamp = sample["at"].as_str()?.parse().ok()?;
    let at = at.as_millisecond() as f64 / 1000.0;
    Some(Point { from: at - sample["seconds"].as_f64().unwrap_or(0.0), at, sample })
}

/// A line without the times in which nothing ran: it ends there and begins anew. A
/// sample is a level from its beginning to its end.
fn stretches(points: &[Point<'_>], line: &Line) -> Vec<Vec<(f64, f64)>> {
    let mut stretches: Vec<Vec<(f64, f64)>> = Vec::new();
    let mut until = f64::NEG_INFINITY;
    for point in points {
        let Some(value) = (line.value)(point.sample) else { continue };
        let length = point.at - point.from;
        let begins = if point.from - until > length.max(1.0) * 2.0 { None } else { stretches.last_mut() };
        match begins {
            Some(stretch) => stretch.push((point.at, value)),
            None => stretches.push(vec![(point.from, value), (point.at, value)]),
        }
        until = point.at;
    }
    stretches
}

fn told(line: &Line, values: &[f64], unit: &str) -> Option<String> {
    let most = values.iter().copied().reduce(f64::max)?;
    let least = values.iter().copied().reduce(f64::min)?;
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    Some(format!("{}: from {least:.1} to {most:.1} {unit}, on average {mean:.1}", line.name))
}

fn grid(svg: &mut Svg, end: f64, step: f64, y: impl Fn(f64) -> f64) {
    let mut value = 0.0;
    while value <= end * 1.001 {
        svg.line(if value == 0.0 { "axis" } else { "grid" }, (LEFT, y(value)), (WIDTH - RIGHT, y(value)));
        svg.text("tick", (LEFT - 8.0, y(value) + 4.0), Anchor::End, &axis(value));
        value += step;
    }
}

fn moments(svg: &mut Svg, from: f64, until: f64, x: impl Fn(f64) -> f64) {
    let format = if until - from > 86_400.0 {
        "%m-%d %H:%M"
    } else if until - from > 600.0 {
        "%H:%M"
    } else {
        "%H:%M:%S"
    };
    for number in 0..=MOMENTS {
        let at = from + (until - from) * f64::from(number) / f64::from(MOMENTS);
        #[expect(clippy::cast_possible_truncation, reason = "a moment of our time")]
        let Ok(moment) = jiff::Timestamp::from_second(at.round() as i64) else { continue };
        let anchor = match number {
            0 => Anchor::Start,
            MOMENTS => Anchor::End,
            _ => Anchor::Middle,
        };
        let text = moment.strftime(format).to_string();
        svg.text("tick", (x(at), HEIGHT - BOTTOM + 20.0), anchor, &text);
    }
}

fn legend(svg: &mut Svg, lines: &[Line]) {
    let mut right = WIDTH - RIGHT;
    for line in lines.iter().rev() {
        svg.text("legend", (right, TOP - 18.0), Anchor::End, line.name);
        let left = right - 6.4 * line.name.chars().count() as f64 - 10.0;
        svg.path(&format!("line {}", line.class), &[(left - 26.0, TOP - 22.0), (left, TOP - 22.0)]);
        right = left - 44.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const LINE: Line =
        Line { name: "calls", class: "one", is_area: false, value: |sample| sample["operations"].as_f64() };

    fn sample(at: &str, operations: u64) -> Value {
        json!({"at": at, "seconds": 2.0, "operations": operations})
    }

    #[test]
    fn a_line_ends_where_nothing_ran() {
        let samples = [
            sample("2026-01-01T00:00:02Z", 5),
            sample("2026-01-01T00:00:04Z", 7),
            sample("2026-01-01T08:00:04Z", 9),
        ];
        let points: Vec<Point<'_>> = samples.iter().filter_map(point).collect();
        let stretches = stretches(&points, &LINE);
        assert_eq!(stretches.iter().map(Vec::len).collect::<Vec<_>>(), [3, 2]);
        let drawn = draw("t", "Title", "per second", &samples, &[LINE]);
        assert_eq!(drawn.matches("<polyline").count(), 3, "two stretches and the legend: {drawn}");
        assert!(drawn.contains("calls: from 5.0 to 9.0 per second, on average 7.0"), "{drawn}");
        assert!(drawn.contains(">00:00<") && drawn.contains(">08:00<"), "{drawn}");
    }

    #[test]
    fn nothing_and_nonsense_draw_nothing() {
        assert_eq!(draw("t", "Title", "s", &[], &[LINE]), "");
        assert_eq!(draw("t", "Title", "s", &[json!({"at": "soon"}), json!(5)], &[LINE]), "");
        assert!(draw("t", "Title", "s", &[sample("2026-01-01T00:00:02Z", 0)], &[LINE]).contains("<svg"));
    }
}
