//! A registry that does not answer, in all ways: a tag is told from memory, soon and with the age of that, or not at all
//! where that is not wanted; what answers, or can't be trusted, is never stood in for.

mod support;

use std::fs;
use std::time::Duration;

use kitfs::cache::Cache;
use kitfs::digest::Digest;
use serde_json::{Value, json};
use support::away::{Away, GIVEN_UP, Nobody, SOON, is_old, json_of, kit, make_old, within};
use support::kit::Served;
use support::program::Kitfs;
use support::{Auth, Fault, FaultServer, Login, Registry, RegistryOptions, data};

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
    for (away, cause) in [(Away::Drops, "took no connection in time"), (Away::Silent, "no answer within 10.0s")] {
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
    falls_back(&kitfs, "registry.invalid/team/kit:v1", &kit.digest, "failed to lookup address", GIVEN_UP);
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
