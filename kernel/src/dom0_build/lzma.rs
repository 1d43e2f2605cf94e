//! LZMA, LZMA2 and the .xz container, decompressed straight into the caller's buffer.
//!
//! Kernels are compressed with dictionaries of 32 to 128 MiB. A decoder that keeps its dictionary
//! apart from its output needs that much heap and copies every byte once more; here the output *is*
//! the dictionary, and the decoder needs 28 KiB.
//!
//! The only user is [`super::bzimage`]. Formats: "The .xz File Format" 1.2 (tukaani.org, public
//! domain) for the container, the LZMA specification of the LZMA SDK (public domain) for the rest.
//! Check fields are not verified: the stream has to end exactly where the size recorded beside it
//! says, with the range coder in its final state.

use alloc::boxed::Box;
use alloc::vec;

/// Why a stream cannot be decompressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LzmaError {
    /// The data end too early, contradict themselves or do not fill the buffer exactly.
    Corrupt,
    /// The stream uses something that kernels are not compressed with.
    Unsupported(&'static str),
}

use LzmaError::{Corrupt, Unsupported};

/// Decompresses a stream of the old `.lzma` format, which must fill `out`.
pub fn decompress_lzma(input: &[u8], out: &mut [u8]) -> Result<(), LzmaError> {
    let (header, data) = input.split_first_chunk::<13>().ok_or(Corrupt)?;
    let [props, _, _, _, _, size @ ..] = *header;
    let size = u64::from_le_bytes(size);
    if size != u64::MAX && size != out.len() as u64 {
        return Err(Corrupt);
    }
    let mut decoder = Decoder::new(out);
    decoder.set_props(props)?;
    let end = decoder.out.len();
    let mut rc = RangeDecoder::new(data)?;
    decoder.run(&mut rc, end, size == u64::MAX)?;
    if decoder.pos == end {
        Ok(())
    } else {
        Err(Corrupt)
    }
}

/// Decompresses the first stream of an `.xz` file, which must fill `out`.
pub fn decompress_xz(input: &[u8], out: &mut [u8]) -> Result<(), LzmaError> {
    let mut input = Bytes(input);
    let [magic @ .., flags0, flags1] = *input.array::<8>()?;
    if magic != *b"\xfd7zXZ\0" {
        return Err(Corrupt);
    }
    if flags0 != 0 || flags1 > 15 {
        return Err(Unsupported("stream flags"));
    }
    input.take(4)?;
    // Check sizes by type: none, then three types of each size.
    let check_len = match flags1 {
        0 => 0,
        n => 4usize << ((n - 1) / 3),
    };

    let mut start = 0;
    loop {
        let block = input.0;
        let header_len = match input.u8()? {
            // Here begins the index: no more blocks.
            0 => break,
            n => (usize::from(n) + 1) * 4,
        };
        let header = block.get(1..header_len.saturating_sub(4)).ok_or(Corrupt)?;
        let x86 = block_filters(Bytes(header))?;
        input = Bytes(block.get(header_len..).ok_or(Corrupt)?);

        let rest = out.get_mut(start..).ok_or(Corrupt)?;
        let mut decoder = Decoder::new(rest);
        decoder.run_lzma2(&mut input)?;
        let written = decoder.pos;
        if x86 {
            decode_x86_branches(rest.get_mut(..written).ok_or(Corrupt)?);
        }
        start += written;
        let block_len = block.len() - input.0.len();
        input.take(block_len.next_multiple_of(4) - block_len)?;
        input.take(check_len)?;
    }
    if start == out.len() {
        Ok(())
    } else {
        Err(Corrupt)
    }
}

/// Reads the filter list of a block header (behind its size byte); tells whether the x86 filter
/// precedes LZMA2.
fn block_filters(mut header: Bytes<'_>) -> Result<bool, LzmaError> {
    let flags = header.u8()?;
    if flags & 0x3c != 0 {
        return Err(Unsupported("block flags"));
    }
    for present in [0x40, 0x80] {
        if flags & present != 0 {
            header.varint()?;
        }
    }
    let filters = flags & 3;
    let mut x86 = false;
    for n in 0..=filters {
        let id = header.varint()?;
        let len = usize::try_from(header.varint()?).map_err(|_| Corrupt)?;
        let props = header.take(len)?;
        match id {
            0x21 if n == filters => return Ok(x86),
            4 if !x86 && props.iter().all(|&b| b == 0) => x86 = true,
            4 => return Err(Unsupported("x86 filter with an offset")),
            _ => return Err(Unsupported("a filter other than x86 and LZMA2")),
        }
    }
    Err(Unsupported("a filter chain that does not end with LZMA2"))
}

/// Input, consumed from the front.
#[derive(Clone, Copy)]
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], LzmaError> {
        let (taken, rest) = self.0.split_at_checked(n).ok_or(Corrupt)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<&'a [u8; N], LzmaError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(Corrupt)?;
        self.0 = rest;
        Ok(taken)
    }

    fn u8(&mut self) -> Result<u8, LzmaError> {
        self.array::<1>().map(|&[b]| b)
    }

    fn be16(&mut self) -> Result<usize, LzmaError> {
        self.array().map(|&b| usize::from(u16::from_be_bytes(b)))
    }

    fn varint(&mut self) -> Result<u64, LzmaError> {
        let mut value = 0;
        for shift in (0..63).step_by(7) {
            let byte = self.u8()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Corrupt)
    }
}

type Prob = u16;
const PROB_INIT: Prob = 1 << 10;
const STATES: usize = 12;
const POS_STATES: usize = 16;
/// LZMA2 allows no more literal contexts; no kernel uses more.
const MAX_LITERAL_BITS: u32 = 4;
const LITERAL_PROBS: usize = 0x300 << MAX_LITERAL_BITS;
/// First distance slot with bits that are not modelled, and the number of distances below it.
const END_POS_MODEL: u32 = 14;
const FULL_DISTANCES: usize = 1 << (END_POS_MODEL / 2);

struct LengthModel {
    choice: [Prob; 2],
    low: [[Prob; 8]; POS_STATES],
    mid: [[Prob; 8]; POS_STATES],
    high: [Prob; 256],
}

impl LengthModel {
    const INIT: Self = Self {
        choice: [PROB_INIT; 2],
        low: [[PROB_INIT; 8]; POS_STATES],
        mid: [[PROB_INIT; 8]; POS_STATES],
        high: [PROB_INIT; 256],
    };

    fn decode(&mut self, rc: &mut RangeDecoder<'_>, pos_state: usize) -> usize {
        let n = if rc.bit(&mut self.choice[0]) == 0 {
            rc.tree(&mut self.low[pos_state % POS_STATES])
        } else if rc.bit(&mut self.choice[1]) == 0 {
            8 + rc.tree(&mut self.mid[pos_state % POS_STATES])
        } else {
            16 + rc.tree(&mut self.high)
        };
        n as usize + 2
    }
}

struct Model {
    is_match: [[Prob; POS_STATES]; STATES],
    is_rep: [Prob; STATES],
    is_rep_g0: [Prob; STATES],
    is_rep_g1: [Prob; STATES],
    is_rep_g2: [Prob; STATES],
    is_rep0_long: [[Prob; POS_STATES]; STATES],
    slot: [[Prob; 64]; 4],
    special: [Prob; FULL_DISTANCES],
    align: [Prob; 16],
    match_len: LengthModel,
    rep_len: LengthModel,
}

impl Model {
    const INIT: Self = Self {
        is_match: [[PROB_INIT; POS_STATES]; STATES],
        is_rep: [PROB_INIT; STATES],
        is_rep_g0: [PROB_INIT; STATES],
        is_rep_g1: [PROB_INIT; STATES],
        is_rep_g2: [PROB_INIT; STATES],
        is_rep0_long: [[PROB_INIT; POS_STATES]; STATES],
        slot: [[PROB_INIT; 64]; 4],
        special: [PROB_INIT; FULL_DISTANCES],
        align: [PROB_INIT; 16],
        match_len: LengthModel::INIT,
        rep_len: LengthModel::INIT,
    };
}

/// The binary range decoder. Input that has run out reads as zeroes and is noticed at the end.
struct RangeDecoder<'a> {
    input: &'a [u8],
    pos: usize,
    range: u32,
    code: u32,
}

impl<'a> RangeDecoder<'a> {
    fn new(input: &'a [u8]) -> Result<Self, LzmaError> {
        let (&[zero, code @ ..], _) = input.split_first_chunk::<5>().ok_or(Corrupt)?;
        if zero != 0 {
            return Err(Corrupt);
        }
        Ok(Self {
            input,
            pos: 5,
            range: u32::MAX,
            code: u32::from_be_bytes(code),
        })
    }

    #[inline(always)]
    fn normalise(&mut self) {
        if self.range < 1 << 24 {
            let byte = self.input.get(self.pos).copied().unwrap_or(0);
            self.pos += 1;
            self.range <<= 8;
            self.code = self.code << 8 | u32::from(byte);
        }
    }

    #[inline(always)]
    fn bit(&mut self, prob: &mut Prob) -> u32 {
        self.normalise();
        // Probabilities have 11 bits, the range here at least 24: the product fits.
        let bound = (self.range >> 11).wrapping_mul(u32::from(*prob));
        if self.code < bound {
            self.range = bound;
            *prob += ((1 << 11) - *prob) >> 5;
            0
        } else {
            self.range = self.range.wrapping_sub(bound);
            self.code = self.code.wrapping_sub(bound);
            *prob -= *prob >> 5;
            1
        }
    }

    /// A symbol of log2(`N`) bits, the highest first.
    #[inline(always)]
    fn tree<const N: usize>(&mut self, probs: &mut [Prob; N]) -> u32 {
        let mut symbol = 1;
        while symbol < N {
            symbol = symbol << 1 | self.bit(&mut probs[symbol % N]) as usize;
        }
        (symbol - N) as u32
    }

    /// A symbol of `bits` bits, the lowest first, modelled from `probs[base + 1]` on.
    #[inline]
    fn reverse_tree<const N: usize>(
        &mut self,
        probs: &mut [Prob; N],
        base: usize,
        bits: u32,
    ) -> u32 {
        let mut m = 1;
        let mut symbol = 0;
        for n in 0..bits {
            let bit = self.bit(&mut probs[(base + m) % N]);
            m = m << 1 | bit as usize;
            symbol |= bit << n;
        }
        symbol
    }

    /// Bits of equal probability.
    #[inline]
    fn direct(&mut self, bits: u32) -> u32 {
        let mut value = 0u32;
        for _ in 0..bits {
            self.normalise();
            self.range >>= 1;
            let one = self.code >= self.range;
            if one {
                self.code = self.code.wrapping_sub(self.range);
            }
            value = value << 1 | u32::from(one);
        }
        value
    }

    /// Whether the input was used up exactly, to the coder's final state.
    fn finished(&mut self) -> bool {
        self.normalise();
        self.pos == self.input.len() && self.code == 0
    }
}

struct Decoder<'o> {
    out: &'o mut [u8],
    pos: usize,
    /// Where the dictionary begins: matches reach no further back.
    dict: usize,
    model: Box<Model>,
    literal: Box<[Prob]>,
    state: usize,
    reps: [u32; 4],
    lc: u32,
    lp_mask: usize,
    pb_mask: usize,
}

impl<'o> Decoder<'o> {
    fn new(out: &'o mut [u8]) -> Self {
        Self {
            out,
            pos: 0,
            dict: 0,
            model: Box::new(Model::INIT),
            literal: vec![PROB_INIT; LITERAL_PROBS].into_boxed_slice(),
            state: 0,
            reps: [0; 4],
            lc: 0,
            lp_mask: 0,
            pb_mask: 0,
        }
    }

    fn set_props(&mut self, props: u8) -> Result<(), LzmaError> {
        let (lc, lp, pb) = (props % 9, props / 9 % 5, props / 45);
        if pb > 4 {
            return Err(Corrupt);
        }
        if u32::from(lc + lp) > MAX_LITERAL_BITS {
            return Err(Unsupported("more than 4 bits of literal context"));
        }
        self.lc = lc.into();
        self.lp_mask = (1 << lp) - 1;
        self.pb_mask = (1 << pb) - 1;
        Ok(())
    }

    fn reset(&mut self) {
        *self.model = Model::INIT;
        self.literal.fill(PROB_INIT);
        self.state = 0;
        self.reps = [0; 4];
    }

    /// Decodes LZMA2 chunks up to their end mark.
    fn run_lzma2(&mut self, input: &mut Bytes<'_>) -> Result<(), LzmaError> {
        // What the stream has to set before it can be used.
        let (mut need_dict, mut need_props) = (true, true);
        loop {
            let control = input.u8()?;
            match control {
                0 => return Ok(()),
                1 | 2 => {
                    if control == 1 {
                        self.dict = self.pos;
                        need_dict = false;
                    } else if need_dict {
                        return Err(Corrupt);
                    }
                    let len = input.be16()? + 1;
                    let data = input.take(len)?;
                    self.out
                        .get_mut(self.pos..)
                        .and_then(|out| out.get_mut(..len))
                        .ok_or(Corrupt)?
                        .copy_from_slice(data);
                    self.pos += len;
                }
                3..=0x7f => return Err(Corrupt),
                _ => {
                    let len = (usize::from(control & 0x1f) << 16 | input.be16()?) + 1;
                    let packed = input.be16()? + 1;
                    let reset = control >> 5 & 3;
                    if reset == 3 {
                        self.dict = self.pos;
                        need_dict = false;
                    }
                    if reset >= 2 {
                        self.set_props(input.u8()?)?;
                        need_props = false;
                    }
                    if need_dict || need_props {
                        return Err(Corrupt);
                    }
                    if reset >= 1 {
                        self.reset();
                    }
                    let mut rc = RangeDecoder::new(input.take(packed)?)?;
                    let end = self.pos + len;
                    if end > self.out.len() {
                        return Err(Corrupt);
                    }
                    self.run(&mut rc, end, false)?;
                    if !rc.finished() || self.pos != end {
                        return Err(Corrupt);
                    }
                }
            }
        }
    }

    /// Decodes symbols until the output stands at `end` (at most the buffer's length), or up to the
    /// end mark where there is to be one.
    fn run(
        &mut self,
        rc: &mut RangeDecoder<'_>,
        end: usize,
        end_mark: bool,
    ) -> Result<(), LzmaError> {
        // Beside the final position there may be an end mark, which is one more symbol.
        while self.pos < end || end_mark {
            // Input that ran out reads as zeroes: without this check, as a very long output.
            if rc.pos > rc.input.len() {
                return Err(Corrupt);
            }
            // Positions count from the dictionary's reset.
            let pos_state = (self.pos - self.dict) & self.pb_mask & (POS_STATES - 1);
            let state = self.state % STATES;
            if rc.bit(&mut self.model.is_match[state][pos_state]) == 0 {
                if self.pos >= end {
                    return Err(Corrupt);
                }
                self.literal(rc)?;
                continue;
            }
            let model = &mut *self.model;
            let len;
            if rc.bit(&mut model.is_rep[state]) == 0 {
                len = model.match_len.decode(rc, pos_state);
                let distance = Self::distance(model, rc, len);
                self.state = if state < 7 { 7 } else { 10 };
                if distance == u32::MAX {
                    return if end_mark { Ok(()) } else { Err(Corrupt) };
                }
                self.reps = [distance, self.reps[0], self.reps[1], self.reps[2]];
            } else {
                if rc.bit(&mut model.is_rep_g0[state]) == 0 {
                    if rc.bit(&mut model.is_rep0_long[state][pos_state]) == 0 {
                        self.state = if state < 7 { 9 } else { 11 };
                        self.copy(1, end)?;
                        continue;
                    }
                } else if rc.bit(&mut model.is_rep_g1[state]) == 0 {
                    self.reps.swap(0, 1);
                } else if rc.bit(&mut model.is_rep_g2[state]) == 0 {
                    self.reps[..3].rotate_right(1);
                } else {
                    self.reps.rotate_right(1);
                }
                len = self.model.rep_len.decode(rc, pos_state);
                self.state = if state < 7 { 8 } else { 11 };
            }
            self.copy(len, end)?;
        }
        Ok(())
    }

    /// The distance of a match, minus one; `u32::MAX` is the end mark.
    fn distance(model: &mut Model, rc: &mut RangeDecoder<'_>, len: usize) -> u32 {
        let slot = rc.tree(&mut model.slot[(len - 2).min(3)]);
        if slot < 4 {
            return slot;
        }
        let bits = (slot >> 1) - 1;
        let base = (2 | slot & 1) << bits;
        if slot < END_POS_MODEL {
            // The models of the slots follow one another, as their distances do.
            base + rc.reverse_tree(&mut model.special, (base - slot) as usize, bits)
        } else {
            let high = rc.direct(bits - 4) << 4;
            base.wrapping_add(high)
                .wrapping_add(rc.reverse_tree(&mut model.align, 0, 4))
        }
    }

    #[inline]
    fn literal(&mut self, rc: &mut RangeDecoder<'_>) -> Result<(), LzmaError> {
        let at = self.pos - self.dict;
        let before = match at {
            0 => 0,
            _ => self.out.get(self.pos - 1).copied().unwrap_or(0),
        };
        let context = (at & self.lp_mask) << self.lc | usize::from(before) >> (8 - self.lc);
        // After a match the byte that would have continued it is a good guess.
        let guess = match self.state {
            0..7 => None,
            _ => Some(usize::from(self.back(self.reps[0])?)),
        };
        let probs: &mut [Prob; 0x300] = self
            .literal
            .get_mut(context * 0x300..)
            .and_then(|probs| probs.first_chunk_mut())
            .ok_or(Corrupt)?;
        let mut symbol = 1usize;
        if let Some(mut guess) = guess {
            let mut offset = 0x100;
            while symbol < 0x100 {
                guess <<= 1;
                let guess_bit = guess & offset;
                let bit = rc.bit(&mut probs[(offset + guess_bit + symbol) % 0x300]);
                symbol = symbol << 1 | bit as usize;
                offset = if bit != 0 {
                    guess_bit
                } else {
                    offset & !guess_bit
                };
            }
        } else {
            while symbol < 0x100 {
                symbol = symbol << 1 | rc.bit(&mut probs[symbol % 0x300]) as usize;
            }
        }
        *self.out.get_mut(self.pos).ok_or(Corrupt)? = symbol as u8;
        self.pos += 1;
        self.state = match self.state {
            0..=3 => 0,
            4..=9 => self.state - 3,
            _ => self.state - 6,
        };
        Ok(())
    }

    fn back(&self, distance: u32) -> Result<u8, LzmaError> {
        let distance = distance as usize;
        if distance >= self.pos - self.dict {
            return Err(Corrupt);
        }
        self.out
            .get(self.pos - 1 - distance)
            .copied()
            .ok_or(Corrupt)
    }

    /// Copies a match of the most recent distance.
    #[inline]
    fn copy(&mut self, len: usize, end: usize) -> Result<(), LzmaError> {
        let distance = self.reps[0] as usize + 1;
        if distance > self.pos - self.dict || len > end - self.pos {
            return Err(Corrupt);
        }
        let from = self.pos - distance;
        if distance >= len {
            self.out.copy_within(from..from + len, self.pos);
        } else {
            let window = self.out.get_mut(from..self.pos + len).ok_or(Corrupt)?;
            for n in distance..window.len() {
                window[n] = window[n - distance];
            }
        }
        self.pos += len;
        Ok(())
    }
}

/// Undoes the x86 filter on a whole block: the operands of CALL and JMP were made absolute, so that
/// calls of one function look the same everywhere.
///
/// The compressor skipped an operand when opcode bytes among the three before it made a
/// misinterpretation likely; `mask` remembers them in the same way (bit 0: the byte before).
fn decode_x86_branches(code: &mut [u8]) {
    /// For a mask: how many operand bytes an earlier opcode shares, or `None` not to convert.
    const SHARED: [Option<u32>; 8] = [Some(0), Some(1), Some(2), None, Some(3), None, None, None];
    let extends_sign = |byte: u8| byte == 0 || byte == 0xff;

    let mut mask = 0u32;
    let mut last_opcode = None::<usize>;
    let mut at = 0;
    while let Some(&[opcode, b1, b2, b3, b4]) = code.get(at..).and_then(<[u8]>::first_chunk::<5>) {
        if opcode & 0xfe != 0xe8 {
            at += 1;
            continue;
        }
        mask = match last_opcode.map(|last| at - last) {
            Some(gap @ 1..=3) => mask << (gap - 1) & 7,
            _ => 0,
        };
        last_opcode = Some(at);
        let operand = [b1, b2, b3, b4];
        let shared = SHARED[mask as usize];
        let convert = match shared {
            None => false,
            Some(0) => extends_sign(b4),
            Some(n) => !extends_sign(operand[3 - n as usize]) && extends_sign(b4),
        };
        if !convert {
            mask = mask << 1 | 1;
            at += 1;
            continue;
        }
        let next_insn = (at as u32).wrapping_add(5);
        let mut relative = u32::from_le_bytes(operand).wrapping_sub(next_insn);
        if let Some(n @ 1..) = shared {
            // The compressor inverted bits where the shared byte could have been mistaken.
            let shift = 32 - n * 8;
            if extends_sign((relative >> (shift - 8)) as u8) {
                relative = (relative ^ ((1 << shift) - 1)).wrapping_sub(next_insn);
            }
        }
        // Operands are 25 bits, sign-extended.
        let relative = ((relative << 7) as i32 >> 7) as u32;
        if let Some(place) = code.get_mut(at + 1..at + 5) {
            place.copy_from_slice(&relative.to_le_bytes());
        }
        at += 5;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lzma_rust2::{CheckType, FilterType, LzmaOptions, LzmaWriter, XzOptions, XzWriter};
    use proptest::prelude::*;
    use std::io::Write;
    use std::vec::Vec;

    /// Compressible bytes with plenty of x86 opcodes: what kernels are made of.
    fn code(len: usize, mut seed: u32) -> Vec<u8> {
        let mut next = move || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            seed >> 16
        };
        let mut out: Vec<u8> = Vec::new();
        while out.len() < len {
            match next() % 8 {
                0 | 1 => {
                    out.push(0xe8 | next() as u8 & 1);
                    out.extend_from_slice(&(next() as i16 as i32).to_le_bytes());
                }
                2 => out.extend_from_slice(&[0xe8, 0xe9, 0xe8, 0, 0xff, 0xe8]),
                3 => out.push(next() as u8),
                _ if out.len() > 16 => {
                    let from = next() as usize % out.len();
                    let n = (next() as usize % 40).min(out.len() - from);
                    let copy = out[from..from + n].to_vec();
                    out.extend_from_slice(&copy);
                }
                _ => out.extend_from_slice(b"\x48\x89\xe5\x0f\x1f\x00"),
            }
        }
        out.truncate(len);
        out
    }

    fn xz(data: &[u8], x86: bool, preset: u32) -> Vec<u8> {
        let mut options = XzOptions::with_preset(preset);
        options.set_check_sum_type(CheckType::Crc32);
        if x86 {
            options.prepend_pre_filter(FilterType::BcjX86, 0);
        }
        let mut writer = XzWriter::new(Vec::new(), options).unwrap();
        writer.write_all(data).unwrap();
        writer.finish().unwrap()
    }

    fn lzma(data: &[u8], known_size: bool) -> Vec<u8> {
        let options = LzmaOptions::with_preset(6);
        let size = known_size.then_some(data.len() as u64);
        let mut writer = LzmaWriter::new_use_header(Vec::new(), &options, size).unwrap();
        writer.write_all(data).unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn xz_streams_come_back_as_they_were() {
        for (len, x86) in [
            (0, true),
            (1, false),
            (5, true),
            (300_000, true),
            (3_000_000, false),
        ] {
            let data = code(len, 7);
            let packed = xz(&data, x86, 3);
            let mut out = std::vec![0; len];
            assert_eq!(decompress_xz(&packed, &mut out), Ok(()), "{len}");
            assert!(out == data, "{len}");
        }
    }

    #[test]
    fn old_lzma_streams_come_back_with_and_without_their_size() {
        let data = code(200_000, 3);
        for known in [true, false] {
            let mut out = std::vec![0; data.len()];
            assert_eq!(decompress_lzma(&lzma(&data, known), &mut out), Ok(()));
            assert!(out == data);
        }
    }

    #[test]
    fn a_buffer_of_the_wrong_size_is_an_error() {
        let data = code(10_000, 1);
        for len in [0, 9_999, 10_001] {
            let mut out = std::vec![0; len];
            assert_eq!(decompress_xz(&xz(&data, false, 1), &mut out), Err(Corrupt));
            assert_eq!(decompress_lzma(&lzma(&data, false), &mut out), Err(Corrupt));
            assert_eq!(decompress_lzma(&lzma(&data, true), &mut out), Err(Corrupt));
        }
    }

    #[test]
    fn a_stream_cut_short_is_an_error() {
        let data = code(5_000, 2);
        let packed = xz(&data, true, 1);
        // Index and footer, which nothing here depends on, are the last 32 bytes at most.
        for len in (0..packed.len() - 32).step_by(7) {
            let mut out = std::vec![0; data.len()];
            assert!(decompress_xz(&packed[..len], &mut out).is_err(), "{len}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn every_input_survives_the_round_trip(
            data in prop::collection::vec(prop::sample::select(std::vec![0u8, 0xe8, 0xe9, 0xff, 1, 0x48]), 0..4000),
            x86: bool,
        ) {
            let mut out = std::vec![0; data.len()];
            prop_assert_eq!(decompress_xz(&xz(&data, x86, 2), &mut out), Ok(()));
            prop_assert_eq!(out, data);
        }

        #[test]
        fn damaged_streams_end_in_time_and_in_the_buffer(
            seed: u32, hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        ) {
            let data = code(3_000, seed);
            let mut packed = xz(&data, true, 1);
            let mut old = lzma(&data, false);
            for (at, value) in hits {
                *at.get_mut(&mut packed) = value;
                *at.get_mut(&mut old) = value;
            }
            let mut out = std::vec![0; data.len()];
            let _ = decompress_xz(&packed, &mut out);
            let _ = decompress_lzma(&old, &mut out);
        }
    }
}
