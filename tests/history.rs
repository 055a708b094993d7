//! The record of what was served: complete whoever writes at once and is killed meanwhile, and right in what it answers.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use kitfs::digest::Digest;
use kitfs::history::{Action, Event, History, Outcome};
use serde_json::Value;
use support::FaultServer;
use support::kit::{KitBuilder, Served, tar};
use support::life::text;
use support::program::Kitfs;
use support::random::Random;

const HOUR: SignedDuration = SignedDuration::from_hours(1);

fn digest(name: &str) -> Digest {
    Digest::of(name.as_bytes())
}

fn history(kitfs: &Kitfs) -> History {
    History::at(&kitfs.path("state"))
}

/// An event of a time, a mount and a kit; the mount's directory is named like it.
fn event(time: &str, action: Action, mount: &str, kit: &str) -> Event {
    Event {
        time: time.parse().expect("a time"),
        mount: Some(mount.to_owned()),
        mount_point: Some(format!("/mnt/{mount}").into()),
        digest: Some(digest(kit)),
        ..Event::now(action, "r.io/team/llama:production")
    }
}

fn json(kitfs: &Kitfs, arguments: &[&str]) -> Value {
    serde_json::from_str(&kitfs.ok(&[&["history", "--json"], arguments].concat())).expect("JSON")
}

/// Digests under a key of all that is in a list.
fn digests(answer: &Value, list: &str) -> Vec<Digest> {
    let all = answer[list].as_array().expect("a list").iter();
    all.map(|item| item["digest"].as_str().expect("a digest").parse().expect("a digest")).collect()
}

/// Where the processes of a test write, if this is one of them.
const WRITER: &str = "KITFS_TEST_HISTORY_WRITER";

/// Appends events until it ends or is killed, an event each hour by its own clock, so that files are closed now and then;
/// and tells after each that it was appended.
fn write_events(dir: &Path, name: &str, count: usize) {
    let history = History::at(dir);
    let mut told = std::io::stderr().lock();
    let start: Timestamp = "2026-01-01T00:00:00Z".parse().expect("a time");
    for number in 0..count {
        let labels = [("writer".to_owned(), name.to_owned()), ("number".to_owned(), number.to_string())].into();
        let time = start + HOUR * i32::try_from(number).expect("small") * 24;
        history.append(&Event { time, labels, ..Event::now(Action::Tag, "r.io/a:1") }).expect("appended");
        writeln!(told, "{number}").expect("told");
    }
}

/// Starts this very test again as a process that only writes.
fn writer(test: &str, dir: &Path, name: &str, count: usize) -> Child {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", test, "--nocapture"]).env(WRITER, format!("{}\n{name}\n{count}", dir.display()));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("starts")
}

/// What that process has to do, if this is one.
fn is_writer() -> bool {
    let Ok(asked) = std::env::var(WRITER) else { return false };
    let parts: Vec<&str> = asked.split('\n').collect();
    write_events(Path::new(parts[0]), parts[1], parts[2].parse().expect("a number"));
    true
}

/// The numbers that a writer has told of.
fn told(child: &mut Child) -> Vec<usize> {
    let output = BufReader::new(child.stderr.take().expect("piped"));
    output.lines().map_while(Result::ok).filter_map(|line| line.parse().ok()).collect()
}

/// What is on record of each writer.
fn recorded(dir: &Path) -> BTreeMap<String, Vec<usize>> {
    let mut all: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for event in History::at(dir).read().expect("read") {
        all.entry(event.labels["writer"].clone()).or_default().push(event.labels["number"].parse().expect("a number"));
    }
    all
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir.join("history")).expect("a directory").map(|entry| entry.expect("an entry").path());
    let mut files: Vec<_> = entries.filter(|path| path.extension().is_some_and(|end| end == "jsonl")).collect();
    files.sort();
    files
}

#[test]
fn processes_that_append_at_once_lose_and_mix_nothing_while_files_are_closed() {
    const COUNT: usize = 100;
    if is_writer() {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let name = "processes_that_append_at_once_lose_and_mix_nothing_while_files_are_closed";
    let writers: Vec<_> = (0..6).map(|number| writer(name, dir.path(), &format!("writer {number}"), COUNT)).collect();
    // Whoever reads meanwhile sees what is there, each event once.
    let mut seen = 0;
    while seen < 6 * COUNT / 2 {
        let all: Vec<_> = recorded(dir.path()).into_values().collect();
        assert!(all.iter().all(|numbers| numbers.iter().copied().eq(0..numbers.len())), "{all:?}");
        let now = all.iter().map(Vec::len).sum();
        assert!(now >= seen, "{now} after {seen}");
        seen = now;
    }
    for mut writer in writers {
        assert_eq!(told(&mut writer).len(), COUNT);
        assert!(writer.wait().expect("waits").success());
    }
    let all = recorded(dir.path());
    assert_eq!(all.len(), 6);
    assert!(all.values().all(|numbers| numbers.iter().copied().eq(0..COUNT)), "{all:?}");
    assert!(files(dir.path()).len() > 3, "{:?}", files(dir.path()));
    for file in files(dir.path()) {
        let content = fs::read_to_string(file).expect("reads");
        assert!(content.lines().all(|line| serde_json::from_str::<Event>(line).is_ok()), "{content}");
    }
}

#[test]
fn kill_9_at_any_moment_loses_nothing_that_was_appended() {
    if is_writer() {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let name = "kill_9_at_any_moment_loses_nothing_that_was_appended";
    let mut random = Random::new(7);
    let mut appended: BTreeMap<String, BTreeSet<usize>> = BTreeMap::new();
    let mut most = 0;
    for round in 0..30 {
        let mut writers: Vec<_> = (0..3)
            .map(|number| {
                let name_of = format!("{round}.{number}");
                (writer(name, dir.path(), &name_of, 100_000), name_of)
            })
            .collect();
        std::thread::sleep(Duration::from_millis(30 + random.below(120) as u64));
        for (child, name_of) in &mut writers {
            child.kill().expect("kill");
            child.wait().expect("reaped");
            let told = told(child);
            most = most.max(told.len());
            appended.insert(name_of.clone(), told.into_iter().collect());
        }
        // What is torn stays, and takes nothing with it.
        if round % 5 == 0 {
            let live = dir.path().join("history/events.jsonl");
            let mut live = fs::OpenOptions::new().append(true).create(true).open(live).expect("opens");
            live.write_all(b"{\"time\":\"2026-0").expect("torn");
        }
    }
    assert!(most > 10, "the fastest has written {most}");
    let all = recorded(dir.path());
    for (writer, numbers) in appended {
        let found: BTreeSet<usize> = all.get(&writer).into_iter().flatten().copied().collect();
        let lost: Vec<_> = numbers.difference(&found).collect();
        assert!(lost.is_empty(), "of {writer} is lost: {lost:?}");
        // The last one may be there without its writer having told of it.
        assert!(found.len() <= numbers.len() + 1, "{writer}: {found:?}");
    }
}

#[test]
fn a_record_of_nothing_says_so() {
    let kitfs = Kitfs::new();
    let output = kitfs.run(&["history"]);
    assert!(output.status.success() && output.stdout.is_empty());
    assert_eq!(String::from_utf8_lossy(&output.stderr), "note: nothing is recorded yet\n");
    assert_eq!(json(&kitfs, &[])["events"], Value::Array(vec![]));
    assert_eq!(json(&kitfs, &["--at", "2026-01-01"])["served"], Value::Array(vec![]));
}

#[test]
fn events_are_found_by_place_reference_digest_label_and_time() {
    let kitfs = Kitfs::new();
    let history = history(&kitfs);
    let of = |reference: &str, event: Event| Event { reference: reference.to_owned(), ..event };
    let label = |key: &str, value: &str, event: Event| Event {
        labels: [(key.to_owned(), value.to_owned()), ("job".to_owned(), "7".to_owned())].into(),
        ..event
    };
    let layout = fs::canonicalize(support::data("layouts/tiny-llm")).expect("its path");
    let layout = format!("oci:{}", layout.display());
    for event in [
        label("team", "search", event("2026-01-01T00:00:00Z", Action::Mount, "a", "1")),
        of("r.io/team/llama", event("2026-01-02T00:00:00Z", Action::Mount, "b", "1")),
        Event { from: Some(digest("1")), ..event("2026-01-03T00:00:00Z", Action::Tag, "-", "2") },
        label("team", "ads", of("r.io/team/other:production", event("2026-01-04T00:00:00Z", Action::Mount, "c", "3"))),
        of(&format!("{layout}:1.2.0"), event("2026-01-05T00:00:00Z", Action::Mount, "d", "4")),
        Event { time: Timestamp::now() - HOUR, ..event("2026-01-05T00:00:00Z", Action::Mount, "e", "5") },
    ] {
        history.append(&event).expect("appended");
    }
    let all = ["1", "1", "2", "3", "4", "5"].map(digest);
    let found = |arguments: &[&str]| {
        let found = digests(&json(&kitfs, arguments), "events");
        all.iter().enumerate().filter(|(_, digest)| found.contains(digest)).map(|(at, _)| at).collect::<Vec<_>>()
    };
    assert_eq!(found(&[]), [0, 1, 2, 3, 4, 5]);
    assert_eq!(digests(&json(&kitfs, &["/mnt/b"]), "events"), [digest("1")]);
    assert_eq!(digests(&json(&kitfs, &["r.io/team/llama"]), "events"), ["1", "1", "2", "5"].map(digest));
    assert_eq!(digests(&json(&kitfs, &["r.io/team/llama:latest"]), "events"), [digest("1")]);
    assert_eq!(digests(&json(&kitfs, &["r.io/team/llama:production"]), "events"), ["1", "2", "5"].map(digest));
    let pinned = format!("r.io/team/llama@{}", digest("2"));
    assert_eq!(digests(&json(&kitfs, &[&pinned]), "events"), [digest("2")]);
    // By the digest alone also where it went.
    assert_eq!(digests(&json(&kitfs, &[&digest("1").to_string()]), "events"), ["1", "1", "2"].map(digest));
    assert_eq!(found(&[&layout]), [4]);
    assert_eq!(found(&["--label", "team=ads"]), [3]);
    assert_eq!(digests(&json(&kitfs, &["--label=team=search", "--label=job=7"]), "events"), [digest("1")]);
    assert_eq!(found(&["--label", "team=search", "--label", "job=8"]), [0; 0]);
    assert_eq!(found(&["--since", "7d"]), [5]);
    assert_eq!(found(&["--since", "2026-01-04T00:00:00Z"]), [3, 4, 5]);
    assert_eq!(found(&["/mnt/elsewhere"]), [0; 0]);
    assert_eq!(found(&[&digest("3").to_string()[..15]]), [3], "the beginning of a digest");
    let none = kitfs.run(&["history", "/mnt/elsewhere"]);
    assert_eq!(String::from_utf8_lossy(&none.stderr), "note: no event is about that, as far as is recorded\n");
}

#[test]
fn a_line_tells_when_what_where_who_and_what_came_of_it() {
    let kitfs = Kitfs::new();
    let switch = Event {
        from: Some(digest("1")),
        outcome: Outcome::Failed("no\u{1b}[2J such kit".to_owned()),
        labels: [("team".to_owned(), "search".to_owned())].into(),
        user: "alice".to_owned(),
        host: "node7".to_owned(),
        ..event("2026-01-01T10:00:00.5Z", Action::Switch, "a", "2")
    };
    history(&kitfs).append(&switch).expect("appended");
    let said = kitfs.ok(&["history"]);
    let cells: Vec<&str> = said.trim_end().split("  ").collect();
    let (from, to) =
        (format!("FAILED: no\\u{{1b}}[2J such kit; from {}; team=search", digest("1")), digest("2").to_string());
    let expected =
        ["2026-01-01T10:00:00Z", "switch", "r.io/team/llama:production", &to, "/mnt/a", "alice@node7", &from];
    assert_eq!(cells, expected);
    let stored = &json(&kitfs, &[])["events"][0];
    assert_eq!(stored["time"], "2026-01-01T10:00:00.5Z");
    assert_eq!(serde_json::from_value::<Event>(stored.clone()).expect("an event"), switch);
}

#[test]
fn what_was_served_on_a_day_or_at_an_instant_is_told_by_mount() {
    let kitfs = Kitfs::new().with("TZ", "UTC");
    let history = history(&kitfs);
    for event in [
        event("2026-10-01T00:00:00Z", Action::Mount, "a", "1"),
        event("2026-10-05T00:00:00Z", Action::Mount, "b", "9"),
        event("2026-10-05T06:00:00Z", Action::Unmount, "b", "9"),
        event("2026-10-10T12:00:00Z", Action::Switch, "a", "2"),
        Event {
            outcome: Outcome::Failed("gone".to_owned()),
            ..event("2026-10-11T00:00:00Z", Action::Switch, "a", "3")
        },
        event("2026-10-12T00:00:00Z", Action::Rollback, "a", "1"),
        event("2026-10-20T00:00:00Z", Action::Unmount, "a", "1"),
    ] {
        history.append(&event).expect("appended");
    }
    let at = |when: &str| {
        let answer = json(&kitfs, &["--at", when]);
        let served = answer["served"].as_array().expect("a list").clone();
        let dirs = served.iter().map(|span| span["mountpoint"].as_str().expect("a path").to_owned());
        dirs.zip(digests(&answer, "served")).collect::<Vec<_>>()
    };
    let on = |dir: &str, kit: &str| (format!("/mnt/{dir}"), digest(kit));
    assert_eq!(at("2026-09-30"), []);
    assert_eq!(at("2026-10-05"), [on("a", "1"), on("b", "9")]);
    assert_eq!(at("2026-10-05T06:00:00Z"), [on("a", "1")]);
    assert_eq!(at("2026-10-10"), [on("a", "1"), on("a", "2")]);
    assert_eq!(at("2026-10-10T11:59"), [on("a", "1")]);
    assert_eq!(at("2026-10-10T14:00:00+02:00"), [on("a", "2")]);
    assert_eq!(at("2026-10-11T00:00:01Z"), [on("a", "2")]);
    assert_eq!(at("2026-10-15"), [on("a", "1")]);
    assert_eq!(at("2026-10-20"), []);
    let served = json(&kitfs, &["--at", "2026-10-10T13:00", "/mnt/a"]);
    assert_eq!(served["served"][0]["since"], "2026-10-10T12:00:00Z");
    assert_eq!(served["served"][0]["until"], "2026-10-12T00:00:00Z");
    assert_eq!(served["served"][0]["end"], "recorded");
    assert_eq!(json(&kitfs, &["--at", "2026-10-05", "/mnt/b"])["served"].as_array().map(Vec::len), Some(1));

    let said = String::from_utf8(kitfs.run(&["history", "--at", "2026-09-30"]).stderr).expect("UTF-8");
    assert!(
        said.contains("nothing was served from 2026-09-30T00:00:00Z to 2026-09-30T23:59:59Z, as far as is recorded"),
        "{said}"
    );
    assert!(said.contains("the record begins at 2026-10-01T00:00:00Z; events are kept for 400d"), "{said}");
    for (when, why) in [("2126-01-01", "is yet to come"), ("soon", "is neither a day, as in 2026-11-01")] {
        let output = kitfs.run(&["history", "--at", when]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(why), "{said}");
    }
}

#[test]
fn a_day_is_one_of_this_machines_time_zone() {
    let kitfs = Kitfs::new().with("TZ", "AEST-10");
    history(&kitfs).append(&event("2026-10-01T14:30:00Z", Action::Mount, "a", "1")).expect("appended");
    history(&kitfs).append(&event("2026-10-01T14:40:00Z", Action::Unmount, "a", "1")).expect("appended");
    assert_eq!(digests(&json(&kitfs, &["--at", "2026-10-02"]), "served"), [digest("1")]);
    assert_eq!(digests(&json(&kitfs, &["--at", "2026-10-01"]), "served"), []);
    assert_eq!(digests(&json(&kitfs, &["--at", "2026-10-02T00:35"]), "served"), [digest("1")]);
}

#[test]
fn a_mount_without_an_end_is_told_from_one_that_lives() {
    let server = FaultServer::empty("team/kit");
    let kit = KitBuilder::new().tar("model", "w", tar(&[("w/a", b"a")])).serve(&server, "1");
    let kitfs = Kitfs::new();
    let history = history(&kitfs);
    history.append(&event("2026-01-01T00:00:00Z", Action::Mount, "dead", "1")).expect("appended");
    let elsewhere = event("2026-01-01T00:00:00Z", Action::Mount, "far", "2");
    history.append(&Event { host: "node7".to_owned(), ..elsewhere }).expect("appended");
    let mount = kitfs.mount(&kit.reference, &[]);
    support::eventually("the mount is on record", || history.read().expect("read").len() == 3);
    let answer = json(&kitfs, &["--at", &Timestamp::now().to_string()]);
    assert_eq!(digests(&answer, "served"), [digest("1"), digest("2"), kit.digest]);
    let ends: Vec<_> = answer["served"].as_array().expect("a list").iter().map(|span| &span["end"]).collect();
    assert_eq!(ends, ["unknown", "unknown", "live"]);
    let said = kitfs.ok(&["history", "--at", &Timestamp::now().to_string()]);
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines[0].contains("to an unknown time: its daemon died, and its end is not recorded"), "{said}");
    assert!(lines[1].contains("no end is recorded of it on node7"), "{said}");
    assert!(lines[2].trim_end().ends_with("to now"), "{said}");
    drop(mount);
}

/// What happened to one directory, oldest first.
fn actions(kitfs: &Kitfs, dir: &str) -> Vec<(Action, Outcome, Option<Digest>)> {
    let events = history(kitfs).read().expect("read").into_iter();
    let here = events.filter(|event| event.mount_point.as_deref() == Some(Path::new(dir)));
    here.map(|event| (event.action, event.outcome, event.digest)).collect()
}

#[test]
fn what_a_mount_does_is_on_record_and_answers_what_it_served() {
    let server = FaultServer::empty("team/kit");
    let serve = |tag: &str| -> Served {
        KitBuilder::new().tar("model", "w", tar(&[("w/a", tag.as_bytes())])).serve(&server, tag)
    };
    let (first, second) = (serve("1"), serve("2"));
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&first.reference, &["--label", "team=search"]);
    let dir = text(&mount.dir).to_owned();
    kitfs.ok(&["switch", &dir, &second.reference]);
    kitfs.fails(&["switch", &dir, &second.reference.replace(":2", ":gone")]);
    kitfs.ok(&["rollback", &dir]);
    drop(mount);
    let done = |action, kit: &Served| (action, Outcome::Done, Some(kit.digest));
    let found = actions(&kitfs, &dir);
    let failed = found.iter().position(|(_, outcome, _)| *outcome != Outcome::Done).expect("the failure");
    assert_eq!(failed, 2, "{found:?}");
    let well: Vec<_> = found.into_iter().filter(|(_, outcome, _)| *outcome == Outcome::Done).collect();
    let expected = [
        done(Action::Mount, &first),
        done(Action::Switch, &second),
        done(Action::Rollback, &first),
        done(Action::Unmount, &first),
    ];
    assert_eq!(well, expected);
    let today = Timestamp::now().to_zoned(jiff::tz::TimeZone::system()).date().to_string();
    // It was served on this day, or on the last one, if that has just ended.
    let answer = json(&kitfs, &["--at", &today, &dir, "--label", "team=search"]);
    assert_eq!(digests(&answer, "served"), [first.digest, second.digest, first.digest]);
    assert_eq!(json(&kitfs, &["--at", &today, &dir, "--label", "team=ads"])["served"], Value::Array(vec![]));
}

#[test]
fn what_is_kept_is_set_by_flag_variable_and_config() {
    let kitfs = Kitfs::new();
    let config = kitfs.path("config.toml");
    fs::write(&config, "history_keep = \"7d\"").expect("written");
    history(&kitfs).append(&event("2026-01-01T00:00:00Z", Action::Mount, "a", "1")).expect("appended");
    let note = |kitfs: &Kitfs, arguments: &[&str]| {
        let output = kitfs.run(&[&["history", "--since", "2025-01-01"], arguments].concat());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(note(&kitfs, &[]).contains("kept for 400d"));
    let kitfs = kitfs.with("KITFS_CONFIG", &config);
    assert!(note(&kitfs, &[]).contains("kept for 7d"), "{}", note(&kitfs, &[]));
    let kitfs = kitfs.with("KITFS_HISTORY_KEEP", "30d");
    assert!(note(&kitfs, &[]).contains("kept for 30d"));
    assert!(note(&kitfs, &["--history-keep=2h"]).contains("kept for 2h"));
}

#[test]
fn a_mount_lets_old_events_go_and_not_those_of_mounts_that_have_no_end() {
    let server = FaultServer::empty("team/kit");
    let kit = KitBuilder::new().tar("model", "w", tar(&[("w/a", b"a")])).serve(&server, "1");
    let kitfs = Kitfs::new().with("KITFS_HISTORY_KEEP", "10d");
    let past = |days: i32, action, mount: &str| Event {
        time: Timestamp::now() - HOUR * 24 * days,
        ..event("2026-01-01T00:00:00Z", action, mount, mount)
    };
    for event in
        [past(100, Action::Mount, "ended"), past(99, Action::Mount, "open"), past(98, Action::Unmount, "ended")]
    {
        history(&kitfs).append(&event).expect("appended");
    }
    let mount = kitfs.mount(&kit.reference, &[]);
    support::eventually("the mount is on record", || {
        let events = history(&kitfs).read().expect("read");
        events.iter().any(|event| event.digest == Some(kit.digest))
    });
    assert_eq!(digests(&json(&kitfs, &[]), "events"), [digest("open"), kit.digest]);
    drop(mount);
}
