//! What may be mounted and pulled: what breaks a rule is refused with the rule's name and what to use instead, and a
//! registry that is not allowed is asked for nothing.

mod support;

use std::fs;

use kitfs::fetch::Policy;
use kitfs::reference::Reference;
use support::FaultServer;
use support::kit::{KitBuilder, Served, tar};
use support::program::Kitfs;

fn kit(content: &[u8]) -> KitBuilder {
    KitBuilder::new().tar("model", "w", tar(&[("w/a", content)]))
}

fn serve(server: &FaultServer, tag: &str) -> Served {
    kit(tag.as_bytes()).serve(server, tag)
}

/// What the reference stands for, by its digest.
fn pinned(kit: &Served) -> String {
    let repository = kit.reference.rsplit_once(':').expect("a tag").0;
    format!("{repository}@{}", kit.digest)
}

/// Both commands that a policy is about, which must refuse; what they said.
fn refused(kitfs: &Kitfs, reference: &str, flags: &[&str]) -> String {
    let dir = kitfs.path("never");
    let mount = kitfs.fails(&[&["mount", reference, dir.to_str().expect("UTF-8")], flags].concat());
    assert!(!dir.exists(), "the directory stays");
    let dry = kitfs.fails(&[&["mount", "--dry-run", reference], flags].concat());
    let pull = kitfs.fails(&[&["pull", reference], flags].concat());
    assert_eq!((&dry, &pull), (&mount, &mount), "all say the same");
    mount
}

#[test]
fn a_denied_tag_is_refused_with_the_pinned_reference_that_mounts() {
    let server = FaultServer::empty("team/kit");
    let (latest, dev, good) = (serve(&server, "latest"), serve(&server, "dev-7"), serve(&server, "8b"));
    let kitfs = Kitfs::new();
    let flags = ["--deny-tags", "latest,dev-*"];
    for kit in [&latest, &dev] {
        let said = refused(&kitfs, &kit.reference, &flags);
        let expected = format!("error: the policy deny_tags refuses {}: use {} instead\n", kit.reference, pinned(kit));
        assert_eq!(said, expected);
        let mount = kitfs.mount(&pinned(kit), &flags);
        assert!(mount.path("w/a").exists());
    }
    kitfs.mount(&good.reference, &flags);
    kitfs.ok(&["pull", &format!("{}@{}", latest.reference, latest.digest), "--deny-tags=latest"]);
}

#[test]
fn an_omitted_tag_is_latest_and_named() {
    let server = FaultServer::empty("team/kit");
    let latest = serve(&server, "latest");
    let bare = latest.reference.strip_suffix(":latest").expect("the tag");
    let said = refused(&Kitfs::new(), bare, &["--deny-tags=latest"]);
    assert!(said.contains(&format!("{bare}:latest (no tag means latest): use {} instead", pinned(&latest))), "{said}");
}

#[test]
fn rules_come_from_the_config_file_and_variables_and_a_flag_overrides_them() {
    let server = FaultServer::empty("team/kit");
    let good = serve(&server, "8b");
    let kitfs = Kitfs::new();
    let config = kitfs.path("config.toml");
    let kitfs = kitfs.with("KITFS_CONFIG", &config);
    for (text, rule) in [
        ("require_digest = true", "require_digest"),
        ("deny_tags = [\"latest\", \"8*\"]", "deny_tags"),
        ("allow_registries = \"r.io\"", "allow_registries"),
        ("[allow]\nrepositories = [\"r.io/*\", \"127.0.0.1:1/*\"]", "allow_repositories"),
    ] {
        fs::write(&config, text).expect("written");
        let said = refused(&kitfs, &good.reference, &[]);
        assert!(said.contains(&format!("the policy {rule} refuses {}", good.reference)), "{said}");
    }
    fs::write(&config, "require_digest = true").expect("written");
    kitfs.ok(&["pull", &good.reference, "--require-digest=false"]);
    kitfs.mount(&pinned(&good), &[]);
    // Looks are not what it is about.
    kitfs.ok(&["ls", &good.reference]);
    assert!(kitfs.ok(&["resolve", &good.reference]).contains(&good.digest.to_string()));
    let kitfs = kitfs.with("KITFS_REQUIRE_DIGEST", "false");
    kitfs.ok(&["pull", &good.reference]);
}

#[test]
fn an_empty_list_of_what_is_allowed_does_not_allow_all() {
    let server = FaultServer::empty("team/kit");
    let good = serve(&server, "8b");
    let kitfs = Kitfs::new();
    let config = kitfs.path("config.toml");
    let kitfs = kitfs.with("KITFS_CONFIG", &config);
    for (text, key) in
        [("allow_registries = []", "allow_registries"), ("[allow]\nrepositories = []", "allow.repositories")]
    {
        fs::write(&config, text).expect("written");
        let output = kitfs.run(&["pull", &good.reference]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        let expected =
            format!("config.toml: {key} is an empty list; name what is allowed, or leave the key out to allow all");
        assert!(said.contains(&expected), "{said}");
    }
    assert_eq!((server.connections(), server.requests().len()), (0, 0));
}

#[test]
fn wrong_patterns_are_wrong_use() {
    let kitfs = Kitfs::new();
    for (flag, value, why) in [
        ("--allow-registries", "https://r.io", "it holds a scheme"),
        ("--allow-registries", "r.io/team", "see --allow-repositories"),
        ("--allow-repositories", "r.io/team/", "end it with `/*`"),
        ("--deny-tags", "[a", "not a pattern of tags"),
    ] {
        let output = kitfs.run(&["pull", "llama", flag, value]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(flag) && said.contains(why), "{said}");
    }
}

#[test]
fn a_registry_or_repository_that_is_not_allowed_is_asked_for_nothing() {
    let server = FaultServer::empty("team/kit");
    let good = serve(&server, "8b");
    let host = server.host();
    let kitfs = Kitfs::new();
    for (flag, value) in [
        ("--allow-registries", "ghcr.io,*.internal:5000".to_owned()),
        ("--allow-repositories", format!("{host}/team/other, {host}/kits/*").replace(", ", ",")),
    ] {
        let said = refused(&kitfs, &good.reference, &[flag, &value]);
        let rule = flag.trim_start_matches("--").replace('-', "_");
        let allowed = value.replace(',', ", ");
        assert_eq!(said, format!("error: the policy {rule} refuses {}: allowed is {allowed}\n", good.reference));
        // A digest does not help.
        refused(&kitfs, &pinned(&good), &[flag, &value]);
    }
    assert_eq!((server.connections(), server.requests().len()), (0, 0));
    kitfs.mount(&good.reference, &["--allow-registries", &host, "--allow-repositories", &format!("{host}/team/*")]);
}

#[test]
fn a_layout_is_allowed_by_its_directory() {
    let kitfs = Kitfs::new();
    let layout = support::data("layouts/tiny-llm");
    let reference = format!("oci:{}:1.2.0", layout.display());
    let said = refused(&kitfs, &reference, &["--allow-repositories", "oci:/srv/kits/*"]);
    assert!(said.contains("allow_repositories refuses oci:"), "{said}");
    let all = format!("oci:{}/*", layout.parent().expect("a parent").canonicalize().expect("its path").display());
    kitfs.ok(&["pull", &reference, "--allow-repositories", &all]);
    let said = refused(&kitfs, &reference, &["--require-digest"]);
    assert!(said.contains("the policy require_digest refuses oci:") && said.contains("@sha256:"), "{said}");
}

#[test]
fn the_rules_hold_for_what_a_kit_builds_on() {
    let (base, server) = (FaultServer::empty("base/kit"), FaultServer::empty("team/kit"));
    let parent = serve(&base, "latest");
    let child = |tag: &str, on: &str| {
        let child = KitBuilder::new().parent(on).tar("docs", "d", tar(&[("d/readme", tag.as_bytes())]));
        child.serve(&server, tag)
    };
    let by_tag = child("by-tag", &parent.reference);
    let by_digest = child("by-digest", &pinned(&parent));
    let kitfs = Kitfs::new();
    let on_it = format!("{}, on which {} builds", parent.reference, pinned(&by_tag));

    let said = refused(&kitfs, &by_tag.reference, &["--allow-registries", &server.host()]);
    assert!(said.contains(&format!("allow_registries refuses {on_it}: allowed is {}", server.host())), "{said}");
    assert_eq!((base.connections(), base.requests().len()), (0, 0));

    let said = refused(&kitfs, &by_tag.reference, &["--deny-tags=latest"]);
    assert!(said.contains(&format!("deny_tags refuses {on_it}: use {} instead", pinned(&parent))), "{said}");
    // A digest of the kit does not say what its parent is.
    let said = refused(&kitfs, &pinned(&by_tag), &["--require-digest"]);
    assert!(said.contains(&format!("require_digest refuses {on_it}")), "{said}");

    let mount = kitfs.mount(&pinned(&by_digest), &["--require-digest", "--deny-tags=latest"]);
    assert!(mount.path("w/a").exists() && mount.path("d/readme").exists());
}

#[test]
fn a_refusal_stays_one_where_the_tag_cant_be_looked_up() {
    let server = FaultServer::empty("team/kit");
    let latest = serve(&server, "latest");
    let kitfs = Kitfs::new();
    let said = kitfs.fails(&["pull", &latest.reference.replace(":latest", ":gone"), "--require-digest"]);
    assert!(
        said.contains("the policy require_digest refuses") && said.contains("as in repository@sha256:…: "),
        "{said}"
    );
    // What it was when it was last seen is told where the registry is away.
    kitfs.ok(&["pull", &latest.reference]);
    drop(server);
    let said = kitfs.fails(&["pull", &latest.reference, "--require-digest", "--meta-timeout=2s"]);
    assert!(said.contains(&format!("use {} instead", pinned(&latest))), "{said}");
}

#[test]
fn a_mount_switches_to_nothing_that_its_policy_refuses() {
    let (server, other) = (FaultServer::empty("team/kit"), FaultServer::empty("team/kit"));
    let (first, second, foreign) = (serve(&server, "1"), serve(&server, "2"), serve(&other, "3"));
    let kitfs = Kitfs::new();
    let mount = kitfs.mount(&pinned(&first), &["--require-digest", "--allow-registries", &server.host()]);
    let dir = mount.dir.to_str().expect("UTF-8");
    let said = kitfs.fails(&["switch", dir, &second.reference]);
    let expected = format!("the policy require_digest refuses {}: use {} instead", second.reference, pinned(&second));
    assert!(said.contains(&expected), "{said}");
    let said = kitfs.fails(&["switch", dir, &pinned(&foreign)]);
    assert!(said.contains("the policy allow_registries refuses"), "{said}");
    assert_eq!(other.requests().len(), 0);
    assert_eq!(fs::read(mount.path("w/a")).expect("reads"), b"1");
    kitfs.ok(&["switch", dir, &pinned(&second)]);
    assert_eq!(fs::read(mount.path("w/a")).expect("reads"), b"2");
}

#[test]
fn a_followed_tag_leads_to_nothing_that_the_policy_refuses() {
    let (base, server) = (FaultServer::empty("base/kit"), FaultServer::empty("team/kit"));
    let parent = serve(&base, "1");
    let first = serve(&server, "production");
    let kitfs = Kitfs::new();
    let flags =
        ["--follow", "--interval=100ms", "--settle=0s", "--allow-registries", &server.host(), "--deny-tags=latest"];
    let mount = kitfs.mount(&first.reference, &flags);
    // Its tag is allowed, and so is where it is; what it builds on is not.
    let child = KitBuilder::new().parent(&pinned(&parent)).tar("docs", "d", tar(&[("d/readme", b"2")]));
    child.serve(&server, "production");
    let mut error = String::new();
    support::eventually("the move is refused", || {
        error = kitfs.status(&mount)["follow"]["error"].as_str().unwrap_or_default().to_owned();
        !error.is_empty()
    });
    assert!(error.contains("the policy allow_registries refuses"), "{error}");
    assert_eq!(base.requests().len(), 0);
    assert_eq!(fs::read(mount.path("w/a")).expect("reads"), b"production");
    kit(b"3").serve(&server, "production");
    support::eventually("the next move is taken", || fs::read(mount.path("w/a")).is_ok_and(|bytes| bytes == b"3"));
}

#[test]
fn who_follows_a_tag_can_ask_before_each_move() {
    let policy = Policy { require_digest: true, ..Policy::default() };
    let reference: Reference = "r.io/team/kit:production".parse().expect("a reference");
    let refusal = policy.check(&reference).expect_err("refused");
    assert_eq!(refusal.rule.to_string(), "require_digest");
    Policy::default().check(&reference).expect("allowed");
}
