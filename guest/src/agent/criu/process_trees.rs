//! The commands in the form CRIU can dump: trees of processes, each with its root.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::SplitAsciiWhitespace;

use super::record::{AgentPipe, Tree};
use crate::reply::{Code, ErrorReply};
use crate::system::cgroup;

/// Reads all trees; the processes must stand still.
pub fn read() -> Result<(Vec<Tree>, Vec<AgentPipe>), ErrorReply> {
    let failed = |error: io::Error| ErrorReply::io("processes", &error);
    let pids = cgroup::workload_pids().map_err(failed)?;
    let mut processes = BTreeMap::new();
    for pid in pids {
        // A process that ended before the freeze and has not been reaped is skipped.
        if let Some(process) = Process::read(pid).map_err(failed)? {
            processes.insert(pid, process);
        }
    }
    let trees = group(&processes);
    let pipes = agent_pipes().map_err(failed)?;
    refuse_shared(&trees, &pipes)?;
    for process in processes.values() {
        process.refuse_unsupported()?;
    }
    Ok((trees, pipes))
}

/// A process, as `/proc` describes it.
#[derive(Debug)]
struct Process {
    pid: i32,
    name: String,
    parent: i32,
    session: i32,
    stopped: bool,
    /// The targets of its descriptors' links.
    open: Vec<String>,
}

impl Process {
    fn read(pid: i32) -> io::Result<Option<Self>> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let Some(mut process) = Self::parse(pid, &stat) else { return Ok(None) };
        process.open = open_files(&format!("/proc/{pid}/fd"))?.into_iter().map(|(_, target)| target).collect();
        Ok(Some(process))
    }

    /// Parses `/proc/PID/stat`. `None`: the process has ended.
    fn parse(pid: i32, stat: &str) -> Option<Self> {
        let (name, mut fields) = stat_fields(stat)?;
        let name = name.to_owned();
        let state = fields.next()?;
        let parent = fields.next()?.parse().ok()?;
        let session = fields.nth(1)?.parse().ok()?;
        if matches!(state, "Z" | "X" | "x") {
            return None;
        }
        Some(Self { pid, name, parent, session, stopped: state == "T", open: Vec::new() })
    }

    fn refuse_unsupported(&self) -> Result<(), ErrorReply> {
        // CRIU's own message does not name io_uring as the cause.
        if self.open.iter().any(|target| target == "anon_inode:[io_uring]") {
            let message = format!("process {} ({}) uses io_uring, which CRIU cannot save", self.pid, self.name);
            return Err(ErrorReply::new(Code::Criu, message));
        }
        // The file of a process that has just been killed is gone.
        let group = fs::read_to_string(format!("/proc/{}/cgroup", self.pid));
        if let Ok(group) = group
            && !cgroup::is_below_workload(&group)
        {
            let message = format!(
                "process {} ({}) is in the control group {}, which CRIU does not freeze: is it in a container?",
                self.pid,
                self.name,
                group.trim_start_matches("0::").trim_end()
            );
            return Err(ErrorReply::new(Code::Criu, message));
        }
        Ok(())
    }
}

/// The name in `/proc/PID/stat` and the fields behind it, of which the state is the first (proc(5)). The name is in parentheses and may
/// contain parentheses.
pub fn stat_fields(stat: &str) -> Option<(&str, SplitAsciiWhitespace<'_>)> {
    let (head, tail) = stat.rsplit_once(')')?;
    let name = head.split_once('(').map_or("", |(_, name)| name);
    Some((name, tail.split_ascii_whitespace()))
}

fn group(processes: &BTreeMap<i32, Process>) -> Vec<Tree> {
    let root_of = |mut pid: i32| {
        while let Some(parent) = processes.get(&pid).map(|process| process.parent).filter(|p| processes.contains_key(p))
        {
            pid = parent;
        }
        pid
    };
    let mut members: BTreeMap<i32, Vec<&Process>> = BTreeMap::new();
    for process in processes.values() {
        members.entry(root_of(process.pid)).or_default().push(process);
    }
    let tree = |(root, members): (i32, Vec<&Process>)| Tree {
        root,
        processes: members.iter().map(|process| process.pid).collect(),
        stopped: members.iter().filter(|process| process.stopped).map(|process| process.pid).collect(),
        leads_session: members.iter().any(|process| process.pid == root && process.session == root),
        pipes: members
            .iter()
            .flat_map(|process| process.open.iter().filter_map(|target| pipe_inode(target)))
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect(),
    };
    members.into_iter().map(tree).collect()
}

/// Refuses trees that share a pipe, because what is in the pipe would be lost.
fn refuse_shared(trees: &[Tree], pipes: &[AgentPipe]) -> Result<(), ErrorReply> {
    let agents: BTreeSet<u64> = pipes.iter().map(|pipe| pipe.inode).collect();
    let mut owners = BTreeMap::new();
    for tree in trees {
        for inode in tree.pipes.iter().filter(|inode| !agents.contains(inode)) {
            if let Some(other) = owners.insert(inode, tree.root) {
                let message = format!(
                    "processes {other} and {} share a pipe and no parent, which CRIU cannot save apart",
                    tree.root
                );
                return Err(ErrorReply::new(Code::Criu, message));
            }
        }
    }
    Ok(())
}

/// The pipes that the agent has open.
fn agent_pipes() -> io::Result<Vec<AgentPipe>> {
    let mut pipes = Vec::new();
    for (path, target) in open_files("/proc/self/fd")? {
        let Some(inode) = pipe_inode(&target) else { continue };
        let number = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{number}"))?;
        pipes.push(AgentPipe { inode, agent_reads: !writes(&info) });
    }
    Ok(pipes)
}

/// Whether `fdinfo` tells of a descriptor that can be written; its flags are octal.
fn writes(fdinfo: &str) -> bool {
    let flags = fdinfo.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok()).unwrap_or(0);
    flags & libc::O_ACCMODE != libc::O_RDONLY
}

fn pipe_inode(target: &str) -> Option<u64> {
    target.strip_prefix("pipe:[")?.strip_suffix(']')?.parse().ok()
}

/// Descriptors with the targets of their links. A descriptor that is closed meanwhile, as that of this directory, is left out.
fn open_files(directory: &str) -> io::Result<Vec<(PathBuf, String)>> {
    let mut open = Vec::new();
    for entry in fs::read_dir(Path::new(directory))? {
        let path = entry?.path();
        if let Ok(target) = fs::read_link(&path) {
            open.push((path, target.to_string_lossy().into_owned()));
        }
    }
    Ok(open)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: i32, parent: i32, session: i32, open: &[&str]) -> (i32, Process) {
        let open = open.iter().map(|&target| target.to_owned()).collect();
        (pid, Process { pid, name: "x".to_owned(), parent, session, stopped: false, open })
    }

    #[test]
    fn reads_a_name_with_anything_in_it() {
        let process = Process::parse(7, "7 (a) b ( c) T 3 7 6 0 -1").unwrap();
        assert_eq!((process.name.as_str(), process.parent, process.session, process.stopped), ("a) b ( c", 3, 6, true));
        assert!(Process::parse(7, "7 (a) Z 3 7 6").is_none());
        assert!(Process::parse(7, "7 (a) S").is_none());
    }

    #[test]
    fn a_tree_is_all_that_descends_from_one() {
        let all = [
            process(1001, 38, 1001, &["pipe:[5]"]),
            process(1002, 1001, 1001, &["pipe:[5]", "/x", "pipe:[6]"]),
            process(1004, 1002, 1001, &[]),
            process(1005, 1, 1001, &[]),
        ];
        let trees = group(&all.into_iter().collect());
        assert_eq!(trees.len(), 2);
        assert_eq!(
            (trees[0].root, &trees[0].processes[..], trees[0].leads_session),
            (1001, &[1001, 1002, 1004][..], true)
        );
        assert_eq!(trees[0].pipes, [5, 6]);
        assert_eq!((trees[1].root, trees[1].leads_session), (1005, false));
    }

    #[test]
    fn a_pipe_between_trees_is_refused_unless_it_is_the_agents() {
        let all = [process(1001, 38, 1001, &["pipe:[5]"]), process(1002, 1, 1001, &["pipe:[5]"])];
        let trees = group(&all.into_iter().collect());
        assert_eq!(refuse_shared(&trees, &[]).unwrap_err().code, Code::Criu);
        refuse_shared(&trees, &[AgentPipe { inode: 5, agent_reads: true }]).unwrap();
    }

    #[test]
    fn tells_reading_ends_from_writing_ones() {
        assert!(writes("pos:\t0\nflags:\t02000001\nmnt_id:\t14\n"));
        assert!(!writes("pos:\t0\nflags:\t02004000\nmnt_id:\t14\n"));
    }
}
