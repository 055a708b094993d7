//! What is in the cache, by kit: which objects, indexes and documents belong to which kit, what may go and what stays.
//!
//! The cache knows files by digest; which of them belong together follows from the records of kits
//! ([`KitRecord`](crate::cache::KitRecord)) and from the indexes of their layers. Nothing is remembered here: each answer
//! is read from the disk when it is asked for, and may be out of date the moment after.
//!
//! - [`take`]: the whole account: each file of the cache with the kits that hold it, each kit with what it takes.
//! - `holders`: sets of kits, of which there are few for very many files.
//! - `layers`: what a layer holds, from whatever index of it is here.
//! - `policy`: what eviction has to know.
//! - `sizes`: what contents take, be they here or not.
//! - [`mod@places`]: where in which kits an object is.

mod holders;
mod layers;
pub mod places;
mod policy;
mod sizes;
pub mod take;

pub use places::{Place, lists, places};
pub use policy::{policy, settled};
pub use sizes::bytes_of;
pub use take::{Contents, Inventory, KitState, Share, Stored};

#[cfg(test)]
mod tests;
