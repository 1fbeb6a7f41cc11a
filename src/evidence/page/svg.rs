//! Drawings as inline SVG: shapes on a canvas, with a title and a description for
//! who can't see them. Colours come from the page, by class. Pure.

use super::html::escape;

/// A drawing under way.
pub(super) struct Svg {
    id: String,
    title: String,
    description: String,
    width: f64,
    height: f64,
    shapes: String,
}

/// On which side of its point a text stands.
#[derive(Clone, Copy)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

impl Svg {
    /// An empty canvas; the id is unique on the page.
    pub(super) fn new(id: &str, title: &str, description: &str, width: f64, height: f64) -> Self {
        Self {
            id: id.into(),
            title: title.into(),
            description: description.into(),
            width,
            height,
            shapes: String::new(),
        }
    }

    pub(super) fn rect(&mut self, class: &str, x: f64, y: f64, width: f64, height: f64) {
        self.shapes.push_str(&format!(
            "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{height:.1}\"/>\n",
            width.max(0.0)
        ));
    }

    pub(super) fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        self.shapes.push_str(&format!(
            "<line class=\"{class}\" x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\"/>\n",
            from.0, from.1, to.0, to.1
        ));
    }

    /// A line through points; a single one is a dot.
    pub(super) fn path(&mut self, class: &str, points: &[(f64, f64)]) {
        if let [(x, y)] = points {
            self.shapes
                .push_str(&format!("<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>\n"));
            return;
        }
        let points: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        self.shapes.push_str(&format!("<polyline class=\"{class}\" points=\"{}\"/>\n", points.join(" ")));
    }

    pub(super) fn area(&mut self, class: &str, points: &[(f64, f64)]) {
        let points: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        self.shapes.push_str(&format!("<polygon class=\"{class}\" points=\"{}\"/>\n", points.join(" ")));
    }

    pub(super) fn text(&mut self, class: &str, (x, y): (f64, f64), anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        self.shapes.push_str(&format!(
            "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>\n",
            escape(text)
        ));
    }

    pub(super) fn finish(self) -> String {
        let Self { id, title, description, width, height, shapes } = self;
        format!(
            "<svg viewBox=\"0 0 {width:.0} {height:.0}\" role=\"img\" aria-labelledby=\"{id}-title {id}-desc\">\n\
             <title id=\"{id}-title\">{}</title>\n<desc id=\"{id}-desc\">{}</desc>\n{shapes}</svg>\n",
            escape(&title),
            escape(&description)
        )
    }
}

/// A round number not below `most`, and a step that divides it into few parts.
pub(super) fn scale(most: f64) -> (f64, f64) {
    if !most.is_finite() || most <= 0.0 {
        return (1.0, 1.0);
    }
    let magnitude = 10_f64.powf((most / 4.0).log10().floor());
    let steps = [1.0, 2.0, 2.5, 5.0, 10.0].map(|step| step * magnitude);
    let step = steps.into_iter().find(|step| most / step <= 5.0).unwrap_or(10.0 * magnitude);
    ((most / step).ceil() * step, step)
}

/// A number on an axis: no more digits than are needed.
pub(super) fn axis(number: f64) -> String {
    let (number, unit) = match number {
        _ if number >= 1_000_000.0 => (number / 1_000_000.0, " M"),
        _ if number >= 10_000.0 => (number / 1000.0, " k"),
        _ => (number, ""),
    };
    let rounded = (number * 100.0).round() / 100.0;
    format!("{rounded}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_end_at_round_numbers() {
        for (most, end, step) in
            [(9.0, 10.0, 2.0), (100.0, 100.0, 20.0), (0.7, 0.8, 0.2), (1234.0, 1250.0, 250.0)]
        {
            let found = scale(most);
            assert!((found.0 - end).abs() < 1e-9 && (found.1 - step).abs() < 1e-9, "{most}: {found:?}");
        }
        assert_eq!((scale(0.0), scale(f64::NAN)), ((1.0, 1.0), (1.0, 1.0)));
        assert_eq!(
            (axis(0.25), axis(1500.0), axis(25_000.0), axis(2_500_000.0)),
            ("0.25".into(), "1500".into(), "25 k".into(), "2.5 M".into())
        );
    }

    #[test]
    fn a_drawing_tells_what_it_shows() {
        let mut svg = Svg::new("x", "A <title>", "What & why", 10.0, 20.0);
        svg.path("line", &[(1.0, 2.0)]);
        svg.text("label", (1.0, 2.0), Anchor::Middle, "<script>");
        let svg = svg.finish();
        assert!(svg.contains("role=\"img\" aria-labelledby=\"x-title x-desc\""), "{svg}");
        assert!(svg.contains("A &lt;title&gt;") && svg.contains("What &amp; why"), "{svg}");
        assert!(svg.contains("&lt;script&gt;") && svg.contains("<circle"), "{svg}");
    }
}
