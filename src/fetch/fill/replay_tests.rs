use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::archive::index::Index;
use crate::archive::inflate::{self, Inflater};
use crate::archive::testing::{Tar, content_of};
use crate::archive::testing_trees::{pack, tree};
use crate::cache::{Cache, StagedNumber, Staging};
use crate::digest::Digest;
use crate::fetch::fill::cut::{CutError, Cutter};
use crate::fetch::fill::stage::{Batch, Files, Stager};
use crate::modelkit::testing;
use crate::object::ObjectDigest;

fn layer(bytes: &[u8], format: Format, compression: Compression) -> Layer {
    let (digest, size) = (Digest::of(bytes), bytes.len() as u64);
    Layer { digest, size, format, compression, ..testing::layer("layer") }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("compresses");
    encoder.finish().expect("compresses")
}

/// What the threads of a pass do, one after the other.
struct Line {
    inflater: Option<Inflater>,
    cutter: Cutter,
    stager: Option<Stager>,
}

impl Line {
    /// Stages in a directory, where one is given.
    fn new(cache: &Arc<Cache>, layer: &Layer, staging: Option<Staging>, resumed: u64) -> Self {
        let is_plain = layer.compression == Compression::None;
        let bound = inflate::max_inflated(layer.size);
        let files =
            |staging| Files { cache: cache.clone(), staging, view: None, resumed, wants_index: true, no_room: None };
        Self {
            inflater: (!is_plain).then(|| Inflater::new(layer.compression, bound).expect("inflates")),
            cutter: Cutter::new(layer.clone()),
            stager: staging.map(|staging| Stager::new(files(staging), is_plain)),
        }
    }

    fn feed(&mut self, bytes: &[u8]) {
        let bytes = Bytes::copy_from_slice(bytes);
        let Self { inflater, cutter, stager } = self;
        let stage = |stager: &mut Option<Stager>, batch| stager.as_mut().map_or(Ok(()), |stager| stager.take(batch));
        match inflater {
            None => stage(stager, cutter.feed(&bytes).expect("cuts")).expect("stages"),
            Some(inflater) => {
                stage(stager, Batch::blob(bytes.clone())).expect("stages");
                let cut = &mut |piece: &[u8]| {
                    let batch = cutter.feed(&Bytes::copy_from_slice(piece))?;
                    stage(stager, batch)?;
                    Ok::<_, CutError>(())
                };
                inflater.feed(&bytes, cut).expect("cuts");
            }
        }
    }

    fn feed_in_pieces(&mut self, bytes: &[u8], cuts: &[usize], range: Range<usize>) {
        let mut ends: Vec<usize> = cuts.iter().copied().filter(|cut| range.contains(cut)).chain([range.end]).collect();
        ends.sort_unstable();
        let mut from = range.start;
        for end in ends {
            self.feed(&bytes[from..end]);
            from = end;
        }
    }

    /// Gives up.
    fn stop(self) -> Staging {
        self.stager.expect("it stages").finish().0.staging
    }

    fn finish(mut self) -> Result<Finished, CutError> {
        self.inflater.map(Inflater::finish).transpose()?;
        let (last, cut) = self.cutter.finish()?;
        if let Some(stager) = &mut self.stager {
            stager.take(last)?;
        }
        let staged = self.stager.map(|stager| {
            let (files, numbers) = stager.finish();
            assert!(files.no_room.is_none() && numbers.len() == cut.objects.len(), "not all is staged");
            (files.staging, numbers.into_iter().zip(cut.objects).collect())
        });
        Ok(Finished { index: cut.index, staged })
    }
}

#[derive(Debug)]
struct Finished {
    index: Index,
    staged: Option<(Staging, Vec<(StagedNumber, ObjectDigest)>)>,
}

/// How a fill is interrupted.
#[derive(Debug, Clone)]
struct Interruption {
    /// After so many bytes of the layer.
    stop: usize,
    /// Of what lies beside the files, so many bytes at the end were not written.
    lost: u64,
    /// At most so many bytes of the layer count.
    most: u64,
}

/// Interrupts a fill, looks at what is left, and goes on from there. Tells where that was.
fn resume(layer: &Layer, bytes: &[u8], cuts: &[usize], at: &Interruption) -> u64 {
    let dir = tempfile::tempdir().expect("a directory");
    let cache = Arc::new(Cache::open(&dir.path().join("cache")).expect("a cache"));
    let mut staging = cache.stage(&layer.digest).expect("stages").expect("is free");
    staging.begin(beside(layer)).expect("begins");
    let mut first = Line::new(&cache, layer, Some(staging), 0);
    first.feed_in_pieces(bytes, cuts, 0..at.stop);
    let mut staging = first.stop();
    for name in ["between", "blob"] {
        let path = cache.root().join("incoming").join(layer.digest.hex()).join(name);
        if let Ok(file) = fs::OpenOptions::new().write(true).open(path) {
            let len = file.metadata().expect("stat").len();
            file.set_len(len.saturating_sub(at.lost)).expect("cuts");
        }
    }

    let left = staging.left(beside(layer)).expect("reads").expect("something is left");
    let replay = Replay::up_to(layer, left, at.most).expect("is sound");
    let standing = replay.reached();
    let offset = standing.offset as usize;
    match offset {
        0 => staging.begin(beside(layer)).expect("begins anew"),
        _ => staging.go_on(beside(layer), &standing).expect("goes on"),
    }
    let mut found = Vec::new();
    if offset > 0 {
        let take = |piece| {
            found.extend(piece);
            true
        };
        replay.read(take).expect("reads");
    }
    assert!(found == bytes[..offset], "{} bytes, not the first {offset} of the layer", found.len());

    let mut second = Line::new(&cache, layer, Some(staging), standing.offset);
    second.feed_in_pieces(bytes, cuts, 0..offset);
    second.feed_in_pieces(bytes, cuts, offset..bytes.len());
    let mut plain = Line::new(&cache, layer, None, 0);
    plain.feed(bytes);
    match (second.finish(), plain.finish()) {
        (Ok(cut), Ok(plain)) => {
            assert_eq!(cut.index.as_bytes(), plain.index.as_bytes());
            let (staging, files) = cut.staged.expect("it stages");
            assert_eq!(files.len(), plain.index.head().rows().filter(|row| row.object().is_some()).count());
            for (number, object) in files {
                let content = fs::read(staging.path_of(number)).expect("is staged");
                assert_eq!(content_of(&content).object, object);
            }
        }
        // Some trees contradict themselves.
        (Err(error), Err(plain)) => assert_eq!(error.to_string(), plain.to_string()),
        (cut, plain) => panic!("{cut:?} and {plain:?}"),
    }
    standing.offset
}

fn interruption() -> impl Strategy<Value = (prop::sample::Index, u64, Option<prop::sample::Index>)> {
    (any::<prop::sample::Index>(), prop_oneof![2 => Just(0), 1 => 0..3000_u64], any::<Option<prop::sample::Index>>())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn whatever_was_staged_gives_the_layers_first_bytes_and_the_rest_makes_it_whole(
        tree in tree(),
        cuts in prop::collection::vec(0..20_000_usize, 0..12),
        (stop, lost, most) in interruption(),
        is_gzip in any::<bool>(),
    ) {
        let (bytes, compression) = match (pack(&tree), is_gzip) {
            (tar, true) => (gzip(&tar), Compression::Gzip),
            (tar, false) => (tar, Compression::None),
        };
        let layer = layer(&bytes, Format::Tar, compression);
        let stop = stop.index(bytes.len() + 1);
        let most = most.map_or(u64::MAX, |most| most.index(bytes.len() + 1) as u64);
        let offset = resume(&layer, &bytes, &cuts, &Interruption { stop, lost, most });
        prop_assert!(offset <= most.min(stop as u64));
        if lost == 0 {
            prop_assert_eq!(offset, most.min(stop as u64));
        }
    }

    #[test]
    fn a_raw_layer_is_gone_on_with_too(
        bytes in prop::collection::vec(any::<u8>(), 1..5000),
        (stop, _, most) in interruption(),
    ) {
        let layer = layer(&bytes, Format::Raw { mode: 0o644, mtime: 0, stated_size: None }, Compression::None);
        let stop = stop.index(bytes.len() + 1);
        let most = most.map_or(u64::MAX, |most| most.index(bytes.len() + 1) as u64);
        let offset = resume(&layer, &bytes, &[], &Interruption { stop, lost: 0, most });
        prop_assert_eq!(offset, most.min(stop as u64));
    }
}

#[test]
fn it_ends_where_a_file_is_short_or_lost_and_is_refused_where_one_is_too_long() {
    let files: BTreeMap<String, Vec<u8>> = (b'a'..=b'e').map(|n| ((n as char).to_string(), vec![n; 1000])).collect();
    let tar = files.iter().fold(Tar::new(), |tar, (name, content)| tar.file(name, content)).end();
    let layer = layer(&tar, Format::Tar, Compression::None);
    let survey = |change: &dyn Fn(&std::path::Path)| {
        let dir = tempfile::tempdir().expect("a directory");
        let cache = Arc::new(Cache::open(&dir.path().join("cache")).expect("a cache"));
        let mut staging = cache.stage(&layer.digest).expect("stages").expect("is free");
        staging.begin(Beside::Between).expect("begins");
        let mut line = Line::new(&cache, &layer, Some(staging), 0);
        line.feed(&tar);
        let staging = line.stop();
        change(&cache.root().join("incoming").join(layer.digest.hex()));
        let left = staging.left(Beside::Between).expect("reads").expect("something is left");
        Ok::<_, Unusable>(Replay::up_to(&layer, left, u64::MAX)?.reached())
    };
    let whole = survey(&|_| {}).expect("is sound");
    assert_eq!((whole.offset, whole.files), (tar.len() as u64, 5));
    let short = survey(&|dir| {
        fs::write(dir.join("new"), [b'b'; 10]).expect("writes");
        fs::rename(dir.join("new"), dir.join("1")).expect("renames");
    });
    assert_eq!(
        short.expect("is sound"),
        Reached { offset: 1536 + 512 + 10, beside: 512 + 24 + 512, files: 2, last: 10 }
    );
    let lost = survey(&|dir| fs::remove_file(dir.join("2")).expect("removes")).expect("is sound");
    assert_eq!((lost.files, lost.last), (3, 0));
    let long = survey(&|dir| {
        fs::write(dir.join("new"), [b'b'; 1001]).expect("writes");
        fs::rename(dir.join("new"), dir.join("3")).expect("renames");
    });
    assert!(matches!(long, Err(Unusable::TooLong { number: 3, found: 1001, size: 1000 })));
    let damaged = survey(&|dir| {
        let mut between = fs::read(dir.join("between")).expect("reads");
        between[600] ^= 1;
        fs::write(dir.join("between"), between).expect("writes");
    });
    assert!(matches!(damaged, Err(Unusable::Tar(_))), "{damaged:?}");
}
