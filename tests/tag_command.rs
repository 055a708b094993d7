//! `kitfs tag`: what it writes to a registry, a layout and kit's storage, what it refuses, and what it remembers.

mod support;

use std::path::Path;
use std::process::Command;

use kitfs::digest::Digest;
use kitfs::history::{Action, Event, History, Outcome};
use serde_json::{Value, json};
use support::kit::{KitBuilder, Served, huge_tar, tar};
use support::program::Kitfs;
use support::{Fault, FaultServer, Registry, data};

/// The digest of the tiny-llm fixture's manifest.
const TINY: &str = "sha256:0f4b22aefbde7a60a25b5d22ef4090dde0aa0e7622142cbcdc7165537b4602b4";

fn as_json(kitfs: &Kitfs, arguments: &[&str]) -> Value {
    let mut all = vec!["tag", "--json"];
    all.extend(arguments);
    serde_json::from_str(&kitfs.ok(&all)).expect("JSON")
}

fn digest_of(kitfs: &Kitfs, reference: &str) -> String {
    kitfs.ok(&["resolve", "-q", reference]).trim().to_owned()
}

/// What a command says on standard error when it succeeds.
fn says(kitfs: &Kitfs, arguments: &[&str]) -> String {
    let output = kitfs.run(arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {said}");
    said
}

fn history(kitfs: &Kitfs) -> Vec<Event> {
    History::at(&kitfs.path("state")).read().expect("a history")
}

fn actions(told: &Value) -> Vec<(String, String)> {
    let tags = told["tags"].as_array().expect("tags").iter();
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    tags.map(|tag| (text(&tag["tag"]), text(&tag["action"]))).collect()
}

fn pairs(all: &[(&str, &str)]) -> Vec<(String, String)> {
    all.iter().map(|(tag, action)| ((*tag).to_owned(), (*action).to_owned())).collect()
}

/// A registry with `kits` in `team/kit`: their digests, under the tags `a`, `b`, `c` and so on.
struct Shelf {
    registry: Registry,
    kitfs: Kitfs,
    digests: Vec<String>,
}

impl Shelf {
    fn with(kits: usize) -> Self {
        let registry = Registry::start();
        let digests = (0..kits).map(|number| push_kit(&registry, "team/kit", number).to_string()).collect();
        Self { registry, kitfs: Kitfs::new(), digests }
    }

    fn name(&self, tag: &str) -> String {
        format!("{}/team/kit:{tag}", self.registry.host())
    }

    fn is(&self, tag: &str) -> &str {
        let found = digest_of(&self.kitfs, &self.name(tag));
        self.digests.iter().find(|digest| **digest == found).expect("one of the kits")
    }
}

/// Pushes the kit of this number under the tag of this number: a, b, c and so on.
fn push_kit(registry: &Registry, repository: &str, number: usize) -> Digest {
    let tag = char::from(b'a' + u8::try_from(number).expect("few")).to_string();
    let layer = tar(&[("README.md", tag.as_bytes())]);
    let config = json!({"manifestVersion": "1.0.0", "package": {"name": tag},
        "docs": [{"path": "README.md", "digest": Digest::of(&layer)}]});
    let config = config.to_string();
    let manifest = json!({
        "schemaVersion": 2,
        "config": {"mediaType": "application/vnd.kitops.modelkit.config.v1+json",
            "digest": Digest::of(config.as_bytes()), "size": config.len()},
        "layers": [{"mediaType": "application/vnd.kitops.modelkit.docs.v1.tar",
            "digest": Digest::of(&layer), "size": layer.len()}],
        "annotations": {"org.opencontainers.image.revision": format!("revision-{tag}")},
    });
    registry.push(repository, &tag, manifest.to_string().as_bytes(), &[config.as_bytes(), &layer])
}

fn tiny() -> String {
    format!("oci:{}:1.2.0", data("layouts/tiny-llm").display())
}

#[test]
fn tags_are_made_beside_the_source_and_nothing_is_copied() {
    let shelf = Shelf::with(1);
    let told = as_json(&shelf.kitfs, &[&shelf.name("a"), "v1,staging", &shelf.name("x"), "challenger"]);
    let made = [("v1", "created"), ("staging", "created"), ("x", "created"), ("challenger", "created")];
    assert_eq!(actions(&told), pairs(&made));
    assert_eq!((&told["digest"], &told["copied"]), (&json!(shelf.digests[0]), &json!([])));
    for (tag, _) in made {
        assert_eq!(shelf.is(tag), shelf.digests[0]);
    }
    let again = as_json(&shelf.kitfs, &[&shelf.name("a"), "v1"]);
    assert_eq!(actions(&again), pairs(&[("v1", "same")]));
    assert_eq!(history(&shelf.kitfs).len(), 4, "what changed nothing is no event");
}

#[test]
fn an_omitted_tag_is_named() {
    let shelf = Shelf::with(1);
    shelf.kitfs.ok(&["tag", &shelf.name("a"), "latest"]);
    let bare = format!("{}/team/kit", shelf.registry.host());
    let said = says(&shelf.kitfs, &["tag", &bare, "v1"]);
    assert!(said.contains("took `latest`"), "{said}");
    let told = as_json(&shelf.kitfs, &[&shelf.name("a"), &format!("{}/other/kit", shelf.registry.host())]);
    assert_eq!(actions(&told), pairs(&[("a", "created")]), "a target without a tag takes the source's");
}

#[test]
fn a_tag_moves_only_with_move_and_says_from_where_to_where() {
    let shelf = Shelf::with(2);
    shelf.kitfs.ok(&["tag", &shelf.name("a"), "production"]);
    let error = shelf.kitfs.fails(&["tag", &shelf.name("b"), "production"]);
    for part in ["--move", &shelf.digests[0], &shelf.digests[1]] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(shelf.is("production"), shelf.digests[0]);
    let said = shelf.kitfs.ok(&["tag", &shelf.name("b"), "production", "--move"]);
    let moved = format!("moved from {} to {}", shelf.digests[0], shelf.digests[1]);
    assert_eq!(said, format!("{}: {moved}\n", shelf.name("production")));
    assert_eq!(shelf.is("production"), shelf.digests[1]);
}

#[test]
fn what_is_refused_for_one_tag_is_done_for_none() {
    let shelf = Shelf::with(3);
    let error = shelf.kitfs.fails(&["tag", &shelf.name("a"), "new", "b", "c"]);
    assert!(error.contains("nothing was written") && error.matches("--move").count() == 2, "{error}");
    assert!(shelf.kitfs.fails(&["resolve", &shelf.name("new")]).contains("is not in"));
    assert!(history(&shelf.kitfs).is_empty());
}

#[test]
fn a_tag_that_somebody_else_has_moved_is_left() {
    let shelf = Shelf::with(3);
    let (kitfs, digests) = (&shelf.kitfs, &shelf.digests);
    kitfs.ok(&["tag", &shelf.name("b"), "production"]);
    let error = kitfs.fails(&["tag", &shelf.name("c"), "production", "--if-current", &digests[0]]);
    assert!(error.contains("somebody was faster") && error.contains(&digests[1]), "{error}");
    let error = kitfs.fails(&["tag", &shelf.name("c"), "new", "--if-current", &digests[0]]);
    assert!(error.contains("is not there"), "{error}");
    kitfs.ok(&["tag", &shelf.name("c"), "production", "--if-current", &digests[1]]);
    assert_eq!(shelf.is("production"), digests[2]);
    let help = kitfs.ok(&["tag", "--help"]);
    assert!(help.contains("Registries know no condition for a write"), "{help}");
}

#[test]
fn moves_are_recorded_and_undone() {
    let shelf = Shelf::with(3);
    let (kitfs, name) = (&shelf.kitfs, shelf.name("production"));
    kitfs.ok(&["tag", &shelf.name("a"), "production"]);
    let error = kitfs.fails(&["tag", &name, "--undo"]);
    assert!(error.contains("nothing to restore"), "{error}");
    kitfs.ok(&["tag", &shelf.name("b"), "production", "--move"]);
    let event = history(kitfs).pop().expect("an event");
    assert_eq!((event.action, event.outcome, event.reference.as_str()), (Action::Tag, Outcome::Done, name.as_str()));
    let text = |digest: Option<Digest>| digest.map(|digest| digest.to_string());
    assert_eq!(text(event.from).as_ref(), Some(&shelf.digests[0]));
    assert_eq!(text(event.digest).as_ref(), Some(&shelf.digests[1]));
    assert_eq!(event.revision.as_deref(), Some("revision-b"));
    let told = as_json(kitfs, &[&name, "--undo"]);
    assert_eq!((&told["digest"], &told["tags"][0]["from"]), (&json!(shelf.digests[0]), &json!(shelf.digests[1])));
    assert_eq!(shelf.is("production"), shelf.digests[0]);
    kitfs.ok(&["tag", &name, "--undo"]);
    assert_eq!(shelf.is("production"), shelf.digests[1], "what was undone is a move too");
    assert_eq!(history(kitfs).len(), 4);
}

#[test]
fn a_tag_that_an_index_moves_is_immutable_and_recorded_like_any() {
    let shelf = Shelf::with(2);
    let (kitfs, repository) = (&shelf.kitfs, format!("{}/team/kit", shelf.registry.host()));
    let (from, to) = (format!("{repository}:b"), format!("{repository}:a"));
    let refused = kitfs.fails(&["index", "--replace", "--tags-immutable", "a", &from, &to]);
    assert!(refused.contains("is immutable") && refused.contains("--force"), "{refused}");
    assert_eq!(digest_of(kitfs, &to), shelf.digests[0]);
    kitfs.ok(&["index", "--replace", &from, &to]);
    let made = digest_of(kitfs, &to);
    let events = history(kitfs);
    let last = events.last().expect("an event");
    assert_eq!((last.action, last.from.map(|from| from.to_string())), (Action::Tag, Some(shelf.digests[0].clone())));
    assert_eq!(last.digest.map(|digest| digest.to_string()), Some(made));
    kitfs.ok(&["tag", &to, "--undo"]);
    assert_eq!(digest_of(kitfs, &to), shelf.digests[0]);
}

#[test]
fn an_undo_leaves_what_another_machine_has_moved_since() {
    let shelf = Shelf::with(3);
    let (kitfs, name) = (&shelf.kitfs, shelf.name("production"));
    kitfs.ok(&["tag", &shelf.name("a"), "production"]);
    kitfs.ok(&["tag", &shelf.name("b"), "production", "--move"]);
    let elsewhere = Kitfs::new();
    let error = elsewhere.fails(&["tag", &name, "--undo"]);
    assert!(error.contains("knows of no move") && error.contains("production --move"), "{error}");
    elsewhere.ok(&["tag", &shelf.name("c"), "production", "--move"]);
    let error = kitfs.fails(&["tag", &name, "--undo"]);
    assert!(error.contains("somebody else has moved it since") && error.contains(&shelf.digests[2]), "{error}");
    assert_eq!(shelf.is("production"), shelf.digests[2]);
    kitfs.ok(&["tag", &name, "--undo", "--move"]);
    assert_eq!(shelf.is("production"), shelf.digests[0]);
}

#[test]
fn what_the_registry_has_collected_comes_back_only_while_somebody_has_its_manifest() {
    let (server, kitfs) = (FaultServer::empty("team/kit"), Kitfs::new());
    let serve = |name: &str, tag: &str| {
        KitBuilder::new().tar("docs", "a.md", tar(&[("a.md", name.as_bytes())])).serve(&server, tag)
    };
    let (old, new) = (serve("old", "v1"), serve("new", "v2"));
    kitfs.ok(&["resolve", &old.reference]);
    kitfs.ok(&["tag", &new.reference, "v1", "--move"]);
    server.remove(&old.digest);
    kitfs.ok(&["tag", &old.reference, "--undo"]);
    assert_eq!(digest_of(&Kitfs::new(), &old.reference), old.digest.to_string());
    kitfs.ok(&["tag", &new.reference, "v1", "--move"]);
    server.remove(&old.digest);
    std::fs::remove_dir_all(kitfs.cache()).expect("removed");
    let error = kitfs.fails(&["tag", &old.reference, "--undo"]);
    assert!(error.contains(&format!("was {}, which is gone", old.digest)) && error.contains("--keep-old"), "{error}");
}

#[test]
fn what_a_moved_tag_leaves_is_tagged_if_wanted() {
    let shelf = Shelf::with(3);
    let kitfs = &shelf.kitfs;
    kitfs.ok(&["tag", &shelf.name("a"), "production,staging"]);
    let told = as_json(kitfs, &[&shelf.name("b"), "production", "--move", "--keep-old"]);
    assert_eq!(actions(&told), pairs(&[("production-prev", "created"), ("production", "moved")]));
    assert_eq!(shelf.is("production-prev"), shelf.digests[0]);
    let told = as_json(kitfs, &[&shelf.name("c"), "production", "--move", "--keep-old"]);
    assert_eq!(actions(&told), pairs(&[("production-prev", "moved"), ("production", "moved")]));
    assert_eq!(shelf.is("production-prev"), shelf.digests[1]);
    kitfs.ok(&["tag", &shelf.name("c"), "staging", "--move", "--keep-old=good"]);
    assert_eq!(shelf.is("good"), shelf.digests[0]);
    let error = kitfs.fails(&["tag", &shelf.name("a"), "staging,production", "--move", "--keep-old=good"]);
    assert!(error.contains("can't all leave theirs to one"), "{error}");
    let error = kitfs.fails(&["tag", &shelf.name("b"), "staging", "--move", "--keep-old=-x"]);
    assert!(error.contains("is not a tag"), "{error}");
}

#[test]
fn a_digest_that_loses_its_last_tag_is_told() {
    let shelf = Shelf::with(2);
    let kitfs = &shelf.kitfs;
    let lost = format!("{} loses its last tag", shelf.digests[0]);
    kitfs.ok(&["tag", &shelf.name("a"), "other"]);
    let said = says(kitfs, &["tag", &shelf.name("b"), "other", "--move"]);
    assert!(!said.contains("loses"), "a still leads there: {said}");
    let said = says(kitfs, &["tag", &shelf.name("b"), "a", "--move", "--dry-run"]);
    assert!(said.contains(&lost) && said.contains("--keep-old"), "{said}");
    let said = says(kitfs, &["tag", &shelf.name("b"), "a", "--move", "--keep-old", "--dry-run"]);
    assert!(!said.contains("loses"), "{said}");
    let told = as_json(kitfs, &[&shelf.name("b"), "a", "--move"]);
    assert!(told["warnings"][0].as_str().expect("a warning").contains(&lost), "{told}");
}

#[test]
fn a_repository_of_too_many_tags_is_not_asked_for_all_of_them() {
    let (server, kitfs) = (FaultServer::empty("team/kit"), Kitfs::new());
    let serve = |name: &str, tag: &str| {
        KitBuilder::new().tar("docs", "a.md", tar(&[("a.md", name.as_bytes())])).serve(&server, tag)
    };
    let (old, new) = (serve("old", "v1"), serve("new", "v2"));
    (0..1001).for_each(|number| server.tag(&format!("build-{number}"), new.digest));
    let said = says(&kitfs, &["tag", &new.reference, "v1", "--move", "--dry-run"]);
    assert!(said.contains(&format!("leads to {} was not looked up: it has 1002 more tags", old.digest)), "{said}");
    assert_eq!(server.requests_for("build-7"), 0);
}

#[test]
fn a_kit_that_builds_on_another_is_copied_without_it() {
    let (registry, kitfs) = (Registry::start(), Kitfs::new());
    let server = FaultServer::empty("team/kit");
    let layer = || tar(&[("a.md", b"a")]);
    let parent = KitBuilder::new().tar("model", "a.md", layer()).serve(&server, "base");
    let child = KitBuilder::new().tar("docs", "a.md", layer()).parent(&parent.reference).serve(&server, "v1");
    let told = as_json(&kitfs, &[&child.reference, &format!("{}/team/copy", registry.host())]);
    let note = told["notes"][0].as_str().expect("a note");
    assert!(note.contains(&format!("it builds on {}", parent.reference)), "{told}");
}

#[test]
fn a_version_moves_its_lines_forward_and_never_back() {
    let shelf = Shelf::with(4);
    let kitfs = &shelf.kitfs;
    let told = as_json(kitfs, &[&shelf.name("a"), "--semver", "1.4.2"]);
    assert_eq!(actions(&told), pairs(&[("1.4.2", "created"), ("1.4", "created"), ("1", "created")]));
    let told = as_json(kitfs, &[&shelf.name("b"), "--semver", "1.5.0"]);
    assert_eq!(actions(&told), pairs(&[("1.5.0", "created"), ("1.5", "created"), ("1", "moved")]));
    let told = as_json(kitfs, &[&shelf.name("c"), "--semver", "1.4.3"]);
    assert_eq!(actions(&told), pairs(&[("1.4.3", "created"), ("1.4", "moved"), ("1", "stays")]));
    assert_eq!(told["tags"][2]["newest"], "1.5.0");
    assert_eq!((shelf.is("1.4"), shelf.is("1")), (&*shelf.digests[2], &*shelf.digests[1]));
    let told = as_json(kitfs, &[&shelf.name("d"), "--semver", "1.6.0-rc.1", "candidate"]);
    assert_eq!(actions(&told), pairs(&[("candidate", "created"), ("1.6.0-rc.1", "created")]));
    let error = kitfs.fails(&["tag", &shelf.name("d"), "--semver", "1.4.2", "--move", "--force"]);
    assert!(error.contains("a version does not move"), "{error}");
    assert_eq!(shelf.is("1.4.2"), shelf.digests[0]);
    let error = kitfs.fails(&["tag", &shelf.name("d"), "--semver", "1.4"]);
    assert!(error.contains("expected MAJOR.MINOR.PATCH"), "{error}");
}

#[test]
fn a_commit_is_tagged_and_a_tree_with_changes_is_none() {
    let shelf = Shelf::with(1);
    let (kitfs, work) = (&shelf.kitfs, shelf.kitfs.path("work"));
    std::fs::create_dir(&work).expect("made");
    let git = |arguments: &[&str]| {
        let identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"];
        let output = Command::new("git").args(identity).args(arguments).current_dir(&work).output().expect("git runs");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    let tag = |expect_success: bool| {
        let mut command = kitfs.command(["tag", &shelf.name("a"), "--git"]);
        let output = command.current_dir(&work).output().expect("runs");
        assert_eq!(output.status.success(), expect_success, "{output:?}");
        String::from_utf8_lossy(if expect_success { &output.stdout } else { &output.stderr }).into_owned()
    };
    assert!(tag(false).contains("not a git repository"));
    git(&["init", "-q"]);
    std::fs::write(work.join("train.py"), "1").expect("written");
    let error = tag(false);
    assert!(error.contains("train.py") && error.contains("commit, stash or ignore"), "{error}");
    git(&["add", "."]);
    git(&["commit", "-q", "-m", "one"]);
    let expected = format!("git-{}", git(&["rev-parse", "--short", "HEAD"]));
    assert!(tag(true).contains(&expected));
    assert_eq!(shelf.is(&expected), shelf.digests[0]);
}

#[test]
fn an_immutable_tag_moves_only_with_force() {
    let shelf = Shelf::with(2);
    let config = shelf.kitfs.path("config.toml");
    std::fs::write(&config, "[tags]\nimmutable = [\"[0-9]*.[0-9]*.[0-9]*\", \"git-*\"]\n").expect("written");
    let Shelf { registry, kitfs, digests } = shelf;
    let shelf = Shelf { registry, kitfs: kitfs.with("KITFS_CONFIG", &config), digests };
    let kitfs = &shelf.kitfs;
    kitfs.ok(&["tag", &shelf.name("a"), "1.0.0,latest"]);
    let error = kitfs.fails(&["tag", &shelf.name("b"), "1.0.0", "--move"]);
    assert!(
        error.contains("immutable") && error.contains("\"[0-9]*.[0-9]*.[0-9]*\"") && error.contains("--force"),
        "{error}"
    );
    kitfs.ok(&["tag", &shelf.name("b"), "latest", "--move"]);
    kitfs.ok(&["tag", &shelf.name("b"), "1.0.0", "--force"]);
    assert_eq!(shelf.is("1.0.0"), shelf.digests[1]);
    let error = kitfs.fails(&["tag", &shelf.name("a"), "latest", "--move", "--tags-immutable", "lat*"]);
    assert!(error.contains("\"lat*\""), "the flag overrides the file: {error}");
    let error = kitfs.fails(&["tag", &shelf.name("a"), "x", "--tags-immutable", "[0-"]);
    assert!(error.contains("--tags-immutable"), "{error}");
}

#[test]
fn a_registry_that_refuses_is_told_in_its_words_and_the_refusal_is_recorded() {
    let (server, kitfs) = (FaultServer::empty("team/kit"), Kitfs::new());
    let serve = |name: &str, tag: &str| {
        KitBuilder::new().tar("docs", "a.md", tar(&[("a.md", name.as_bytes())])).serve(&server, tag)
    };
    let (old, new) = (serve("old", "v1"), serve("new", "v2"));
    for (status, code) in [(400, "TAG_INVALID"), (412, "PRECONDITION"), (403, "DENIED"), (405, "UNSUPPORTED")] {
        let words = "Failed to process request due to 'team/kit:v1' configured as immutable.";
        let body = json!({"errors": [{"code": code, "message": words}]}).to_string();
        server.fault("v1", Fault::RefuseWrites { status, body });
        let error = kitfs.fails(&["tag", &new.reference, "v1", "--move"]);
        assert!(error.contains("holds that tag to be immutable") && error.contains(words), "{error}");
        assert!(!error.contains("log in as"), "no login helps: {error}");
        server.heal("v1");
        let event = history(&kitfs).pop().expect("an event");
        assert!(matches!(&event.outcome, Outcome::Failed(why) if why.contains("immutable")), "{event:?}");
    }
    assert_eq!(digest_of(&kitfs, &old.reference), old.digest.to_string());
    assert!(kitfs.fails(&["tag", &old.reference, "--undo"]).contains("knows of no move"));
}

#[test]
fn a_tag_that_does_not_lead_where_it_was_written_to_is_an_error() {
    let (server, kitfs) = (FaultServer::empty("team/kit"), Kitfs::new());
    let new = KitBuilder::new().tar("docs", "a.md", tar(&[("a.md", b"new")])).serve(&server, "v2");
    server.fault("v1", Fault::Replace(b"{\"schemaVersion\":2}".to_vec()));
    let error = kitfs.fails(&["tag", &new.reference, "v1", "--move"]);
    assert!(error.contains(&format!("was written as {}", new.digest)), "{error}");
    assert!(matches!(history(&kitfs).pop().expect("an event").outcome, Outcome::Failed(_)));
}

#[test]
fn in_another_repository_of_the_registry_blobs_are_mounted_and_the_indexes_go_along() {
    let (registry, kitfs) = (Registry::start(), Kitfs::new());
    let name = |repository: &str, tag: &str| format!("{}/{repository}:{tag}", registry.host());
    kitfs.ok(&["index", &tiny(), &name("staging/kit", "pinned")]);
    registry.push_layout(&data("layouts/tiny-llm"), "staging/kit");
    let attested: Value =
        serde_json::from_str(&kitfs.ok(&["index", "--json", &name("staging/kit", "1.2.0")])).expect("JSON");
    let targets = [name("prod/kit", "pinned"), name("prod/kit", "1.2.0")];
    for (source, target) in [("pinned", &targets[0]), ("1.2.0", &targets[1])] {
        let told = as_json(&kitfs, &[&name("staging/kit", source), target]);
        let copied = &told["copied"][0];
        // The empty config of a referrer is at hand: it has two bytes.
        assert!(copied["uploaded"]["bytes"].as_u64().is_some_and(|bytes| bytes <= 2), "{told}");
        assert_eq!((&copied["referrers"], &told["warnings"]), (&json!(1), &json!([])), "{told}");
        assert_eq!(digest_of(&kitfs, target), told["digest"].as_str().expect("a digest"));
    }
    let fresh = Kitfs::new();
    let verified = fresh.ok(&["verify", &targets[0]]);
    assert!(verified.contains("pinned"), "{verified}");
    let referrer = attested["referrer"].as_str().expect("a referrer");
    let shown = Kitfs::new().ok(&["inspect", &targets[1], "--index-digest", referrer]);
    assert!(shown.contains("attested"), "{shown}");
    let again = as_json(&kitfs, &[&name("staging/kit", "pinned"), &targets[0]]);
    let copied = &again["copied"][0];
    assert_eq!((&copied["referrers"], &copied["mounted"]["blobs"]), (&json!(0), &json!(0)), "{again}");
}

#[test]
fn a_pinned_kit_whose_referrer_is_gone_gets_it_back() {
    let (registry, kitfs) = (Registry::start(), Kitfs::new());
    let server = FaultServer::empty("team/kit");
    let layer = tar(&[("w.bin", &[7; 5000])]);
    let served = KitBuilder::new().indexed().tar("model", "w.bin", layer).serve(&server, "v1");
    let target = format!("{}/team/copy:v1", registry.host());
    let told = as_json(&kitfs, &[&served.reference, &target]);
    assert_eq!((&told["copied"][0]["referrers"], &told["warnings"]), (&json!(1), &json!([])), "{told}");
    assert!(Kitfs::new().ok(&["verify", &target]).contains("pinned"));
}

#[test]
fn an_index_that_is_lost_is_a_warning_and_the_kit_is_copied() {
    let (registry, kitfs) = (Registry::start(), Kitfs::new());
    let server = FaultServer::empty("team/kit");
    let layer = tar(&[("w.bin", &[7; 5000])]);
    let served = KitBuilder::new().indexed().tar("model", "w.bin", layer).serve(&server, "v1");
    server.remove(&served.indexes[0].digest);
    let target = format!("{}/team/copy:v1", registry.host());
    let told = as_json(&kitfs, &[&served.reference, &target]);
    assert!(told["warnings"][0].as_str().expect("a warning").contains("not taken along"), "{told}");
    assert_eq!(digest_of(&kitfs, &target), served.digest.to_string());
}

/// A kit of two layers of 8 MiB on a server of its own.
fn two_layers(server: &FaultServer) -> Served {
    KitBuilder::new()
        .content("model", "a.bin", huge_tar("a.bin", 5, 8 << 20))
        .content("docs", "b.bin", huge_tar("b.bin", 7, 8 << 20))
        .serve(server, "v1")
}

#[test]
fn a_copy_that_was_killed_is_gone_on_with() {
    let (registry, server, kitfs) = (Registry::start(), FaultServer::empty("team/kit"), Kitfs::new());
    let served = two_layers(&server);
    let target = format!("{}/team/copy:v1", registry.host());
    let gate = server.hold(served.layers[1], 1 << 20);
    let mut child = kitfs.command(["tag", &served.reference, &target]).spawn().expect("runs");
    let arrived = registry.blob_file(&served.layers[0]);
    support::eventually("the first layer is there", || arrived.exists());
    gate.wait_until_reached_by(1);
    child.kill().expect("killed");
    child.wait().expect("gone");
    gate.release();
    assert!(kitfs.fails(&["resolve", &target]).contains("is not in"), "nothing is tagged");
    server.reset_counters();
    let told = as_json(&kitfs, &[&served.reference, &target]);
    assert_eq!(server.bytes_for(served.layers[0]), 0, "it is there: {told}");
    kitfs.ok(&["verify", &target]);
}

#[test]
fn a_tag_that_moves_during_the_copy_is_left() {
    let (registry, server, kitfs) = (Registry::start(), FaultServer::empty("team/kit"), Kitfs::new());
    let served = two_layers(&server);
    let old = push_kit(&registry, "team/copy", 0);
    let other = push_kit(&registry, "team/copy", 1).to_string();
    let name = |tag: &str| format!("{}/team/copy:{tag}", registry.host());
    kitfs.ok(&["tag", &name("a"), "v1"]);
    let gate = server.hold(served.layers[1], 1 << 20);
    let mut command = kitfs.command(["tag", &served.reference, &name("v1"), "--move"]);
    let child = command.stderr(std::process::Stdio::piped()).spawn().expect("runs");
    gate.wait_until_reached_by(1);
    Kitfs::new().ok(&["tag", &name("b"), "v1", "--move"]);
    gate.release();
    let output = child.wait_with_output().expect("ends");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains("somebody was faster"), "{error}");
    assert!(error.contains(&old.to_string()) && error.contains(&other), "{error}");
    assert_eq!(digest_of(&kitfs, &name("v1")), other);
}

#[test]
fn layouts_and_kits_storage_are_tagged_and_copied_to() {
    let kitfs = Kitfs::new();
    let home = kitfs.path("kit");
    let kitfs = kitfs.with("KITOPS_HOME", &home);
    let layout = format!("oci:{}", kitfs.path("layout").display());
    let in_layout = |tag: &str| format!("{layout}:{tag}");
    let told = as_json(&kitfs, &[&tiny(), &in_layout("v1,v2"), "tiny-llm:v1"]);
    assert_eq!(actions(&told), pairs(&[("v1", "created"), ("v2", "created"), ("v1", "created")]));
    for name in [in_layout("v1"), in_layout("v2"), "tiny-llm:v1".to_owned()] {
        assert_eq!(digest_of(&kitfs, &name), TINY);
        kitfs.ok(&["verify", &name]);
    }
    let docs = "docs-only:v1".to_owned();
    let source = format!("oci:{}", data("layouts/docs-only").display());
    let tag = tag_of(&data("layouts/docs-only"));
    kitfs.ok(&["tag", &format!("{source}:{tag}"), &docs, &in_layout("docs")]);
    // Another repository of kit's storage shares its blobs; within a layout there is no other.
    for (old, new, copies) in [("tiny-llm:v1", "docs-only:v1", 1), (&in_layout("v1"), &in_layout("docs"), 0)] {
        let error = kitfs.fails(&["tag", new, old]);
        assert!(error.contains("--move") && error.contains(TINY), "{error}");
        let told = as_json(&kitfs, &[new, old, "--move"]);
        let copied = told["copied"].as_array().expect("copies");
        assert_eq!(copied.len(), copies, "{told}");
        assert!(copied.iter().all(|copy| copy["uploaded"]["blobs"] == 0), "{told}");
        assert_eq!(digest_of(&kitfs, old), digest_of(&kitfs, new));
        kitfs.ok(&["tag", old, "--undo"]);
        assert_eq!(digest_of(&kitfs, old), TINY);
    }
}

#[test]
fn a_layout_is_undone_from_another_directory_too() {
    let kitfs = Kitfs::new();
    let source = format!("oci:{}", data("layouts/docs-only").display());
    let docs = format!("{source}:{}", tag_of(&data("layouts/docs-only")));
    for source in [&tiny(), &docs] {
        let mut command = kitfs.command(["tag", source, "oci:kits:v1", "--move"]);
        assert!(command.current_dir(kitfs.path("")).status().expect("runs").success());
    }
    let name = format!("oci:{}:v1", kitfs.path("kits").display());
    kitfs.ok(&["tag", &name, "--undo"]);
    assert_eq!(digest_of(&kitfs, &name), TINY);
}

/// The tag of a layout's first kit.
fn tag_of(layout: &Path) -> String {
    let index: Value =
        serde_json::from_slice(&std::fs::read(layout.join("index.json")).expect("an index")).expect("JSON");
    let tag = &index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"];
    tag.as_str().expect("a tag").to_owned()
}

#[test]
fn an_image_index_is_tagged_and_copied_with_all_its_kits() {
    let (registry, kitfs) = (Registry::start(), Kitfs::new());
    let source = format!("oci:{}:two", data("layouts/image-index").display());
    let target = format!("{}/team/kit:two", registry.host());
    let told = as_json(&kitfs, &[&source, &target]);
    assert_eq!(digest_of(&kitfs, &target), told["digest"].as_str().expect("a digest"));
    assert_eq!(digest_of(&kitfs, &target), digest_of(&kitfs, &source));
    let error = kitfs.fails(&["ls", &target]);
    let kits: Vec<&str> =
        error.split_whitespace().filter(|word| word.starts_with("sha256:") && word.len() == 71).collect();
    assert!(kits.len() >= 2, "it leads to several: {error}");
    for kit in kits {
        Kitfs::new().ok(&["verify", &target, "--select", kit]);
    }
    kitfs.ok(&["tag", &target, "again"]);
    assert_eq!(digest_of(&kitfs, &format!("{}/team/kit:again", registry.host())), digest_of(&kitfs, &source));
}

#[test]
fn a_dry_run_writes_nothing_and_shows_what_a_node_would_fetch() {
    let shelf = Shelf::with(2);
    let kitfs = &shelf.kitfs;
    kitfs.ok(&["tag", &shelf.name("a"), "production"]);
    let layout = kitfs.path("layout");
    let in_layout = format!("oci:{}:v1", layout.display());
    let told = as_json(kitfs, &[&shelf.name("b"), "production", &in_layout, "--move", "--dry-run", "--keep-old"]);
    let all = [("production-prev", "created"), ("production", "moved"), ("v1", "created")];
    assert_eq!((actions(&told), &told["dry_run"]), (pairs(&all), &json!(true)));
    let diff = &told["tags"][1]["diff"];
    assert_eq!((&diff["from"]["digest"], &diff["to"]["digest"]), (&json!(shelf.digests[0]), &json!(shelf.digests[1])));
    assert_eq!((&diff["counts"]["changed"], &diff["fetch"]), (&json!(1), &json!(2048)), "{diff}");
    assert_eq!((shelf.is("production"), layout.exists()), (&*shelf.digests[0], false));
    assert_eq!(history(kitfs).len(), 1);
    let said = kitfs.ok(&["tag", &shelf.name("b"), "production", "--move", "--dry-run"]);
    assert!(said.contains("would move from") && said.contains("2.0 KiB"), "{said}");
}

#[test]
fn a_tag_that_can_not_be_looked_up_now_is_not_passed_on() {
    let shelf = Shelf::with(1);
    digest_of(&shelf.kitfs, &shelf.name("a"));
    let error = shelf.kitfs.fails(&["tag", "--offline", &shelf.name("a"), "oci:x:v1"]);
    let repository = format!("{}/team/kit@{}", shelf.registry.host(), shelf.digests[0]);
    assert!(error.contains("offline") && error.contains(&format!("name it: {repository}")), "{error}");
}

#[test]
fn what_is_no_kit_and_what_names_no_tag_is_refused() {
    let shelf = Shelf::with(1);
    let kitfs = &shelf.kitfs;
    for (arguments, why) in [
        (vec!["tag", &shelf.name("a")], "name a TARGET"),
        (vec!["tag", &shelf.name("a"), &shelf.name("x@")], "is not a digest"),
        (vec!["tag", &shelf.name("a"), "x y"], "is not a reference"),
        (vec!["tag", &shelf.name("a"), "b", "--undo"], "cannot be used with"),
        (vec!["tag", &shelf.name("missing"), "b"], "is not in"),
        (vec!["tag", &shelf.name("a"), "b", "--semver", "1.0.0+x"], "can't hold a `+`"),
    ] {
        let error = kitfs.fails(&arguments);
        assert!(error.contains(why), "{arguments:?}: {error}");
    }
    let image = json!({"schemaVersion": 2, "layers": [], "config":
        {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": Digest::of(b"{}"), "size": 2}});
    shelf.registry.push("team/kit", "image", image.to_string().as_bytes(), &[b"{}"]);
    assert!(kitfs.fails(&["tag", &shelf.name("image"), "b"]).contains("a container image"));
}
