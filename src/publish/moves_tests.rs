use super::*;

fn digest(seed: &str) -> Digest {
    Digest::of(seed.as_bytes())
}

fn step(wanted: &Wanted, current: Option<&str>, rules: &Rules, tags: &[&str]) -> Result<Step, Refusal> {
    let tags: Vec<String> = tags.iter().map(|tag| (*tag).to_owned()).collect();
    wanted.step(&wanted.tag, current.map(digest), digest("new"), rules, &tags)
}

fn from_old() -> Result<Step, Refusal> {
    Ok(Step::Move { from: digest("old") })
}

fn release(text: &str) -> Release {
    text.parse().expect("a release")
}

#[test]
fn a_tag_that_leads_elsewhere_moves_only_if_that_was_asked_for() {
    let (named, none) = (Wanted::named("production"), Rules::default());
    assert_eq!(step(&named, None, &none, &[]), Ok(Step::Create));
    assert_eq!(step(&named, Some("new"), &none, &[]), Ok(Step::Same));
    let refused = step(&named, Some("old"), &none, &[]).expect_err("refused");
    assert!(matches!(refused, Refusal::Taken { .. }) && refused.to_string().contains("--move"), "{refused}");
    assert_eq!(step(&named, Some("old"), &Rules { may_move: true, ..none }, &[]), from_old());
}

#[test]
fn a_tag_that_somebody_else_moved_is_left_and_one_that_is_there_already_is_right() {
    let named = Wanted::named("production");
    let expected = Some(Expected { digest: digest("old"), says: "was said: somebody was faster" });
    let rules = Rules { expected, ..Rules::default() };
    assert_eq!(step(&named, Some("old"), &rules, &[]), from_old());
    assert_eq!(step(&named, Some("new"), &rules, &[]), Ok(Step::Same));
    for found in [None, Some("other")] {
        let refused = step(&named, found, &rules, &[]).expect_err("refused").to_string();
        assert!(refused.contains("somebody was faster"), "{refused}");
    }
}

#[test]
fn an_immutable_tag_is_made_and_moves_only_by_force() {
    let immutable = ["[0-9]*.[0-9]*.[0-9]*", "git-*"].map(|text| text.parse().expect("a pattern")).to_vec();
    let rules = Rules { may_move: true, immutable, ..Rules::default() };
    for tag in ["1.4.2", "git-0a1b2c3"] {
        let named = Wanted::named(tag);
        assert_eq!(step(&named, None, &rules, &[]), Ok(Step::Create));
        let refused = step(&named, Some("old"), &rules, &[]).expect_err("refused");
        assert!(matches!(refused, Refusal::Immutable { .. }) && refused.to_string().contains("--force"), "{refused}");
        assert_eq!(step(&named, Some("old"), &Rules { force: true, ..rules.clone() }, &[]), from_old());
        assert!(step(&Wanted { role: Role::Keeps, ..named }, Some("old"), &rules, &[]).is_err());
    }
    assert_eq!(step(&Wanted::named("1.4"), Some("old"), &rules, &[]), from_old());
}

#[test]
fn a_release_gets_its_version_and_its_lines_and_what_comes_before_it_the_version_alone() {
    let tags = |text: &str| release(text).tags().into_iter().map(|wanted| wanted.tag).collect::<Vec<_>>();
    assert_eq!(tags("1.4.2"), ["1.4.2", "1.4", "1"]);
    assert_eq!(tags("v0.10.0"), ["v0.10.0", "v0.10", "v0"]);
    assert_eq!(tags("1.5.0-rc.1"), ["1.5.0-rc.1"]);
}

#[test]
fn lines_move_forward_by_themselves_and_never_back() {
    let lines = |there: &[&str]| {
        let steps = release("1.4.2").tags().into_iter().skip(1);
        steps.map(|line| step(&line, Some("old"), &Rules::default(), there)).collect::<Vec<_>>()
    };
    let behind = |newest: &str| Ok(Step::Behind { newest: newest.to_owned() });
    assert_eq!(lines(&["1.4.1", "1.4.2", "1.4", "1", "latest", "v1.9.0", "2.0.0"]), [from_old(), from_old()]);
    assert_eq!(lines(&["1.4.10", "1.4.9"]), [behind("1.4.10"), behind("1.4.10")]);
    assert_eq!(lines(&["1.10.0", "1.9.0"]), [from_old(), behind("1.10.0")]);
    assert_eq!(lines(&["1.5.0-rc.1", "1.4.3-rc.1", "10.0.0"]), [from_old(), from_old()]);
}

#[test]
fn a_line_that_is_not_there_is_made_only_by_the_newest_release_on_it() {
    let line = &release("1.4.2").tags()[1];
    assert_eq!(step(line, None, &Rules::default(), &["1.4.1"]), Ok(Step::Create));
    assert!(matches!(step(line, None, &Rules::default(), &["1.4.3"]), Ok(Step::Behind { .. })));
}

#[test]
fn a_full_version_never_moves_by_its_release() {
    let version = &release("1.4.2").tags()[0];
    let all = Rules { may_move: true, force: true, ..Rules::default() };
    assert_eq!(step(version, None, &all, &[]), Ok(Step::Create));
    assert_eq!(step(version, Some("new"), &all, &[]), Ok(Step::Same));
    assert!(matches!(step(version, Some("old"), &all, &[]), Err(Refusal::Released { .. })));
}

#[test]
fn what_is_no_version_is_refused_with_what_is_expected() {
    for (text, why) in [
        ("1.4", "expected MAJOR.MINOR.PATCH"),
        ("latest", "expected MAJOR.MINOR.PATCH"),
        ("1.04.2", "leading zero"),
        ("1.4.2+cuda12", "can't hold a `+`"),
        (&format!("1.0.0-{}", "a".repeat(130)), "too long"),
    ] {
        let error = text.parse::<Release>().expect_err(text);
        assert!(error.contains(why) && error.contains(&text[..3]), "{error}");
    }
}
