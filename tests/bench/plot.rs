//! The figures as a picture: how each stands to its goal. SVG by hand; it follows who looks at it into the dark.

use crate::measure::{Figure, Goal, Verdict};
use crate::report::number;

/// Where bars begin, to the right of their names.
const LEFT: f64 = 400.0;
/// How long a bar is that just meets its goal.
const GOAL: f64 = 200.0;
/// Bars end here; what is longer is cut, and its number tells.
const MOST: f64 = 2.0;
/// From one bar to the next.
const STEP: f64 = 24.0;
/// Above the first.
const TOP: f64 = 104.0;
/// The whole picture, numbers to the right of the bars included.
const WIDTH: f64 = 960.0;

const STYLE: &str = "\
text { font: 13px system-ui, sans-serif; fill: #1f2328; }
.small { font-size: 11px; fill: #59636e; }
.met { fill: #1a7f37; } .missed { fill: #bc4c00; }
.line { stroke: #59636e; stroke-dasharray: 4 3; } .spread { stroke: #1f2328; stroke-width: 1.5; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .small { fill: #9198a1; } .met { fill: #3fb950; } .missed { fill: #f0883e; }
  .line { stroke: #9198a1; } .spread { stroke: #e6edf3; }
}";

/// Draws the figures that have a goal.
pub fn draw(figures: &[Figure], head: &str) -> String {
    let figures: Vec<_> = figures.iter().filter(|figure| figure.goal != Goal::None).collect();
    let height = TOP + STEP * figures.len() as f64 + 24.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
         aria-label=\"Each figure against its goal\">\n<style>\n{STYLE}\n</style>\n\
         <text x=\"12\" y=\"22\">Each figure against its goal: longer is better, the broken line is the goal</text>\n"
    );
    for (line, y) in head.lines().zip((40..).step_by(16)) {
        svg.push_str(&format!("<text class=\"small\" x=\"12\" y=\"{y}\">{}</text>\n", escaped(line)));
    }
    for (at, figure) in figures.iter().enumerate() {
        bar(&mut svg, figure, TOP + STEP * at as f64);
    }
    let (x, bottom) = (LEFT + GOAL, height - 16.0);
    svg.push_str(&format!(
        "<line class=\"line\" x1=\"{x}\" x2=\"{x}\" y1=\"{:.0}\" y2=\"{bottom:.0}\"/>\n</svg>\n",
        TOP - 10.0
    ));
    svg
}

fn bar(svg: &mut String, figure: &Figure, y: f64) {
    let reach = |value: f64| GOAL * score(figure.goal, value).clamp(0.0, MOST);
    let (low, high) = figure.spread();
    let (from, to) = (LEFT + reach(low).min(reach(high)), LEFT + reach(low).max(reach(high)));
    let class = if figure.verdict() == Verdict::Met { "met" } else { "missed" };
    let name = escaped(&format!("{} {}", figure.row, figure.what));
    let (sign, goal) = match figure.goal {
        Goal::AtLeast(goal) => ("≥", goal),
        Goal::AtMost(goal) => ("≤", goal),
        Goal::None => return,
    };
    let told = escaped(&format!("{} {} (goal {sign} {goal})", number(figure.median()), figure.unit));
    let (text, middle, length) = (y + 12.0, y + 8.0, reach(figure.median()));
    svg.push_str(&format!(
        "<text x=\"12\" y=\"{text:.0}\">{name}</text>\
         <rect class=\"{class}\" x=\"{LEFT}\" y=\"{y:.0}\" width=\"{length:.1}\" height=\"16\" rx=\"2\"/>\
         <line class=\"spread\" x1=\"{from:.1}\" x2=\"{to:.1}\" y1=\"{middle:.0}\" y2=\"{middle:.0}\"/>\
         <text x=\"{:.0}\" y=\"{text:.0}\">{told}</text>\n",
        LEFT + MOST * GOAL + 12.0
    ));
}

/// A value as a multiple of its goal, so that more is better.
fn score(goal: Goal, value: f64) -> f64 {
    match goal {
        Goal::AtLeast(goal) => value / goal,
        // Nothing at all is as good as can be.
        Goal::AtMost(_) if value <= 0.0 => MOST,
        Goal::AtMost(goal) => goal / value,
        Goal::None => 0.0,
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
