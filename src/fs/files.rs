//! Files: opened, read, released.
//!
//! Opening decides how a file is read ([`ways`](super::ways)): that waits for nothing but a look at the disk, or for a fill
//! that is about to end.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use super::at_hand::At;
use super::direct::Direct;
use super::{Fs, FsError, Ino, NodeKind};
use crate::cache::Object;
use crate::fetch::chunks::Piece;
use crate::fetch::layer::{Content, RowContent};
use crate::fetch::{FetchError, Tier, Verify};
use crate::tree::Origin;

/// What a read answers: always as much as was asked for, up to the end of the file.
#[derive(Debug, Clone)]
pub enum ReadReply {
    /// Nothing: the read starts at or behind the end.
    End,
    /// Verified bytes in memory and in the cache, one piece after the other; never none.
    Pieces(Vec<Piece>),
    /// Bytes that no digest covers yet, which only [`Verify::Stream`] gives.
    Staged {
        /// The file that stages them.
        file: Arc<File>,
        /// Where in it.
        offset: u64,
        /// How many bytes.
        len: usize,
    },
}

/// How a file was opened.
#[derive(Debug)]
pub struct Opened {
    /// The handle: one of the two below, as handles are stateless.
    pub handle: u64,
    /// How it is to be read.
    pub via: Via,
    /// Whether what the kernel has cached of it stays valid.
    pub keep_cache: bool,
}

/// How a file is to be read.
#[derive(Debug)]
pub enum Via {
    /// By the kernel from this file, which has all of its content; through the kernel's cache where that is not possible.
    Passthrough(Object),
    /// Through the kernel's cache.
    Cached,
    /// Past the kernel's cache.
    Direct,
}

/// The handle of who reads through the kernel's cache, or without us.
const PLAIN: u64 = 0;
/// The handle of who reads past the kernel's cache, and is noted.
const DIRECT: u64 = 1;

impl Fs {
    /// Opens a file for reading.
    pub async fn open(&self, ino: Ino) -> Result<Opened, FsError> {
        let (_, meta, origin) = self.node(ino)?;
        if meta.kind == NodeKind::Directory {
            return Err(FsError::IsDirectory);
        }
        let opened = |via, keep_cache| Opened { handle: PLAIN, via, keep_cache };
        let Origin::Layer { layer: at, entry } = origin else { return Ok(opened(Via::Cached, true)) };
        let (layer, row, at) = (&self.kit.layers[at as usize], entry as usize, (at, entry));
        // What the kernel has cached of it is not asked for, nor what passes through.
        layer.check_poison()?;
        // From here on nothing fails: what was counted is released.
        let found = self.at_hand.opened(at);
        layer.note_opened(row);
        if self.context.verify == Verify::Stream && layer.tier() == Tier::Provisional {
            if !found.is_at_hand {
                layer.prepare(row);
            }
            return Ok(opened(Via::Direct, false));
        }
        if self.context.cache.rechecks() {
            // Whoever reads it next opens it anew, and that hashes it.
            self.at_hand.forget(at);
            layer.look_anew(row);
            return Ok(opened(Via::Cached, false));
        }
        if self.ways.may_pass()
            && let Some(object) = self.whole(at).await.filter(|object| object.size() == meta.size)
        {
            // Of what passes through no read is seen.
            let is_watched = self.prefetch().is_some_and(|prefetch| prefetch.watches(ino, meta.size));
            let passes = object.is_lasting() && !is_watched;
            if !object.is_lasting() {
                let why = "others than root and this user may write to a lower cache, after it was hashed";
                self.ways.note_not_all(|| why.to_owned());
            }
            return Ok(opened(if passes { Via::Passthrough(object) } else { Via::Cached }, true));
        }
        if !found.is_at_hand {
            layer.prepare(row);
        }
        let may_be_direct = found.is_first && self.ways.direct.suits(ino, meta.size);
        if may_be_direct && Direct::is_cold(meta.size, layer.in_cache(row).await) {
            return Ok(Opened { handle: DIRECT, via: Via::Direct, keep_cache: true });
        }
        Ok(opened(Via::Cached, true))
    }

    /// All of a file's content, if the cache has it, or will in a moment.
    async fn whole(&self, at: At) -> Option<Object> {
        let (layer, row) = (&self.kit.layers[at.0 as usize], at.1 as usize);
        let (at_hand, moment) = self.at_hand.get(at);
        let content = match at_hand {
            Some(content) => content,
            None => {
                let content = match layer.filled(row) {
                    Some(file) => Content::Chunked(file),
                    None => Content::Object(layer.whole_soon(row).await?),
                };
                self.at_hand.put(at, content.clone(), moment);
                content
            }
        };
        match content {
            Content::Object(object) => Some(object),
            Content::Chunked(file) => file.whole(),
        }
    }

    /// Ends what [`Fs::open`] began.
    pub async fn release(&self, ino: Ino) {
        let Ok((_, _, Origin::Layer { layer: at, entry })) = self.node(ino) else { return };
        if let Some(content) = self.at_hand.released((at, entry)) {
            self.kit.layers[at as usize].let_go(entry as usize, content).await;
        }
    }

    /// Bytes of a file: all that were asked for, up to its end, and only verified ones (but see [`Verify::Stream`]).
    pub async fn read(&self, ino: Ino, handle: u64, offset: u64, len: usize) -> Result<ReadReply, FsError> {
        let (_, meta, origin) = self.node(ino)?;
        if meta.kind == NodeKind::Directory {
            return Err(FsError::IsDirectory);
        }
        let end = offset.saturating_add(len as u64).min(meta.size);
        let Some(len) = end.checked_sub(offset).filter(|len| *len > 0) else {
            return Ok(ReadReply::End);
        };
        let len = usize::try_from(len).map_err(|_| FsError::TooLong)?;
        match origin {
            Origin::Skeleton => Err(FsError::IsDirectory),
            Origin::Kitfile => {
                let kitfile = self.kit.resolved.kitfile.as_ref().ok_or(FsError::Stale)?;
                Ok(ReadReply::Pieces(vec![Piece::Memory(kitfile.slice(offset as usize..end as usize))]))
            }
            Origin::Layer { layer, entry } => {
                if handle == DIRECT {
                    self.ways.direct.note_read(ino, len as u64);
                }
                if let Some(prefetch) = self.prefetch() {
                    prefetch.note_read(ino, meta.size, len as u64);
                }
                self.read_layer((layer, entry), offset, len).await
            }
        }
    }

    async fn read_layer(&self, at: (u32, u32), offset: u64, len: usize) -> Result<ReadReply, FsError> {
        let (layer, row) = (&self.kit.layers[at.0 as usize], at.1 as usize);
        layer.check_poison()?;
        let range = offset..offset + len as u64;
        loop {
            let (at_hand, moment) = self.at_hand.get(at);
            let content = match at_hand {
                Some(content) => content,
                None => match layer.content(row, range.end).await? {
                    RowContent::Verified(content) => {
                        self.at_hand.put(at, content.clone(), moment);
                        content
                    }
                    RowContent::Staged(path) => match staged(path).await? {
                        Some(file) => return Ok(ReadReply::Staged { file, offset, len }),
                        // The fill ended in between: the next look finds what it came to.
                        None => continue,
                    },
                },
            };
            let file = match content {
                Content::Object(object) => return Ok(ReadReply::Pieces(vec![Piece::File(object.range(range))])),
                Content::Chunked(file) => file,
            };
            match layer.read(row, &file, range.clone()).await {
                Ok(pieces) => return Ok(ReadReply::Pieces(pieces)),
                // Its source knows no ranges: the layer is fetched whole after all.
                Err(error) if error.ignores_ranges() => self.at_hand.forget(at),
                Err(error) => return Err(error.into()),
            };
        }
    }
}

/// Opens a staged file; `None` where it is staged no more.
async fn staged(path: PathBuf) -> Result<Option<Arc<File>>, FsError> {
    let opened = tokio::task::spawn_blocking(move || File::open(path)).await;
    match opened.map_err(|_| FetchError::Lost { what: "a staged file".to_owned() })? {
        Ok(file) => Ok(Some(Arc::new(file))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(FsError::Disk { cause }),
    }
}
