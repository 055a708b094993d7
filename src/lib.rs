//! kitfs mounts a ModelKit from a registry as a read-only directory tree: lazily, verified, cached.
//!
//! This page is the map. A module may use those below it, never one above; `tests/architecture.rs` holds that.
//!
//! ```text
//! main          arguments, logging, exit code
//! cli           one file a command
//! serving       a mount that changes from kit to kit: switches, a tag that is followed, what it answers
//! mount         mount points, daemon, signals, control socket
//! fuse          the adapter: fuser ↔ fs; the only module that knows fuser
//! fs            lookup, getattr, readdir, open, read
//! publish       a kit with indexes: derived, named in its manifest or beside it, written where it can be found
//! fetch         resolving a reference to a plan, listing a layer, getting its chunks or all of it: flights and deadlines
//! inventory     what is in the cache by kit: what belongs together, what may go
//! tree          the merged names of all layers                                    (pure)
//! archive       layer bytes → entries → chunks: tar walker, inflaters, index      (pure)
//! cache         verified bytes on disk: blobs, objects, staging, tags; their limit
//! source        where blobs come from: registry, OCI layout, kit's storage
//! modelkit      manifest, config, Kitfile, filter → plan                          (pure)
//! history       what was served and when, and which tags were moved: an append-only record
//! object        chunks, their list, and the object digest that names a file's content
//! tagging       the order of tags, and patterns of them                           (pure)
//! reference digest path units report     newtypes that are valid once they exist, and how errors are told
//! ```
//!
//! The kernel's requests come by number, and [`fs::trees`] tells the kit that a number is of: a mount that has switched has several.
//! A read goes `fuse → fs → fetch → {source → archive → cache}`: [`fs::Fs::read`] asks [`fetch::LayerFetch`] for content, which
//! is in the cache, comes chunk by chunk where an index proves them, or comes with the whole layer. What comes back as
//! a [`digest::Verified`] value or a [`cache::CachedRange`] has had its digest proved; the one thing else that a read can
//! answer from is a staged file, with [`fetch::Verify::Stream`] alone. Of a file that is complete when it is opened we see no
//! read, where the kernel reads the cache's file by itself: [`fs::Fs::open`] decides, [`fs::ways`] tells.

pub mod archive;
pub mod cache;
pub mod cli;
pub mod digest;
pub mod fetch;
pub mod fs;
pub mod fuse;
pub mod history;
pub mod inventory;
pub mod modelkit;
pub mod mount;
pub mod object;
pub mod path;
pub mod publish;
pub mod reference;
pub mod report;
pub mod serving;
pub mod source;
pub mod tagging;
pub mod tree;
pub mod units;
