//! Sets of kits. A million objects belong to a handful of different sets, so each object has the number of its set.

use std::collections::HashMap;

/// The number of a set of kits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct SetId(u32);

/// All sets that were met, each once. The first is the empty one.
#[derive(Debug)]
pub(super) struct Sets {
    /// The members in ascending order.
    sets: Vec<Vec<usize>>,
    ids: HashMap<Vec<usize>, SetId>,
    /// Unions that were asked for before.
    unions: HashMap<(SetId, SetId), SetId>,
}

impl SetId {
    /// The empty set.
    pub const NONE: Self = Self(0);

    /// Its place among all sets.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl Sets {
    pub fn new() -> Self {
        Self { sets: vec![Vec::new()], ids: HashMap::from([(Vec::new(), SetId::NONE)]), unions: HashMap::new() }
    }

    /// The set of these kits.
    pub fn of(&mut self, kits: impl IntoIterator<Item = usize>) -> SetId {
        let mut members: Vec<usize> = kits.into_iter().collect();
        members.sort_unstable();
        members.dedup();
        if let Some(id) = self.ids.get(&members) {
            return *id;
        }
        let id = SetId(self.sets.len() as u32);
        self.sets.push(members.clone());
        self.ids.insert(members, id);
        id
    }

    /// The kits that are in either set.
    pub fn union(&mut self, a: SetId, b: SetId) -> SetId {
        if a == b || b == SetId::NONE {
            return a;
        }
        if a == SetId::NONE {
            return b;
        }
        if let Some(known) = self.unions.get(&(a, b)) {
            return *known;
        }
        let both = self.members(a).iter().chain(self.members(b)).copied().collect::<Vec<_>>();
        let union = self.of(both);
        self.unions.insert((a, b), union);
        union
    }

    /// The kits in a set, in ascending order.
    pub fn members(&self, set: SetId) -> &[usize] {
        self.sets.get(set.index()).map_or(&[], Vec::as_slice)
    }

    /// All sets.
    pub fn all(&self) -> impl Iterator<Item = (SetId, &[usize])> {
        (0..).map(SetId).zip(self.sets.iter().map(Vec::as_slice))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_has_one_number_however_it_came_about() {
        let mut sets = Sets::new();
        let [a, b] = [sets.of([1]), sets.of([2])];
        let both = sets.union(a, b);
        assert_eq!([sets.union(b, a), sets.of([2, 1, 2]), sets.union(both, a)], [both; 3]);
        assert_eq!(sets.members(both), [1, 2]);
        assert_eq!([sets.union(SetId::NONE, a), sets.union(a, SetId::NONE), sets.of([1])], [a; 3]);
        assert_eq!(sets.of([]), SetId::NONE);
        assert_eq!(sets.all().count(), 4);
    }
}
