//! What a registry may do wrong on the wire, and the error that each fault becomes. One fault a test.

mod support;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use kitfs::digest::Digest;
use kitfs::source::{BlobId, Connection, MAX_MANIFEST, Source, SourceError, Timeouts, open};
use support::{Content, Fault, FaultServer, collect};

/// Long enough for a busy machine, short enough to wait for.
const SHORT: Duration = Duration::from_millis(400);
const SIZE: u64 = 300_000;

/// A server with one blob of [`SIZE`] bytes, and a source that gives up soon.
struct Setup {
    server: FaultServer,
    source: Arc<dyn Source>,
    bytes: Vec<u8>,
    blob: BlobId,
}

fn setup() -> Setup {
    let server = FaultServer::empty("team/kit");
    let bytes: Vec<u8> = (0..SIZE).map(|at| (at * 7 % 251) as u8).collect();
    let blob = BlobId { digest: server.add_blob(bytes.clone()), size: SIZE };
    let source = source(&server);
    Setup { server, source, bytes, blob }
}

fn source(server: &FaultServer) -> Arc<dyn Source> {
    let timeouts = Timeouts { connect: SHORT, answer: SHORT, stall: SHORT };
    let connection = Connection { timeouts, ..Connection::default() };
    open(&server.location(), &connection, Path::new("/nonexistent")).expect("a source")
}

impl Setup {
    async fn read(&self, range: std::ops::Range<u64>) -> Result<Vec<u8>, SourceError> {
        collect(self.source.blob(&self.blob, range).await?).await
    }

    /// The error of a read of some bytes under a fault.
    async fn error_with(&self, fault: Fault) -> SourceError {
        self.server.fault(self.blob.digest, fault);
        self.read(1000..201_000).await.expect_err("must fail")
    }
}

#[tokio::test]
async fn a_range_is_one_request_for_exactly_its_bytes() {
    let setup = setup();
    assert_eq!(setup.read(1000..1010).await.expect("bytes"), setup.bytes[1000..1010]);
    assert_eq!(setup.server.ranges_for(setup.blob.digest), [(1000, 1009)]);
    assert_eq!(setup.server.bytes_for(setup.blob.digest), 10);
    assert_eq!(setup.server.requests().len(), 1);
}

#[tokio::test]
async fn a_flipped_bit_reaches_the_caller_as_unverified_bytes_that_do_not_verify() {
    let setup = setup();
    setup.server.fault(setup.blob.digest, Fault::FlipBit { offset: 77 });
    let bytes = setup.read(0..SIZE).await.expect("the source does not hash");
    assert_ne!(Digest::of(&bytes), setup.blob.digest);
}

#[tokio::test]
async fn a_truncated_body_is_a_transport_error_that_says_where_it_ended() {
    let error = setup().error_with(Fault::Truncate { after: 100_000 }).await;
    assert!(matches!(error, SourceError::Transport { .. }), "{error:?}");
    assert!(error.to_string().contains("after 100000 of 200000 bytes"), "{error}");
}

#[tokio::test]
async fn a_reset_is_a_transport_error() {
    let error = setup().error_with(Fault::Reset { after: 100_000 }).await;
    assert!(matches!(error, SourceError::Transport { .. }), "{error:?}");
}

#[tokio::test]
async fn the_bytes_before_a_truncation_are_delivered() {
    let setup = setup();
    setup.server.fault(setup.blob.digest, Fault::Truncate { after: 100_000 });
    let mut stream = setup.source.blob(&setup.blob, 1000..201_000).await.expect("a stream");
    let mut got = Vec::new();
    let error = loop {
        match stream.next().await.expect("an error before the end") {
            Ok(piece) => got.extend_from_slice(piece.peek()),
            Err(error) => break error,
        }
    };
    assert_eq!(got, setup.bytes[1000..101_000], "{error}");
    assert!(stream.next().await.is_none(), "an error ends the stream");
}

#[tokio::test]
async fn a_body_that_is_too_long_breaks_the_protocol() {
    let error = setup().error_with(Fault::Longer { extra: 5 }).await;
    assert!(matches!(error, SourceError::Protocol { .. }), "{error:?}");
    assert!(error.to_string().contains("more than the 200000 bytes"), "{error}");
}

#[tokio::test]
async fn the_whole_blob_for_a_range_is_told_apart_so_that_the_caller_may_ask_for_the_whole() {
    let setup = setup();
    let error = setup.error_with(Fault::IgnoreRange).await;
    assert!(matches!(error, SourceError::RangeIgnored { .. }), "{error:?}");
    assert_eq!(setup.read(0..SIZE).await.expect("the whole blob"), setup.bytes);
}

#[tokio::test]
async fn a_wrong_content_range_breaks_the_protocol() {
    for wrong in ["bytes 1001-201000/300000", "bytes 1000-200998/300000", "bytes 1000-200999/300001", "bytes */9", "x"]
    {
        let error = setup().error_with(Fault::ContentRange(wrong.to_owned())).await;
        assert!(matches!(error, SourceError::Protocol { .. }), "{error:?}");
        assert!(error.to_string().contains("`bytes 1000-200999/300000`"), "{error}");
    }
}

#[tokio::test]
async fn a_compressed_answer_breaks_the_protocol() {
    let error = setup().error_with(Fault::Header("Content-Encoding", "gzip".to_owned())).await;
    assert!(error.to_string().contains("Content-Encoding"), "{error}");
}

#[tokio::test]
async fn a_blob_of_another_size_than_stated_is_refused_before_its_bytes_are_read() {
    let mut setup = setup();
    setup.blob.size = SIZE + 10;
    let whole = setup.read(0..SIZE + 10).await.expect_err("shorter than stated");
    assert!(matches!(whole, SourceError::Protocol { .. }), "{whole:?}");
    let beyond = setup.read(SIZE + 1..SIZE + 5).await.expect_err("outside");
    assert!(beyond.to_string().contains("shorter than the 300010 bytes"), "{beyond}");
    let inside = setup.read(0..10).await.expect_err("another total");
    assert!(matches!(inside, SourceError::Protocol { .. }), "{inside:?}");
}

#[tokio::test]
async fn a_missing_blob_is_not_found_and_named() {
    let setup = setup();
    let error = setup.error_with(Fault::status(404)).await;
    assert!(matches!(error, SourceError::NotFound { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains(&setup.blob.digest.to_string()) && text.contains("team/kit"), "{text}");
    assert!(!error.is_transient());
}

#[tokio::test]
async fn a_403_is_denied_access() {
    let error = setup().error_with(Fault::status(403)).await;
    assert!(matches!(error, SourceError::Forbidden { .. }), "{error:?}");
}

#[tokio::test]
async fn a_busy_server_says_how_long_to_wait_in_seconds_or_by_date() {
    let busy = |status, retry_after: &str| Fault::Status { status, retry_after: Some(retry_after.to_owned()) };
    let error = setup().error_with(busy(429, "7")).await;
    let seven = Some(Duration::from_secs(7));
    assert!(matches!(error, SourceError::Status { status: 429, retry_after, .. } if retry_after == seven), "{error:?}");
    assert!(error.is_transient());
    let past = busy(503, "Sun, 06 Nov 1994 08:49:37 GMT");
    let error = setup().error_with(past).await;
    let now = Some(Duration::ZERO);
    assert!(matches!(error, SourceError::Status { status: 503, retry_after, .. } if retry_after == now), "{error:?}");
}

#[tokio::test]
async fn each_server_error_is_transient_and_the_source_does_not_retry() {
    for status in [408, 500, 502, 503, 504] {
        let setup = setup();
        setup.server.fault_times(1, setup.blob.digest, Fault::status(status));
        let error = setup.read(0..10).await.expect_err("must fail");
        assert!(error.is_transient(), "{error:?}");
        assert_eq!(setup.server.requests_for(setup.blob.digest), 1);
        assert_eq!(setup.read(0..10).await.expect("the next try"), setup.bytes[..10]);
    }
}

#[tokio::test]
async fn a_server_that_says_nothing_is_given_up() {
    let start = Instant::now();
    let error = setup().error_with(Fault::Silence).await;
    assert!(matches!(error, SourceError::Transport { .. }), "{error:?}");
    assert!(error.to_string().contains("did not answer within"), "{error}");
    assert!(start.elapsed() < SHORT * 10);
}

#[tokio::test]
async fn a_body_that_stops_is_given_up() {
    let error = setup().error_with(Fault::Hang { after: 100_000 }).await;
    assert!(matches!(error, SourceError::Transport { .. }), "{error:?}");
    assert!(error.to_string().contains("stalled at byte 100000 of 200000"), "{error}");
}

#[tokio::test]
async fn a_byte_now_and_then_is_no_progress() {
    let start = Instant::now();
    let error = setup().error_with(Fault::Drip { every: SHORT / 20 }).await;
    assert!(error.to_string().contains("stalled"), "{error}");
    assert!(start.elapsed() < SHORT * 10);
}

#[tokio::test]
async fn a_slow_reader_is_not_mistaken_for_a_stalled_server() {
    let setup = setup();
    let mut stream = setup.source.blob(&setup.blob, 0..SIZE).await.expect("a stream");
    let first = stream.next().await.expect("a piece").expect("bytes").len();
    tokio::time::sleep(SHORT * 2).await;
    let rest = collect(stream).await.expect("the rest");
    assert_eq!(first + rest.len(), SIZE as usize);
}

#[tokio::test]
async fn a_slow_server_that_makes_progress_is_waited_for() {
    let setup = setup();
    // The whole takes three times the stall time, each 64 KiB less than it.
    setup.server.set_rate(Some(SIZE * 1000 / (3 * SHORT.as_millis() as u64)));
    assert_eq!(setup.read(0..SIZE).await.expect("all of it"), setup.bytes);
}

#[tokio::test]
async fn a_host_that_is_not_there_is_named() {
    let setup = setup();
    let host = setup.server.host();
    drop(setup.server);
    let error = setup.source.resolve("latest").await.expect_err("nobody listens");
    assert!(matches!(error, SourceError::Transport { .. }), "{error:?}");
    assert!(error.to_string().contains(&format!("{host} can't be reached")), "{error}");
}

#[tokio::test]
async fn an_endless_manifest_is_cut_off_while_it_is_read() {
    let setup = setup();
    let huge = Digest::of(b"a manifest of a gigabyte");
    setup.server.add_content(huge, Content::generated(1 << 30, |_, bytes| bytes.fill(b' ')));
    // Without a length, only counting can tell.
    setup.server.fault(huge, Fault::Longer { extra: 1 });
    let error = setup.source.manifest(&huge).await.expect_err("too long");
    assert!(matches!(error, SourceError::Protocol { .. }), "{error:?}");
    assert!(setup.server.bytes_for(huge) < 4 * MAX_MANIFEST, "{} bytes sent", setup.server.bytes_for(huge));
}

#[tokio::test]
async fn a_tag_without_a_digest_header_is_hashed() {
    let setup = setup();
    let manifest = setup.server.add_manifest("v1", r#"{"schemaVersion":2}"#);
    assert_eq!(setup.source.resolve("v1").await.expect("a digest"), manifest);
    assert_eq!(setup.server.requests_for("v1"), 1, "HEAD alone");
    let other = br#"{"schemaVersion":2,"other":true}"#.to_vec();
    setup.server.fault("v1", Fault::Replace(other.clone()));
    assert_eq!(setup.source.resolve("v1").await.expect("a digest"), Digest::of(&other));
}

#[tokio::test]
async fn a_server_that_knows_no_head_is_asked_with_get() {
    let setup = setup();
    let manifest = setup.server.add_manifest("v1", r#"{"schemaVersion":2}"#);
    setup.server.fault_times(1, "v1", Fault::status(405));
    assert_eq!(setup.source.resolve("v1").await.expect("a digest"), manifest);
}

#[tokio::test]
async fn other_bytes_than_those_of_the_digest_do_not_verify() {
    let setup = setup();
    let manifest = setup.server.add_manifest("v1", r#"{"schemaVersion":2}"#);
    setup.server.fault(manifest, Fault::Replace(b"{}".to_vec()));
    let bytes = setup.source.manifest(&manifest).await.expect("unverified bytes");
    assert!(bytes.verify(&manifest).is_err());
}

#[tokio::test]
async fn tags_are_listed_page_by_page() {
    let setup = setup();
    let digest = setup.server.add_blob(r#"{"schemaVersion":2}"#);
    let all: Vec<String> = (0..25).map(|number| format!("v{number:02}")).collect();
    for tag in &all {
        setup.server.tag(tag, digest);
    }
    setup.server.set_page(10);
    assert_eq!(setup.source.tags().await.expect("tags"), all);
    let asked: Vec<_> = setup.server.requests_to("list").into_iter().map(|request| request.path).collect();
    assert_eq!(asked.len(), 3);
    assert!(asked[1].contains("last=v09") && asked[2].contains("last=v19"), "{asked:?}");
}

#[tokio::test]
async fn a_page_is_asked_for_as_the_registry_links_to_it() {
    let setup = setup();
    setup.server.tag("b", setup.server.add_blob("{}"));
    let first = Fault::Replace(br#"{"tags":["a"]}"#.to_vec());
    setup.server.fault_times(1, "list", first);
    let link = "<https://elsewhere/v2/team/kit/tags/list?next_page=gAAA%3D>; rel=\"next\"";
    setup.server.fault_times(1, "list", Fault::Header("Link", link.to_owned()));
    assert_eq!(setup.source.tags().await.expect("tags"), ["a", "b"]);
    let asked: Vec<_> = setup.server.requests_to("list").into_iter().map(|request| request.path).collect();
    assert_eq!(asked[1..], ["/v2/team/kit/tags/list?next_page=gAAA%3D"]);
}

#[tokio::test]
async fn a_tag_list_that_repeats_itself_ends() {
    let setup = setup();
    setup.server.fault("list", Fault::Replace(br#"{"tags":["a","b"]}"#.to_vec()));
    setup.server.fault("list", Fault::Header("Link", "<again>; rel=next".to_owned()));
    let tags = tokio::time::timeout(SHORT * 10, setup.source.tags()).await.expect("an end");
    assert_eq!(tags.expect("tags"), ["a", "b"]);
    assert_eq!(setup.server.requests_for("list"), 2);
}

#[tokio::test]
async fn a_tag_that_could_reach_another_path_is_never_sent() {
    let setup = setup();
    for tag in ["../../other/manifests/v1", "v1?x=y", "", "a b"] {
        let error = setup.source.resolve(tag).await.expect_err("no such tag");
        assert!(matches!(error, SourceError::NotFound { .. }), "{error:?}");
    }
    assert_eq!(setup.server.requests().len(), 0);
}

#[tokio::test]
async fn a_stream_that_is_dropped_gives_its_connection_up_and_harms_no_other() {
    let setup = setup();
    let gate = setup.server.hold(setup.blob.digest, 64 << 10);
    let stream = setup.source.blob(&setup.blob, 0..SIZE).await.expect("a stream");
    gate.wait_until_reached_by(1);
    drop(stream);
    gate.release();
    assert_eq!(setup.read(0..SIZE).await.expect("the next read"), setup.bytes);
}

#[tokio::test]
async fn sixteen_reads_at_once_are_served_over_kept_connections() {
    let setup = setup();
    for _ in 0..2 {
        let reads = (0..16).map(|part| setup.read(part * 1000..part * 1000 + 500));
        for (part, bytes) in futures_util::future::join_all(reads).await.into_iter().enumerate() {
            assert_eq!(bytes.expect("bytes"), setup.bytes[part * 1000..part * 1000 + 500]);
        }
    }
    assert_eq!(setup.server.requests().len(), 32);
    assert!(setup.server.connections() <= 16, "{} connections", setup.server.connections());
}

#[tokio::test]
async fn a_huge_blob_is_read_where_it_is_asked_and_nowhere_else() {
    let server = FaultServer::empty("team/kit");
    let size = 40 << 30;
    let digest = Digest::of(b"a name for forty gigabytes");
    server.add_content(digest, Content::generated(size, |offset, bytes| bytes.fill((offset >> 30) as u8)));
    let blob = BlobId { digest, size };
    let range = (20 << 30) + 5..(20 << 30) + 105;
    let bytes = collect(source(&server).blob(&blob, range).await.expect("a stream")).await.expect("bytes");
    assert_eq!(bytes, [20; 100]);
    assert_eq!(server.bytes(), 100);
}
