//! Places in the code, told by where in their page they are and what stands there.

/// An instruction: its address and its bytes.
#[derive(Debug, Clone, Copy)]
pub struct Insn<'a> {
    pub at: u64,
    pub bytes: &'a [u8],
}

/// A place.
#[derive(Debug, PartialEq, Eq)]
pub struct Mark {
    pub name: String,
    offset: u64,
    bytes: Vec<u8>,
}

impl Mark {
    /// Reads `NAME:OFFSET:BYTES`.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let (name, offset, hex) = (parts.next()?, parts.next()?, parts.next()?);
        let bytes = hex
            .as_bytes()
            .chunks(2)
            .map(|two| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok())
            .collect::<Option<Vec<u8>>>()?;
        Some(Self {
            name: name.to_owned(),
            offset: u64::from_str_radix(offset, 16).ok()?,
            bytes,
        })
        .filter(|m| !m.name.is_empty() && !m.bytes.is_empty() && parts.next().is_none())
    }

    /// Whether this is the place: its bytes are there, as far as the block goes, of which these are the
    /// instructions from here on.
    pub fn is_at<'a>(&self, rest: impl Iterator<Item = Insn<'a>>) -> bool {
        let mut rest = rest.peekable();
        if rest.peek().is_none_or(|i| i.at & 0xfff != self.offset) {
            return false;
        }
        rest.flat_map(|i| i.bytes)
            .zip(&self.bytes)
            .all(|(a, b)| a == b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(mark: &Mark, at: u64, code: &[&[u8]]) -> bool {
        mark.is_at(code.iter().map(|bytes| Insn { at, bytes }))
    }

    #[test]
    fn a_place_is_told_by_its_offset_and_its_bytes() {
        let mark = Mark::parse("entry:ff0:fc89de").unwrap();
        assert_eq!(mark.name, "entry");
        assert!(at(&mark, 0x10_0ff0, &[&[0xfc], &[0x89, 0xde], &[0x90]]));
        assert!(!at(&mark, 0x10_0ff1, &[&[0xfc], &[0x89, 0xde]]));
        assert!(!at(&mark, 0x10_0ff0, &[&[0xfc], &[0x89, 0xdf]]));
        assert!(!at(&mark, 0x10_0ff0, &[]));
    }

    #[test]
    fn a_block_that_ends_early_is_enough() {
        let mark = Mark::parse("entry:0:fc89de").unwrap();
        assert!(at(&mark, 0x1000, &[&[0xfc]]));
    }

    #[test]
    fn what_is_no_place_is_refused() {
        for text in ["", "a:1", "a:1:", ":1:90", "a:x:90", "a:1:9x", "a:1:90:2"] {
            assert_eq!(Mark::parse(text), None, "{text}");
        }
    }
}
