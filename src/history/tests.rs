//! What the record keeps, what it lets go, and what it says of a moment.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;

use jiff::SignedDuration;
use rustix::fs::{FlockOperation, flock};

use super::served::{Until, spans};
use super::*;

const DAY: SignedDuration = SignedDuration::from_hours(24);

/// The start of a day, counted from one.
fn day(number: i32) -> Timestamp {
    "2026-01-01T00:00:00Z".parse::<Timestamp>().expect("a time") + DAY * number
}

fn digest(name: &str) -> Digest {
    Digest::of(name.as_bytes())
}

fn at(number: i32, action: Action, mount: &str, kit: &str) -> Event {
    Event {
        time: day(number),
        mount: Some(mount.to_owned()),
        mount_point: Some(format!("/mnt/{mount}").into()),
        digest: Some(digest(kit)),
        ..Event::now(action, "r.io/a:production")
    }
}

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a directory") }
    }

    fn history(&self) -> History {
        History::at(self.dir.path()).with_journal(self.dir.path().join("no journal"))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join("history").join(name)
    }

    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path().join("history")).expect("a directory");
        let mut names: Vec<_> =
            entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

#[test]
fn what_is_appended_is_read_in_order_and_a_torn_line_is_passed_over() {
    let place = Place::new();
    let history = place.history();
    assert_eq!(history.read().expect("none yet"), []);
    let events: Vec<_> = (0..4).map(|number| at(number, Action::Mount, "m", "kit")).collect();
    history.append(&events[0]).expect("appended");
    let tear = |bytes: &[u8]| {
        let mut file = OpenOptions::new().append(true).open(place.file("events.jsonl")).expect("opens");
        file.write_all(bytes).expect("torn");
    };
    tear(b"{\"time\":\"20");
    history.append(&events[1]).expect("appended");
    tear(b"{\"time\":\"20\n\n\xff\xff\n{\"action\":\"of a newer version\"}\n");
    history.append(&events[2]).expect("appended");
    history.append(&events[3]).expect("appended");
    assert_eq!(history.read().expect("read"), events);
    let text = fs::read(place.file("events.jsonl")).expect("reads");
    assert!(text.windows(8).any(|part| part == b"of a new"), "nothing is removed");
    let mode = |path: &Path| fs::metadata(path).expect("stats").permissions().mode() & 0o777;
    assert_eq!((mode(&place.file("events.jsonl")), mode(&place.dir.path().join("history"))), (0o600, 0o700));
}

#[test]
fn a_record_without_its_lock_can_be_read() {
    let place = Place::new();
    let event = at(0, Action::Mount, "m", "kit");
    place.history().append(&event).expect("appended");
    fs::remove_file(place.file("lock")).expect("removed");
    assert_eq!(place.history().read().expect("read"), [event]);
}

#[test]
fn whoever_holds_the_lock_forever_is_waited_for_and_then_named() {
    let place = Place::new();
    place.history().append(&at(0, Action::Mount, "m", "kit")).expect("appended");
    let held = File::open(place.file("lock")).expect("opens");
    flock(&held, FlockOperation::LockExclusive).expect("locks");
    let error = place.history().append(&at(1, Action::Unmount, "m", "kit")).expect_err("not appended");
    let text = crate::report::chain(&error);
    assert!(text.contains("history/lock can't be written: another process has held it for 10.0s"), "{text}");
}

#[test]
fn old_events_go_with_their_file_and_none_that_must_stay() {
    let place = Place::new();
    let history = place.history().keeping(Duration::from_secs(400 * 86_400));
    let last = 900;
    for number in (0..=last).step_by(5) {
        history.append(&at(number, Action::Tag, "m", "kit")).expect("appended");
        let events = history.read().expect("read");
        let (first, count) = (events[0].time, events.len() as i32);
        let expected = day((number - 400).max(0));
        assert!(first <= expected, "day {number}: what is younger than 400 days has gone: {first}");
        assert!(first >= day(number - 400 - 2 * 31), "day {number}: {first} is still there");
        let next = |pair: &[Event]| pair[1].time.duration_since(pair[0].time) == DAY * 5;
        assert!(events.windows(2).all(next), "day {number}: one of {count} is missing");
    }
    let files = place.files();
    assert!(files.len() > 10 && files.len() < 20, "{files:?}");
    assert!(!files.contains(&"events-000001.jsonl".to_owned()), "{files:?}");
}

#[test]
fn a_large_file_is_closed() {
    let place = Place::new();
    let history = place.history();
    let large = |number| Event {
        labels: [("note".to_owned(), "x".repeat(2 << 20))].into(),
        ..at(number, Action::Mount, "m", "kit")
    };
    let events = [large(0), large(1), large(2), large(3)];
    for event in &events {
        history.append(event).expect("appended");
    }
    assert_eq!(place.files(), ["events-000001.jsonl", "events.jsonl", "lock"]);
    assert_eq!(history.read().expect("read"), events);
}

#[test]
fn what_a_mount_still_serves_outlives_its_file() {
    let place = Place::new();
    let history = place.history().keeping(Duration::from_secs(10 * 86_400));
    history.append(&at(0, Action::Mount, "long", "a")).expect("appended");
    history.append(&at(0, Action::Mount, "short", "b")).expect("appended");
    history.append(&at(1, Action::Switch, "long", "c")).expect("appended");
    history.append(&at(1, Action::Unmount, "short", "b")).expect("appended");
    for number in 2..100 {
        history.append(&at(number, Action::Tag, "tag", "kit")).expect("appended");
    }
    let events = history.read().expect("read");
    let kept: Vec<_> = events.iter().filter(|event| event.action != Action::Tag).collect();
    assert_eq!(kept, [&at(1, Action::Switch, "long", "c")]);
    let open = spans(&events).into_iter().filter(|span| span.until == Until::Open).collect::<Vec<_>>();
    assert_eq!(open.iter().map(|span| (span.digest, span.since)).collect::<Vec<_>>(), [(digest("c"), Some(day(1)))]);
}

#[test]
fn a_file_that_only_a_newer_version_can_read_is_not_old_before_its_time() {
    let place = Place::new();
    let history = place.history().keeping(Duration::from_secs(86_400));
    history.append(&at(0, Action::Mount, "m", "kit")).expect("appended");
    let newer = place.file("events-000001.jsonl");
    fs::write(&newer, "{\"action\":\"of a newer version\"}\n").expect("written");
    let written = Timestamp::now() - SignedDuration::from_mins(10);
    for number in 0..3 {
        let time = written + DAY * number;
        history.append(&Event { time, ..at(0, Action::Tag, "m", "kit") }).expect("appended");
        assert_eq!(newer.exists(), number < 2, "day {number}: {:?}", place.files());
    }
}

#[test]
fn a_journal_that_listens_gets_each_event_and_one_that_does_not_is_no_error() {
    let place = Place::new();
    let socket = place.dir.path().join("journal");
    let listener = UnixDatagram::bind(&socket).expect("listens");
    listener.set_read_timeout(Some(Duration::from_secs(10))).expect("set");
    let history = place.history().with_journal(&socket);
    let event = Event {
        outcome: Outcome::Failed("http://kit:sesame@proxy/ said\nno".to_owned()),
        from: Some(digest("before")),
        ..at(0, Action::Switch, "m", "kit")
    };
    history.append(&event).expect("appended");
    let mut bytes = vec![0; 1 << 16];
    let len = listener.recv(&mut bytes).expect("received");
    let text = String::from_utf8_lossy(&bytes[..len]).into_owned();
    for field in ["PRIORITY=4\n", "SYSLOG_IDENTIFIER=kitfs\n", "KITFS_ACTION=switch\n", "KITFS_MOUNT_POINT=/mnt/m\n"] {
        assert!(text.contains(field), "{field}: {text}");
    }
    assert!(text.contains(&format!("KITFS_FROM={}\n", digest("before"))), "{text}");
    // A value with a line break is preceded by its length.
    let why = "http://…@proxy/ said\nno";
    let mut field = b"KITFS_ERROR\n".to_vec();
    field.extend((why.len() as u64).to_le_bytes());
    field.extend(why.as_bytes());
    assert!(bytes.windows(field.len()).any(|part| part == field), "{text}");
    assert!(!text.contains("sesame"), "{text}");

    // It is full, then gone.
    listener.set_nonblocking(true).expect("set");
    for number in 1..2000 {
        let sender = UnixDatagram::unbound().expect("a socket");
        sender.set_nonblocking(true).expect("set");
        if sender.send_to(b"x", &socket).is_err() {
            break;
        }
        assert!(number < 1999, "it never fills");
    }
    history.append(&at(1, Action::Mount, "m", "kit")).expect("appended");
    drop(listener);
    history.append(&at(2, Action::Mount, "m", "kit")).expect("appended");
    assert_eq!(history.read().expect("read").len(), 3);
}

#[test]
fn no_secret_gets_to_the_disk() {
    let place = Place::new();
    let event = Event {
        outcome: Outcome::Failed(
            "proxy http://kit:sesame@proxy/ and Bearer sesame and https://h/x?sig=sesame".to_owned(),
        ),
        labels: [("feed".to_owned(), "https://kit:sesame@feed/".to_owned())].into(),
        revision: Some("git+https://sesame@github.com/a/b".to_owned()),
        ..at(0, Action::Mount, "m", "kit")
    };
    place.history().append(&event).expect("appended");
    let text = fs::read_to_string(place.file("events.jsonl")).expect("reads");
    assert!(!text.contains("sesame"), "{text}");
    assert!(text.contains("github.com/a/b"), "{text}");
}

#[test]
fn a_mount_serves_what_it_was_switched_to_until_it_ends() {
    let events = [
        at(0, Action::Mount, "x", "a"),
        at(1, Action::Mount, "y", "b"),
        at(2, Action::Switch, "x", "c"),
        Event { outcome: Outcome::Failed("gone".to_owned()), ..at(3, Action::Switch, "x", "d") },
        at(3, Action::Tag, "x", "e"),
        at(4, Action::Rollback, "x", "a"),
        at(5, Action::Unmount, "x", "a"),
    ];
    let found: Vec<_> = spans(&events).into_iter().map(|span| (span.digest, span.since, span.until)).collect();
    assert_eq!(
        found,
        [
            (digest("a"), Some(day(0)), Until::At(day(2))),
            (digest("b"), Some(day(1)), Until::Open),
            (digest("c"), Some(day(2)), Until::At(day(4))),
            (digest("a"), Some(day(4)), Until::At(day(5))),
        ]
    );
}

#[test]
fn an_end_that_nobody_saw_has_a_latest_moment_at_most() {
    let dead = Outcome::Failed("its daemon had died".to_owned());
    let on = |event: Event, dir: &str| Event { mount_point: Some(dir.into()), ..event };
    let events = [
        on(at(0, Action::Mount, "a", "a"), "/x"),
        // Another on its directory.
        on(at(1, Action::Mount, "b", "b"), "/x"),
        Event { outcome: dead, ..on(at(2, Action::Unmount, "b", "b"), "/x") },
        on(at(3, Action::Mount, "c", "c"), "/x"),
        // A lazy one, whose files were open until later.
        on(at(4, Action::Mount, "d", "d"), "/x"),
        on(at(5, Action::Unmount, "c", "c"), "/x"),
        // On another host the directory is another.
        Event { host: "other".to_owned(), ..on(at(6, Action::Mount, "e", "e"), "/x") },
    ];
    let found: Vec<_> = spans(&events).into_iter().map(|span| (span.digest, span.until)).collect();
    assert_eq!(
        found,
        [
            (digest("a"), Until::AtLatest(day(1))),
            (digest("b"), Until::AtLatest(day(2))),
            (digest("c"), Until::At(day(5))),
            (digest("d"), Until::Open),
            (digest("e"), Until::Open),
        ]
    );
}

#[test]
fn where_the_beginning_is_lost_it_is_not_known_and_not_made_up() {
    let from = Some(digest("a"));
    let events = [
        Event { from, ..at(2, Action::Switch, "x", "b") },
        at(3, Action::Unmount, "x", "b"),
        at(4, Action::Unmount, "y", "c"),
    ];
    let found: Vec<_> = spans(&events).into_iter().map(|span| (span.digest, span.since, span.until)).collect();
    assert_eq!(
        found,
        [
            (digest("a"), None, Until::At(day(2))),
            (digest("b"), Some(day(2)), Until::At(day(3))),
            (digest("c"), None, Until::At(day(4))),
        ]
    );
}

#[test]
fn labels_of_a_mount_hold_for_what_it_was_switched_to() {
    let labels: BTreeMap<_, _> = [("team".to_owned(), "search".to_owned())].into();
    let events = [Event { labels: labels.clone(), ..at(0, Action::Mount, "x", "a") }, at(1, Action::Switch, "x", "b")];
    assert!(spans(&events).iter().all(|span| span.labels == labels));
}

#[test]
fn a_span_includes_its_first_moment_and_not_its_end() {
    let events = [at(1, Action::Mount, "x", "a"), at(2, Action::Switch, "x", "b"), at(3, Action::Unmount, "x", "b")];
    let served = |text: &str| {
        let period = Period::parse_in(text, &jiff::tz::TimeZone::UTC).expect("a moment");
        spans(&events).into_iter().filter(|span| span.overlaps(&period)).map(|span| span.digest).collect::<Vec<_>>()
    };
    assert_eq!(served("2026-01-01T23:59:59Z"), []);
    assert_eq!(served("2026-01-01"), []);
    assert_eq!(served("2026-01-02T00:00:00Z"), [digest("a")]);
    assert_eq!(served("2026-01-03T00:00:00Z"), [digest("b")]);
    assert_eq!(served("2026-01-02"), [digest("a")]);
    assert_eq!(served("2026-01-03"), [digest("b")]);
    assert_eq!(served("2026-01-04"), []);
}

#[test]
fn what_is_no_file_in_the_place_of_one_is_refused_and_holds_nobody() {
    for name in ["events.jsonl", "lock", "events-000001.jsonl"] {
        let place = Place::new();
        place.history().append(&at(1, Action::Mount, "a", "1")).expect("appended");
        let path = place.file(name);
        let elsewhere = place.dir.path().join("elsewhere");
        fs::write(&elsewhere, "").expect("written");
        let pipe = |path: &Path| rustix::fs::mkfifoat(rustix::fs::CWD, path, rustix::fs::Mode::RUSR).expect("a pipe");
        let socket = |path: &Path| drop(std::os::unix::net::UnixListener::bind(path).expect("a socket"));
        let link = |path: &Path| std::os::unix::fs::symlink(&elsewhere, path).expect("linked");
        for what in ["pipe", "socket", "link"] {
            let _ = fs::remove_file(&path);
            match what {
                "pipe" => pipe(&path),
                "socket" => socket(&path),
                _ => link(&path),
            }
            let refused = |error: HistoryError| {
                let said = crate::report::chain(&error);
                assert!(said.contains("it is not a regular file; move it away"), "{name}, a {what}: {said}");
                assert!(said.contains(&path.display().to_string()), "{said} tells to move more away than {name}");
            };
            refused(place.history().read().expect_err("refused"));
            // A closed file is not opened to append.
            if !name.starts_with("events-") {
                refused(place.history().append(&at(2, Action::Mount, "a", "2")).expect_err("refused"));
            }
            assert_eq!(fs::read(&elsewhere).expect("reads"), b"", "{name}, a {what}");
        }
    }
}
