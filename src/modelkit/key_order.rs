//! The order in which go-yaml writes the keys of a map.
//!
//! Like a person would: numbers inside of keys by their value, punctuation before letters. The order is go-yaml's and
//! not provably a total one, so nothing here relies on that.

use std::cmp::Ordering;

/// Sorts the keys of a map as go-yaml does: numbers in them by value, punctuation before letters.
pub(super) fn sort_keys<T>(pairs: Vec<(String, T)>) -> Vec<(String, T)> {
    // A merge sort of its own: the order is go-yaml's and not provably a total one, where the library's may panic.
    if pairs.len() < 2 {
        return pairs;
    }
    let mut left = pairs;
    let right = sort_keys(left.split_off(left.len() / 2));
    let left = sort_keys(left);
    let mut sorted = Vec::with_capacity(left.len() + right.len());
    let (mut left, mut right) = (left.into_iter().peekable(), right.into_iter().peekable());
    while let (Some((a, _)), Some((b, _))) = (left.peek(), right.peek()) {
        sorted.extend(if key_less(b, a) { right.next() } else { left.next() });
    }
    sorted.extend(left);
    sorted.extend(right);
    sorted
}

/// go-yaml's order of two keys.
fn key_less(a: &str, b: &str) -> bool {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let Some(at) = a.iter().zip(&b).position(|(a, b)| a != b) else {
        return a.len() < b.len();
    };
    match (a[at].is_alphabetic(), b[at].is_alphabetic()) {
        (true, true) => return a[at] < b[at],
        // After a digit a letter goes first (`a1b` < `a1-`), elsewhere punctuation does.
        (a_is_letter, b_is_letter) if a_is_letter || b_is_letter => {
            let after_digit = at > 0 && is_digit(&a[at - 1]);
            return if after_digit { a_is_letter } else { b_is_letter };
        }
        _ => {}
    }
    // Within a number whose leading part is equal and not zero, a further 0 counts.
    let inside_number =
        (a[at] == '0' || b[at] == '0') && a[..at].iter().rev().take_while(|c| is_digit(c)).any(|c| *c != '0');
    let number = |key: &[char]| {
        let digits = key[at..].iter().take_while(|c| is_digit(c));
        digits.fold((i64::from(inside_number), 0), |(value, length), c| {
            let digit = i64::from(u32::from(*c)) - i64::from(u32::from('0'));
            (value.wrapping_mul(10).wrapping_add(digit), length + 1)
        })
    };
    match number(&a).cmp(&number(&b)) {
        Ordering::Equal => a[at] < b[at],
        order => order == Ordering::Less,
    }
}

/// Go's category Nd, decimal digits; the standard library only knows them together with fractions and superscripts.
/// (For Go's letters its `is_alphabetic` serves: it adds a few marks.)
fn is_digit(c: &char) -> bool {
    let code = u32::from(*c);
    let after = DIGIT_ZEROS.partition_point(|zero| *zero <= code);
    after > 0 && code - DIGIT_ZEROS[after - 1] < 10
}

/// The zeros of all decimal digits of Unicode 15: nine more digits follow each.
#[rustfmt::skip]
const DIGIT_ZEROS: [u32; 68] = [
    0x30, 0x660, 0x6f0, 0x7c0, 0x966, 0x9e6, 0xa66, 0xae6, 0xb66, 0xbe6, 0xc66, 0xce6, 0xd66, 0xde6,
    0xe50, 0xed0, 0xf20, 0x1040, 0x1090, 0x17e0, 0x1810, 0x1946, 0x19d0, 0x1a80, 0x1a90, 0x1b50, 0x1bb0, 0x1c40,
    0x1c50, 0xa620, 0xa8d0, 0xa900, 0xa9d0, 0xa9f0, 0xaa50, 0xabf0, 0xff10, 0x104a0, 0x10d30, 0x11066, 0x110f0, 0x11136,
    0x111d0, 0x112f0, 0x11450, 0x114d0, 0x11650, 0x116c0, 0x11730, 0x118e0, 0x11950, 0x11c50, 0x11d50, 0x11da0, 0x11f50, 0x16a60,
    0x16ac0, 0x16b50, 0x1d7ce, 0x1d7d8, 0x1d7e2, 0x1d7ec, 0x1d7f6, 0x1e140, 0x1e2f0, 0x1e4f0, 0x1e950, 0x1fbf0,
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sorted(keys: &[&str]) -> Vec<String> {
        sort_keys(keys.iter().map(|key| ((*key).to_owned(), ())).collect()).into_iter().map(|(key, ())| key).collect()
    }

    #[test]
    fn numbers_in_keys_go_by_value() {
        assert_eq!(sorted(&["k10", "k2", "k1", "10", "2"]), ["2", "10", "k1", "k2", "k10"]);
        assert_eq!(sorted(&["a1.10", "a1.9", "a01", "a1"]), ["a1", "a1.9", "a1.10", "a01"]);
        assert_eq!(sorted(&["v100", "v10x", "v1000"]), ["v10x", "v100", "v1000"]);
        assert_eq!(sorted(&["\u{664}", "\u{663}"]), ["\u{663}", "\u{664}"]);
    }

    #[test]
    fn punctuation_goes_before_letters_but_for_letters_after_a_digit() {
        assert_eq!(sorted(&["ab", "a_b", "a b", "B", ""]), ["", "B", "a b", "a_b", "ab"]);
        assert_eq!(sorted(&["a1-", "a1b"]), ["a1b", "a1-"]);
    }

    proptest! {
        #[test]
        fn sorting_keeps_every_key_and_never_panics(keys in proptest::collection::vec("[a-b0-2_. \u{b2}\u{663}]{0,5}", 0..40)) {
            let mut expected = keys.clone();
            let mut found: Vec<_> =
                sort_keys(keys.into_iter().map(|key| (key, ())).collect()).into_iter().map(|(key, ())| key).collect();
            expected.sort();
            found.sort();
            prop_assert_eq!(found, expected);
        }
    }
}
