//! Values that can't be meant, and values that are not there.

mod support;

use support::program::Kitfs;

#[test]
fn an_empty_variable_counts_as_not_set() {
    let reference = format!("oci:{}", support::data("layouts/tiny-llm").display());
    let reference = format!("{reference}:1.2.0");
    for name in ["KITOPS_HOME", "KITFS_READ_TIMEOUT", "KITFS_PLAIN_HTTP", "KITFS_LOG_LEVEL", "KITFS_VERIFY"] {
        let kitfs = Kitfs::new().with(name, "");
        kitfs.ok(&["ls", &reference]);
    }
}

#[test]
fn an_empty_value_is_called_empty() {
    let kitfs = Kitfs::new();
    let said = kitfs.fails(&["ls", "llama", "--cache-dir", ""]);
    assert!(said.contains("--cache-dir: the value is empty"), "{said}");
    let said = kitfs.fails(&["unmount", ""]);
    assert!(said.contains("DIR: the value is empty"), "{said}");
}

#[test]
fn a_log_level_that_is_none_is_refused() {
    let kitfs = Kitfs::new();
    let said = kitfs.fails(&["status", "--log-level", "bogus"]);
    assert!(said.contains("--log-level: \"bogus\" is neither error"), "{said}");
    for level in ["off", "warn", "DEBUG", "kitfs::fetch=debug,warn"] {
        kitfs.ok(&["status", "--log-level", level]);
    }
}
