//! What numbers mean, and how many there are.

use std::fs;
use std::path::Path;

use rustix::fs::{Mode, OFlags, open};

use super::*;

fn node(path: &Path) -> Node {
    Node::new(open(path, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty()).unwrap(), 0).unwrap().0
}

/// A share with so many files, of which so many may be held.
fn tree(files: usize, held: usize, most: usize) -> (tempfile::TempDir, Vec<std::path::PathBuf>, Nodes) {
    let dir = tempfile::tempdir().unwrap();
    let paths: Vec<_> = (0..files).map(|n| dir.path().join(n.to_string())).collect();
    paths.iter().for_each(|path| fs::write(path, "").unwrap());
    let nodes = Nodes::new(vec![node(dir.path())], held, most);
    (dir, paths, nodes)
}

#[test]
fn a_file_has_one_number_until_it_is_forgotten_as_often_as_it_was_told() {
    let (dir, paths, mut nodes) = tree(1, 10, 10);
    let (number, _) = nodes.tell(node(&paths[0])).unwrap();
    let link = dir.path().join("link");
    fs::hard_link(&paths[0], &link).unwrap();
    assert_eq!(nodes.tell(node(&link)).unwrap().0, number);
    nodes.forget(number, 1);
    assert!(nodes.get(number).is_ok());
    nodes.forget(number, 1);
    assert_eq!(nodes.get(number).unwrap_err(), Errno::STALE);
    assert_ne!(nodes.tell(node(&paths[0])).unwrap().0, number);
}

#[test]
fn a_share_stays_and_what_is_unknown_is_no_matter() {
    let (_dir, _, mut nodes) = tree(0, 10, 10);
    nodes.forget(Nodes::of_share(0), u64::MAX);
    nodes.forget(77, 1);
    assert!(nodes.get(Nodes::of_share(0)).is_ok());
    assert_eq!(nodes.len(), 1);
}

#[test]
fn a_file_that_was_let_go_has_its_number_again_when_it_is_looked_up() {
    let (dir, paths, mut nodes) = tree(50, 10, 100);
    let directory = dir.path().join("directory");
    fs::create_dir(&directory).unwrap();
    let (directory, _) = nodes.tell(node(&directory)).unwrap();
    let (open, _held) = nodes.tell(node(&paths[0])).unwrap();
    let numbers: Vec<_> = paths.iter().map(|path| nodes.tell(node(path)).unwrap().0).collect();
    assert!(nodes.held <= 10);
    // What is open, and directories.
    assert!(nodes.get(open).is_ok());
    assert!(nodes.get(directory).is_ok());
    let gone: Vec<_> = (0..50).filter(|n| nodes.get(numbers[*n]).is_err()).collect();
    assert!(gone.len() >= 40);
    for n in gone {
        assert_eq!(nodes.tell(node(&paths[n])).unwrap().0, numbers[n]);
    }
    // Each was told twice, once of them by the walk here or not; all are forgotten in the end.
    numbers.iter().for_each(|number| drop(nodes.forget(*number, 3)));
    assert_eq!(nodes.len(), 2);
}

#[test]
fn a_number_is_not_given_to_a_later_file_with_the_same_inode() {
    let (_dir, paths, mut nodes) = tree(20, 4, 100);
    let (number, _) = nodes.tell(node(&paths[0])).unwrap();
    paths[1..].iter().for_each(|path| drop(nodes.tell(node(path)).unwrap()));
    assert_eq!(nodes.get(number).unwrap_err(), Errno::STALE);
    let mut later = node(&paths[0]);
    later.born += 1;
    assert_ne!(nodes.tell(later).unwrap().0, number);
}

#[test]
fn numbers_are_bounded_and_so_are_descriptors_of_what_is_in_use() {
    let (_dir, paths, mut nodes) = tree(100, 10, 30);
    paths.iter().for_each(|path| drop(nodes.tell(node(path)).unwrap()));
    assert!(nodes.len() <= 31, "{}", nodes.len());
    assert_eq!(nodes.by_identity.len(), nodes.len());
    let mut held = Vec::new();
    let refused = paths.iter().find_map(|path| match nodes.tell(node(path)) {
        Ok((_, node)) => {
            held.push(node);
            None
        }
        Err(errno) => Some(errno),
    });
    assert_eq!(refused, Some(Errno::NFILE));
    drop(held);
    assert!(nodes.tell(node(&paths[99])).is_ok());
}
