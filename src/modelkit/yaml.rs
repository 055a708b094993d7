//! Writes YAML byte for byte as go-yaml 3 does with an indent of 2, which is how kit writes a Kitfile.
//!
//! Only what a Kitfile needs: no comments, anchors or tags, and lines are never folded (go-yaml's default width is
//! unlimited). Where go-yaml has quirks they are kept, because the bytes are the promise: a literal block that begins
//! with a line break loses that break, and a string that begins with U+FEFF is escaped character for character.

use super::scalar::{Forms, is_break, is_printable, reads_back_as_string};

/// Spaces for each level.
const INDENT: usize = 2;
/// A key that is longer is written behind a `?`.
const MAX_SIMPLE_KEY: usize = 128;
/// From this power of ten on numbers are written with an exponent.
const EXPONENT_FROM: i32 = 6;

/// A value to write.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Node {
    Null,
    Bool(bool),
    Number(f64),
    Text(String),
    List(Vec<Node>),
    /// A list on one line, `[a, b]`.
    FlowList(Vec<String>),
    /// Pairs in the order given.
    Map(Vec<(String, Node)>),
}

/// The document whose root is a map of `pairs`.
pub(super) fn document(pairs: &[(String, Node)]) -> String {
    let mut emitter = Emitter::default();
    if pairs.is_empty() {
        emitter.indicator("{}", true, false, false);
    } else {
        emitter.block_map(pairs, 0);
    }
    emitter.start_line(0);
    emitter.out
}

/// A number as Go's `FormatFloat(number, 'g', -1, 64)` writes it: the fewest digits that read back as the same double.
fn format_number(number: f64) -> String {
    let shortest = format!("{number:e}");
    let digits = shortest.bytes().take_while(|c| *c != b'e').filter(u8::is_ascii_digit).count();
    // Where two texts of that length are equally near, Go takes the even one, as this rounding does.
    let rounded = format!("{number:.*e}", digits.saturating_sub(1));
    let (mantissa, exponent) = rounded.split_once('e').unwrap_or((&rounded, "0"));
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if (-4..EXPONENT_FROM).contains(&exponent) {
        return number.to_string();
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.unsigned_abs())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Style {
    Plain,
    SingleQuoted,
    DoubleQuoted,
    Literal,
}

/// Where a scalar stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Block,
    Flow,
}

/// The output and what go-yaml's emitter knows of it: the column in characters, whether the last thing written was
/// white space, and whether the line holds nothing but indentation so far.
struct Emitter {
    out: String,
    column: usize,
    whitespace: bool,
    indention: bool,
}

impl Default for Emitter {
    fn default() -> Self {
        Self { out: String::new(), column: 0, whitespace: true, indention: true }
    }
}

impl Emitter {
    fn put(&mut self, c: char) {
        self.out.push(c);
        self.column += 1;
    }

    fn put_break(&mut self, c: char) {
        self.out.push(c);
        self.column = 0;
        self.indention = true;
    }

    /// Goes to column `indent`, on this line if nothing stands there yet.
    fn start_line(&mut self, indent: usize) {
        if !self.indention || self.column > indent || (self.column == indent && !self.whitespace) {
            self.put_break('\n');
        }
        while self.column < indent {
            self.put(' ');
        }
        self.whitespace = true;
    }

    fn indicator(&mut self, text: &str, needs_whitespace: bool, is_whitespace: bool, is_indention: bool) {
        if needs_whitespace && !self.whitespace {
            self.put(' ');
        }
        text.chars().for_each(|c| self.put(c));
        self.whitespace = is_whitespace;
        self.indention = self.indention && is_indention;
    }

    /// `indent` is where the parent's content begins.
    fn node(&mut self, node: &Node, indent: usize) {
        let below = indent + INDENT;
        match node {
            Node::Null => self.plain("null"),
            Node::Bool(value) => self.plain(if *value { "true" } else { "false" }),
            Node::Number(number) => self.plain(&format_number(*number)),
            Node::Text(text) => self.text(text, below, Place::Block),
            Node::List(items) if items.is_empty() => self.indicator("[]", true, false, false),
            Node::List(items) => self.block_list(items, below),
            Node::FlowList(items) => self.flow_list(items, below),
            Node::Map(pairs) if pairs.is_empty() => self.indicator("{}", true, false, false),
            Node::Map(pairs) => self.block_map(pairs, below),
        }
    }

    fn block_list(&mut self, items: &[Node], indent: usize) {
        for item in items {
            self.start_line(indent);
            self.indicator("-", true, false, true);
            self.node(item, indent);
        }
    }

    fn block_map(&mut self, pairs: &[(String, Node)], indent: usize) {
        for (key, value) in pairs {
            self.start_line(indent);
            let simple = key.len() <= MAX_SIMPLE_KEY && !key.contains(is_break);
            if !simple {
                self.indicator("?", true, false, true);
            }
            self.text(key, indent + INDENT, Place::Block);
            if !simple {
                self.start_line(indent);
            }
            self.indicator(":", !simple, false, !simple);
            self.node(value, indent);
        }
    }

    fn flow_list(&mut self, items: &[String], indent: usize) {
        self.indicator("[", true, true, false);
        for (at, item) in items.iter().enumerate() {
            if at > 0 {
                self.indicator(",", false, false, false);
            }
            self.text(item, indent + INDENT, Place::Flow);
        }
        self.indicator("]", false, false, false);
    }

    fn text(&mut self, text: &str, indent: usize, place: Place) {
        match style_of(text, place) {
            Style::Plain => self.plain(text),
            Style::SingleQuoted => self.single_quoted(text, indent),
            Style::DoubleQuoted => self.double_quoted(text),
            Style::Literal => self.literal(text, indent),
        }
    }

    fn plain(&mut self, text: &str) {
        self.indicator(text, true, false, false);
    }

    fn single_quoted(&mut self, text: &str, indent: usize) {
        self.indicator("'", true, false, false);
        let mut after_break = false;
        for c in text.chars() {
            if is_break(c) {
                self.put_break(c);
            } else {
                if after_break {
                    self.start_line(indent);
                }
                if c == '\'' {
                    self.put('\'');
                }
                self.put(c);
                self.indention = false;
            }
            after_break = is_break(c);
        }
        self.indicator("'", false, false, false);
    }

    fn double_quoted(&mut self, text: &str) {
        self.indicator("\"", true, false, false);
        let escape_all = text.starts_with('\u{feff}');
        for c in text.chars() {
            if escape_all || !is_printable(c) || is_break(c) || matches!(c, '"' | '\\') {
                self.escape(c);
            } else {
                self.put(c);
            }
        }
        self.indicator("\"", false, false, false);
    }

    fn escape(&mut self, c: char) {
        let short = match c {
            '\0' => '0',
            '\u{7}' => 'a',
            '\u{8}' => 'b',
            '\t' => 't',
            '\n' => 'n',
            '\u{b}' => 'v',
            '\u{c}' => 'f',
            '\r' => 'r',
            '\u{1b}' => 'e',
            '"' | '\\' => c,
            '\u{85}' => 'N',
            '\u{a0}' => '_',
            '\u{2028}' => 'L',
            '\u{2029}' => 'P',
            _ => {
                let code = u32::from(c);
                let escaped = match code {
                    ..=0xff => format!("\\x{code:02X}"),
                    0x100..=0xffff => format!("\\u{code:04X}"),
                    _ => format!("\\U{code:08X}"),
                };
                return escaped.chars().for_each(|c| self.put(c));
            }
        };
        self.put('\\');
        self.put(short);
    }

    fn literal(&mut self, text: &str, indent: usize) {
        self.indicator("|", true, false, false);
        if text.starts_with(|c| c == ' ' || is_break(c)) {
            self.indicator(&INDENT.to_string(), false, false, false);
        }
        let mut last = text.chars().rev();
        let ends_in_break = last.next().is_some_and(is_break);
        let ends_in_two = ends_in_break && last.next().is_none_or(is_break);
        if !ends_in_break {
            self.indicator("-", false, false, false);
        } else if ends_in_two {
            self.indicator("+", false, false, false);
        }
        self.whitespace = true;
        let mut after_break = true;
        for c in text.chars() {
            if is_break(c) {
                self.put_break(c);
            } else {
                if after_break {
                    self.start_line(indent);
                }
                self.put(c);
                self.indention = false;
            }
            after_break = is_break(c);
        }
    }
}

fn style_of(text: &str, place: Place) -> Style {
    let forms = Forms::of(text);
    let quoted = if forms.single_quoted { Style::SingleQuoted } else { Style::DoubleQuoted };
    if text.contains('\n') {
        let literal = forms.literal && place == Place::Block;
        return if literal { Style::Literal } else { Style::DoubleQuoted };
    }
    if !reads_back_as_string(text) {
        return Style::DoubleQuoted;
    }
    let plain = if place == Place::Flow { forms.flow_plain } else { forms.block_plain };
    if plain { Style::Plain } else { quoted }
}
