//! What go-yaml 3.0.1 wrote for these values, with an indent of 2. All expected bytes are its own.

use super::json::Json;
use super::kitfile::node;
use super::yaml::{Node, document};

fn written(json: &str) -> String {
    let Node::Map(pairs) = node(&Json::parse(json.as_bytes()).expect("JSON")) else { panic!("not a map: {json}") };
    document(&pairs)
}

/// What stands behind `k: ` in `{k: text}`.
fn value(text: &str) -> String {
    let document = document(&[("k".to_owned(), Node::Text(text.to_owned()))]);
    document.strip_prefix("k: ").expect("a key").to_owned()
}

#[test]
fn null_booleans_numbers_and_dates_are_quoted_only_where_they_would_be_read_so() {
    for (text, expected) in [
        ("", "\"\"\n"),
        ("~", "\"~\"\n"),
        ("Null", "\"Null\"\n"),
        ("TRUE", "\"TRUE\"\n"),
        ("tRUE", "tRUE\n"),
        ("Off", "\"Off\"\n"),
        ("N", "\"N\"\n"),
        (".inf", "\".inf\"\n"),
        ("-.INF", "\"-.INF\"\n"),
        ("+.nan", "+.nan\n"),
        (".NaN", "\".NaN\"\n"),
        (".5e3", "\".5e3\"\n"),
        (".1_0", "\".1_0\"\n"),
        ("._1", "._1\n"),
        ("1e400", "1e400\n"),
        ("08", "\"08\"\n"),
        ("0_8", "\"0_8\"\n"),
        ("0b-1", "\"0b-1\"\n"),
        ("0o+7", "\"0o+7\"\n"),
        ("-0b-1", "-0b-1\n"),
        ("0b2", "0b2\n"),
        ("+0x1", "\"+0x1\"\n"),
        ("0x1FFFFFFFFFFFFFFFFF", "0x1FFFFFFFFFFFFFFFFF\n"),
        ("18446744073709551616", "\"18446744073709551616\"\n"),
        ("-9223372036854775809", "\"-9223372036854775809\"\n"),
        ("1_0:30", "\"1_0:30\"\n"),
        ("12:60", "12:60\n"),
        ("1:2.5", "\"1:2.5\"\n"),
        ("1:2:", "'1:2:'\n"),
        ("2001-1-2", "\"2001-1-2\"\n"),
        ("2001-02-29", "2001-02-29\n"),
        ("2001-1-2  3:4:5", "\"2001-1-2  3:4:5\"\n"),
        ("2001-1-2T3:4:5", "2001-1-2T3:4:5\n"),
        ("<<", "<<\n"),
        ("=", "=\n"),
    ] {
        assert_eq!(value(text), expected, "{text:?}");
    }
}

#[test]
fn indicators_are_quoted_where_they_mean_something() {
    for (text, expected) in [
        ("-x", "-x\n"),
        ("- x", "'- x'\n"),
        ("?x", "?x\n"),
        ("? x", "'? x'\n"),
        (":x", ":x\n"),
        (": x", "': x'\n"),
        ("x:", "'x:'\n"),
        ("x: y", "'x: y'\n"),
        ("x:y", "x:y\n"),
        ("x #", "'x #'\n"),
        ("x#", "x#\n"),
        ("---", "'---'\n"),
        ("...x", "'...x'\n"),
        ("..", "..\n"),
        ("a, b", "a, b\n"),
        ("[x", "'[x'\n"),
        ("x]", "x]\n"),
        ("%x", "'%x'\n"),
        ("@x", "'@x'\n"),
        ("!x", "'!x'\n"),
        ("'x", "'''x'\n"),
        ("x'y: z", "'x''y: z'\n"),
        ("\tx", "\"\\tx\"\n"),
        ("x\ty", "\"x\\ty\"\n"),
        (" x", "' x'\n"),
        ("x ", "'x '\n"),
    ] {
        assert_eq!(value(text), expected, "{text:?}");
    }
}

#[test]
fn characters_that_yaml_does_not_print_are_escaped() {
    for (text, expected) in [
        ("\u{0}\u{7}\u{1b}", "\"\\0\\a\\e\"\n"),
        ("\u{7f}", "\"\\x7F\"\n"),
        ("\u{85}", "\"\\N\"\n"),
        ("\u{a0}x", "\u{a0}x\n"),
        ("\u{a0}\u{1}", "\"\u{a0}\\x01\"\n"),
        ("x\u{2028}y", "'x\u{2028}  y'\n"),
        ("x \u{2029}", "\"x \\P\"\n"),
        ("\u{2028} x", "\"\\L x\"\n"),
        ("\u{feff}", "\"\\uFEFF\"\n"),
        ("\u{feff}ab", "\"\\uFEFF\\x61\\x62\"\n"),
        ("a\u{feff}b", "\"a\\uFEFFb\"\n"),
        ("\u{fffe}", "\"\\uFFFE\"\n"),
        ("\u{1f642} x", "\"\\U0001F642 x\"\n"),
        ("\u{e9}\"\\", "\u{e9}\"\\\n"),
    ] {
        assert_eq!(value(text), expected, "{text:?}");
    }
}

#[test]
fn lines_become_a_literal_block_with_hints() {
    for (text, expected) in [
        ("a\nb", "|-\n  a\n  b\n"),
        ("a\nb\n", "|\n  a\n  b\n"),
        ("a\n\n", "|+\n  a\n\n"),
        ("\n", "|2+\n"),
        ("\n\n", "|2+\n\n"),
        ("\na", "|2-\n  a\n"),
        (" a\nb", "|2-\n   a\n  b\n"),
        ("a \nb", "\"a \\nb\"\n"),
        ("a\n b", "|-\n  a\n   b\n"),
        ("a\nb ", "\"a\\nb \"\n"),
        ("a\n\tb", "|-\n  a\n  \tb\n"),
        ("a\r\nb", "\"a\\r\\nb\"\n"),
        ("a\n\u{2028}b", "|-\n  a\n\u{2028}  b\n"),
        ("a\u{1}\nb", "\"a\\x01\\nb\"\n"),
    ] {
        assert_eq!(value(text), expected, "{text:?}");
    }
}

#[test]
fn numbers_have_the_fewest_digits_and_an_exponent_from_a_million_on() {
    let numbers = "[0.00001, 0.0001, 123456, 1234567, -0.0, 1e100, 70507795283278.62, 100000, 999999.5]";
    let expected = "1e-05 0.0001 123456 1.234567e+06 -0 1e+100 7.050779528327862e+13 100000 999999.5";
    let document = written(&format!(r#"{{"k": {numbers}}}"#));
    let found: Vec<_> = document.lines().skip(1).map(|line| line.trim_start_matches("  - ")).collect();
    assert_eq!(found.join(" "), expected);
}

#[test]
fn lists_and_maps_nest_by_two_spaces() {
    let nested = r#"{"k": [[], {}, [[1], {"a": [{}]}], {"b": "x\ny", "c": [null]}]}"#;
    let expected =
        "k:\n  - []\n  - {}\n  - - - 1\n    - a:\n        - {}\n  - b: |-\n      x\n      y\n    c:\n      - null\n";
    assert_eq!(written(nested), expected);
}

#[test]
fn keys_that_are_long_or_have_lines_stand_behind_a_question_mark() {
    assert_eq!(written(r#"{"a\nb": 1}"#), "? |-\n  a\n  b\n: 1\n");
    assert_eq!(written(r#"{"a\u2028b": "c"}"#), "? 'a\u{2028}  b'\n: c\n");
    let long = "x".repeat(129);
    assert_eq!(written(&format!(r#"{{"{long}": 1}}"#)), format!("? {long}\n: 1\n"));
    let short = "x".repeat(128);
    assert_eq!(written(&format!(r#"{{"{short}": 1}}"#)), format!("{short}: 1\n"));
    assert_eq!(written(r#"{"": ""}"#), "\"\": \"\"\n");
}
