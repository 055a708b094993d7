//! `scripts/tags`: the life of a tag, from the first to the audit, on a real registry.

use std::process::Command;

#[test]
fn the_life_of_a_tag_is_as_the_script_tells_it() {
    let root = env!("CARGO_MANIFEST_DIR");
    let script = format!("{root}/scripts/tags");
    let run = Command::new(script).env("KITFS", env!("CARGO_BIN_EXE_kitfs")).output().expect("the script runs");
    let [said, wrong] = [run.stdout, run.stderr].map(|said| String::from_utf8_lossy(&said).into_owned());
    assert!(run.status.success() && said.ends_with("all as it should be\n"), "{said}\n{wrong}");
}
