use std::os::unix::fs::FileExt as _;

use super::*;
use crate::digest::{Digest, Unverified};
use crate::fetch::Limits;
use crate::fetch::chunks::open_files::OpenFiles;
use crate::fetch::memory::Memory;

fn file() -> (tempfile::TempDir, Arc<Cache>, Arc<OpenFiles>, Arc<Chunked>) {
    let dir = tempfile::tempdir().expect("a directory");
    let cache = Arc::new(Cache::open(&dir.path().join("cache")).expect("a cache"));
    let list = ChunkList::new(3, Bytes::copy_from_slice(Digest::of(b"abc").as_bytes())).expect("one chunk");
    let files = Arc::new(OpenFiles::new(&Memory::new(32 << 20)));
    let file = files.get_or_open(&cache, list);
    (dir, cache, files, file)
}

fn claim(file: &Arc<Chunked>) -> (Option<Claim>, Wait) {
    file.claim(0, &watch::Sender::new(0))
}

async fn bytes(file: &Chunked, wait: Wait) -> Result<Vec<u8>, FetchError> {
    let Wait::Coming(coming) = wait else { panic!("it is not here yet") };
    match coming.arrived(&Limits::default()).await? {
        Arrived::InMemory(bytes) => Ok(bytes.bytes().to_vec()),
        Arrived::InFile => {
            let range = file.cached(&(0..file.list().size())).expect("it is in the file");
            let mut bytes = vec![0; range.len() as usize];
            range.file().read_exact_at(&mut bytes, range.offset()).expect("reads");
            Ok(bytes)
        }
    }
}

fn abc() -> Unverified {
    Unverified::new(&b"abc"[..])
}

#[tokio::test]
async fn one_claims_a_chunk_and_all_get_the_same_answer() {
    let (_dir, cache, files, file) = file();
    let (first, mine) = claim(&file);
    let (second, theirs) = claim(&file);
    assert!(second.is_none());
    assert!(first.expect("the claim").accept(abc()).expect("its bytes").finish(), "the file is complete");
    assert_eq!(bytes(&file, mine).await.expect("its bytes"), b"abc");
    assert_eq!(bytes(&file, theirs).await.expect("its bytes"), b"abc");
    let (again, wait) = claim(&file);
    assert!(again.is_none() && matches!(wait, Wait::Here) && file.cached(&(1..3)).is_some());
    let same = files.get_or_open(&cache, file.list().clone());
    assert!(Arc::ptr_eq(&file, &same), "whoever reads this content shares the file");
}

#[tokio::test]
async fn other_bytes_give_the_claim_back_and_nobody_an_answer() {
    let (_dir, _cache, _files, file) = file();
    let (first, wait) = claim(&file);
    let (held, mismatch) = first.expect("the claim").accept(Unverified::new(&b"abd"[..])).expect_err("not its bytes");
    assert_eq!(mismatch.found, Digest::of(b"abd"));
    held.accept(abc()).expect("its bytes").finish();
    assert_eq!(bytes(&file, wait).await.expect("its bytes"), b"abc");
}

#[tokio::test]
async fn a_claim_that_is_dropped_ends_the_wait_and_the_next_claims_anew() {
    let (_dir, _cache, _files, file) = file();
    let (first, wait) = claim(&file);
    drop(first);
    assert!(matches!(bytes(&file, wait).await, Err(FetchError::Lost { .. })));
    let (second, wait) = claim(&file);
    let error = FetchError::Lost { what: "on purpose".to_owned() };
    second.expect("free again").fail(Arc::new(error));
    let told = bytes(&file, wait).await.expect_err("refused");
    assert!(matches!(told.root(), FetchError::Lost { what } if what == "on purpose"));
    assert!(claim(&file).0.is_some());
}

#[test]
fn who_was_told_of_a_failure_does_not_meet_it_again() {
    let (_dir, _cache, _files, file) = file();
    for round in 0..2000 {
        let (held, wait) = claim(&file);
        let Wait::Coming(Coming { mut slot, .. }) = wait else { panic!("round {round}: it is not here") };
        let held = held.expect("nobody holds it");
        std::thread::scope(|scope| {
            scope.spawn(|| held.fail(Arc::new(FetchError::Lost { what: "on purpose".to_owned() })));
            while slot.outcome.borrow_and_update().is_none() {}
            assert!(claim(&file).0.is_some(), "round {round}: the claim of before");
        });
    }
}

#[tokio::test]
async fn what_another_process_wrote_is_found_and_what_is_complete_is_committed() {
    let (_dir, cache, files, file) = file();
    let other = OpenFiles::new(&Memory::new(32 << 20)).get_or_open(&cache, file.list().clone());
    claim(&other).0.expect("the claim").accept(abc()).expect("its bytes").finish();
    let (claim, wait) = claim(&file);
    assert!(claim.expect("not here yet").look().expect("is on the disk"), "it completes the file");
    assert_eq!(bytes(&file, wait).await.expect("its bytes"), b"abc");
    files.commit(&cache, file.clone());
    let (name, size) = (file.list().object(), file.list().size());
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !cache.has_object(&name, size) {
        assert!(std::time::Instant::now() < deadline, "it was not committed");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}
