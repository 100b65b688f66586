//! Lines, boxes and words of a drawing, and scales for them.

use std::fmt::{self, Display, Write as _};

/// Text as it must stand in HTML.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            letter => escaped.push(letter),
        }
    }
    escaped
}

/// Where the words of a label end up beside their point.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Anchor {
    Start,
    Middle,
    End,
}

/// How wide a drawing is that is stretched.
pub(crate) const STRETCHED: f64 = 1000.0;

/// How a drawing follows the width of the page.
#[derive(Clone, Copy, Debug)]
enum Fit {
    /// As a whole, with what is written in it.
    Scaled,
    /// In its width alone, and nothing is written in it.
    Stretched,
}

/// A drawing, `width` by `height`.
#[derive(Debug)]
pub(crate) struct Drawing {
    width: f64,
    height: f64,
    fit: Fit,
    /// What it shows, for who cannot see it.
    label: String,
    body: String,
}

impl Drawing {
    /// One that grows and shrinks with the page.
    pub(crate) fn new(width: f64, height: f64, label: impl Into<String>) -> Self {
        Self { width, height, fit: Fit::Scaled, label: label.into(), body: String::new() }
    }

    /// One that is as wide as there is room, [`STRETCHED`] by its own measure, and always as high.
    pub(crate) fn stretched(height: f64, label: impl Into<String>) -> Self {
        Self { fit: Fit::Stretched, ..Self::new(STRETCHED, height, label) }
    }

    fn push(&mut self, element: fmt::Arguments<'_>) {
        self.body.write_fmt(element).expect("a string takes all that is written to it");
        self.body.push('\n');
    }

    pub(crate) fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        let ((x1, y1), (x2, y2)) = (from, to);
        self.push(format_args!(
            r#"<line class="{class}" x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}"/>"#
        ));
    }

    /// A box of which a reader who points at it is told `title`.
    pub(crate) fn rect(&mut self, class: &str, at: (f64, f64), size: (f64, f64), title: &str) {
        let ((x, y), (width, height)) = (at, size);
        self.push(format_args!(
            r#"<rect class="{class}" x="{x:.1}" y="{y:.1}" width="{width:.2}" height="{height:.1}"><title>{}</title></rect>"#,
            escape(title)
        ));
    }

    pub(crate) fn dot(&mut self, class: &str, at: (f64, f64), title: &str) {
        let (x, y) = at;
        self.push(format_args!(
            r#"<circle class="{class}" cx="{x:.1}" cy="{y:.1}" r="3"><title>{}</title></circle>"#,
            escape(title)
        ));
    }

    pub(crate) fn path(&mut self, class: &str, points: &[(f64, f64)]) {
        let points: Vec<_> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        self.push(format_args!(r#"<polyline class="{class}" points="{}"/>"#, points.join(" ")));
    }

    pub(crate) fn text(&mut self, class: &str, at: (f64, f64), anchor: Anchor, text: &str) {
        let (x, y) = at;
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        self.push(format_args!(
            r#"<text class="{class}" x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#,
            escape(text)
        ));
    }
}

impl Display for Drawing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { width, height, fit, label, body } = self;
        let fit = match fit {
            Fit::Scaled => String::new(),
            Fit::Stretched => {
                format!(" class=\"stretched\" preserveAspectRatio=\"none\" style=\"height: {height}px\"")
            }
        };
        write!(
            f,
            "<svg viewBox=\"0 0 {width} {height}\"{fit} role=\"img\" aria-label=\"{}\">\n{body}</svg>\n",
            escape(label)
        )
    }
}

/// Nanoseconds on a logarithmic scale, from whole power of ten to whole power of ten.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LogScale {
    low: i32,
    high: i32,
    /// Where the lowest and the highest value lie.
    from: f64,
    to: f64,
}

impl LogScale {
    pub(crate) fn new(least: u64, greatest: u64, from: f64, to: f64) -> Self {
        let low = (least.max(1) as f64).log10().floor() as i32;
        let high = (greatest.max(1) as f64).log10().ceil() as i32;
        Self { low, high: high.max(low + 1), from, to }
    }

    pub(crate) fn at(&self, value: u64) -> f64 {
        let part = ((value.max(1) as f64).log10() - f64::from(self.low)) / f64::from(self.high - self.low);
        self.from + part.clamp(0.0, 1.0) * (self.to - self.from)
    }

    /// The powers of ten.
    pub(crate) fn ticks(&self) -> impl Iterator<Item = u64> + use<> {
        (self.low..=self.high).map(|power| 10_u64.pow(power.unsigned_abs().min(18)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_become_markup() {
        let mut drawing = Drawing::new(1.0, 1.0, "a \"label\"");
        drawing.text("t", (0.0, 0.0), Anchor::Start, "<b> & more");
        let drawn = drawing.to_string();
        assert!(drawn.contains("&lt;b&gt; &amp; more") && drawn.contains("a &quot;label&quot;"));
    }

    #[test]
    fn a_scale_holds_its_values() {
        let scale = LogScale::new(150, 90_000, 100.0, 0.0);
        assert_eq!(scale.ticks().collect::<Vec<_>>(), [100, 1000, 10_000, 100_000]);
        assert_eq!((scale.at(100), scale.at(100_000)), (100.0, 0.0));
        assert!(scale.at(1000) > scale.at(2000));
        assert_eq!(LogScale::new(0, 0, 0.0, 1.0).at(10), 1.0);
    }
}
