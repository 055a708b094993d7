//! The document of the format, held against what is written here.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::process::Command;

use super::layout::{Header, Record};
use super::*;
use crate::archive::testing::index_of;

const DOCUMENT: &str = include_str!("../../../docs/index-format.md");

/// The text of the document's block in this language, of which there is one.
fn block(language: &str) -> &'static str {
    let (_, rest) = DOCUMENT.split_once(&format!("```{language}\n")).expect("a block in this language");
    rest.split_once("```").expect("an end").0
}

/// Offset and name of each field in the table below a heading.
fn table(heading: &str) -> Vec<(usize, &'static str)> {
    let (_, rest) = DOCUMENT.split_once(&format!("### {heading}\n")).expect("a heading");
    let rows = rest.lines().skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|')).skip(2);
    let cells = rows.map(|row| row.split('|').map(str::trim).collect::<Vec<_>>());
    cells.map(|cells| (cells[1].parse().expect("an offset"), cells[3])).collect()
}

#[test]
fn the_tables_have_the_fields_where_they_are() {
    macro_rules! fields {
        ($of:ty: $($field:ident)*) => { vec![$((offset_of!($of, $field), stringify!($field))),*] };
    }
    let header = fields!(Header: magic version format compression unused chunk_size entries names chunks size inflated digest diff_id);
    assert_eq!(table("Header"), header);
    assert_eq!(table("Record"), fields!(Record: digest size offset mtime uid gid chunks path path_len mode));
}

#[test]
fn the_caps_are_those_in_the_document() {
    let caps = "`entries` ≤ 16,777,216, `names` ≤ 1,073,741,824, `chunks` ≤ 67,108,864";
    assert!(DOCUMENT.contains(caps));
    assert_eq!((MAX_ENTRIES, MAX_NAMES, MAX_CHUNKS), (16_777_216, 1_073_741_824, 67_108_864));
    assert_eq!(Caps::DEFAULT.depth, 256);
}

#[test]
fn the_example_is_what_is_written_for_its_tar() {
    let tar = Command::new("python3").args(["-c", block("python")]).output().expect("python3 is installed");
    assert!(tar.status.success(), "{}", String::from_utf8_lossy(&tar.stderr));
    let index = index_of(&tar.stdout).expect("sound");

    let mut bytes = Vec::new();
    for line in block("hex").lines() {
        let mut columns = line.splitn(3, "  ");
        let offset = usize::from_str_radix(columns.next().expect("an offset"), 16).expect("hexadecimal");
        assert_eq!(offset, bytes.len(), "{line}");
        let digits = columns.next().expect("bytes").split(' ');
        bytes.extend(digits.map(|byte| u8::from_str_radix(byte, 16).expect("hexadecimal")));
    }
    assert_eq!(bytes, index.as_bytes());

    let annotations: BTreeMap<String, String> = serde_json::from_str(block("json")).expect("JSON");
    assert_eq!(Pin::read(&annotations), Ok(Some(index.pin())));
    assert_eq!(annotations.len(), 3);
}
