//! The parts of a file that one owner has locked, as the kernel keeps them: neighbours of a kind are one, and a lock replaces what it covers.

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Range {
    pub start: u64,
    /// The last byte.
    pub end: u64,
    pub exclusive: bool,
}

#[derive(Debug, Default)]
pub struct Ranges(Vec<Range>);

impl Ranges {
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Locks the range in that way, or unlocks it.
    pub fn set(&mut self, start: u64, end: u64, exclusive: Option<bool>) {
        // Those that are touched, with the neighbours that may become one with it.
        let first = self.0.partition_point(|range| range.end.saturating_add(1) < start);
        let behind = self.0.partition_point(|range| range.start <= end.saturating_add(1));
        let mut kept = Vec::with_capacity(3);
        let mut added = exclusive.map(|exclusive| Range { start, end, exclusive });
        for range in &self.0[first..behind.max(first)] {
            if let Some(added) = added.as_mut()
                && range.exclusive == added.exclusive
            {
                added.start = added.start.min(range.start);
                added.end = added.end.max(range.end);
                continue;
            }
            if range.start < start {
                kept.push(Range { end: range.end.min(start - 1), ..*range });
            }
            if range.end > end {
                kept.push(Range { start: range.start.max(end + 1), ..*range });
            }
        }
        kept.extend(added);
        kept.sort_unstable_by_key(|range| range.start);
        self.0.splice(first..behind.max(first), kept);
    }

    /// How many there are after `set`, at most.
    pub fn len_after(&self, start: u64, end: u64, exclusive: Option<bool>) -> usize {
        let first = self.0.partition_point(|range| range.end < start);
        let splits = self.0.get(first).is_some_and(|range| range.start < start && range.end > end);
        self.0.len() + usize::from(splits) + usize::from(exclusive.is_some())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BYTES: u64 = 12;

    /// Each byte's lock, told by the ranges.
    fn bytes(ranges: &Ranges) -> Vec<Option<bool>> {
        let of = |byte| ranges.0.iter().find(|range| (range.start..=range.end).contains(&byte));
        (0..BYTES).map(|byte| of(byte).map(|range| range.exclusive)).collect()
    }

    proptest! {
        #[test]
        fn ranges_are_what_each_byte_was_last_given(
            steps in prop::collection::vec((0..BYTES, 0..BYTES, prop::option::of(any::<bool>())), 0..30)
        ) {
            let mut ranges = Ranges::default();
            let mut model = vec![None; usize::try_from(BYTES).unwrap()];
            for (one, other, kind) in steps {
                let (start, end) = (one.min(other), one.max(other));
                let most = ranges.len_after(start, end, kind);
                ranges.set(start, end, kind);
                (start..=end).for_each(|byte| model[usize::try_from(byte).unwrap()] = kind);
                prop_assert_eq!(bytes(&ranges), model.clone());
                prop_assert!(ranges.len() <= most);
                // As few as the kernel has.
                let apart = |pair: &[Range]| pair[0].end + 1 < pair[1].start || pair[0].exclusive != pair[1].exclusive;
                prop_assert!(ranges.0.windows(2).all(|pair| pair[0].end < pair[1].start && apart(pair)));
            }
        }
    }

    #[test]
    fn the_last_byte_there_is_has_no_neighbour() {
        let mut ranges = Ranges::default();
        ranges.set(0, u64::MAX, Some(true));
        ranges.set(5, u64::MAX, None);
        assert_eq!(ranges.0, [Range { start: 0, end: 4, exclusive: true }]);
    }
}
