//! Holds what the map in `src/lib.rs` promises: which module may use which, who may name which library, who does no I/O.
//!
//! The source is read as Rust tokens, so comments and strings don't count, and whatever names a path does: `use` groups
//! over several lines, inline paths, arguments of macros, `#[cfg(test)]` modules. A path is judged by the file it stands
//! in; what a macro of this crate expands to is judged where the macro is written.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use proc_macro2::{Delimiter, Spacing, TokenStream, TokenTree};

/// The modules from the top down. A module may use those in lower layers; those in its own layer are its peers, and it
/// does not know them.
const LAYERS: &[&[&str]] = &[
    &["main", "lib"],
    &["cli"],
    &["serving"],
    &["mount"],
    &["fuse"],
    &["fs", "publish"],
    &["fetch"],
    &["tree", "inventory"],
    &["archive", "cache", "source"],
    &["modelkit"],
    &["object", "history"],
    &["reference", "digest", "path", "tagging", "units", "report"],
];

/// Peers that may know each other: who uses whom, and why that is right.
const PEERS: &[(&str, &str, &str)] = &[("reference", "digest", "a reference may pin a digest")];

/// Libraries, and the modules that alone may name them.
const OWNERS: &[(&str, &[&str])] =
    &[("fuser", &["fuse"]), ("oci_client", &["source"]), ("reqwest", &["source"]), ("clap", &["cli", "main"])];

/// Modules that the map calls pure. Their files of tests, `tests.rs` and `*_tests.rs`, may read fixtures.
const PURE: &[&str] = &["tree", "archive", "modelkit", "tagging"];

/// What a pure module may not name.
const IO: &[&str] = &["std::fs", "std::net", "std::process", "tokio", "reqwest", "rustix::fs", "rustix::net"];

/// Files that may contain `unsafe`: the one that maps memory.
const UNSAFE: &[&str] = &["cache/map.rs"];

#[test]
fn the_source_keeps_to_the_map() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files = rust_files(&src);
    let mut wrong = Vec::new();
    let mut seen = Vec::new();
    for file in &files {
        let name = file.strip_prefix(&src).expect("below src").to_str().expect("UTF-8 name");
        wrong.extend(violations(name, &fs::read_to_string(file).expect("readable source")));
        seen.push(module_of(name)[0].clone());
    }
    for module in LAYERS.iter().copied().flatten() {
        if !seen.iter().any(|name| name == module) {
            wrong.push(format!("LAYERS lists `{module}`, and src has no such module"));
        }
    }
    assert!(wrong.is_empty(), "the source leaves the map in src/lib.rs:\n  {}", wrong.join("\n  "));
}

#[test]
fn each_kind_of_violation_is_reported() {
    let cases = [
        // Direction, however the path is written.
        ("fetch/mod.rs", "use crate::cli::run;", "fetch/mod.rs:1: `crate::cli::run`: `cli` stands above `fetch`"),
        ("fetch/fill.rs", "fn f() { crate::cli::run() }", "`crate::cli::run`"),
        (
            "fs.rs",
            "use crate::{\n    path::TreePath,\n    mount::{self,\n        Daemon},\n};",
            "fs.rs:3: `crate::mount`",
        ),
        (
            "fs.rs",
            "use crate::{\n    path::TreePath,\n    mount::{self,\n        Daemon},\n};",
            "fs.rs:4: `crate::mount::Daemon`",
        ),
        ("path.rs", "use super::digest::Digest;", "`path` and `digest` are peers"),
        ("source/registry/token.rs", "use super::super::super::fetch::Flight;", "`crate::fetch::Flight`"),
        ("source/mod.rs", "use self::super::cache::Store;", "`source` and `cache` are peers"),
        (
            "digest.rs",
            "#[cfg(test)]\nmod tests {\n    use super::super::tree::Node;\n}",
            "digest.rs:3: `crate::tree::Node`",
        ),
        ("fetch/mod.rs", "fn f() { assert_eq!(1, kitfs::fs::ONE) }", "`crate::fs::ONE`"),
        ("fetch/mod.rs", "fn f(x: <crate::path::TreePath as crate::fs::Named>::Out) {}", "`crate::fs::Named`"),
        ("cache/mod.rs", "pub(in crate::fetch) fn f() {}", "`crate::fetch`"),
        ("cache/mod.rs", "use crate::r#fs::Fs;", "`crate::fs::Fs`"),
        // Ways around it.
        ("fetch/mod.rs", "use crate as kit;", "names the whole crate"),
        ("fetch/mod.rs", "use super::*;", "names the whole crate"),
        ("fetch/mod.rs", "use crate::VERSION;", "`VERSION` is not a module of the map"),
        ("helpers.rs", "", "`helpers` is not a module of the map"),
        ("bin/other.rs", "", "`bin` is not a module of the map"),
        // Libraries.
        ("fs.rs", "use fuser::Errno;", "fs.rs:1: `fuser::Errno`: only `fuse` may name `fuser`"),
        ("mount.rs", "use {std::io, fuser as f};", "only `fuse` may name `fuser`"),
        ("mount.rs", "extern crate fuser;", "only `fuse` may name `fuser`"),
        ("fetch/mod.rs", "fn f() -> ::reqwest::Client { todo() }", "only `source` may name `reqwest`"),
        ("fetch/mod.rs", "use oci_client::{\n    Client,\n};", "only `source` may name `oci_client`"),
        ("units.rs", "#[derive(clap::ValueEnum)]\nenum Unit {}", "only `cli` or `main` may name `clap`"),
        // Purity.
        ("modelkit/mod.rs", "use std::{fmt, fs};", "`std::fs`: `modelkit` does no I/O"),
        ("modelkit/mod.rs", "use std::*;", "`std::*`: `modelkit` does no I/O"),
        ("tree.rs", "fn f() { tokio::spawn(async {}); }", "`tokio::spawn`: `tree` does no I/O"),
        ("archive/walker.rs", "fn f() { let _ = std::net::TcpStream::connect(\"\"); }", "`archive` does no I/O"),
        ("archive/fixture_tests.rs", "use crate::cache::Store;", "`archive` and `cache` are peers"),
        ("tree.rs", "use rustix::fs::open;", "`tree` does no I/O"),
        ("archive/walker.rs", "#[cfg(test)]\nmod tests { use std::fs; }", "`archive` does no I/O"),
        // The rest.
        ("digest.rs", "fn f() { unsafe { g() } }", "digest.rs:1: `unsafe`"),
        ("digest.rs", "fn f( {", "digest.rs: not Rust"),
    ];
    for (file, source, expected) in cases {
        let found = violations(file, source);
        assert!(
            found.iter().any(|line| line.contains(expected)),
            "{file}: {source}\nexpected {expected}\nfound {found:#?}"
        );
    }
}

#[test]
fn what_the_map_allows_is_not_reported() {
    let cases = [
        ("main.rs", "use clap::Parser;\nfn main() { kitfs::cli::run() }"),
        ("cli/mod.rs", "use clap::Parser;\nuse crate::{mount, path::TreePath};"),
        ("fuse.rs", "use fuser::{Errno, Filesystem};\nuse crate::fs::Fs;"),
        (
            "fetch/mod.rs",
            "mod fill;\nuse self::fill::Fill;\nuse crate::{archive, cache::*, source};\npub(crate) fn f() {}",
        ),
        ("fetch/fill.rs", "use super::Flight;\n#[cfg(test)]\nmod tests { use super::*; use super::super::Flight; }"),
        ("tree.rs", "use crate::archive::Entry;\nuse std::{collections::BTreeMap, fmt};"),
        ("reference.rs", "use crate::digest::Digest;"),
        ("archive/fixture_tests.rs", "fn f() { std::fs::read(\"x\"); }"),
        (
            "fetch/mod.rs",
            "// crate::cli::run\n/* use /* fuser::X */ crate::cli; */\n/// [`crate::cli::run`]\nfn f() {}",
        ),
        (
            "fetch/mod.rs",
            "fn f() -> [&'static str; 3] { [\"crate::cli\", r#\"unsafe \" fuser::X\"#, \"\\\" crate::fs\"] }",
        ),
        ("modelkit/mod.rs", "fn f<'a>(fs: &'a Fs, tokio: char) -> bool { fs.tokio == '\"' && tokio == '\\'' }"),
        ("cache/mod.rs", "#![deny(unsafe_code)]\nfn f() -> impl Iterator<Item = u8> + use<> { [].into_iter() }"),
    ];
    for (file, source) in cases {
        assert_eq!(violations(file, source), Vec::<String>::new(), "{file}: {source}");
    }
}

/// What is wrong with one file of `src`, a line for each finding.
fn violations(file: &str, source: &str) -> Vec<String> {
    let module = module_of(file);
    let user = module[0].as_str();
    let Some(height) = layer(user) else {
        return vec![format!("{file}: `{user}` is not a module of the map: give it its place in src/lib.rs and here")];
    };
    let tokens = match TokenStream::from_str(source) {
        Ok(stream) => flatten(stream),
        Err(error) => return vec![format!("{file}: not Rust: {error}")],
    };
    let root = if matches!(user, "main" | "lib") { Vec::new() } else { module.clone() };
    let mut wrong = Vec::new();
    for Named { line, segments, module } in Reader::read(&tokens, root) {
        let at = format!("{file}:{line}");
        let Some(inside) = inside_crate(&segments, &module) else {
            let path = segments.join("::");
            for (library, owners) in OWNERS {
                if segments[0] == *library && !owners.contains(&user) {
                    wrong.push(format!("{at}: `{path}`: only `{}` may name `{library}`", owners.join("` or `")));
                }
            }
            if PURE.contains(&user) && !file.ends_with("tests.rs") && IO.iter().any(|io| reaches(&segments, io)) {
                wrong.push(format!("{at}: `{path}`: `{user}` does no I/O"));
            }
            continue;
        };
        let path = format!("crate::{}", inside.join("::"));
        match inside.first().map(String::as_str) {
            None | Some("*") => wrong.push(format!("{at}: names the whole crate, which hides what `{user}` uses")),
            Some(used) if used == user => {}
            Some(used) => match layer(used) {
                None => wrong.push(format!("{at}: `{path}`: `{used}` is not a module of the map")),
                Some(other) if other < height => wrong.push(format!("{at}: `{path}`: `{used}` stands above `{user}`")),
                Some(other) if other == height && !PEERS.iter().any(|(a, b, _)| (*a, *b) == (user, used)) => {
                    wrong.push(format!("{at}: `{path}`: `{user}` and `{used}` are peers and do not know each other"));
                }
                Some(_) => {}
            },
        }
    }
    if !UNSAFE.contains(&file) {
        let lines = tokens.iter().filter(|token| token.text == "unsafe").map(|token| token.line);
        wrong.extend(lines.map(|line| format!("{file}:{line}: `unsafe` is allowed in {UNSAFE:?} alone")));
    }
    wrong
}

/// The layer of a module, counted from the top.
fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

/// The module path of a file below `src`: `fetch/fill.rs` is `fetch::fill`, `fetch/mod.rs` is `fetch`.
fn module_of(file: &str) -> Vec<String> {
    let path = file.trim_end_matches(".rs").trim_end_matches("/mod");
    path.split('/').map(str::to_owned).collect()
}

/// The path from the crate's root that `segments` mean where they stand in `module`; `None` if they lead to another crate.
fn inside_crate(segments: &[String], module: &[String]) -> Option<Vec<String>> {
    let mut base = match segments[0].as_str() {
        "crate" | "kitfs" => Vec::new(),
        "self" | "super" => module.to_vec(),
        _ => return None,
    };
    for segment in segments {
        match segment.as_str() {
            "super" => drop(base.pop()),
            "crate" | "kitfs" | "self" => {}
            name => base.push(name.to_owned()),
        }
    }
    Some(base)
}

/// Whether a path leads to `target`, below it, or takes in all of what holds it (`std::*`, `use std as s`).
fn reaches(segments: &[String], target: &str) -> bool {
    segments.iter().zip(target.split("::")).all(|(segment, part)| segment == part || segment == "*")
}

/// All Rust files below a directory, sorted.
fn rust_files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).expect("readable directory") {
        let path = entry.expect("readable entry").path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// A token as text; a literal is empty.
struct Token {
    line: usize,
    text: String,
}

/// The tokens in a row, groups opened, `::` as one.
fn flatten(stream: TokenStream) -> Vec<Token> {
    let mut out = Vec::new();
    let mut half_separator = false;
    for tree in stream {
        let line = tree.span().start().line;
        let mut push = |text: String| out.push(Token { line, text });
        let second_half = std::mem::take(&mut half_separator);
        match tree {
            TokenTree::Group(group) => {
                let (open, close) = match group.delimiter() {
                    Delimiter::Brace => ("{", "}"),
                    Delimiter::Parenthesis => ("(", ")"),
                    Delimiter::Bracket => ("[", "]"),
                    Delimiter::None => ("", ""),
                };
                push(open.to_owned());
                let end = group.span_close().start().line;
                out.extend(flatten(group.stream()));
                out.push(Token { line: end, text: close.to_owned() });
            }
            TokenTree::Ident(name) => push(name.to_string().trim_start_matches("r#").to_owned()),
            TokenTree::Punct(punct) if punct.as_char() == ':' && second_half => push("::".to_owned()),
            TokenTree::Punct(punct) if punct.as_char() == ':' && punct.spacing() == Spacing::Joint => {
                half_separator = true
            }
            TokenTree::Punct(punct) => push(punct.to_string()),
            TokenTree::Literal(_) => push(String::new()),
        }
    }
    out
}

/// A path as it is written, the line of its last segment, and the module that it stands in.
struct Named {
    line: usize,
    segments: Vec<String>,
    module: Vec<String>,
}

/// Finds the paths in a row of tokens: all that `use` and `extern crate` name, and elsewhere all of two segments or more.
struct Reader<'a> {
    tokens: &'a [Token],
    module: Vec<String>,
    found: Vec<Named>,
}

impl<'a> Reader<'a> {
    fn read(tokens: &'a [Token], root: Vec<String>) -> Vec<Named> {
        let mut reader = Self { tokens, module: root, found: Vec::new() };
        // One item for each open brace: whether it opened a module.
        let mut braces = Vec::new();
        let mut at = 0;
        while at < tokens.len() {
            at = match (reader.text(at), reader.text(at + 1), reader.text(at + 2)) {
                ("mod", name, "{") => {
                    reader.module.push(name.to_owned());
                    braces.push(true);
                    at + 3
                }
                ("{", ..) => {
                    braces.push(false);
                    at + 1
                }
                ("}", ..) => {
                    if braces.pop() == Some(true) {
                        reader.module.pop();
                    }
                    at + 1
                }
                ("use", "::", _) | ("extern", "crate", _) => reader.tree(at + 2, Vec::new(), true),
                ("use", ..) => reader.tree(at + 1, Vec::new(), true),
                (name, "::", _) if is_word(name) => reader.tree(at, Vec::new(), false),
                _ => at + 1,
            };
        }
        reader.found
    }

    fn text(&self, at: usize) -> &'a str {
        self.tokens.get(at).map_or("", |token| &token.text)
    }

    /// Reads one path, or a tree of them in braces, from token `at` on; returns where it ends.
    fn tree(&mut self, mut at: usize, mut path: Vec<String>, in_use: bool) -> usize {
        loop {
            let text = self.text(at);
            if text == "{" {
                at += 1;
                while !matches!(self.text(at), "}" | "") {
                    at = self.tree(at, path.clone(), true);
                    at += usize::from(self.text(at) == ",");
                }
                return at + 1;
            }
            if !is_word(text) && text != "*" {
                return at + 1;
            }
            path.push(text.to_owned());
            at += 1;
            let next = self.text(at + 1);
            if self.text(at) == "::" && (is_word(next) || matches!(next, "{" | "*")) {
                at += 1;
                continue;
            }
            if in_use || path.len() > 1 {
                let line = self.tokens[at - 1].line;
                self.found.push(Named { line, segments: path, module: self.module.clone() });
            }
            // `name as other`: the other name says nothing. Outside of `use`, what follows `as` is a path of its own.
            return if in_use && self.text(at) == "as" { at + 2 } else { at };
        }
    }
}

fn is_word(text: &str) -> bool {
    text.starts_with(|c: char| c.is_alphabetic() || c == '_')
}
