//! Another machine with the same directory.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

pub struct Other {
    process: Child,
    answers: BufReader<ChildStdout>,
}

impl Other {
    pub fn new(host: &Path) -> Self {
        // Not by `current_exe`: in a chroot the path of this program is not known to this thread, whose mount namespace is its own.
        let this_program = Path::new("/proc/self/exe");
        let mut process = Command::new(this_program)
            .args(["--exact", "other_machine", "--ignored", "--nocapture"])
            .env("DIRECTORY", host)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let answers = BufReader::new(process.stdout.take().unwrap());
        Self { process, answers }
    }

    /// The output (one line) of a command in its share.
    pub fn does(&mut self, command: &str) -> String {
        writeln!(self.process.stdin.as_mut().unwrap(), "{command}").unwrap();
        let mut lines = self.answers.by_ref().lines().map(Result::unwrap);
        lines.find_map(|line| line.strip_prefix("answer:").map(str::to_owned)).unwrap()
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        self.process.wait().unwrap();
    }
}
