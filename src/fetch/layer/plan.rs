//! Planning the requests for what a layer lacks: which chunks the next one gets. Blocks, as it looks for files on the disk.
//!
//! Invariants: files come in the order of their content, chunks of one request lie together, and what is here already is
//! in none. A small file that nobody asked for is opened only with a right to do so.

use std::ops::Range;
use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;

use super::Known;
use super::complete::Work;
use crate::archive::index::{Chunks, Index};
use crate::cache::{CacheError, Standing};
use crate::fetch::Context;
use crate::fetch::chunks::Chunked;
use crate::fetch::chunks::requests::joins;
use crate::object::ObjectDigest;

/// A file that is not on the cache's disk under its name.
#[derive(Debug, Clone, Copy)]
pub struct Missing {
    /// Its row in the listing.
    pub row: usize,
    /// The name of its content.
    pub object: ObjectDigest,
    /// Its bytes.
    pub size: u64,
    /// Where it begins in the layer.
    pub offset: u64,
}

/// Where the chunk lists are that are not in a head.
#[derive(Debug)]
pub enum Lists {
    /// In the index.
    All(Arc<Index>),
    /// With files that are open, by their rows.
    Few(Vec<(usize, Arc<Chunked>)>),
}

/// One chunk of a file, and where it is in the layer.
#[derive(Debug, Clone)]
pub struct Part {
    /// The file.
    pub file: Arc<Chunked>,
    /// Which chunk.
    pub chunk: u64,
    /// Its bytes in the layer.
    pub at: Range<u64>,
}

impl Part {
    /// Whether it is verified in the file.
    pub fn is_here(&self) -> bool {
        self.file.partial().has(self.chunk)
    }

    /// How many bytes it has.
    pub fn len(&self) -> u64 {
        self.at.end - self.at.start
    }

    /// Writes what the cache could not take before. Blocks.
    pub fn write_again(&self) -> Result<(), CacheError> {
        self.file.write_again(self.chunk)
    }
}

/// What comes next.
pub enum Next {
    /// These chunks, which lie together.
    Parts(Vec<Part>),
    /// Nothing, before another file may be opened: see [`Planner::take_right`].
    NoRight,
    /// Nothing: what lies before this is not known any more.
    NoList,
    /// Nothing more.
    End,
}

/// What is planned up to now, and what is left to plan.
pub struct Planner {
    context: Context,
    known: Known,
    lists: Lists,
    files: std::iter::Peekable<std::vec::IntoIter<Missing>>,
    /// The file whose chunks come next.
    open: Option<Open>,
    /// For the next file that nobody asked for.
    right: Option<OwnedSemaphorePermit>,
    work: Arc<Work>,
    /// The longest request.
    most: u64,
}

struct Open {
    file: Arc<Chunked>,
    offset: u64,
    next: u64,
}

impl Planner {
    /// Plans for `files`, which are in the order of their content, and for requests of at most so many bytes.
    pub fn new(context: Context, known: Known, lists: Lists, files: Vec<Missing>, work: Arc<Work>, most: u64) -> Self {
        Self { context, known, lists, files: files.into_iter().peekable(), open: None, right: None, work, most }
    }

    /// Takes the right to open a file.
    pub fn take_right(&mut self, right: Option<OwnedSemaphorePermit>) {
        self.right = right;
    }

    /// The chunks of the next request; gives itself back, as it goes from thread to thread.
    pub fn next(mut self) -> (Self, Next) {
        let mut parts = Vec::new();
        let end = loop {
            match &mut self.open {
                Some(open) => match open.fill(&mut parts, self.most, &self.work) {
                    true => break Next::End,
                    false => self.close(),
                },
                None => match self.open_next() {
                    Ok(true) => {}
                    Ok(false) => break Next::End,
                    Err(next) => break next,
                },
            }
        };
        let next = if parts.is_empty() { end } else { Next::Parts(parts) };
        (self, next)
    }

    /// Goes on behind a file. One of which nothing was missing but its name gets that.
    fn close(&mut self) {
        if let Some(Open { file, .. }) = self.open.take()
            && file.is_complete()
        {
            self.context.files.commit(&self.context.cache, file);
        }
    }

    /// Opens the next file that is still missing; tells whether there was one.
    fn open_next(&mut self) -> Result<bool, Next> {
        let Some(Missing { row, object, size, offset }) = self.files.peek().copied() else { return Ok(false) };
        let few = match &self.lists {
            Lists::Few(few) => few.iter().find(|(at, _)| *at == row).map(|(_, file)| file.clone()),
            Lists::All(_) => None,
        };
        let files = &self.context.files;
        let file = match few {
            Some(file) => file,
            None => {
                let list = match (self.known.head().row(row).and_then(|row| row.chunks()), &self.lists) {
                    (Some(Chunks::Here(list)), _) => Some(list.to_owned()),
                    (_, Lists::All(index)) => index.chunks(row).map(|list| list.to_owned()),
                    (_, Lists::Few(_)) => None,
                };
                // Opened as an object by who looked for its list: it has become one.
                let Some(list) = list else {
                    self.files.next();
                    self.work.arrived(size);
                    return if self.context.cache.has_object(&object, size) { Ok(true) } else { Err(Next::NoList) };
                };
                let is_small = list.len() == 1;
                let right = if is_small { self.right.take().or_else(|| files.neighbour()) } else { None };
                if is_small && right.is_none() {
                    return Err(Next::NoRight);
                }
                let file = files.get_or_open(&self.context.cache, list);
                if let Some(right) = right {
                    file.keep(right);
                }
                file
            }
        };
        self.files.next();
        // After it was opened: a file that is committed in between is either still this one or seen here.
        if self.context.cache.standing(&object, size) == Standing::Absent {
            self.open = Some(Open { file, offset, next: 0 });
        } else {
            self.work.arrived(size);
        }
        Ok(true)
    }
}

impl Open {
    /// Adds chunks that are missing and lie near those before; tells whether one is left that does not.
    fn fill(&mut self, parts: &mut Vec<Part>, most: u64, work: &Work) -> bool {
        while let Some(within) = self.file.list().range(self.next) {
            let part = Part {
                file: self.file.clone(),
                chunk: self.next,
                at: self.offset + within.start..self.offset + within.end,
            };
            if part.is_here() {
                work.arrived(part.len());
            } else {
                if let (Some(first), Some(last)) = (parts.first(), parts.last()) {
                    let span = first.at.start..last.at.end;
                    if !joins(&span, &part.at) || part.at.end - span.start > most {
                        return true;
                    }
                }
                parts.push(part);
            }
            self.next += 1;
        }
        false
    }
}
