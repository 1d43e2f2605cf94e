//! The instruction decoder beside iced-x86: what both take has the same length.

use galvan_kernel::emulate::{Bits, decode};
use iced_x86::{Decoder, DecoderOptions};

/// The first byte is the mode, the rest code.
pub fn run(data: &[u8]) {
    let Some((&mode, code)) = data.split_first() else {
        return;
    };
    let code = &code[..code.len().min(15)];
    let (bits, width) = match mode % 3 {
        0 => (Bits::B16, 16),
        1 => (Bits::B32, 32),
        _ => (Bits::B64, 64),
    };
    let Ok(ours) = decode(code, bits) else {
        return;
    };
    let theirs = Decoder::with_ip(width, code, 0, DecoderOptions::NONE).decode();
    // The decoder knows a part of the instructions only, but must not invent any. A LOCK prefix that
    // may not be there is for the execution to refuse.
    assert!(
        !theirs.is_invalid() || code.contains(&0xf0),
        "{code:02x?} in {width} bits is {ours:?}, and no instruction"
    );
    if !theirs.is_invalid() {
        assert_eq!(
            usize::from(ours.len),
            theirs.len(),
            "{code:02x?} in {width} bits is {ours:?}, and {theirs}"
        );
    }
}
