//! A plot as inline SVG: lines over two axes, or bars.

use std::fmt::Write as _;

use super::escape::escaped;

/// Size of a plot, and of the room for its labels, in the units of its view box.
const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 46.0;
const BOTTOM: f64 = 40.0;
/// Steps of an axis.
const STEPS: usize = 4;

/// What one of several sides measured.
#[derive(Debug, Clone)]
pub(super) struct Series {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

/// Lines over two axes. The vertical one starts at zero, so that what looks twice as high is.
#[derive(Debug, Clone)]
pub(super) struct Plot {
    pub(super) title: String,
    pub(super) x_label: &'static str,
    pub(super) y_label: &'static str,
    pub(super) series: Vec<Series>,
}

/// A range of numbers on one axis.
#[derive(Debug, Clone, Copy)]
struct Axis {
    low: f64,
    high: f64,
}

impl Axis {
    fn share(self, value: f64) -> f64 {
        ((value - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }

    fn steps(self) -> impl Iterator<Item = f64> {
        let step = (self.high - self.low) / STEPS as f64;
        (0..=STEPS).map(move |index| self.low + step * index as f64)
    }
}

impl Plot {
    /// Writes the plot; nothing when there is nothing to draw.
    pub(super) fn write(&self, out: &mut String) {
        let points = || self.series.iter().flat_map(|series| &series.points);
        if points().next().is_none() {
            return;
        }
        let low = points().map(|point| point.0).fold(f64::MAX, f64::min);
        let high = points().map(|point| point.0).fold(f64::MIN, f64::max);
        let top = points().map(|point| point.1).fold(0.0, f64::max);
        let x = Axis {
            low,
            high: if high > low { high } else { low + 1.0 },
        };
        let y = Axis {
            low: 0.0,
            high: round_up(top),
        };
        let x_of = |value: f64| LEFT + x.share(value) * (WIDTH - LEFT - RIGHT);
        let y_of = |value: f64| HEIGHT - BOTTOM - y.share(value) * (HEIGHT - TOP - BOTTOM);
        let _ = write!(
            out,
            "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\"><title>{0}</title>\
             <text class=\"title\" x=\"{LEFT}\" y=\"16\">{0}</text>",
            escaped(&self.title)
        );
        for value in y.steps() {
            let (at, right) = (y_of(value), WIDTH - RIGHT);
            let _ = write!(
                out,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
                 <text class=\"end\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                LEFT - 6.0,
                at + 4.0,
                short(value)
            );
        }
        for value in x.steps() {
            let _ = write!(
                out,
                "<text class=\"middle\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                x_of(value),
                HEIGHT - BOTTOM + 16.0,
                short(value)
            );
        }
        let _ = write!(
            out,
            "<text class=\"middle\" x=\"{:.1}\" y=\"{:.1}\">{}</text>\
             <text class=\"middle\" transform=\"translate(12 {:.1}) rotate(-90)\">{}</text>",
            LEFT + (WIDTH - LEFT - RIGHT) / 2.0,
            HEIGHT - 6.0,
            escaped(self.x_label),
            TOP + (HEIGHT - TOP - BOTTOM) / 2.0,
            escaped(self.y_label)
        );
        for (index, series) in self.series.iter().enumerate() {
            self.write_series(index, series, out, x_of, y_of);
        }
        out.push_str("</svg>\n");
    }

    fn write_series(
        &self,
        index: usize,
        series: &Series,
        out: &mut String,
        x_of: impl Fn(f64) -> f64,
        y_of: impl Fn(f64) -> f64,
    ) {
        let width = (WIDTH - LEFT - RIGHT) / self.series.len() as f64;
        let at = LEFT + width * index as f64;
        let name = escaped(&series.name);
        let _ = write!(
            out,
            "<g class=\"s{index}\"><circle class=\"dot\" cx=\"{:.1}\" cy=\"31\" r=\"4\"/>\
             <text x=\"{:.1}\" y=\"35\">{name}</text><polyline points=\"",
            at + 4.0,
            at + 12.0
        );
        for (x, y) in &series.points {
            let _ = write!(out, "{:.1},{:.1} ", x_of(*x), y_of(*y));
        }
        out.push_str("\"/>");
        for (x, y) in &series.points {
            let _ = write!(
                out,
                "<circle class=\"dot\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.5\">\
                 <title>{name}: {}, {}</title></circle>",
                x_of(*x),
                y_of(*y),
                short(*x),
                short(*y)
            );
        }
        out.push_str("</g>");
    }
}

/// Returns the next number whose quarters are short to write: 1, 2, 4 or 8 times a power of ten.
fn round_up(value: f64) -> f64 {
    if value <= 0.0 || !value.is_finite() {
        return 1.0;
    }
    let power = 10_f64.powf(value.log10().floor());
    let found = [1.0, 2.0, 4.0, 8.0]
        .into_iter()
        .find(|step| step * power >= value);
    found.unwrap_or(10.0) * power
}

/// Returns a number with three digits that matter, and none for nothing.
pub(super) fn short(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_ends_at_the_next_short_number() {
        let found: Vec<f64> = [0.0, 0.03, 1.0, 1.1, 3.9, 7.0, 9.0, 850.0]
            .into_iter()
            .map(round_up)
            .collect();
        assert_eq!(found, [1.0, 0.04, 1.0, 2.0, 4.0, 8.0, 10.0, 1000.0]);
        assert_eq!(round_up(f64::NAN), 1.0);
    }

    #[test]
    fn numbers_are_short() {
        let found: Vec<String> = [0.0, 0.25, 1.5, 12.34, 1234.5]
            .into_iter()
            .map(short)
            .collect();
        assert_eq!(found, ["0", "0.25", "1.5", "12.3", "1234"]);
    }

    #[test]
    fn higher_values_are_drawn_higher_and_names_cannot_break_out() {
        let plot = Plot {
            title: "a < b".into(),
            x_label: "x",
            y_label: "y",
            series: vec![Series {
                name: "<script>".into(),
                points: vec![(1.0, 1.0), (2.0, 4.0)],
            }],
        };
        let mut svg = String::new();
        plot.write(&mut svg);
        assert!(
            svg.contains("a &lt; b") && svg.contains("&lt;script&gt;: 2, 4"),
            "{svg}"
        );
        assert!(!svg.contains("<script"), "{svg}");
        // One at the left in a quarter of the height, the other at the upper right corner.
        assert!(svg.contains("points=\"52.0,176.5 408.0,46.0 \""), "{svg}");
    }

    #[test]
    fn nothing_measured_is_no_plot() {
        let plot = Plot {
            title: String::new(),
            x_label: "",
            y_label: "",
            series: Vec::new(),
        };
        let mut svg = String::new();
        plot.write(&mut svg);
        assert_eq!(svg, "");
    }
}
