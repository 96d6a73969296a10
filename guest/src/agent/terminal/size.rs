//! The size of a terminal.

use std::num::NonZeroU16;

/// The size in character cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub columns: NonZeroU16,
    pub rows: NonZeroU16,
}

impl Size {
    pub fn new(columns: u16, rows: u16) -> Option<Self> {
        Some(Self { columns: NonZeroU16::new(columns)?, rows: NonZeroU16::new(rows)? })
    }
}
