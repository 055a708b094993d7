//! The command line: what it prints, where, and with which exit code. Nothing is mounted here.

mod support;

use std::io::Read as _;
use std::path::Path;
use std::process::{Output, Stdio};

use serde_json::{Value, json};
use support::kit::KitBuilder;
use support::program::{Kitfs, recorded, sha256};
use support::{FaultServer, data};

/// The digest of the tiny-llm fixture's manifest.
const TINY: &str = "sha256:0f4b22aefbde7a60a25b5d22ef4090dde0aa0e7622142cbcdc7165537b4602b4";

/// A user whose kit storage holds the fixtures.
fn user() -> Kitfs {
    Kitfs::new().with("KITOPS_HOME", data("kithome"))
}

fn layout(kit: &str, tag: &str) -> String {
    format!("oci:{}:{tag}", data("layouts").join(kit).display())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("not killed")
}

/// Runs a command whose arguments are wrong, and returns what it says.
fn wrong_use(kitfs: &Kitfs, arguments: &[&str]) -> String {
    let output = kitfs.run(arguments);
    assert_eq!(code(&output), 2, "{arguments:?}: {}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "", "{arguments:?}");
    text(&output.stderr)
}

/// Runs a command that fails, and returns what it says: one line.
fn failure(kitfs: &Kitfs, arguments: &[&str]) -> String {
    let output = kitfs.run(arguments);
    let said = text(&output.stderr);
    assert_eq!(code(&output), 1, "{arguments:?}: {said}");
    assert_eq!(text(&output.stdout), "", "{arguments:?}");
    let errors: Vec<&str> = said.lines().filter(|line| !line.starts_with("note: ")).collect();
    assert_eq!(errors.len(), 1, "{said}");
    errors[0].strip_prefix("error: ").unwrap_or_else(|| panic!("{said}")).to_owned()
}

fn as_json(kitfs: &Kitfs, arguments: &[&str]) -> Value {
    let printed = kitfs.ok(arguments);
    assert_eq!(printed.lines().count(), 1, "one line for programs: {printed}");
    serde_json::from_str(&printed).expect("JSON")
}

#[test]
fn help_is_grouped_and_ends_with_examples() {
    let help = user().ok(&["--help"]);
    let order = [
        "Usage: kitfs",
        "Mounts:\n  mount ",
        "Without a mount:\n  ls ",
        "Tags and digests:\n  tags ",
        "Making kits readable in parts:\n  index ",
        "The cache:\n  cache ",
        "Options:",
        "Examples:",
        "Exit codes: 0",
    ];
    let places: Vec<_> = order.iter().map(|part| help.find(part).unwrap_or_else(|| panic!("{part}: {help}"))).collect();
    assert!(places.is_sorted(), "{help}");
    assert!(help.lines().count() < 56 && help.lines().all(|line| line.chars().count() <= 100), "{help}");
}

#[test]
fn every_command_explains_itself_with_examples() {
    let kitfs = user();
    let looks =
        ["ls", "cat", "inspect", "resolve", "pull", "tags", "tag", "diff", "history", "index", "verify", "cache"];
    for command in ["mount", "unmount", "status", "switch", "rollback"].into_iter().chain(looks) {
        let help = kitfs.ok(&[command, "--help"]);
        assert!(help.contains(&format!("Usage: kitfs {command}")) && help.contains("Examples:\n"), "{help}");
        assert!(help.lines().all(|line| line.chars().count() <= 100), "{help}");
    }
    for command in ["ls", "gc", "rm", "verify"] {
        let help = kitfs.ok(&["cache", command, "--help"]);
        assert!(help.contains(&format!("Usage: kitfs cache {command}")) && help.contains("Examples:\n"), "{help}");
        assert!(help.lines().all(|line| line.chars().count() <= 100), "{help}");
    }
    assert_eq!(kitfs.ok(&["umount", "--help"]), kitfs.ok(&["unmount", "--help"]));
    assert_eq!(kitfs.ok(&["list", "--help"]), kitfs.ok(&["tags", "--help"]));
    assert!(kitfs.ok(&["--version"]).starts_with("kitfs "));
}

#[test]
fn wrong_use_is_exit_code_2_and_says_what_was_read() {
    let kitfs = user();
    for (arguments, said) in [
        (&["frobnicate"][..], "frobnicate"),
        (&["ls"], "<REF>"),
        (&["unmount"], "<DIR>"),
        (&["ls", "tiny-llm:1.2.0", "--read-timeout", "5"], "error: --read-timeout: \"5\" is not a duration: expected "),
        (&["ls", "tiny-llm:1.2.0", "--max-inflated", "1.5GiB"], "error: --max-inflated: \"1.5GiB\" is not a size"),
        (&["ls", "tiny-llm:1.2.0", "--platform", "linux"], "error: --platform: \"linux\" is not a platform"),
        (
            &["ls", "tiny-llm:1.2.0", "--concurrency", "0"],
            "error: --concurrency: \"0\": expected a number from 1 to 64",
        ),
        (&["ls", "tiny-llm:1.2.0", "--tls-verify=maybe"], "--tls-verify"),
        (&["ls", "tiny-llm:1.2.0", "--filter", "bogus"], "\"bogus\" is not one of the types"),
        (&["ls", "tiny-llm:1.2.0", "../x"], "climbs out of the kit's root"),
        (&["cat", "tiny-llm:1.2.0", "README.md", "--bytes", "4-2"], "error: --bytes: \"4-2\": B lies before A"),
        (&["mount", "tiny-llm:1.2.0", "x", "--verify", "none"], "\"none\" is not one of strict, stream, listing"),
        (
            &["mount", "tiny-llm:1.2.0", "x", "--file-mode", "u+r"],
            "error: --file-mode: \"u+r\": expected an octal mode",
        ),
        (&["mount", "--foreground"], "REF"),
        (&["inspect", "tiny-llm:1.2.0", "--manifest", "--config"], "cannot be used with"),
        (&["ls", "tiny-llm:1.2.0", "--log-level", "=="], "--log-level: \"==\" is neither error, warn"),
    ] {
        let error = wrong_use(&kitfs, arguments);
        assert!(error.starts_with("error: ") && error.contains(said), "{arguments:?}: {error}");
    }
}

#[test]
fn a_bad_reference_says_what_was_read_and_what_is_allowed() {
    let kitfs = user();
    for (reference, why) in [
        ("https://ghcr.io/x", "leave the scheme out"),
        ("ghcr.io/Team/x", "must be lower case (team/x)"),
        ("x:", "is not a tag"),
        (TINY, "a digest alone names no repository"),
    ] {
        let error = wrong_use(&kitfs, &["ls", reference]);
        assert!(error.starts_with(&format!("error: REF: {reference:?} is not a reference: ")), "{error}");
        assert!(error.contains(why) && error.contains("allowed are registry/repo[:tag]"), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn what_is_not_there_is_named_with_what_is() {
    let kitfs = user();
    let hub = failure(&kitfs, &["ls", "team/llama:8b"]);
    assert!(hub.contains("not in kit's storage; for Docker Hub write docker.io/team/llama:8b"), "{hub}");
    let tag = failure(&kitfs, &["resolve", "tiny-llm:9"]);
    assert!(tag.contains("\"9\"") && tag.contains("1.2.0"), "{tag}");
    let tag = failure(&kitfs, &["ls", &layout("tiny-llm", "9")]);
    assert!(tag.contains("\"9\"") && tag.contains("1.2.0"), "{tag}");
    let missing = failure(&kitfs, &["ls", "oci:/nowhere"]);
    assert!(missing.contains("/nowhere"), "{missing}");
    assert_eq!(failure(&kitfs, &["cat", "tiny-llm:1.2.0", "src/nope"]), "src/nope: no such file or directory");
    assert_eq!(failure(&kitfs, &["cat", "tiny-llm:1.2.0", "src"]), "src: is a directory");
    assert_eq!(failure(&kitfs, &["cat", "tiny-llm:1.2.0", "LICENSE/x"]), "LICENSE/x: not a directory");
    let moved = failure(&kitfs, &["ls", &format!("tiny-llm:1.2.0@sha256:{}", "0".repeat(64))]);
    assert!(moved.contains("resolves to") && moved.contains(TINY), "{moved}");
}

#[test]
fn resolve_prints_one_line_the_digest_alone_or_json() {
    let kitfs = user();
    assert_eq!(kitfs.ok(&["resolve", "tiny-llm:1.2.0"]), format!("tiny-llm@{TINY}\n"));
    assert_eq!(kitfs.ok(&["resolve", "-q", "tiny-llm:1.2.0"]), format!("{TINY}\n"));
    let resolved = as_json(&kitfs, &["resolve", "--json", "tiny-llm:1.2.0"]);
    let expected = json!({
        "reference": "tiny-llm:1.2.0", "repository": "tiny-llm", "tag": "1.2.0", "digest": TINY, "last_known": null, "notes": [],
    });
    assert_eq!(resolved, expected);
}

#[test]
fn an_omitted_tag_is_told_on_standard_error() {
    let kitfs = user();
    let output = kitfs.run(&["resolve", "tiny-llm"]);
    assert_eq!(text(&output.stdout), format!("tiny-llm@{TINY}\n"));
    assert_eq!(text(&output.stderr), "note: no tag in tiny-llm: took `latest`\n");
    let resolved = as_json(&kitfs, &["resolve", "--json", "tiny-llm"]);
    assert_eq!(resolved["notes"], json!(["no tag in tiny-llm: took `latest`"]));
}

#[test]
fn ls_lists_what_unpack_writes() {
    let kitfs = user();
    let listed = as_json(&kitfs, &["ls", "-R", "--json", &layout("tiny-llm", "1.2.0")]);
    let mut rows: Vec<_> = listed["entries"].as_array().expect("entries").iter().map(shape).collect();
    rows.sort();
    let expected: Vec<_> = recorded(&data("trees/tiny-llm.jsonl"))
        .into_iter()
        .map(|row| (row.path, row.mode, row.kind, row.size.unwrap_or(0)))
        .collect();
    assert_eq!(rows, expected);
    assert_eq!((&listed["digest"], &listed["verified"]), (&json!(TINY), &json!(false)), "most layers were not hashed");
}

fn shape(row: &Value) -> (String, String, String, u64) {
    let text = |key: &str| row[key].as_str().expect(key).to_owned();
    (text("path"), text("mode"), text("type"), row["size"].as_u64().expect("size"))
}

#[test]
fn ls_prints_names_details_and_subdirectories() {
    let kitfs = user();
    let kit = layout("tiny-llm", "1.2.0");
    assert_eq!(kitfs.ok(&["ls", &kit, "src"]), "lib\nserve.sh\ntrain.py\n");
    assert_eq!(kitfs.ok(&["ls", &kit, "src/serve.sh"]), "src/serve.sh\n");
    let long = "drwxr-xr-x  0 1970-01-01 00:00:00 lib\n\
                -rwxr-xr-x 20 1970-01-01 00:00:00 serve.sh\n\
                -rw-r--r-- 15 1970-01-01 00:00:00 train.py\n";
    assert_eq!(kitfs.ok(&["ls", "-l", &kit, "/src/"]), long);
    let recursive = "src:\nlib\nserve.sh\ntrain.py\n\nsrc/lib:\nutil.py\n";
    assert_eq!(kitfs.ok(&["ls", "-R", &kit, "src"]), recursive);
    assert_eq!(kitfs.ok(&["ls", "--filter", "docs:LICENSE", &kit]), "LICENSE\n");
    assert_eq!(kitfs.ok(&["ls", &layout("image-index", "one"), "src"]), "lib\nserve.sh\ntrain.py\n");
}

#[test]
fn names_go_to_a_pipe_as_they_are() {
    let kitfs = user();
    let output = kitfs.run(&["ls", "-R", &layout("edge-names", "v1")]);
    assert_eq!(code(&output), 0, "{}", text(&output.stderr));
    let recorded = recorded(&data("trees/edge-names.jsonl"));
    for row in recorded {
        let name = Path::new(&row.path).file_name().expect("a name").to_str().expect("UTF-8");
        assert!(text(&output.stdout).contains(&format!("{name}\n")), "{name:?}");
    }
}

#[test]
fn an_image_index_with_several_kits_lists_them() {
    let kitfs = user();
    let two = layout("image-index", "two");
    let output = kitfs.run(&["ls", &two]);
    let error = text(&output.stderr);
    assert!(code(&output) == 1 && error.contains("--select") && error.contains(TINY), "{error}");
    assert!(kitfs.ok(&["ls", &two, "--select", TINY]).contains("weights\n"));
    let inspected = as_json(&kitfs, &["inspect", "--json", &two, "--select", TINY]);
    assert_eq!((&inspected["digest"], &inspected["index"]["chosen"]), (&json!(TINY), &json!(TINY)));
}

#[test]
fn cat_gives_every_file_byte_for_byte() {
    let kitfs = user();
    for (kit, reference) in [("tiny-llm", "tiny-llm:1.2.0".to_owned()), ("nested", layout("nested", "v1"))] {
        for row in recorded(&data(format!("trees/{kit}.jsonl"))).iter().filter(|row| row.kind == "file") {
            let output = kitfs.run(&["cat", &reference, &row.path]);
            assert_eq!(code(&output), 0, "{}: {}", row.path, text(&output.stderr));
            assert_eq!(Some(sha256(&output.stdout)), row.sha256, "{}", row.path);
        }
    }
}

#[test]
fn cat_takes_a_half_open_range() {
    let kitfs = user();
    let cat = |range: &str| kitfs.ok(&["cat", "tiny-llm:1.2.0", "README.md", "--bytes", range]);
    let whole = kitfs.ok(&["cat", "tiny-llm:1.2.0", "README.md"]);
    assert_eq!(
        (cat("0-6"), cat("8-"), cat("2-2"), cat("27-")),
        (whole[..6].into(), whole[8..].into(), "".into(), "".into())
    );
    assert_eq!(cat("20-1MiB"), whole[20..]);
    let error = failure(&kitfs, &["cat", "tiny-llm:1.2.0", "README.md", "--bytes", "28-"]);
    assert_eq!(error, "README.md has 27 bytes; --bytes begins at 28");
}

#[test]
fn cat_streams_and_still_fails_when_the_layer_is_false() {
    let server = FaultServer::empty("team/kit");
    let tar = tar_of("big.bin", &vec![7; 3 << 20]);
    let served = KitBuilder::new().tar("model", "big.bin", tar).serve(&server, "v1");
    let kitfs = user();
    let good = kitfs.run(&["cat", "--verify=stream", &served.reference, "big.bin"]);
    assert_eq!((code(&good), good.stdout.len()), (0, 3 << 20), "{}", text(&good.stderr));
    let mut flipped = tar_of("big.bin", &vec![7; 3 << 20]);
    flipped[2 << 20] ^= 1;
    server.add_content(served.layers[0], support::Content::Bytes(flipped));
    for mode in ["--verify=strict", "--verify=stream"] {
        let fresh = user();
        let bad = fresh.run(&["cat", mode, &served.reference, "big.bin"]);
        let error = text(&bad.stderr);
        assert!(code(&bad) == 1 && error.contains("digest mismatch"), "{mode}: {error}");
        assert!(mode == "--verify=stream" || bad.stdout.is_empty(), "{mode}");
        assert_eq!(fresh.cached_files("objects"), Vec::<std::path::PathBuf>::new(), "{mode}");
    }
}

fn tar_of(name: &str, content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_data(&mut header, name, content).expect("appended");
    tar.into_inner().expect("a tar")
}

#[test]
fn without_verification_a_range_is_read_and_marked_and_nothing_is_kept() {
    let server = FaultServer::empty("team/kit");
    let mut content = vec![0; 40 << 20];
    content[30 << 20..][..6].copy_from_slice(b"needle");
    let served = KitBuilder::new().tar("model", "w/big.bin", tar_of("w/big.bin", &content)).serve(&server, "v1");
    let kitfs = user();
    let range = "31457280-31457286";
    let found = kitfs.run(&["cat", "--verify=none", &served.reference, "w/big.bin", "--bytes", range]);
    assert_eq!(text(&found.stdout), "needle", "{}", text(&found.stderr));
    assert!(text(&found.stderr).contains("UNVERIFIED: "), "{}", text(&found.stderr));
    let listed = kitfs.run(&["ls", "-l", "--verify=none", "--json", &served.reference, "w"]);
    assert!(text(&listed.stderr).contains("UNVERIFIED: "), "{}", text(&listed.stderr));
    let listed: Value = serde_json::from_slice(&listed.stdout).expect("JSON");
    assert_eq!((&listed["verified"], &listed["entries"][0]["size"]), (&json!(false), &json!(40 << 20)));
    let inspected = as_json(&kitfs, &["inspect", "--verify=none", "--json", &served.reference, "w/big.bin"]);
    assert_eq!((&inspected["file"]["verified"], &inspected["file"]["size"]), (&json!(false), &json!(40 << 20)));
    assert!(server.bytes() < 1 << 20, "{} bytes were sent", server.bytes());
    assert_eq!(kitfs.cached_files("objects"), Vec::<std::path::PathBuf>::new());
}

#[test]
fn without_verification_a_compressed_layer_says_what_to_do() {
    let error = failure(&user(), &["ls", "--verify=none", &layout("tiny-llm-gzip", "1.2.0"), "src"]);
    assert!(error.contains("is compressed") && error.contains("leave --verify=none out"), "{error}");
}

#[test]
fn inspect_shows_a_row_for_each_entry() {
    let kitfs = user();
    let printed = kitfs.ok(&["inspect", "tiny-llm:1.2.0"]);
    for part in
        [TINY, "application/vnd.kitops.modelkit.config.v1+json", "ml.kitops.modelkit.cli-version=1.7.0", "TYPE "]
    {
        assert!(printed.contains(part), "{part}: {printed}");
    }
    let inspected = as_json(&kitfs, &["inspect", "--json", "tiny-llm:1.2.0"]);
    let entries = inspected["entries"].as_array().expect("entries");
    let paths: Vec<_> = entries.iter().map(|entry| entry["path"].as_str().expect("a path")).collect();
    let expected = [
        "./weights/model-00001-of-00002.safetensors",
        "weights/model-00002-of-00002.safetensors",
        "weights/model.safetensors.index.json",
        "config.json",
        "tokenizer/",
        "src",
        "data/train",
        "./data/val.jsonl",
        "README.md",
        "LICENSE",
    ];
    assert_eq!(paths, expected);
    for entry in entries {
        assert!(entry["size"].is_u64() && entry["trust"] == "provisional", "{entry}");
        assert_eq!(entry["digest"], entry["diff_id"], "nothing is compressed");
    }
    assert_eq!(
        (&inspected["package"]["name"], &inspected["package"]["version"]),
        (&json!("tiny-llm"), &json!("1.2.0"))
    );
}

#[test]
fn inspect_of_a_path_shows_its_entry_and_the_file() {
    let kitfs = user();
    let inspect = || as_json(&kitfs, &["inspect", "--json", "tiny-llm:1.2.0", "src/train.py"]);
    let before = inspect();
    assert_eq!(before["entries"].as_array().map(Vec::len), Some(1), "{before}");
    assert_eq!((&before["entries"][0]["path"], &before["file"]["mode"]), (&json!("src"), &json!("0644")));
    kitfs.ok(&["cat", "tiny-llm:1.2.0", "src/train.py"]);
    let after = inspect();
    assert_eq!((&after["file"]["trust"], &after["file"]["cached"]), (&json!("derived"), &json!("yes")));
    assert!(after["file"]["object"].is_string(), "{after}");
    let error = failure(&kitfs, &["inspect", "tiny-llm:1.2.0", "nope"]);
    assert_eq!(error, "nope: no such file or directory");
}

#[test]
fn inspect_gives_the_documents_byte_for_byte() {
    let kitfs = user();
    let manifest = kitfs.run(&["inspect", "tiny-llm:1.2.0", "--manifest"]).stdout;
    assert_eq!(format!("sha256:{}", sha256(&manifest)), TINY);
    let manifest: Value = serde_json::from_slice(&manifest).expect("JSON");
    let config = kitfs.run(&["inspect", "tiny-llm:1.2.0", "--config"]).stdout;
    assert_eq!(json!(format!("sha256:{}", sha256(&config))), manifest["config"]["digest"]);
    let kitfile = kitfs.run(&["inspect", "tiny-llm:1.2.0", "--kitfile"]).stdout;
    assert_eq!(kitfile, std::fs::read(data("trees/tiny-llm.Kitfile")).expect("recorded"));
    let error = failure(&kitfs, &["inspect", "tiny-llm:1.2.0", "--kitfile", "--filter", "model"]);
    assert!(error.contains("has no Kitfile, or the filters leave it out"), "{error}");
}

#[test]
fn inspect_names_the_kits_of_a_chain() {
    let kitfs = user();
    let inspected = as_json(&kitfs, &["inspect", "--json", "grandchild:v1"]);
    let kits = inspected["kits"].as_array().expect("kits");
    let names: Vec<_> = kits.iter().map(|kit| kit["repository"].as_str().expect("a name")).collect();
    let expected = ["grandchild", "registry.example.com/fixtures/child", "registry.example.com/fixtures/base"];
    assert_eq!(names, expected);
}

#[test]
fn a_dry_run_shows_tree_trust_and_bytes_and_mounts_nothing() {
    let kitfs = user();
    let dir = kitfs.path("mnt");
    let dir = dir.to_str().expect("UTF-8");
    let kit = layout("tiny-llm", "1.2.0");
    let planned = as_json(&kitfs, &["mount", "--dry-run", "--json", &kit, dir]);
    let mut rows: Vec<_> = planned["entries"].as_array().expect("entries").iter().map(shape).collect();
    rows.sort();
    let paths: Vec<_> = recorded(&data("trees/tiny-llm.jsonl")).into_iter().map(|row| row.path).collect();
    assert_eq!(rows.into_iter().map(|(path, ..)| path).collect::<Vec<_>>(), paths);
    let model = &planned["layers"][0];
    assert_eq!((&model["fetch"], &model["trust"]), (&model["size"], &json!("provisional")));
    assert!(!Path::new(dir).exists());
    kitfs.ok(&["cat", &kit, "weights/model-00001-of-00002.safetensors"]);
    let planned = as_json(&kitfs, &["mount", "--dry-run", "--json", &kit, dir]);
    assert_eq!((&planned["layers"][0]["fetch"], &planned["layers"][0]["trust"]), (&json!(0), &json!("derived")));
    let printed = kitfs.ok(&["mount", "--dry-run", &kit, dir, "--file-mode", "0440"]);
    assert!(printed.contains("-r--r-----") && printed.contains("weights/model.safetensors.index.json"), "{printed}");
}

#[test]
fn nothing_mounted_is_no_error() {
    let kitfs = user();
    for arguments in [&["status"][..], &["mount"], &["unmount", "--all"]] {
        let output = kitfs.run(arguments);
        assert_eq!((code(&output), text(&output.stdout)), (0, String::new()), "{arguments:?}");
        assert_eq!(text(&output.stderr), "note: nothing is mounted\n", "{arguments:?}");
    }
    assert_eq!(as_json(&kitfs, &["status", "--json"]), json!({"mounts": []}));
    let error = failure(&kitfs, &["status", "/usr"]);
    assert_eq!(error, "nothing is mounted on /usr");
    let error = failure(&kitfs, &["unmount", "/usr"]);
    assert_eq!(error, "nothing is mounted on /usr");
}

#[test]
fn a_failed_mount_leaves_no_directory() {
    let kitfs = user();
    let dir = kitfs.path("mnt");
    for options in [&[][..], &["--foreground", "--log-level=error"]] {
        let mut arguments = vec!["mount", "team/llama:8b", dir.to_str().expect("UTF-8")];
        arguments.extend(options);
        let error = failure(&kitfs, &arguments);
        assert!(error.contains("for Docker Hub write docker.io/team/llama:8b"), "{error}");
        assert!(!dir.exists());
    }
}

#[test]
fn a_flag_overrides_its_variable_which_overrides_the_config_file() {
    let kitfs = user().with("XDG_CONFIG_HOME", "/nowhere");
    let config = kitfs.path("config.toml");
    let [in_file, in_variable, as_flag] = ["a", "b", "c"].map(|name| kitfs.path(name));
    std::fs::write(&config, format!("cache_dir = {in_file:?}\nconcurrency = 3\ntls_verify = false\n"))
        .expect("written");
    let run = |variable: bool, flag: bool| {
        let mut command = kitfs.command(["resolve", "tiny-llm:1.2.0"]);
        command.env_remove("KITFS_CACHE_DIR").env("KITFS_CONFIG", &config);
        if variable {
            command.env("KITFS_CACHE_DIR", &in_variable);
        }
        if flag {
            command.arg("--cache-dir").arg(&as_flag);
        }
        let output = command.output().expect("runs");
        assert_eq!(code(&output), 0, "{}", text(&output.stderr));
        [&in_file, &in_variable, &as_flag].map(|dir| dir.exists())
    };
    assert_eq!(run(true, true), [false, false, true]);
    assert_eq!(run(true, false), [false, true, true]);
    assert_eq!(run(false, false), [true, true, true]);
}

#[test]
fn a_wrong_value_is_named_with_the_place_it_came_from() {
    let kitfs = user();
    let config = kitfs.path("config.toml");
    let run = |text: &str, variable: Option<&str>, arguments: &[&str]| {
        std::fs::write(&config, text).expect("written");
        let mut command = kitfs.command(arguments);
        command.env("KITFS_CONFIG", &config).envs(variable.map(|value| ("KITFS_VERIFY", value)));
        command.output().expect("runs")
    };
    let resolve = ["ls", "tiny-llm:1.2.0"];
    let path = config.display().to_string();
    for (contents, variable, said) in [
        ("readtimeout = \"1s\"", None, format!("error: {path}: unknown key \"readtimeout\"; the keys are ")),
        (
            "read_timeout = 5",
            None,
            format!(
                "error: --read-timeout: \"5\" is not a duration: expected a whole number with ms, s, m, h or d, as in 10s (from {path})\n"
            ),
        ),
        ("filter = \"model\"", None, format!("error: {path}: unknown key \"filter\"")),
        ("verify = [\"strict\"]", None, format!("error: {path}: verify is of type array; expected ")),
        ("\n\nverify = ", None, format!("error: {path}: line 3: ")),
        (
            "",
            Some("loose"),
            "error: --verify: \"loose\" is not one of strict, stream, listing, none (from KITFS_VERIFY)\n".into(),
        ),
    ] {
        let output = run(contents, variable, &resolve);
        let error = text(&output.stderr);
        assert!(code(&output) == 2 && error.starts_with(&said), "{contents:?}: {error}");
    }
    let help = run("nonsense = 1", None, &["ls", "--help"]);
    assert!(code(&help) == 0 && text(&help.stdout).contains("Examples:"), "help needs no config file");
    let mut missing = kitfs.command(resolve);
    let output = missing.env("KITFS_CONFIG", "/nowhere.toml").output().expect("runs");
    assert!(code(&output) == 2 && text(&output.stderr).contains("/nowhere.toml"), "{}", text(&output.stderr));
}

#[test]
fn a_closed_pipe_ends_quietly() {
    let server = FaultServer::empty("team/kit");
    let tar = tar_of("big.bin", &vec![7; 8 << 20]);
    let served = KitBuilder::new().tar("model", "big.bin", tar).serve(&server, "v1");
    let kitfs = user();
    let mut command = kitfs.command(["cat", &served.reference, "big.bin"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("runs");
    let mut first = [0; 4];
    child.stdout.take().expect("piped").read_exact(&mut first).expect("four bytes");
    let output = child.wait_with_output().expect("ends");
    assert_eq!((code(&output), text(&output.stderr)), (0, String::new()));
}

#[test]
fn progress_off_a_terminal_is_a_plain_line_after_ten_seconds() {
    let server = FaultServer::empty("team/kit");
    let tar = tar_of("big.bin", &vec![7; 12 << 20]);
    let served = KitBuilder::new().tar("model", "big.bin", tar).serve(&server, "v1");
    server.set_rate(Some(1 << 20));
    let kitfs = user();
    let output = kitfs.run(&["cat", &served.reference, "big.bin"]);
    let said = text(&output.stderr);
    assert!(code(&output) == 0 && said.starts_with("fetching: big.bin: ") && said.contains(" of 12.0 MiB"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    let quiet = user().run(&["cat", "--progress=none", &served.reference, "big.bin"]);
    assert_eq!((code(&quiet), text(&quiet.stderr)), (0, String::new()));
}

#[test]
fn logs_are_json_where_they_are_asked_for() {
    let kitfs = user();
    let kit = layout("tiny-llm", "1.2.0");
    let output = kitfs.run(&["cat", "--log-level=info", "--log-format=json", &kit, "README.md"]);
    let said = text(&output.stderr);
    let line: Value = serde_json::from_str(said.lines().next().expect("a line")).expect("JSON");
    assert_eq!(line["fields"]["message"], "layer verified", "{said}");
}
