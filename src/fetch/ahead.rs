//! What to fetch before it is asked for: sequential streams on one file, shared by all who read it.
//!
//! A read that goes on where an earlier one ended belongs to its stream; any other begins one. The window of a stream
//! doubles with each chunk that it goes on, so that random reads fetch nothing but their chunks.

use std::ops::Range;

/// The widest window in chunks: two requests of the longest kind.
pub const WIDEST: u64 = 32;
/// Streams that are remembered: as many as ranks or threads that read one file; a random read takes the place of the
/// stream that has been quiet for longest.
const STREAMS: usize = 32;

/// The streams of one file, the one read last at the end. All numbers count chunks.
#[derive(Debug, Default)]
pub struct Streams(Vec<Stream>);

#[derive(Debug)]
struct Stream {
    /// Where the last read ended.
    next: u64,
    /// What has been asked for ends here.
    asked: u64,
    window: u64,
}

impl Streams {
    /// Notes a read of these chunks of a file of `count`; tells which ones behind it should be asked for now, at most
    /// `widest`.
    pub fn read(&mut self, chunks: &Range<u64>, count: u64, widest: u64) -> Range<u64> {
        // Several reads may lie in one chunk, and those of one reader may overtake each other.
        let goes_on = |stream: &Stream| (chunks.start..=chunks.end).contains(&stream.next);
        let mut stream = match self.0.iter().rposition(goes_on) {
            Some(at) => self.0.remove(at),
            None => {
                if self.0.len() == STREAMS {
                    self.0.remove(0);
                }
                Stream { next: chunks.end, asked: chunks.end, window: 0 }
            }
        };
        let advanced = chunks.end.saturating_sub(stream.next);
        stream.next = stream.next.max(chunks.end);
        stream.asked = stream.asked.max(stream.next);
        for _ in 0..advanced.min(WIDEST) {
            stream.window = (stream.window * 2).clamp(1, WIDEST);
        }
        let window = stream.window.min(widest);
        let end = count.min(stream.next + window);
        // In halves of the window, so that there are few requests and always one under way.
        let is_due = stream.asked - stream.next <= window / 2;
        let ahead = stream.asked..if is_due { end } else { stream.asked };
        stream.asked = stream.asked.max(ahead.end);
        self.0.push(stream);
        ahead
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What reads of one chunk after the other ask for, one after the other.
    fn asked(streams: &mut Streams, chunks: Range<u64>, count: u64) -> Vec<Range<u64>> {
        let asked = chunks.map(|chunk| streams.read(&(chunk..chunk + 1), count, WIDEST));
        asked.filter(|ahead| !ahead.is_empty()).collect()
    }

    #[test]
    fn random_reads_ask_for_nothing_more() {
        let mut streams = Streams::default();
        for chunk in [500, 3, 77, 200, 9, 600, 502] {
            assert!(streams.read(&(chunk..chunk + 1), 1000, WIDEST).is_empty(), "{chunk}");
            assert!(streams.read(&(chunk..chunk + 1), 1000, WIDEST).is_empty(), "{chunk}, again");
        }
    }

    #[test]
    fn a_sequential_reader_gets_everything_asked_for_once_in_ever_larger_pieces() {
        let mut streams = Streams::default();
        let asked = asked(&mut streams, 0..300, 300);
        assert_eq!(asked[0].start, 2, "the second chunk shows that it is sequential");
        for pair in asked.windows(2) {
            assert_eq!(pair[0].end, pair[1].start);
        }
        assert_eq!(asked.last().expect("some").end, 300, "not beyond the end");
        let longest = asked.iter().map(|ahead| ahead.end - ahead.start).max();
        assert!(longest.is_some_and(|longest| (WIDEST / 2..=WIDEST).contains(&longest)), "{asked:?}");
        assert!(asked.len() < 30, "{asked:?}");
    }

    #[test]
    fn a_window_that_is_narrowed_meanwhile_asks_for_no_more_than_it_and_leaves_nothing_out() {
        let mut streams = Streams::default();
        let wide = asked(&mut streams, 0..40, 1000).pop().expect("some").end;
        let narrow: Vec<_> = (40..200).map(|chunk| streams.read(&(chunk..chunk + 1), 1000, 4)).collect();
        let mut end = wide;
        for (chunk, ahead) in (40..).zip(&narrow).filter(|(_, ahead)| !ahead.is_empty()) {
            assert_eq!(ahead.start, end.max(chunk + 1));
            assert!(ahead.end <= chunk + 1 + 4, "{ahead:?} after {chunk}");
            end = ahead.end;
        }
        assert!(end > 200, "it goes on");
    }

    #[test]
    fn many_readers_of_one_file_are_each_sequential() {
        let mut streams = Streams::default();
        for step in 0..20 {
            for reader in 0..16 {
                let chunk = reader * 1000 + step;
                let ahead = streams.read(&(chunk..chunk + 1), 16_000, WIDEST);
                assert!(ahead.is_empty() || ahead.start > chunk && ahead.end <= chunk + 1 + WIDEST, "{ahead:?}");
                if step == 1 {
                    assert!(!ahead.is_empty(), "reader {reader}");
                }
            }
        }
    }

    #[test]
    fn small_steps_within_a_chunk_and_reads_over_two_are_one_stream() {
        let mut streams = Streams::default();
        let reads = [0..1, 0..1, 0..2, 1..2, 1..2, 1..3, 2..3];
        let ahead: Vec<_> = reads.iter().map(|chunks| streams.read(chunks, 100, WIDEST)).collect();
        assert_eq!(streams.0.len(), 1);
        assert_eq!(ahead.iter().filter(|ahead| !ahead.is_empty()).count(), 2, "{ahead:?}");
    }
}
