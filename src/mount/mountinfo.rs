//! The kernel's table of mounts, `/proc/self/mountinfo`.
//!
//! This is how kitfs learns about mounts: reading the table asks no file system anything, while a `stat` of a mount
//! would ask its daemon, which may be dead, stuck, or this very thread.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use super::MountError;

const TABLE: &str = "/proc/self/mountinfo";
/// The type of our mounts: `fuse`, and whose.
pub const TYPE: &str = "fuse.kitfs";

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The kernel's number for the mount. Reused after an unmount, so compare the whole entry.
    pub id: u64,
    /// The mount that this one is mounted on.
    pub parent: u64,
    /// Major and minor number of the device that `stat` would show.
    pub device: (u32, u32),
    /// Where it is mounted.
    pub dir: PathBuf,
    /// The type of the file system.
    pub kind: String,
    /// What is mounted: for us, the reference with its digest.
    pub shows: String,
}

impl Entry {
    /// Whether kitfs mounted it.
    pub fn is_kitfs(&self) -> bool {
        self.kind == TYPE
    }
}

/// All mounts that this process sees.
pub fn read() -> Result<Vec<Entry>, MountError> {
    let table = std::fs::read(TABLE).map_err(|cause| MountError::disk("read", TABLE, cause))?;
    Ok(parse(&table))
}

/// The mount that a path lookup of `dir` ends in, if `dir` is a mount point.
pub fn top_at(dir: &Path) -> Result<Option<Entry>, MountError> {
    Ok(top(&read()?, dir).cloned())
}

/// Mounts can be stacked on one directory: the top one is nobody's parent there.
fn top<'a>(table: &'a [Entry], dir: &Path) -> Option<&'a Entry> {
    let here: Vec<&Entry> = table.iter().filter(|entry| entry.dir == dir).collect();
    here.iter().rev().find(|entry| !here.iter().any(|other| other.parent == entry.id && other.id != entry.id)).copied()
}

/// Parses the table. A line of a form that the kernel doesn't write is left out.
fn parse(table: &[u8]) -> Vec<Entry> {
    table.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

// 36 35 98:0 /root/in/fs /mount/point rw,noatime [optional fields] - type source superblock,options
fn parse_line(line: &[u8]) -> Option<Entry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let number = |field: &[u8]| std::str::from_utf8(field).ok()?.parse::<u64>().ok();
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let (major, minor) = std::str::from_utf8(fields.next()?).ok()?.split_once(':')?;
    let device = (major.parse().ok()?, minor.parse().ok()?);
    let dir = PathBuf::from(OsString::from_vec(unescape(fields.nth(1)?)));
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let kind = String::from_utf8_lossy(fields.next()?).into_owned();
    let shows = String::from_utf8_lossy(&unescape(fields.next()?)).into_owned();
    Some(Entry { id, parent, device, dir, kind, shows })
}

/// The kernel writes space, tab, newline, backslash and `#` as `\` and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        rest = match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) => {
                out.push(((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'));
                after
            }
            (byte, after) => {
                out.push(*byte);
                after
            }
        };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &[u8] = b"\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,discard\n\
90 22 0:45 / /mnt/a\\040b\\134c ro,nosuid,nodev,relatime shared:7 master:2 - fuse.kitfs \
reg.example/a:1@sha256:00 ro,user_id=0\n\
91 22 0:46 / /mnt/x ro - fuse.kitfs first ro\n\
92 91 0:47 / /mnt/x rw - tmpfs tmpfs rw\n\
torn line\n";

    #[test]
    fn a_line_is_read_with_its_escapes_and_any_number_of_optional_fields() {
        let table = parse(SAMPLE);
        assert_eq!(table.len(), 4);
        assert_eq!(
            table[1],
            Entry {
                id: 90,
                parent: 22,
                device: (0, 45),
                dir: PathBuf::from("/mnt/a b\\c"),
                kind: "fuse.kitfs".to_owned(),
                shows: "reg.example/a:1@sha256:00".to_owned(),
            }
        );
    }

    #[test]
    fn of_stacked_mounts_the_top_one_is_found() {
        let mut table = parse(SAMPLE);
        assert_eq!(top(&table, Path::new("/mnt/x")).map(|entry| entry.id), Some(92));
        table.reverse();
        assert_eq!(top(&table, Path::new("/mnt/x")).map(|entry| entry.id), Some(92));
        assert_eq!(top(&table, Path::new("/")).map(|entry| entry.id), Some(22));
        assert_eq!(top(&table, Path::new("/mnt")), None);
    }

    #[test]
    fn the_real_table_has_a_root() {
        assert!(read().expect("table").iter().any(|entry| entry.dir == Path::new("/")));
    }

    #[test]
    fn a_backslash_without_digits_stays() {
        assert_eq!(unescape(b"a\\9\\04"), b"a\\9\\04");
        assert_eq!(unescape(b"\\040\\377"), [b' ', 0xff]);
    }
}
