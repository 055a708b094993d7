//! Without a registry: what is complete in the cache is mounted and read, what is not fails soon and says why, and a tag
//! that could not be looked up is served with the age of what stood in for it, or not at all.

mod support;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use kitfs::cache::Cache;
use kitfs::digest::Digest;
use rustix::io::Errno;
use serde_json::{Value, json};
use support::away::{Away, Nobody};
use support::kit::{KitBuilder, Served, gzip, pattern, tar};
use support::program::{Kitfs, Mount, tree_of};
use support::{Auth, Fault, FaultServer, Login, Registry, RegistryOptions, data};

/// What a busy machine takes for what needs no waiting.
const AT_ONCE: Duration = Duration::from_secs(4);
/// A host that refuses connections is given up after a second or two.
const SOON: Duration = Duration::from_secs(10);
/// Connecting takes 5 s, and an answer is waited for 10 s.
const GIVEN_UP: Duration = Duration::from_secs(20);
/// How old the knowledge of a tag is made.
const OLD: u64 = 3 * 3600 + 5 * 60;

/// A kit of two layers, one of them with chunks.
fn kit(server: &FaultServer) -> Served {
    two_layers(KitBuilder::new()).serve(server, "v1")
}

fn two_layers(kit: KitBuilder) -> KitBuilder {
    let weights = tar(&[("w/a.bin", &pattern(3, (2 << 20) + 5)), ("w/b.bin", &pattern(4, 1000))]);
    kit.tar("model", "w", weights).layer("docs", "docs", "tar+gzip", gzip(&tar(&[("docs/x.md", b"read me")])))
}

/// Reads all of it, through a mount that ends with this.
fn complete(kitfs: &Kitfs, reference: &str, options: &[&str]) -> Vec<support::program::Row> {
    let mount = kitfs.mount(reference, options);
    tree_of(&mount.dir)
}

/// What is known of tags was learned three hours and five minutes ago.
fn make_old(kitfs: &Kitfs) {
    let notes = kitfs.cached_files("tags");
    assert!(!notes.is_empty(), "nothing is known of any tag");
    for path in notes {
        let mut note: Value = serde_json::from_slice(&fs::read(&path).expect("a note")).expect("JSON");
        note["seen"] = json!(note["seen"].as_u64().expect("a time") - OLD);
        fs::write(&path, note.to_string()).expect("written");
    }
}

fn json_of(kitfs: &Kitfs, arguments: &[&str]) -> Value {
    serde_json::from_str(&kitfs.ok(arguments)).expect("JSON")
}

/// That an age is what [`make_old`] made it, or a little more.
fn is_old(known: &Value) {
    let age = known["age_seconds"].as_u64().unwrap_or_else(|| panic!("no age: {known}"));
    assert!((OLD..OLD + 300).contains(&age), "{known}");
    let seen = known["seen"].as_str().expect("a time");
    assert!(seen.len() == "2026-01-01T00:00:00Z".len() && seen.ends_with('Z') && seen.contains('T'), "{known}");
}

/// What `work` gives, and that it took no longer than it may.
fn within<T>(limit: Duration, what: &str, work: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let value = work();
    let elapsed = began.elapsed();
    assert!(elapsed < limit, "{what} took {elapsed:?}");
    value
}

fn errno(path: &Path) -> Errno {
    let error = fs::read(path).expect_err("it is not in the cache");
    Errno::from_io_error(&error).expect("an error of the system")
}

#[test]
fn offline_opens_no_connection_and_looks_no_name_up() {
    let server = FaultServer::empty("team/kit");
    let kit = kit(&server);
    let kitfs = Kitfs::new();
    let pinned = format!("{}@{}", kit.reference.trim_end_matches(":v1"), kit.digest);
    for reference in [&kit.reference, &pinned] {
        for command in [&["resolve"][..], &["inspect"], &["ls"], &["mount"]] {
            let arguments = [command, &["--offline", reference]].concat();
            let error = within(AT_ONCE, "to refuse", || kitfs.fails(&arguments));
            let told = "is not in the cache or in kit's storage, and --offline (KITFS_OFFLINE) keeps kitfs from asking";
            assert!(error.contains(told) && error.contains("kitfs pull"), "{arguments:?}: {error}");
        }
    }
    assert_eq!(server.connections(), 0);

    let tree = complete(&kitfs, &kit.reference, &[]);
    let connections = server.connections();
    let offline = kitfs.with("KITFS_OFFLINE", "true");
    for reference in [&kit.reference, &pinned] {
        assert_eq!(complete(&offline, reference, &[]), tree);
        offline.ok(&["inspect", reference]);
        offline.ok(&["cat", reference, "w/a.bin"]);
    }
    assert_eq!(server.connections(), connections, "nobody was asked");

    // A name that can't be looked up is not looked up: that would take its time, and fail.
    let cache = Cache::open(&offline.cache()).expect("the cache");
    cache.remember("registry.invalid/team/kit:v1", &kit.digest).expect("a note");
    let served =
        within(AT_ONCE, "to resolve", || json_of(&offline, &["resolve", "--json", "registry.invalid/team/kit:v1"]));
    assert_eq!(served["digest"], json!(kit.digest));
    assert_eq!(served["last_known"]["why"], "offline");
}

#[test]
fn offline_is_a_key_of_the_config_file_and_writes_to_no_registry() {
    let server = FaultServer::empty("team/kit");
    let kit = kit(&server);
    let kitfs = Kitfs::new();
    complete(&kitfs, &kit.reference, &[]);
    let connections = server.connections();
    fs::create_dir_all(kitfs.path(".config/kitfs")).expect("mkdir");
    fs::write(kitfs.path(".config/kitfs/config.toml"), "offline = true\n").expect("written");
    let made = kit.reference.replace(":v1", ":v2");
    let error = kitfs.fails(&["index", &kit.reference, &made]);
    assert!(error.contains("keeps kitfs from writing there") && error.contains("oci:DIR"), "{error}");
    assert_eq!(server.connections(), connections);
    // What lies on the disk works as ever.
    let from = format!("oci:{}", data("layouts/tiny-llm").display());
    let to = format!("oci:{}:v2", kitfs.path("layout").display());
    kitfs.ok(&["index", &from, &to]);
    assert!(!complete(&kitfs, &to, &[]).is_empty());
}

#[test]
fn a_digest_whose_kit_is_complete_needs_no_request() {
    for indexed in [false, true] {
        let server = FaultServer::empty("team/kit");
        let kit =
            two_layers(if indexed { KitBuilder::new().indexed() } else { KitBuilder::new() }).serve(&server, "v1");
        let kitfs = Kitfs::new();
        let tree = complete(&kitfs, &kit.reference, &[]);
        server.reset_counters();
        let pinned = format!("{}@{}", kit.reference.trim_end_matches(":v1"), kit.digest);
        assert_eq!(complete(&kitfs, &pinned, &[]), tree);
        let paths: Vec<_> = server.requests().into_iter().map(|request| request.path).collect();
        assert!(paths.is_empty(), "{paths:?}");
    }
}

#[test]
fn a_complete_kit_is_served_without_its_registry_and_says_how_old_its_tag_is() {
    let server = FaultServer::empty("team/kit");
    let kit = kit(&server);
    let kitfs = Kitfs::new();
    let fresh = kitfs.ok(&["mount", &kit.reference, kitfs.path("m").to_str().expect("UTF-8"), "--json"]);
    let fresh: Value = serde_json::from_str(&fresh).expect("JSON");
    assert_eq!((&fresh["last_known"], &fresh["offline"]), (&Value::Null, &json!(false)));
    let tree = tree_of(&kitfs.path("m"));
    kitfs.ok(&["unmount", kitfs.path("m").to_str().expect("UTF-8")]);
    make_old(&kitfs);
    drop(server);

    let mount = within(SOON, "to mount", || kitfs.mount(&kit.reference, &[]));
    let note = mount.said.lines().find(|line| line.starts_with("note")).expect("a note");
    let told = ":v1: the registry can't be reached (Connection refused (os error 111)); took the digest it had at 20";
    assert!(note.contains(told) && note.contains("3h 5m before"), "{note}");
    assert_eq!(tree_of(&mount.dir), tree);
    let status = kitfs.status(&mount);
    is_old(&status["last_known"]);
    assert_eq!(status["last_known"]["why"], "the registry can't be reached");
    let shown = kitfs.ok(&["status", mount.dir.to_str().expect("UTF-8")]);
    assert!(shown.contains("3h 5m before"), "{shown}");
    drop(mount);

    let offline = within(AT_ONCE, "to mount offline", || kitfs.mount(&kit.reference, &["--offline"]));
    assert!(offline.said.contains(":v1: offline; took the digest it had at 20"), "{}", offline.said);
    assert!(offline.said.contains("no registry is asked"), "{}", offline.said);
    assert_eq!(tree_of(&offline.dir), tree);
    let status = kitfs.status(&offline);
    is_old(&status["last_known"]);
    assert_eq!((&status["last_known"]["why"], &status["offline"]), (&json!("offline"), &json!(true)));
    let shown = kitfs.ok(&["status", offline.dir.to_str().expect("UTF-8")]);
    assert!(shown.contains("no registry is asked"), "{shown}");
    drop(offline);

    for command in [&["resolve", "--json"][..], &["inspect", "--json"], &["mount", "--dry-run", "--json"]] {
        for (options, why) in [(&[][..], "the registry can't be reached"), (&["--offline"], "offline")] {
            let known = json_of(&kitfs, &[command, options, &[&kit.reference]].concat())["last_known"].clone();
            is_old(&known);
            assert_eq!(known["why"], why, "{command:?}");
            assert_eq!(known["cause"].is_null(), why == "offline", "{known}");
        }
    }
    let pinned = format!("{}@{}", kit.reference.trim_end_matches(":v1"), kit.digest);
    assert_eq!(json_of(&kitfs, &["resolve", "--json", &pinned])["last_known"], Value::Null);
}

/// A user who has seen the tag, and the address at which its registry was.
fn who_has_seen(kit: impl Fn(&FaultServer) -> Served) -> (Kitfs, Served, FaultServer) {
    let server = FaultServer::empty("team/kit");
    let kit = kit(&server);
    let kitfs = Kitfs::new();
    kitfs.ok(&["inspect", &kit.reference]);
    make_old(&kitfs);
    (kitfs, kit, server)
}

/// The tag is told from memory soon enough; and is not, if that is not wanted.
fn falls_back(kitfs: &Kitfs, reference: &str, digest: &Digest, cause: &str, limit: Duration) {
    let found = within(limit, cause, || json_of(kitfs, &["resolve", "--json", reference]));
    assert_eq!(found["digest"], json!(digest), "{cause}");
    is_old(&found["last_known"]);
    assert_eq!(found["last_known"]["why"], "the registry can't be reached");
    let told = found["last_known"]["cause"].as_str().expect("a cause");
    assert!(told.contains(cause), "{told}");
}

#[test]
fn a_registry_that_refuses_or_fails_is_given_up_soon() {
    let (kitfs, kit, server) = who_has_seen(kit);
    for (status, retry_after) in [(500, None), (503, None), (503, Some("600")), (429, Some("600"))] {
        server.fault("v1", Fault::Status { status, retry_after: retry_after.map(str::to_owned) });
        falls_back(&kitfs, &kit.reference, &kit.digest, &format!("it answered {status}"), SOON);
        server.heal("v1");
    }
    drop(server);
    falls_back(&kitfs, &kit.reference, &kit.digest, "Connection refused", SOON);
}

#[test]
fn a_token_server_that_is_away_is_a_registry_that_is_away() {
    let (kitfs, kit, server) = who_has_seen(kit);
    let gone = FaultServer::empty("x").host();
    let realm = Some(format!("http://{gone}/token"));
    server.set_auth(Auth::Bearer { realm, login: Login::Anyone, expires_in: 300 });
    falls_back(&kitfs, &kit.reference, &kit.digest, "Connection refused", SOON);
}

#[test]
fn a_host_that_drops_packets_or_says_nothing_holds_nobody_for_long() {
    for (away, cause) in [(Away::Drops, ""), (Away::Silent, "")] {
        let (kitfs, kit, server) = who_has_seen(kit);
        let host = server.host();
        drop(server);
        let _nobody = Nobody::at(&host, away);
        falls_back(&kitfs, &kit.reference, &kit.digest, cause, GIVEN_UP);
        // The layers are not known: the mount does not wait for them too.
        let mount = within(GIVEN_UP, &format!("to mount, {away:?}"), || kitfs.mount(&kit.reference, &[]));
        assert!(mount.said.contains("warning"), "{}", mount.said);
    }
}

#[test]
fn a_name_that_is_not_known_any_more_is_a_registry_that_is_away() {
    let (kitfs, kit, _server) = who_has_seen(kit);
    let cache = Cache::open(&kitfs.cache()).expect("the cache");
    cache.remember("registry.invalid/team/kit:v1", &kit.digest).expect("a note");
    make_old(&kitfs);
    falls_back(&kitfs, "registry.invalid/team/kit:v1", &kit.digest, "", GIVEN_UP);
}

#[test]
fn a_web_page_in_the_place_of_a_registry_is_nobody_and_nothing_of_it_is_kept() {
    let (kitfs, kit, server) = who_has_seen(kit);
    let host = server.host();
    drop(server);
    let _portal = Nobody::at(&host, Away::Page);
    falls_back(&kitfs, &kit.reference, &kit.digest, "a web page came where", SOON);

    let stranger = Kitfs::new();
    let pinned = format!("{}@{}", kit.reference.trim_end_matches(":v1"), kit.digest);
    for reference in [&kit.reference, &pinned] {
        let error = within(SOON, "to fail", || stranger.fails(&["inspect", reference]));
        assert!(error.contains("the network wants a login, or the host is no registry"), "{error}");
    }
    assert!(stranger.cached_files("tags").is_empty() && stranger.cached_files("blobs").is_empty());
}

#[test]
fn what_a_tag_led_to_is_known_only_once_it_was_found_to_be_a_kit() {
    let (kitfs, kit, server) = who_has_seen(kit);
    let other = server.add_manifest("v1", r#"{"schemaVersion":2,"this":"is no kit"}"#);
    let error = kitfs.fails(&["inspect", &kit.reference]);
    assert!(!error.contains("can't be reached"), "{error}");
    drop(server);
    let known = json_of(&kitfs, &["resolve", "--json", &kit.reference]);
    assert_eq!(known["digest"], json!(kit.digest), "and not {other}");
    is_old(&known["last_known"]);
}

#[test]
fn a_registry_that_refuses_is_an_answer() {
    let (kitfs, kit, server) = who_has_seen(kit);
    for (status, told) in [(401, "refused the credentials"), (403, "denied access"), (404, "is not in")] {
        server.fault("v1", Fault::status(status));
        let error = within(SOON, told, || kitfs.fails(&["resolve", &kit.reference]));
        assert!(error.contains(told), "{status}: {error}");
        server.heal("v1");
    }
}

#[test]
fn nothing_stands_in_for_a_server_that_is_not_proved_to_be_the_registry() {
    let plain = Registry::start();
    plain.push_layout(&data("layouts/tiny-llm"), "team/kit");
    let tls = Registry::start_with(RegistryOptions {
        storage: Some(plain.storage().to_owned()),
        tls: true,
        ..RegistryOptions::default()
    });
    // Loopback names get plain HTTP, so that the registry is asked through a name that is none.
    let proxy = support::http::Tunnel::to(&tls.host()).url();
    let kitfs = Kitfs::new().with("KITFS_PROXY", &proxy);
    let ca = support::support("tls/ca.pem");
    let ca = ca.to_str().expect("UTF-8");
    let reference = "registry.test/team/kit:latest";
    let digest = kitfs.ok(&["resolve", reference, "--ca", ca]);
    let error = within(SOON, "to refuse", || kitfs.fails(&["resolve", reference]));
    let told = ["is not trusted", "--ca FILE", "--offline takes what is in the cache instead"];
    assert!(told.iter().all(|told| error.contains(told)), "{error}");
    assert_eq!(kitfs.ok(&["resolve", reference, "--offline"]), digest);
    let cache = Cache::open(&kitfs.cache()).expect("the cache");
    cache.remember("other.test/team/kit:latest", &Digest::of(b"x")).expect("a note");
    let error = kitfs.fails(&["resolve", "other.test/team/kit:latest", "--ca", ca]);
    assert!(error.contains("is for another name"), "{error}");
}

#[test]
fn where_fresh_is_required_the_age_is_told_and_nothing_is_served() {
    let (kitfs, kit, server) = who_has_seen(kit);
    assert_eq!(json_of(&kitfs, &["resolve", "--json", "--require-fresh", &kit.reference])["last_known"], Value::Null);
    make_old(&kitfs);
    drop(server);
    let strict = kitfs.with("KITFS_REQUIRE_FRESH", "true");
    let pinned = format!("{}@{}", kit.reference.trim_end_matches(":v1"), kit.digest);
    for (options, why) in [(&[][..], "can't be reached"), (&["--offline"], "--offline (KITFS_OFFLINE)")] {
        for command in ["resolve", "inspect", "mount"] {
            let error = within(SOON, "to refuse", || strict.fails(&[&[command, &kit.reference], options].concat()));
            let told = ["--require-fresh refuses the digest it had at 20", "3h 5m before", &pinned, why];
            assert!(told.iter().all(|told| error.contains(told)), "{error}");
        }
        strict.ok(&[&["resolve", &pinned], options].concat());
    }
}

#[test]
fn kits_storage_stands_in_first_and_its_age_is_not_known() {
    let (kitfs, kit, server) = who_has_seen(kit);
    let other = server.add_manifest("v2", server.bytes_of(&kit.digest).expect("the manifest").repeat(1));
    let home = kitfs.path("kit");
    fs::create_dir_all(home.join("storage")).expect("mkdir");
    let repository = kit.reference.trim_end_matches(":v1");
    let filed = base64::Engine::encode(&base64::engine::general_purpose::URL_SAFE, repository);
    let tags = json!({"v1": {"digest": other, "size": 1, "mediaType": "application/vnd.oci.image.manifest.v1+json"}});
    fs::write(home.join(format!("storage/{filed}-tags.json")), tags.to_string()).expect("written");
    drop(server);
    let home = home.to_str().expect("UTF-8");
    for (options, why) in [(&[][..], "the registry can't be reached"), (&["--offline"], "offline")] {
        let all = [&["resolve", "--json", &kit.reference, "--kit-home", home], options].concat();
        let known = json_of(&kitfs, &all);
        assert_eq!((&known["last_known"]["seen"], &known["last_known"]["age_seconds"]), (&Value::Null, &Value::Null));
        assert_eq!(known["last_known"]["why"], why);
        let note = known["notes"][0].as_str().expect("a note");
        assert!(note.contains("took the digest in kit's storage, whose age is not known"), "{note}");
        let error =
            kitfs.fails(&[&["resolve", &kit.reference, "--kit-home", home, "--require-fresh"], options].concat());
        assert!(error.contains("--require-fresh refuses the digest in kit's storage"), "{error}");
    }
}

#[test]
fn a_digest_stands_by_itself_where_the_tag_beside_it_cant_be_checked() {
    let (kitfs, kit, server) = who_has_seen(kit);
    drop(server);
    let both = format!("{}@{}", kit.reference, kit.digest);
    for (options, why) in [(&[][..], "the registry can't be reached (Connection refused"), (&["--offline"], "offline")]
    {
        let found = within(SOON, "to resolve", || json_of(&kitfs, &[&["resolve", "--json", &both], options].concat()));
        assert_eq!((&found["digest"], &found["last_known"]), (&json!(kit.digest), &Value::Null));
        let note = found["notes"][0].as_str().expect("a note");
        assert!(note.contains(why) && note.contains("it was not checked"), "{note}");
        kitfs.fails(&[&["resolve", &both, "--require-fresh"], options].concat());
    }
}

#[test]
fn whoever_vouches_for_its_indexes_a_complete_kit_is_read_without_its_registry() {
    let server = FaultServer::empty("team/kit");
    let pinned = two_layers(KitBuilder::new().indexed()).serve(&server, "pinned");
    let attested = two_layers(KitBuilder::new().attested()).serve(&server, "attested");
    let referrer = attested.referrer.expect("a referrer").to_string();
    let rule = format!("{}/*", server.host());
    let kits = [
        (&pinned.reference, vec![], "pinned"),
        (&attested.reference, vec!["--index-digest", &referrer], "attested"),
        (&attested.reference, vec!["--trust-index", &rule], "attested"),
        (&pinned.reference, vec!["--trust", "layer"], "derived"),
    ];
    // A cache for each, so that none is helped by what another left.
    let users: Vec<_> = kits
        .iter()
        .map(|(reference, options, tier)| {
            let kitfs = Kitfs::new();
            let mount = kitfs.mount(reference, options);
            if *tier != "derived" {
                assert_eq!(mount.trust_of("w/a.bin"), *tier, "{reference}");
            }
            let tree = tree_of(&mount.dir);
            drop(mount);
            if *tier != "derived" {
                // Reading all of an attested layer derives it. It is not to help here.
                for index in kitfs.cached_files("indexes") {
                    fs::remove_file(index).expect("removed");
                }
            }
            make_old(&kitfs);
            (kitfs, tree)
        })
        .collect();
    drop(server);
    for ((kitfs, tree), (reference, options, tier)) in users.iter().zip(&kits) {
        for (more, limit) in [(&[][..], SOON), (&["--offline"], AT_ONCE)] {
            let mount = within(limit, tier, || kitfs.mount(reference, &[options, more].concat()));
            assert!(!mount.said.contains("warning"), "{}", mount.said);
            assert_eq!(mount.trust_of("w/a.bin"), *tier);
            assert_eq!(tree_of(&mount.dir), *tree, "{tier}");
            if options.contains(&"--trust-index") {
                assert!(mount.said.contains("what a rule trusts to name the indexes of"), "{}", mount.said);
                assert_eq!(mount.said.matches("3h 5m before").count(), 2, "the tag and the rule: {}", mount.said);
            }
        }
    }
}

#[test]
fn an_image_index_and_parents_are_followed_from_memory() {
    let server = FaultServer::from_layout(data("layouts/image-index"), "team/kit");
    let base = two_layers(KitBuilder::new()).serve(&server, "base");
    let child = KitBuilder::new().parent(&base.reference).tar("docs", "notes", tar(&[("notes/n.md", b"note")]));
    let child = child.serve(&server, "child");
    let kitfs = Kitfs::new();
    let one = json_of(&kitfs, &["inspect", "--json", &server.reference("one")]);
    let select = one["digest"].as_str().expect("a digest").to_owned();
    let references = [
        (server.reference("one"), vec![]),
        (server.reference("two"), vec!["--select", &select]),
        (child.reference.clone(), vec![]),
    ];
    let trees: Vec<_> = references.iter().map(|(reference, options)| complete(&kitfs, reference, options)).collect();
    make_old(&kitfs);
    drop(server);
    for (more, limit) in [(&[][..], SOON), (&["--offline"], AT_ONCE)] {
        for ((reference, options), tree) in references.iter().zip(&trees) {
            let mount = within(limit, reference, || kitfs.mount(reference, &[&options[..], more].concat()));
            assert_eq!(tree_of(&mount.dir), *tree, "{reference}");
        }
        let mount = kitfs.mount(&child.reference, more);
        assert_eq!(mount.said.matches("3h 5m before").count(), 2, "the kit and its parent: {}", mount.said);
        assert!(mount.said.contains(&format!("{}: ", base.reference)), "{}", mount.said);
        drop(mount);
        let error = kitfs.fails(&[&["resolve", &child.reference, "--require-fresh"], more].concat());
        assert!(error.contains(&child.reference), "{error}");
    }
}

/// A kit of a layer that is read and others that are not, with the registry gone.
fn incomplete(others: usize) -> (Kitfs, Served, FaultServer) {
    let server = FaultServer::empty("team/kit");
    let mut kit = two_layers(KitBuilder::new());
    for number in 0..others {
        let (path, name) = (format!("d{number}"), format!("d{number}/x"));
        kit = kit.tar("datasets", &path, tar(&[(&name, &pattern(number as u64, 200_000))]));
    }
    let kit = kit.serve(&server, "v1");
    let kitfs = Kitfs::new();
    kitfs.ok(&["cat", &kit.reference, "w/a.bin"]);
    (kitfs, kit, server)
}

fn reads_what_is_here(mount: &Mount<'_>) {
    assert_eq!(fs::read(mount.path("w/a.bin")).expect("cached"), pattern(3, (2 << 20) + 5));
    assert_eq!(fs::read(mount.path("w/b.bin")).expect("cached"), pattern(4, 1000));
}

#[test]
fn an_incomplete_kit_serves_what_is_here_and_the_rest_fails_within_its_deadline() {
    let (kitfs, kit, server) = incomplete(1);
    drop(server);
    let options = ["--read-timeout", "2s", "--meta-timeout", "3s"];
    let mount = within(SOON, "to mount", || kitfs.mount(&kit.reference, &options));
    assert!(mount.said.contains("what 2 layers of"), "{}", mount.said);
    reads_what_is_here(&mount);
    within(SOON, "to fail", || assert_eq!(errno(&mount.path("d0/x")), Errno::TIMEDOUT));
    reads_what_is_here(&mount);
    drop(mount);

    let mount = within(AT_ONCE, "to mount offline", || kitfs.mount(&kit.reference, &["--offline"]));
    assert!(mount.said.contains("what 2 layers of") && mount.said.contains("--offline"), "{}", mount.said);
    reads_what_is_here(&mount);
    within(AT_ONCE, "to fail offline", || assert_eq!(errno(&mount.path("d0/x")), Errno::IO));
    within(AT_ONCE, "to fail offline", || assert_eq!(errno(&mount.path("docs/x.md")), Errno::IO));
    reads_what_is_here(&mount);
    let log = kitfs.logs();
    assert!(log.contains("keeps kitfs from asking"), "the log says why: {log}");
}

#[test]
fn a_mount_waits_for_a_hundred_layers_of_a_registry_that_is_gone_as_for_one() {
    let (kitfs, kit, server) = incomplete(100);
    let host = server.host();
    drop(server);
    let pinned = format!("{}@{}", kit.reference.trim_end_matches(":v1"), kit.digest);
    // The digest tells nobody that the registry is gone; the tag does.
    for reference in [&pinned, &kit.reference] {
        let mount = within(SOON, "to mount", || kitfs.mount(reference, &[]));
        assert!(mount.said.contains("what 101 layers of"), "{}", mount.said);
        assert_eq!(mount.said.matches("warning").count(), 1, "{}", mount.said);
        reads_what_is_here(&mount);
        let mount = within(AT_ONCE, "to mount offline", || kitfs.mount(reference, &["--offline"]));
        assert_eq!(mount.said.matches("warning").count(), 1, "{}", mount.said);
        reads_what_is_here(&mount);
    }
    let _nobody = Nobody::at(&host, Away::Drops);
    for reference in [&pinned, &kit.reference] {
        let mount = within(GIVEN_UP, "to mount", || kitfs.mount(reference, &[]));
        reads_what_is_here(&mount);
    }
}

#[test]
fn a_layer_that_could_not_be_asked_at_the_mount_is_read_when_its_registry_is_back() {
    let (kitfs, kit, server) = incomplete(1);
    for layer in &kit.layers[1..] {
        server.fault(layer, Fault::status(503));
    }
    let mount = kitfs.mount(&kit.reference, &[]);
    assert!(mount.said.contains("it answered 503") || mount.said.contains("answered 503"), "{}", mount.said);
    kit.layers.iter().for_each(|layer| server.heal(layer));
    assert_eq!(fs::read(mount.path("d0/x")).expect("it is back"), pattern(0, 200_000));
    assert_eq!(fs::read(mount.path("docs/x.md")).expect("it is back"), b"read me");
}

#[test]
fn a_layer_in_kits_storage_is_read_offline_though_its_index_is_not_here() {
    let server = FaultServer::empty("team/kit");
    let kit = two_layers(KitBuilder::new().indexed()).serve(&server, "v1");
    let kitfs = Kitfs::new();
    let blobs = kitfs.path("kit/storage/blobs/sha256");
    fs::create_dir_all(&blobs).expect("mkdir");
    let manifest: Value =
        serde_json::from_slice(&server.bytes_of(&kit.digest).expect("the manifest")).expect("a manifest");
    let config: Digest = manifest["config"]["digest"].as_str().expect("a config").parse().expect("a digest");
    for digest in kit.layers.iter().chain([&kit.digest, &config]) {
        fs::write(blobs.join(digest.hex()), server.bytes_of(digest).expect("on the server")).expect("written");
    }
    let pinned = format!("{}@{}", kit.reference.trim_end_matches(":v1"), kit.digest);
    let home = kitfs.path("kit");
    let mount = kitfs.mount(&pinned, &["--offline", "--kit-home", home.to_str().expect("UTF-8")]);
    reads_what_is_here(&mount);
    assert_eq!(server.connections(), 0);
}

#[test]
fn a_real_registry_may_stop_too() {
    let registry = Registry::start();
    registry.push_layout(&data("layouts/tiny-llm"), "team/kit");
    let reference = format!("{}/team/kit:latest", registry.host());
    let kitfs = Kitfs::new();
    let tree = complete(&kitfs, &reference, &[]);
    drop(registry);
    for (options, limit) in [(&[][..], SOON), (&["--offline"], AT_ONCE)] {
        let mount = within(limit, "to mount", || kitfs.mount(&reference, options));
        assert!(mount.said.contains("took the digest it had at"), "{}", mount.said);
        assert_eq!(tree_of(&mount.dir), tree);
    }
}
