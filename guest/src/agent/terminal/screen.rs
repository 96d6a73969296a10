//! What a terminal shows, kept for clients that attach later.

use vt100::Parser;

use super::size::Size;

/// Columns and rows of the largest screen that is kept; larger ones are cut to this. A cell takes 32 bytes, on each of two screens.
const LARGEST: (u16, u16) = (512, 256);

/// A terminal emulator without a window.
pub struct Screen {
    terminal: Parser,
    /// Nothing has been shown yet.
    is_new: bool,
}

impl Screen {
    pub fn new(size: Size) -> Self {
        Self { terminal: Parser::new(size.rows, size.columns, 0), is_new: true }
    }

    /// The size with which a terminal of `size` is kept.
    pub fn limit(size: Size) -> Size {
        let (columns, rows) = LARGEST;
        Size::new(size.columns.get().min(columns), size.rows.get().min(rows)).unwrap_or(size)
    }

    pub fn resize(&mut self, size: Size) {
        self.terminal.set_size(size.rows, size.columns);
    }

    pub fn process(&mut self, output: &[u8]) {
        self.terminal.process(output);
        self.is_new = false;
    }

    /// The bytes that make another terminal of the same size look like this one and take input as it does. They hold both screens, because
    /// a full-screen program returns to the normal one when it ends.
    pub fn replay(&self) -> Vec<u8> {
        let screen = self.terminal.screen();
        let mut replay = Vec::new();
        if self.is_new {
            // Without output nothing is replayed, so that the client's window is not cleared.
            return replay;
        }
        if screen.alternate_screen() {
            let (rows, columns) = screen.size();
            let mut normal = Parser::new(rows, columns, 0);
            *normal.screen_mut() = screen.clone();
            normal.process(b"\x1b[?47l");
            replay.extend_from_slice(normal.screen().contents_formatted().as_bytes());
            replay.extend_from_slice(b"\x1b[?1049h");
        }
        replay.extend_from_slice(screen.state_formatted().as_bytes());
        replay
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn size(columns: u16, rows: u16) -> Size {
        Size::new(columns, rows).unwrap()
    }

    fn shown(bytes: &[u8], columns: u16, rows: u16) -> Screen {
        let mut screen = Screen::new(size(columns, rows));
        screen.process(bytes);
        screen
    }

    fn assert_same(screen: &Screen, columns: u16, rows: u16) {
        let copy = shown(&screen.replay(), columns, rows);
        let (one, other) = (screen.terminal.screen(), copy.terminal.screen());
        assert_eq!(one.contents_formatted(), other.contents_formatted());
        assert_eq!(one.input_mode_formatted(), other.input_mode_formatted());
        assert_eq!(one.alternate_screen(), other.alternate_screen());
    }

    #[test]
    fn is_replayed_with_colours_cursor_and_modes() {
        let screen = shown(b"$ ls\r\n\x1b[1;34mdir\x1b[m file\r\n$ \x1b[?2004h", 20, 5);
        assert_same(&screen, 20, 5);
        assert!(screen.terminal.screen().contents().starts_with("$ ls\ndir file\n$"));
    }

    #[test]
    fn the_screen_below_a_full_screen_program_comes_back() {
        let screen = shown(b"$ vi\r\n\x1b[?1049h\x1b[H\x1b[2J~ text", 20, 5);
        assert_same(&screen, 20, 5);
        let mut copy = shown(&screen.replay(), 20, 5);
        copy.process(b"\x1b[?1049l");
        assert_eq!(copy.terminal.screen().contents(), "$ vi");
        assert_eq!(copy.terminal.screen().cursor_position(), (1, 0));
    }

    #[test]
    fn a_new_one_is_not_drawn() {
        assert!(shown(b"", 20, 5).replay().starts_with(b"\x1b"));
        assert_eq!(Screen::new(size(20, 5)).replay(), b"");
    }

    #[test]
    fn is_kept_no_larger_than_it_may() {
        assert_eq!(Screen::limit(size(u16::MAX, 1)), size(LARGEST.0, 1));
        assert_eq!(Screen::limit(size(80, 24)), size(80, 24));
    }

    /// Generates bytes that mean something to a terminal more often than random bytes would.
    fn output() -> impl Strategy<Value = Vec<u8>> {
        let sequence =
            (prop::collection::vec(0u16..600, 0..4), prop::sample::select(b"ABCDEFGHJKLMPSTXdfghlmnr@`su".to_vec()))
                .prop_map(|(numbers, last)| {
                    let numbers: Vec<_> = numbers.iter().map(u16::to_string).collect();
                    format!("\x1b[{}{}", numbers.join(";"), char::from(last)).into_bytes()
                });
        let mode = (prop::sample::select(vec![1, 6, 7, 25, 47, 1000, 1049, 2004]), any::<bool>())
            .prop_map(|(mode, on)| format!("\x1b[?{mode}{}", if on { 'h' } else { 'l' }).into_bytes());
        let text = prop::sample::select(vec![
            "a",
            "\r",
            "\n",
            "\t",
            "\x08",
            "漢",
            "e\u{301}",
            "\x1b7",
            "\x1b8",
            "\x1bM",
            "\x1bc",
            "👩\u{200d}💻",
        ])
        .prop_map(|text| text.as_bytes().to_vec());
        let noise = prop::collection::vec(any::<u8>(), 0..12);
        prop::collection::vec(prop_oneof![3 => sequence, 1 => mode, 4 => text, 1 => noise], 0..60)
            .prop_map(|parts| parts.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// A panic of the agent would end the machine.
        #[test]
        fn survives_any_output_at_any_size(
            steps in prop::collection::vec((output(), 1u16..140, 1u16..60), 1..5),
        ) {
            let mut screen = Screen::new(size(80, 24));
            for (output, columns, rows) in steps {
                screen.process(&output);
                screen.resize(size(columns, rows));
                screen.replay();
            }
        }
    }
}
