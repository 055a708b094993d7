use super::*;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// What the kernel sends by itself.
const USUAL: u64 = 128 * KIB;

/// A file, who reads it, and what is asked for.
struct File {
    streams: Streams,
    size: u64,
    /// Where the last read ended.
    end: u64,
    /// Each piece that was asked for ahead.
    pieces: Vec<Range<u64>>,
    /// Chunks that are here or on their way.
    coming: std::collections::BTreeSet<u64>,
    /// Chunks that were not when they were read.
    missed: u64,
    /// Chunks that came ahead.
    ahead: u64,
}

impl File {
    fn new(size: u64) -> Self {
        let (pieces, coming) = Default::default();
        Self { streams: Streams::default(), size, end: 0, pieces, coming, missed: 0, ahead: 0 }
    }

    fn read(&mut self, offset: u64, len: u64) -> Range<u64> {
        let range = offset..self.size.min(offset + len);
        for chunk in range.start / CHUNK..range.end.div_ceil(CHUNK) {
            if self.coming.insert(chunk) {
                self.missed += 1;
                self.streams.missed(chunk);
                self.streams.asked(chunk..chunk + 1);
            }
        }
        self.end = range.end;
        let ahead = self.streams.read(&range, self.size, WIDEST);
        self.streams.asked(ahead.clone());
        self.ahead += ahead.clone().filter(|chunk| self.coming.insert(*chunk)).count() as u64;
        if !ahead.is_empty() {
            assert!(
                ahead.start >= range.end / CHUNK && ahead.end <= self.size.div_ceil(CHUNK),
                "{ahead:?} after {range:?}"
            );
            assert!(ahead.end <= range.end.div_ceil(CHUNK) + WIDEST, "{ahead:?} after {range:?}");
            self.pieces.push(ahead.clone());
        }
        ahead
    }

    fn read_all(&mut self, range: Range<u64>, step: u64) {
        for offset in range.step_by(step as usize) {
            self.read(offset, step);
        }
    }

    /// The reads of several threads, one of each in turn.
    fn read_in_turn(&mut self, threads: &mut [impl Iterator<Item = u64>], step: u64) {
        while threads.iter_mut().filter_map(Iterator::next).map(|offset| self.read(offset, step)).count() > 0 {}
    }

    fn longest(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.end - piece.start).max().unwrap_or_default()
    }
}

/// Numbers that look random.
fn random(count: u64, below: u64) -> impl Iterator<Item = u64> {
    (1..=count).map(move |at: u64| at.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29) % below)
}

#[test]
fn random_reads_ask_for_nothing_more() {
    for len in [4 * KIB, USUAL, MIB] {
        let mut file = File::new(4 << 30);
        for offset in random(300, 4 << 30) {
            file.read(offset / 4096 * 4096, len);
        }
        assert!(file.ahead <= 3, "{len}: {:?}", file.pieces);
    }
}

#[test]
fn small_reads_all_over_a_file_ask_for_nothing_more_until_most_of_it_is_here() {
    let mut file = File::new(1 << 30);
    for offset in random(2000, 1 << 30) {
        file.read(offset / 4096 * 4096, 4096);
    }
    assert!(file.missed > 700 && file.ahead < file.missed / 10, "{} and {}", file.missed, file.ahead);
}

#[test]
fn a_sequential_reader_waits_once_and_gets_the_rest_once_in_ever_larger_pieces() {
    for step in [4 * KIB, USUAL, MIB] {
        let mut file = File::new(1000 * MIB);
        file.read_all(0..1000 * MIB, step);
        // What was asked for together with a chunk comes with it.
        assert!(file.missed <= 2, "{step}: {}", file.missed);
        assert_eq!(file.missed + file.ahead, 1000, "each once");
        for pair in file.pieces.windows(2) {
            assert_eq!(pair[0].end, pair[1].start);
        }
        assert!((WIDEST / 2..=WIDEST).contains(&file.longest()), "{:?}", file.pieces);
        assert!(file.pieces.len() < 50, "{:?}", file.pieces);
        let soon = file.pieces.iter().find(|piece| piece.end - piece.start >= WIDEST / 2).expect("a wide one");
        assert!(soon.start <= 80, "wide soon: {:?}", file.pieces);
    }
}

#[test]
fn a_window_that_is_narrowed_meanwhile_asks_for_no_more_than_it_and_leaves_nothing_out() {
    let mut file = File::new(1000 * MIB);
    file.read_all(0..100 * MIB, USUAL);
    let mut end = file.pieces.last().expect("some").end;
    for offset in (100 * MIB..300 * MIB).step_by(USUAL as usize) {
        let ahead = file.streams.read(&(offset..offset + USUAL), file.size, 4);
        file.streams.asked(ahead.clone());
        if !ahead.is_empty() {
            assert_eq!(ahead.start, end.max((offset + USUAL).div_ceil(MIB)));
            assert!(ahead.end <= (offset + USUAL).div_ceil(MIB) + 4, "{ahead:?} after {offset}");
            end = ahead.end;
        }
    }
    assert!(end > 300, "it goes on");
}

#[test]
fn many_ranks_are_each_sequential() {
    let mut file = File::new(64 << 30);
    let mut ranks: Vec<_> =
        (0..64).map(|rank| (rank << 30..(rank << 30) + 100 * MIB).step_by(USUAL as usize)).collect();
    file.read_in_turn(&mut ranks, USUAL);
    assert!(file.missed <= 2 * 64, "{}", file.missed);
    assert!(file.longest() >= WIDEST / 2);
}

#[test]
fn threads_that_read_stripes_are_one_stream() {
    for step in [USUAL, MIB] {
        let mut file = File::new(1 << 30);
        let stripes = |thread: u64| {
            let starts = (thread * 2 * MIB..1 << 30).step_by(32 * MIB as usize);
            starts.flat_map(move |start| (start..start + 2 * MIB).step_by(step as usize))
        };
        let mut threads: Vec<_> = (0..16).map(stripes).collect();
        file.read_in_turn(&mut threads, step);
        assert_eq!(file.missed + file.ahead, 1024, "each once");
        assert!(file.missed <= 32, "the first stripe of each: {}", file.missed);
        assert!(file.longest() >= WIDEST / 2, "{:?}", file.pieces);
    }
}

#[test]
fn reads_that_overtake_each_other_are_one_stream() {
    let mut file = File::new(512 * MIB);
    let mut offsets: Vec<u64> = (0..512 * MIB).step_by(USUAL as usize).collect();
    // Each group of sixteen in another order.
    for group in offsets.chunks_mut(16) {
        group.reverse();
        group.rotate_left(5);
    }
    for offset in offsets {
        file.read(offset, USUAL);
    }
    assert_eq!(file.missed + file.ahead, 512);
    assert!(file.missed <= 6, "{}", file.missed);
    assert!(file.longest() >= WIDEST / 2);
}

#[test]
fn a_map_that_is_touched_in_order_and_with_gaps_is_a_stream() {
    let mut file = File::new(512 * MIB);
    // Two thirds of its blocks, in pieces of 640 KiB.
    for offset in (0..512 * MIB).step_by(USUAL as usize).filter(|offset| offset / (5 * USUAL) % 3 != 1) {
        file.read(offset, USUAL);
    }
    assert!(file.missed <= 4, "{}", file.missed);
    assert!(file.longest() >= WIDEST / 4, "{:?}", file.pieces);
}

#[test]
fn a_loader_that_reads_a_header_and_then_runs_through_is_a_stream_at_once() {
    // As `safetensors` reads a file whose header has 90 KB: its length, itself, then the map from the first tensor on.
    let mut file = File::new(512 * MIB);
    for (offset, len) in [(0, 4 * KIB), (0, 96 * KIB), (96 * KIB, 32 * KIB)] {
        file.read(offset, len);
    }
    assert_eq!(file.ahead, 0, "it may have been a look at the header");
    for (read, coming) in [(2 * MIB, 3), (4 * MIB, 14), (16 * MIB, 50)] {
        file.read_all(file.end..read, USUAL);
        assert!(file.coming.len() >= coming, "after {read}: {:?}", file.pieces);
    }
    file.read_all(file.end..512 * MIB, USUAL);
    assert_eq!(file.missed, 2);
}

#[test]
fn backwards_and_strided_reads_ask_for_nothing_more() {
    for step in [4 * KIB, USUAL, MIB] {
        let mut file = File::new(100 * MIB);
        for at in (0..100 * MIB / step).rev() {
            file.read(at * step, step);
        }
        assert_eq!(file.ahead, 0, "{step}");
        let mut file = File::new(400 * MIB);
        file.read_all(0..0, step);
        for offset in (0..400 * MIB).step_by(3 * MIB as usize) {
            file.read(offset, step);
        }
        assert_eq!(file.ahead, 0, "{step}");
    }
}

#[test]
fn what_came_and_went_is_asked_for_again_by_who_reads_on_and_not_by_who_does_not() {
    let mut file = File::new(200 * MIB);
    file.read_all(0..200 * MIB, USUAL);
    let forget = |file: &mut File| {
        file.coming.clear();
        file.pieces.clear();
        (file.missed, file.ahead) = (0, 0);
    };
    forget(&mut file);
    for offset in random(40, 200 * MIB) {
        file.read(offset / 4096 * 4096, 4096);
    }
    assert!(file.ahead <= 8, "{:?}", file.pieces);
    forget(&mut file);
    file.read_all(0..200 * MIB, USUAL);
    assert!(file.missed <= 8 && file.longest() >= WIDEST / 4, "{} and {:?}", file.missed, file.pieces);
}

#[test]
fn what_is_given_up_is_asked_for_again() {
    let mut file = File::new(200 * MIB);
    file.read_all(0..50 * MIB, USUAL);
    let given_up = 60..file.pieces.last().expect("some").end;
    file.streams.given_up(given_up.clone());
    file.pieces.clear();
    file.read_all(50 * MIB..60 * MIB, USUAL);
    assert_eq!(file.pieces[0].start, given_up.start);
}

#[test]
fn bits_are_set_counted_and_found_over_words() {
    let mut bits = Bits::default();
    assert_eq!((bits.count(0..1000), bits.first_unset(0), bits.first_unset(77)), (0, 0, 77));
    bits.set(60..200);
    bits.set(300..300);
    assert_eq!((bits.count(0..1000), bits.count(64..128), bits.count(199..201)), (140, 64, 1));
    assert_eq!((bits.first_unset(0), bits.first_unset(60), bits.first_unset(130)), (0, 200, 200));
    assert!(bits.is_set(60) && bits.is_set(199) && !bits.is_set(200) && !bits.is_set(10_000));
    bits.unset(100..5000);
    assert_eq!((bits.count(0..1000), bits.first_unset(60)), (40, 100));
    bits.set(0..64);
    assert_eq!(bits.first_unset(0), 100);
}
