//! The tree of a mount, for many who read it and one who adds to it.
//!
//! Who reads takes the tree as it is, and may keep it: it does not change. Who adds works on a clone, on a thread that may
//! take its time (a second for a million names), and puts it in the old one's place. So nobody who answers a request waits
//! for more than that.
//!
//! Locks: `adding` is held while a layer is added, by blocking threads alone; `tree`, within it or alone, for the copy or
//! the change of a pointer.

use std::sync::{Arc, Mutex, RwLock};

use crate::tree::{Conflict, Tree};

/// The names that are known by now.
#[derive(Debug)]
pub(super) struct Names {
    tree: RwLock<Arc<Tree>>,
    adding: Mutex<()>,
}

impl Names {
    pub fn new(tree: Tree) -> Self {
        Self { tree: RwLock::new(Arc::new(tree)), adding: Mutex::default() }
    }

    /// The tree as it is now.
    pub fn tree(&self) -> Arc<Tree> {
        self.tree.read().unwrap_or_else(|held| held.into_inner()).clone()
    }

    /// Adds what became known, unless it `is_known`. Takes its time.
    pub fn add(
        &self,
        is_known: impl FnOnce(&Tree) -> bool,
        add: impl FnOnce(&mut Tree) -> Vec<Conflict>,
    ) -> Vec<Conflict> {
        let _one = self.adding.lock().unwrap_or_else(|held| held.into_inner());
        let before = self.tree();
        if is_known(&before) {
            return Vec::new();
        }
        let mut tree = Tree::clone(&before);
        let conflicts = add(&mut tree);
        *self.tree.write().unwrap_or_else(|held| held.into_inner()) = Arc::new(tree);
        conflicts
    }
}
