//! In which mode each inode is open: passed through to the kernel, or read by requests to us, cached or direct.
//!
//! The kernel allows one mode at a time, and one backing file; whoever is answered otherwise gets an EIO that we never see.
//! So the mode stays until the last handle is released, by which time the kernel has left it too: a handle that is mapped
//! is released when it is unmapped, but for one that passes through, whose map is of the cache's file and has no mode. What
//! the kernel registered for an inode is kept until then as well. A handle past the page cache counts like a cached one:
//! mapped, it is one.
//!
//! The lock, a plain mutex, is held while an open is decided, counted and answered: short calls that don't wait.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, MutexGuard};

/// The modes of all inodes that are open. `B` is what stands for a registered file.
#[derive(Debug)]
pub(super) struct OpenModes<B>(Mutex<HashMap<u64, Mode<B>>>);

#[derive(Debug)]
enum Mode<B> {
    Passthrough { handles: u64, backing: B },
    Requests { handles: u64 },
}

impl<B> Default for OpenModes<B> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<B> OpenModes<B> {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Mode<B>>> {
        self.0.lock().unwrap_or_else(|held| held.into_inner())
    }

    /// Counts one more handle of an inode, and has it answered: passed through to what is registered, or not. `register`
    /// registers its file, where there is one and that is possible; it is asked only if nobody has the inode open.
    pub(super) fn open<R>(
        &self,
        inode: u64,
        reply: R,
        register: impl FnOnce(&R) -> Option<B>,
        answer: impl FnOnce(R, Option<&B>),
    ) {
        let mut modes = self.lock();
        let mode = match modes.entry(inode) {
            Entry::Occupied(open) => open.into_mut(),
            Entry::Vacant(free) => free.insert(match register(&reply) {
                Some(backing) => Mode::Passthrough { handles: 0, backing },
                None => Mode::Requests { handles: 0 },
            }),
        };
        match mode {
            Mode::Passthrough { handles, backing } => {
                *handles += 1;
                answer(reply, Some(backing));
            }
            Mode::Requests { handles } => {
                *handles += 1;
                answer(reply, None);
            }
        }
    }

    /// Notes that a handle was released. After the last one, what is registered goes.
    pub(super) fn release(&self, inode: u64) {
        let mut modes = self.lock();
        let Entry::Occupied(mut open) = modes.entry(inode) else { return };
        let (Mode::Passthrough { handles, .. } | Mode::Requests { handles }) = open.get_mut();
        *handles -= 1;
        let last = (*handles == 0).then(|| open.remove());
        drop(modes);
        // Where this was the last hold on a file without a name, the disk frees its blocks: not under the lock.
        drop(last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Opens inode 7; what it was answered.
    fn open(modes: &OpenModes<u32>, file: Option<u32>) -> Option<u32> {
        let mut answered = None;
        modes.open(7, (), |()| file, |(), backing| answered = backing.copied());
        answered
    }

    #[test]
    fn a_mode_and_its_file_stay_until_the_last_handle_is_released() {
        let modes = OpenModes::default();
        assert_eq!(open(&modes, Some(1)), Some(1));
        assert_eq!(open(&modes, Some(2)), Some(1), "one file for all handles");
        modes.release(7);
        assert_eq!(open(&modes, None), Some(1), "even where nothing could be passed through now");
        modes.release(7);
        modes.release(7);
        assert_eq!(open(&modes, None), None);
        assert_eq!(open(&modes, Some(3)), None, "the mode of who has it open");
        modes.release(7);
        assert_eq!(open(&modes, Some(3)), None);
        modes.release(7);
        modes.release(7);
        assert_eq!(open(&modes, Some(3)), Some(3));
    }

    #[test]
    fn inodes_do_not_mind_each_other_and_a_release_too_many_is_nothing() {
        let modes = OpenModes::default();
        assert_eq!(open(&modes, Some(1)), Some(1));
        modes.open(8, (), |()| None, |(), backing| assert!(backing.is_none()));
        modes.release(9);
        modes.release(7);
        assert_eq!(open(&modes, Some(2)), Some(2));
    }
}
