use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use serde_json::{Value, json};

use super::*;
use crate::cache::Cache;
use crate::digest::Unverified;
use crate::fetch::{Context, Limits, Verify};
use crate::modelkit::{Layer, testing};
use crate::source::{BlobId, ByteStream, Source, SourceError};

/// A repository that is asked for manifests and referrers, and for nothing else.
#[derive(Debug, Default)]
struct Repository {
    manifests: BTreeMap<Digest, Vec<u8>>,
    listed: Vec<Digest>,
    /// What the list of referrers is refused with, where it is.
    refusal: Option<SourceError>,
}

impl Repository {
    fn missing(what: impl ToString) -> SourceError {
        SourceError::NotFound { what: what.to_string(), source_name: "the test".to_owned() }
    }

    /// Adds a referrer of `subject`, with an index of `size` bytes for each of `layers`.
    fn attest(&mut self, subject: &Digest, layers: &[Digest], size: u64, change: impl FnOnce(&mut Value)) -> Digest {
        let index = |layer: &Digest| {
            let pin = pin(size);
            let annotations: BTreeMap<_, _> = pin.referrer_annotations(layer).into_iter().collect();
            json!({"mediaType": MEDIA_TYPE, "digest": pin.digest, "size": size, "annotations": annotations})
        };
        let mut manifest = json!({
            "schemaVersion": 2,
            "artifactType": MEDIA_TYPE,
            "layers": layers.iter().map(index).collect::<Vec<_>>(),
            "subject": {"digest": subject, "size": 1},
        });
        change(&mut manifest);
        let bytes = manifest.to_string().into_bytes();
        let digest = Digest::of(&bytes);
        self.manifests.insert(digest, bytes);
        self.listed.push(digest);
        digest
    }
}

#[async_trait]
impl Source for Repository {
    fn name(&self) -> String {
        "the test".to_owned()
    }

    async fn resolve(&self, tag: &str) -> Result<Digest, SourceError> {
        Err(Self::missing(tag))
    }

    async fn manifest(&self, digest: &Digest) -> Result<Unverified, SourceError> {
        self.manifests.get(digest).cloned().map(Unverified::new).ok_or_else(|| Self::missing(digest))
    }

    async fn blob(&self, blob: &BlobId, _: Range<u64>) -> Result<ByteStream, SourceError> {
        Err(Self::missing(blob.digest))
    }

    async fn tags(&self) -> Result<Vec<String>, SourceError> {
        Ok(Vec::new())
    }

    async fn referrers(&self, _: &Digest, _: &str) -> Result<Vec<Digest>, SourceError> {
        self.refusal.clone().map_or_else(|| Ok(self.listed.clone()), Err)
    }
}

fn pin(size: u64) -> Pin {
    Pin { digest: Digest::of(&size.to_le_bytes()), size, head_digest: Digest::of(b"head"), head_size: 112 }
}

fn layer(name: &str, kit: usize) -> Layer {
    Layer { kit, ..testing::layer(name) }
}

fn kit() -> Digest {
    Digest::of(b"the kit")
}

/// What is named for layers `a` and `b` of a kit in `registry.internal/team/a`, by their sizes, and the warnings.
async fn named(repository: Repository, patterns: &[&str]) -> (Vec<Option<u64>>, Vec<String>) {
    let dir = tempfile::tempdir().expect("temporary directory");
    named_in(&dir, repository, patterns).await
}

/// The same with the cache that is in a directory.
async fn named_in(
    dir: &tempfile::TempDir,
    repository: Repository,
    patterns: &[&str],
) -> (Vec<Option<u64>>, Vec<String>) {
    let cache = Arc::new(Cache::open(&dir.path().join("cache")).expect("a cache"));
    let context = Context::new(cache, Limits::default(), Verify::Strict);
    let repositories = patterns.iter().map(|pattern| pattern.parse().expect("a pattern")).collect();
    let trust = Trust::Index { referrers: Vec::new(), repositories };
    let documents = Documents::new(&context);
    let repository: Arc<dyn Source> = Arc::new(repository);
    let origin = Origin { repository: "registry.internal/team/a".to_owned(), digest: kit(), sources: vec![repository] };
    let layers = vec![layer("a", 0), layer("b", 0)];
    let mut plan = Plan { digest: kit(), kitfile: None, layers, warnings: Vec::new() };
    let named = name(&documents, &trust, &[origin], &mut plan, &mut Vec::new()).await.expect("named");
    documents.settle().await;
    let sizes = named.into_iter().map(|named| {
        let named = named?;
        assert_eq!(named.tier, Tier::Attested);
        Some(named.pin.size)
    });
    (sizes.collect(), plan.warnings)
}

fn layers() -> [Digest; 2] {
    [Digest::of(b"a"), Digest::of(b"b")]
}

#[tokio::test]
async fn a_rule_takes_the_referrers_of_the_repositories_that_it_covers() {
    for (pattern, covers) in [("registry.internal/team/*", true), ("registry.internal/other/*", false)] {
        let mut repository = Repository::default();
        repository.attest(&kit(), &layers()[..1], 144, |_| {});
        let (sizes, warnings) = named(repository, &[pattern]).await;
        assert_eq!(sizes, [covers.then_some(144), None], "{pattern}");
        assert_eq!(warnings, Vec::<String>::new());
    }
}

#[tokio::test]
async fn without_a_rule_no_referrer_is_asked_for() {
    let broken = || Repository { refusal: Some(Repository::missing("the API")), ..Repository::default() };
    let (sizes, warnings) = named(broken(), &[]).await;
    assert_eq!((sizes, warnings.len()), (vec![None, None], 0));
    let (sizes, warnings) = named(broken(), &["*"]).await;
    assert_eq!((sizes, warnings.len()), (vec![None, None], 1), "{warnings:?}");
}

#[tokio::test]
async fn of_several_referrers_the_first_by_digest_counts_in_whatever_order_they_come() {
    for reverse in [false, true] {
        let mut repository = Repository::default();
        let made = [144, 176, 208].map(|size| (repository.attest(&kit(), &layers(), size, |_| {}), size));
        if reverse {
            repository.listed.reverse();
        }
        let (_, first) = made.into_iter().min().expect("three");
        let (sizes, _) = named(repository, &["*"]).await;
        assert_eq!(sizes, [Some(first), Some(first)]);
    }
}

#[tokio::test]
async fn referrers_that_are_not_what_they_should_be_are_passed_over_with_a_warning() {
    let mut repository = Repository::default();
    repository.attest(&Digest::of(b"another"), &layers(), 176, |_| {});
    repository.attest(&kit(), &layers(), 208, |manifest| manifest["artifactType"] = json!("application/x"));
    repository.listed.push(Digest::of(b"not there"));
    let (sizes, warnings) = named(repository, &["*"]).await;
    assert_eq!(sizes, [None, None]);
    assert_eq!(warnings.len(), 3);
    for why in ["it is about", "its artifactType is \"application/x\"", "is not in the test"] {
        assert!(warnings.iter().any(|warning| warning.contains(why)), "{why}: {warnings:?}");
    }
}

#[tokio::test]
async fn what_a_rule_led_to_before_stands_in_for_a_registry_that_is_away_and_for_no_answer() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut repository = Repository::default();
    repository.attest(&kit(), &layers(), 144, |_| {});
    assert_eq!(named_in(&dir, repository, &["*"]).await.0, [Some(144), Some(144)]);

    let source_name = "the test".to_owned();
    let away = SourceError::Transport { source_name, what: "no answer".to_owned(), cause: None };
    let away = Repository { refusal: Some(away), ..Repository::default() };
    assert_eq!(named_in(&dir, away, &["*"]).await.0, [Some(144), Some(144)]);

    let forbidden =
        SourceError::Forbidden { host: "the test".to_owned(), what: "the list".to_owned(), tried: String::new() };
    let forbidden = Repository { refusal: Some(forbidden), ..Repository::default() };
    let mut changed = Repository::default();
    changed.attest(&kit(), &layers(), 208, |manifest| manifest["artifactType"] = json!("application/x"));
    for answer in [forbidden, changed] {
        let (sizes, warnings) = named_in(&dir, answer, &["*"]).await;
        assert_eq!((sizes, warnings.len()), (vec![None, None], 1), "{warnings:?}");
    }
}
