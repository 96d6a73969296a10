//! The first line of the control connection: what is to be served.

use std::collections::HashSet;
use std::path::PathBuf;

use rustix::io::Errno;
use serde::Deserialize;

use crate::share::{MOST, Refused, Share, Source};

const VERSION: u32 = 1;

#[derive(Deserialize)]
pub struct Plan {
    version: u32,
    shares: Vec<Source>,
    /// Where the state of a server before this one is, which this one goes on with.
    pub state: Option<PathBuf>,
}

impl Plan {
    /// # Errors
    /// A line that is no plan.
    pub fn parse(line: &[u8]) -> Result<Self, Refused> {
        let refused = |what| Refused { errno: Errno::INVAL, what };
        let plan: Self = serde_json::from_slice(line).map_err(|error| refused(format!("the plan: {error}")))?;
        if plan.version != VERSION {
            return Err(refused(format!("a plan of version {}", plan.version)));
        }
        if plan.shares.len() > MOST {
            return Err(refused(format!("{} shares, at most {MOST} are served", plan.shares.len())));
        }
        let mut tags = HashSet::new();
        match plan.shares.iter().find(|share| !tags.insert(&share.tag)) {
            Some(twice) => Err(refused(format!("the tag {}, which is given twice", twice.tag))),
            None => Ok(plan),
        }
    }

    /// Opens what is shared.
    ///
    /// # Errors
    /// The first share that cannot be served.
    pub fn open(&self) -> Result<Vec<Share>, Refused> {
        self.shares.iter().map(Share::open).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(line: &str) -> String {
        Plan::parse(line.as_bytes()).and_then(|plan| plan.open()).err().unwrap().what
    }

    #[test]
    fn a_plan_names_what_is_wrong_with_it() {
        assert_eq!(refusal(r#"{"version":2,"shares":[]}"#), "a plan of version 2");
        let share = |tag: &str, path: &str| format!(r#"{{"tag":"{tag}","path":"{path}","readOnly":true}}"#);
        let plan = |shares: &[String]| format!(r#"{{"version":1,"shares":[{}]}}"#, shares.join(","));
        assert_eq!(refusal(&plan(&[share("a", "/tmp"), share("a", "/tmp")])), "the tag a, which is given twice");
        assert_eq!(refusal(&plan(&[share("a/b", "/tmp")])), "the tag \"a/b\"");
        assert_eq!(refusal(&plan(&[share("a", "/dev/null")])), "/dev/null");
        assert_eq!(refusal(&plan(&[share("a", "/nowhere/at/all")])), "/nowhere/at/all");
        assert!(refusal(&plan(&vec![share("a", "/tmp"); 65])).contains("at most 64"));
        assert!(refusal("{").starts_with("the plan: "));
    }
}
