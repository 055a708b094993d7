//! Any bytes as a tar: both ways to walk it end, agree, and stay within the layer and the caps.
#![no_main]

use kitfs::archive::listing::Listing;
use kitfs::archive::stream::{Event, StreamWalker};
use kitfs::archive::walker::{Caps, Step, TarError, Walker};
use kitfs::archive::{Entry, EntryKind};
use libfuzzer_sys::fuzz_target;

fn hop(layer: &[u8]) -> Result<Vec<Entry>, TarError> {
    let mut walker = Walker::new(Some(layer.len() as u64), Caps::default());
    let (mut entries, mut start, mut window, mut asked) = (Vec::new(), 0, &layer[..0], None);
    loop {
        match walker.step(start, window)? {
            Step::Need { offset, len } => {
                assert!(asked < Some((offset, len)), "asks for the same again");
                asked = Some((offset, len));
                start = offset;
                window = &layer[offset as usize..][..len as usize];
            }
            Step::Entry(entry) => entries.push(entry),
            Step::End { .. } => return Ok(entries),
        }
    }
}

fn stream(layer: &[u8], piece: usize) -> Result<Vec<Entry>, TarError> {
    let mut walker = StreamWalker::new(None, Caps::default());
    let (mut entries, mut content): (Vec<Entry>, u64) = (Vec::new(), 0);
    for piece in layer.chunks(piece) {
        let mut rest = piece;
        while let Some(event) = walker.next(&mut rest)? {
            match event {
                Event::Entry(entry) => {
                    content = 0;
                    entries.push(entry);
                }
                Event::Content(bytes) => content += bytes.len() as u64,
                Event::EntryEnd => {
                    let entry = entries.last().expect("an entry before its end");
                    assert!(entry.kind == EntryKind::File && entry.size == content);
                }
            }
        }
    }
    walker.finish()?;
    Ok(entries)
}

/// Makes the checksums right, without which hardly any change would be looked at.
fn mend(layer: &mut [u8]) {
    for block in layer.chunks_exact_mut(512).filter(|block| block[257..262] == *b"ustar") {
        let sum: u32 = block[..148].iter().chain(&block[156..]).map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{:06o}\0 ", sum + 8 * 32).as_bytes());
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((first, layer)) = data.split_first() else { return };
    let mut layer = layer.to_vec();
    if first & 1 == 1 {
        mend(&mut layer);
    }
    let hopped = hop(&layer);
    let streamed = stream(&layer, usize::from(*first) * 8 + 1);
    assert_eq!(hopped.is_ok(), streamed.is_ok(), "{hopped:?} {streamed:?}");
    if let (Ok(hopped), Ok(streamed)) = (hopped, streamed) {
        assert_eq!(hopped, streamed);
        let _ = Listing::build(hopped);
    }
});
