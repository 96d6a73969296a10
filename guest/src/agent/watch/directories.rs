//! The directories that are watched.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::path::{Path, PathBuf};

/// The watched directories, by their watch and by their path below the root. Both keys are unique.
#[derive(Default)]
pub struct Directories {
    pub paths: HashMap<i32, PathBuf>,
    watches: BTreeMap<PathBuf, i32>,
}

impl Directories {
    /// Returns the watch of the directory that had this path until now.
    pub fn insert(&mut self, watch: i32, path: PathBuf) -> Option<i32> {
        self.remove(watch);
        let other = self.watches.insert(path.clone(), watch);
        other.map(|other| self.paths.remove(&other));
        self.paths.insert(watch, path);
        other
    }

    pub fn remove(&mut self, watch: i32) {
        self.paths.remove(&watch).map(|path| self.watches.remove(&path));
    }

    /// Removes and returns the directory with this path and all below it.
    pub fn take(&mut self, path: &Path) -> Vec<(i32, PathBuf)> {
        let from = self.watches.range::<Path, _>((Bound::Included(path), Bound::Unbounded));
        let below = from.take_while(|(below, _)| below.starts_with(path));
        let taken: Vec<_> = below.map(|(path, &watch)| (watch, path.clone())).collect();
        for &(watch, _) in &taken {
            self.remove(watch);
        }
        taken
    }
}
