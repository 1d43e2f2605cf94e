//! Linux kernel files: from bzImage (or a plain ELF file) to the bytes of the ELF image in it.
//!
//! A bzImage is a setup header, real-mode code, and a small program that carries the kernel proper,
//! compressed; the header tells where (Linux `Documentation/arch/x86/boot.rst`, "payload_offset").
//! Behind the compressed data stands the length of what they decompress to, 32 bits.
//!
//! Decompression goes straight into the caller's buffer, which serves as the dictionary, too: no
//! decoder here takes more than 100 KiB of heap, whatever the window the kernel was compressed with
//! (128 MiB is usual). The boot code of `kernel/bare` calls it.

use alloc::boxed::Box;
use core::fmt;

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};
use structured_zstd::decoding::FrameDecoder;

use super::bytes;
use super::lzma::{self, LzmaError};

/// No kernel is as large as this; a file that says so is damaged.
const MAX_UNPACKED: usize = 1 << 30;

/// How the kernel inside the file is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// Not at all: the file is an ELF file.
    Elf,
    /// gzip
    Gzip,
    /// xz
    Xz,
    /// lzma, the predecessor of xz
    Lzma,
    /// zstd
    Zstd,
    /// lz4 in its legacy framing
    Lz4,
}

impl Codec {
    /// The name of the format.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Elf => "ELF",
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Lzma => "lzma",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
        }
    }
}

/// Why a file cannot be used as dom0's kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelError {
    /// Neither a bzImage nor an ELF file.
    Format,
    /// A bzImage that does not tell where its payload is: from before Linux 2.6.24.
    TooOld {
        /// The boot protocol version it says, major << 8 | minor.
        protocol: u16,
    },
    /// The file is shorter than it says.
    Truncated,
    /// The payload is in a format Galvan has no decoder for.
    Compression(&'static str),
    /// The payload is in no known format; these are its first bytes.
    Magic([u8; 4]),
    /// The uncompressed length beside the payload cannot be right.
    Length(u32),
    /// The buffer has not [`Kernel::unpacked_len`] bytes.
    Buffer,
    /// The payload does not decompress to what was announced.
    Corrupt(Codec),
    /// The payload uses something its decoder does not do.
    Unsupported(Codec, &'static str),
}

impl fmt::Display for KernelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Format => f.write_str("neither a bzImage nor an ELF file"),
            Self::TooOld { protocol } => write!(
                f,
                "boot protocol {}.{:02}, at least 2.08 is needed",
                protocol >> 8,
                protocol & 0xff
            ),
            Self::Truncated => f.write_str("the file is shorter than its header says"),
            Self::Compression(name) => write!(f, "compressed with {name}, which is not supported"),
            Self::Magic(magic) => write!(f, "compressed in an unknown format ({magic:02x?})"),
            Self::Length(len) => write!(f, "uncompressed length {len:#x} cannot be right"),
            Self::Buffer => f.write_str("the buffer is not of the uncompressed length"),
            Self::Corrupt(codec) => write!(f, "the {} data in it are damaged", codec.name()),
            Self::Unsupported(codec, what) => write!(f, "unsupported {}: {what}", codec.name()),
        }
    }
}

/// A kernel file whose outer format is understood.
#[derive(Clone, Copy)]
pub struct Kernel<'a> {
    codec: Codec,
    payload: &'a [u8],
    unpacked_len: usize,
}

impl fmt::Debug for Kernel<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (from, to) = (self.payload.len(), self.unpacked_len);
        write!(f, "Kernel({}, {from} -> {to} bytes)", self.codec.name())
    }
}

impl<'a> Kernel<'a> {
    /// Looks at the outside of a kernel file.
    pub fn parse(file: &'a [u8]) -> Result<Self, KernelError> {
        if file.starts_with(b"\x7fELF") {
            return Ok(Self {
                codec: Codec::Elf,
                payload: file,
                unpacked_len: file.len(),
            });
        }
        if bytes::u16(file, 0x1fe) != Some(0xaa55) || file.get(0x202..0x206) != Some(b"HdrS") {
            return Err(KernelError::Format);
        }
        let protocol = bytes::u16(file, 0x206).unwrap_or(0);
        if protocol < 0x208 {
            return Err(KernelError::TooOld { protocol });
        }
        let setup_sectors = match file.get(0x1f1) {
            Some(0) | None => 4,
            Some(&n) => usize::from(n),
        };
        let field = |at| bytes::u32(file, at).map(|v| v as usize);
        let (Some(offset), Some(len)) = (field(0x248), field(0x24c)) else {
            return Err(KernelError::Truncated);
        };
        let payload = file
            .get((setup_sectors + 1) * 512..)
            .and_then(|code| code.get(offset..))
            .and_then(|payload| payload.get(..len))
            .ok_or(KernelError::Truncated)?;
        let codec = codec_of(payload)?;
        if codec == Codec::Elf {
            return Ok(Self {
                codec,
                payload,
                unpacked_len: payload.len(),
            });
        }
        let (data, size) = payload
            .split_last_chunk::<4>()
            .ok_or(KernelError::Truncated)?;
        let size = u32::from_le_bytes(*size);
        let unpacked_len = size as usize;
        if unpacked_len == 0 || unpacked_len > MAX_UNPACKED {
            return Err(KernelError::Length(size));
        }
        Ok(Self {
            codec,
            // Of gzip, the length is the format's own trailer.
            payload: if codec == Codec::Gzip { payload } else { data },
            unpacked_len,
        })
    }

    /// How the kernel is compressed.
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// Bytes of the ELF image in it.
    pub fn unpacked_len(&self) -> usize {
        self.unpacked_len
    }

    /// Puts the ELF image into `out`, which must have [`Kernel::unpacked_len`] bytes. On an error
    /// the buffer's contents are of no use.
    pub fn unpack(&self, out: &mut [u8]) -> Result<(), KernelError> {
        if out.len() != self.unpacked_len {
            return Err(KernelError::Buffer);
        }
        let done = match self.codec {
            Codec::Elf => {
                out.copy_from_slice(self.payload);
                true
            }
            Codec::Gzip => gunzip(self.payload, out).is_some(),
            Codec::Xz => from_lzma(self.codec, lzma::decompress_xz(self.payload, out))?,
            Codec::Lzma => from_lzma(self.codec, lzma::decompress_lzma(self.payload, out))?,
            Codec::Zstd => FrameDecoder::new()
                .decode_all(self.payload, out)
                .is_ok_and(|len| len == out.len()),
            Codec::Lz4 => unlz4(self.payload, out).is_some(),
        };
        if done {
            Ok(())
        } else {
            Err(KernelError::Corrupt(self.codec))
        }
    }
}

fn codec_of(payload: &[u8]) -> Result<Codec, KernelError> {
    let magic = *payload.first_chunk::<4>().ok_or(KernelError::Truncated)?;
    match magic {
        [0x7f, b'E', b'L', b'F'] => Ok(Codec::Elf),
        [0x1f, 0x8b | 0x9e, ..] => Ok(Codec::Gzip),
        [0xfd, b'7', b'z', b'X'] => Ok(Codec::Xz),
        [0x5d, 0, 0, _] => Ok(Codec::Lzma),
        [0x28, 0xb5, 0x2f, 0xfd] => Ok(Codec::Zstd),
        LZ4_LEGACY => Ok(Codec::Lz4),
        [b'B', b'Z', b'h', _] => Err(KernelError::Compression("bzip2")),
        [0x89, b'L', b'Z', b'O'] => Err(KernelError::Compression("lzo")),
        other => Err(KernelError::Magic(other)),
    }
}

fn from_lzma(codec: Codec, result: Result<(), LzmaError>) -> Result<bool, KernelError> {
    match result {
        Ok(()) => Ok(true),
        Err(LzmaError::Corrupt) => Ok(false),
        Err(LzmaError::Unsupported(what)) => Err(KernelError::Unsupported(codec, what)),
    }
}

/// One member of a gzip file (RFC 1952), which must fill `out`.
fn gunzip(input: &[u8], out: &mut [u8]) -> Option<()> {
    const HEADER_CRC: u8 = 2;
    const EXTRA: u8 = 4;
    const NAME: u8 = 8;
    const COMMENT: u8 = 16;
    let (&[_, _, 8, flags, ..], mut data) = input.split_first_chunk::<10>()? else {
        return None;
    };
    if flags & EXTRA != 0 {
        let len = usize::from(bytes::u16(data, 0)?);
        data = data.get(2 + len..)?;
    }
    for text in [NAME, COMMENT] {
        if flags & text != 0 {
            let end = data.iter().position(|&b| b == 0)?;
            data = data.get(end + 1..)?;
        }
    }
    if flags & HEADER_CRC != 0 {
        data = data.get(2..)?;
    }
    let mut state = Box::<DecompressorOxide>::default();
    let flags = TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let (status, _, written) = decompress(&mut state, data, out, 0, flags);
    (status == TINFLStatus::Done && written == out.len()).then_some(())
}

const LZ4_LEGACY: [u8; 4] = 0x184c_2102u32.to_le_bytes();

/// An lz4 file in the legacy frame format ("LZ4 Frame Format Description"), which must fill `out`:
/// blocks that begin with their compressed length and know nothing of each other.
fn unlz4(input: &[u8], out: &mut [u8]) -> Option<()> {
    let mut input = input.strip_prefix(&LZ4_LEGACY)?;
    let mut pos = 0;
    while !input.is_empty() {
        let (len, rest) = input.split_first_chunk()?;
        if *len == LZ4_LEGACY {
            // Another frame follows.
            input = rest;
            continue;
        }
        let (block, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
        pos += lz4_flex::block::decompress_into(block, out.get_mut(pos..)?).ok()?;
        input = rest;
    }
    (pos == out.len()).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write as _;
    use std::string::ToString;
    use std::vec::Vec;

    /// A bzImage around `payload`, by the letter of the boot protocol.
    fn bzimage(setup_sectors: u8, offset: u32, payload: &[u8]) -> Vec<u8> {
        let code = (usize::from(setup_sectors.max(1)) + 1) * 512;
        let code = if setup_sectors == 0 { 5 * 512 } else { code };
        let mut file = std::vec![0u8; code + offset as usize];
        file[0x1f1] = setup_sectors;
        file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        file[0x202..0x206].copy_from_slice(b"HdrS");
        file[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        file[0x248..0x24c].copy_from_slice(&offset.to_le_bytes());
        file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        file.extend_from_slice(payload);
        file.extend_from_slice(&[0xcc; 700]);
        file
    }

    fn sized(mut packed: Vec<u8>, len: usize) -> Vec<u8> {
        packed.extend_from_slice(&(len as u32).to_le_bytes());
        packed
    }

    fn image(len: usize) -> Vec<u8> {
        let text = b"\x7fELF the quick brown fox jumps over the lazy dog 0123456789";
        (0..len)
            .map(|n| text[n * (1 + n / 977) % text.len()])
            .collect()
    }

    fn gzip(data: &[u8], flags: u8) -> Vec<u8> {
        let mut out = std::vec![0x1f, 0x8b, 8, flags, 0, 0, 0, 0, 2, 3];
        if flags & 4 != 0 {
            out.extend_from_slice(b"\x03\0abc");
        }
        if flags & 8 != 0 {
            out.extend_from_slice(b"vmlinux.bin\0");
        }
        if flags & 16 != 0 {
            out.extend_from_slice(b"\0");
        }
        if flags & 2 != 0 {
            out.extend_from_slice(&[1, 2]);
        }
        out.extend_from_slice(&miniz_oxide::deflate::compress_to_vec(data, 6));
        out.extend_from_slice(&[9, 9, 9, 9]);
        sized(out, data.len())
    }

    fn xz(data: &[u8]) -> Vec<u8> {
        let options = lzma_rust2::XzOptions::with_preset(1);
        let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
        writer.write_all(data).unwrap();
        sized(writer.finish().unwrap(), data.len())
    }

    fn lzma(data: &[u8]) -> Vec<u8> {
        let options = lzma_rust2::LzmaOptions::with_preset(1);
        let mut writer =
            lzma_rust2::LzmaWriter::new_use_header(Vec::new(), &options, None).unwrap();
        writer.write_all(data).unwrap();
        sized(writer.finish().unwrap(), data.len())
    }

    fn zstd(data: &[u8]) -> Vec<u8> {
        let level = structured_zstd::encoding::CompressionLevel::Fastest;
        let packed = structured_zstd::encoding::compress_to_vec(data, level);
        sized(packed, data.len())
    }

    fn lz4(data: &[u8]) -> Vec<u8> {
        let mut out = LZ4_LEGACY.to_vec();
        for block in data.chunks(8 << 10) {
            let packed = lz4_flex::block::compress(block);
            out.extend_from_slice(&(packed.len() as u32).to_le_bytes());
            out.extend_from_slice(&packed);
        }
        sized(out, data.len())
    }

    fn unpack(file: &[u8]) -> Result<Vec<u8>, KernelError> {
        let kernel = Kernel::parse(file)?;
        let mut out = std::vec![0; kernel.unpacked_len()];
        kernel.unpack(&mut out)?;
        Ok(out)
    }

    #[test]
    fn every_codec_gives_the_image_back() {
        let image = image(100_000);
        for (codec, payload) in [
            (Codec::Elf, image.clone()),
            (Codec::Gzip, gzip(&image, 0)),
            (Codec::Gzip, gzip(&image, 4 | 8 | 16 | 2)),
            (Codec::Xz, xz(&image)),
            (Codec::Lzma, lzma(&image)),
            (Codec::Zstd, zstd(&image)),
            (Codec::Lz4, lz4(&image)),
        ] {
            let file = bzimage(39, 716, &payload);
            assert_eq!(Kernel::parse(&file).unwrap().codec(), codec);
            assert!(unpack(&file).unwrap() == image, "{codec:?}");
        }
    }

    #[test]
    fn a_plain_elf_file_is_a_kernel_too() {
        let image = image(3000);
        assert_eq!(unpack(&image).unwrap(), image);
    }

    #[test]
    fn a_setup_size_of_zero_means_four_sectors() {
        let image = image(500);
        assert_eq!(unpack(&bzimage(0, 0, &gzip(&image, 0))).unwrap(), image);
    }

    #[test]
    fn what_cannot_be_loaded_is_refused_with_its_reason() {
        let good = bzimage(4, 0, &gzip(&image(100), 0));
        let reason = |file: &[u8]| unpack(file).unwrap_err().to_string();
        assert_eq!(reason(b""), "neither a bzImage nor an ELF file");
        assert_eq!(reason(&good[0x100..]), "neither a bzImage nor an ELF file");
        assert_eq!(
            reason(&good[..0x24e]),
            "the file is shorter than its header says"
        );
        assert_eq!(
            reason(&good[..2570]),
            "the file is shorter than its header says"
        );
        let mut old = good.clone();
        old[0x206] = 5;
        assert_eq!(reason(&old), "boot protocol 2.05, at least 2.08 is needed");
        let with = |payload: &[u8]| bzimage(4, 8, payload);
        assert_eq!(
            reason(&with(b"BZh91AY&SY-------")),
            "compressed with bzip2, which is not supported"
        );
        assert_eq!(
            reason(&with(b"\x89LZO\0\r\n\x1a\n")),
            "compressed with lzo, which is not supported"
        );
        assert_eq!(
            reason(&with(b"MZ\x90\0----")),
            "compressed in an unknown format ([4d, 5a, 90, 00])"
        );
        let mut huge = zstd(&image(100));
        let end = huge.len();
        huge[end - 1] = 0xff;
        assert!(reason(&with(&huge)).starts_with("uncompressed length 0xff"));
    }

    #[test]
    fn a_length_that_the_data_do_not_have_is_noticed() {
        let image = image(5000);
        for pack in [|d: &[u8]| gzip(d, 0), xz, lzma, zstd, lz4] {
            for wrong in [4999u32, 5001] {
                let mut payload = pack(&image);
                let end = payload.len();
                payload[end - 4..].copy_from_slice(&wrong.to_le_bytes());
                let error = unpack(&bzimage(4, 0, &payload)).unwrap_err();
                assert!(matches!(error, KernelError::Corrupt(_)), "{wrong} {error}");
            }
        }
    }

    #[test]
    fn the_buffer_has_to_be_of_the_announced_length() {
        let file = bzimage(4, 0, &gzip(&image(100), 0));
        let kernel = Kernel::parse(&file).unwrap();
        assert_eq!(kernel.unpack(&mut [0; 99]), Err(KernelError::Buffer));
    }

    /// Compares decoders on real kernels: `GALVAN_TEST_KERNELS=a:b cargo test --release -- --ignored
    /// real_kernels --nocapture`.
    #[test]
    #[ignore = "needs kernels of distributions"]
    fn real_kernels_unpack_to_elf_files() {
        let list = std::env::var("GALVAN_TEST_KERNELS").unwrap_or_default();
        for path in list.split(':').filter(|p| !p.is_empty()) {
            let file = std::fs::read(path).unwrap();
            let start = std::time::Instant::now();
            let elf = unpack(&file).unwrap();
            std::println!(
                "{path}: {:?} in {:?}",
                Kernel::parse(&file).unwrap(),
                start.elapsed()
            );
            let image = crate::dom0_build::elf::Image::parse(&elf).unwrap();
            std::println!("{image:#x?}");
            assert!(image.range().contains(&u64::from(image.entry)));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        #[test]
        fn damaged_files_are_errors_or_images_but_never_a_panic(
            which in 0usize..5, hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        ) {
            let image = image(3000);
            let payload = match which {
                0 => gzip(&image, 8),
                1 => xz(&image),
                2 => lzma(&image),
                3 => zstd(&image),
                _ => lz4(&image),
            };
            let mut file = bzimage(4, 16, &payload);
            // Keep the damage to the header's fields of interest and the payload.
            let span = 2570..2570 + payload.len() - 4;
            for (at, value) in hits {
                let at = span.start + at.index(span.len());
                file[at] = value;
            }
            let _ = unpack(&file);
        }

        #[test]
        fn any_bytes_are_looked_at_safely(file in prop::collection::vec(any::<u8>(), 0..1200), setup: u8, offset: u32, len: u32) {
            let mut file = file;
            let _ = Kernel::parse(&file);
            if file.len() >= 0x250 {
                file[0x1f1] = setup;
                file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
                file[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
                file[0x248..0x24c].copy_from_slice(&offset.to_le_bytes());
                file[0x24c..0x250].copy_from_slice(&len.to_le_bytes());
                let _ = Kernel::parse(&file);
            }
        }
    }
}
