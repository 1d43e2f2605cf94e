//! Turning what a serial port carries into plain lines: escape sequences go, as do carriage returns.

/// Strips terminal control from a byte stream, across the borders of its pieces.
#[derive(Debug, Default)]
pub struct Plain {
    state: State,
}

#[derive(Debug, Default, Clone, Copy)]
enum State {
    #[default]
    Text,
    /// After ESC.
    Escape,
    /// After ESC and a byte that announces one more (character sets and the like).
    OneMore,
    /// After ESC [, until a final byte.
    Control,
    /// After ESC ], P, X, ^ or _, until BEL or ESC \.
    Until,
}

impl Plain {
    /// The plain text in the next piece of the stream.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(bytes.len());
        for &byte in bytes {
            self.state = match (self.state, byte) {
                (State::Text, 0x1b) => State::Escape,
                (State::Text, b'\n' | b'\t' | 0x20..) => {
                    out.push(byte);
                    State::Text
                }
                (State::Text, _) => State::Text,
                (State::Escape, b'[') => State::Control,
                (State::Escape, b']' | b'P' | b'X' | b'^' | b'_') => State::Until,
                (State::Escape, b' '..=b'/') => State::OneMore,
                (State::Escape | State::OneMore, _) => State::Text,
                (State::Control, 0x40..=0x7e) => State::Text,
                (State::Control, _) => State::Control,
                (State::Until, 0x07) => State::Text,
                (State::Until, 0x1b) => State::Escape,
                (State::Until, _) => State::Until,
            };
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(pieces: &[&[u8]]) -> String {
        let mut plain = Plain::default();
        let bytes: Vec<u8> = pieces.iter().flat_map(|p| plain.feed(p)).collect();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn colours_and_titles_are_removed() {
        let text =
            b"a\x1b[1;32mOK\x1b[0m\r\n\x1b]3008;start=1\x1b\\b\x1b]0;t\x07c\x1b(Bd\x1b[?2004h";
        assert_eq!(plain(&[text]), "aOK\nbcd");
    }

    #[test]
    fn a_sequence_may_arrive_in_pieces() {
        assert_eq!(plain(&[b"x\x1b", b"[0", b";1m", b"y"]), "xy");
    }
}
