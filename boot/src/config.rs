//! `galvan.cfg`: the configuration file beside the application.
//!
//! The dialect is that of `xen.cfg` (Xen's document "EFI boot support"): sections in square
//! brackets, `key=value` lines, comments. [`Config`] keeps the text and looks things up in it, so
//! that nothing is allocated and every value knows its line. The application reads the file,
//! [`Config::parse`]s it, asks for a [`Selection`], and follows `chain=` where that says so.
//!
//! What differs from `xen.cfg`: an unknown key is an error and not silence, and a section that
//! was asked for by name has to exist, even if `[global]` would supply all it needs.

use core::fmt;

/// The section whose values hold for all sections that do not give their own.
const GLOBAL: &str = "global";

/// How many files `chain=` may lead through, so that a loop of files ends.
pub const MAX_CHAIN: usize = 8;

/// What a key is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// `default=`: the section to boot if none is named. In `[global]` only.
    Default,
    /// `chain=`: the file to go on with if this one has no such section. In `[global]` only.
    Chain,
    /// `options=`: the hypervisor's command line.
    Options,
    /// `kernel=`: dom0's kernel file and its command line.
    Kernel,
    /// `ramdisk=`: dom0's initial ramdisk.
    Ramdisk,
    /// `video=`: a video mode. Not supported, harmless to ignore.
    Video,
    /// `ucode=`: a microcode update. Not supported, harmless to ignore.
    Microcode,
    /// `xsm=`: a security policy. Not supported, and not harmless to ignore.
    Xsm,
    /// `dtb=`: a device tree, which no x86 machine reads.
    DeviceTree,
}

impl Key {
    const ALL: [Self; 9] = [
        Self::Default,
        Self::Chain,
        Self::Options,
        Self::Kernel,
        Self::Ramdisk,
        Self::Video,
        Self::Microcode,
        Self::Xsm,
        Self::DeviceTree,
    ];

    /// The key as it is written.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Chain => "chain",
            Self::Options => "options",
            Self::Kernel => "kernel",
            Self::Ramdisk => "ramdisk",
            Self::Video => "video",
            Self::Microcode => "ucode",
            Self::Xsm => "xsm",
            Self::DeviceTree => "dtb",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|key| key.name() == name)
    }

    /// Keys of `xen.cfg` that are understood but not acted upon: the machine boots without.
    const IGNORED: [Self; 3] = [Self::Video, Self::Microcode, Self::DeviceTree];
}

/// One `key=value` line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Line in the file, from 1.
    pub line: usize,
    /// The section it stands in; empty before the first header.
    pub section: &'a str,
    /// What it sets.
    pub key: Key,
    /// What it sets it to, without the white space around it.
    pub value: &'a str,
}

impl<'a> Entry<'a> {
    /// The value of `kernel=` or `ramdisk=`: a file name, and what is to be passed to it.
    pub fn file_and_cmdline(&self) -> (&'a str, &'a str) {
        match self.value.split_once(|c: char| c.is_ascii_whitespace()) {
            Some((file, rest)) => (file, rest.trim_ascii_start()),
            None => (self.value, ""),
        }
    }
}

/// A configuration file without a syntax error.
#[derive(Clone, Copy, Debug)]
pub struct Config<'a> {
    text: &'a str,
}

/// What is to be booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selection<'a> {
    /// The section; `None` = the file names no default, so that its headers do not count.
    pub section: Option<&'a str>,
    /// The hypervisor's command line.
    pub options: Option<Entry<'a>>,
    /// Dom0's kernel.
    pub kernel: Entry<'a>,
    /// Dom0's initial ramdisk.
    pub ramdisk: Option<Entry<'a>>,
    /// Keys of this section that are not supported and do no harm to ignore.
    pub ignored: [Option<Entry<'a>>; 3],
}

/// What a file says about the section that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    clippy::large_enum_variant,
    reason = "one of them exists, on the stack; there is no allocator to box with"
)]
pub enum Lookup<'a> {
    /// It is here.
    Found(Selection<'a>),
    /// It is not here, but this file may have it.
    Chain {
        /// The `chain=` line.
        file: Entry<'a>,
        /// The section to look for there; `None` = that file's own default.
        section: Option<&'a str>,
    },
}

impl<'a> Config<'a> {
    /// Checks the file from end to end.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ConfigError<'a>> {
        if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
            return Err(ConfigError::at(1, Reason::Utf16));
        }
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        let text = core::str::from_utf8(bytes).map_err(|error| {
            let good = bytes.get(..error.valid_up_to()).unwrap_or_default();
            let line = good.iter().filter(|&&b| b == b'\n').count();
            ConfigError::at(line.saturating_add(1), Reason::NotText)
        })?;
        Lines::new(text).find_map(Result::err).map_or(Ok(()), Err)?;
        Ok(Self { text })
    }

    /// All `key=value` lines, in the order of the file.
    pub fn entries(&self) -> impl Iterator<Item = Entry<'a>> + use<'a> {
        Lines::new(self.text).filter_map(|line| match line {
            Ok(Line::Entry(entry)) => Some(entry),
            _ => None,
        })
    }

    /// What to boot: `section`, or the file's default.
    pub fn select(&self, section: Option<&'a str>) -> Result<Lookup<'a>, ConfigError<'a>> {
        let default = self.first(Some(GLOBAL), Key::Default);
        let wanted = section.or(default.map(|entry| entry.value));
        let here = wanted.is_none_or(|name| name != GLOBAL && self.has_section(name));
        let kernel = self.get(wanted, Key::Kernel).filter(|_| here);
        let Some(kernel) = kernel else {
            if let Some(file) = self.first(Some(GLOBAL), Key::Chain) {
                return Ok(Lookup::Chain {
                    file,
                    section: wanted,
                });
            }
            return Err(match wanted {
                Some(name) if !here => ConfigError {
                    line: default
                        .filter(|_| section.is_none())
                        .map(|entry| entry.line),
                    reason: Reason::NoSuchSection(name),
                },
                _ => ConfigError {
                    line: None,
                    reason: Reason::NoKernel(wanted),
                },
            });
        };
        if let Some(xsm) = self.get(wanted, Key::Xsm) {
            return Err(ConfigError::at(xsm.line, Reason::XsmPolicy));
        }
        Ok(Lookup::Found(Selection {
            section: wanted,
            options: self.get(wanted, Key::Options),
            kernel,
            ramdisk: self.get(wanted, Key::Ramdisk),
            ignored: Key::IGNORED.map(|key| self.get(wanted, key)),
        }))
    }

    /// The section's own value, or else that of `[global]`.
    fn get(&self, section: Option<&str>, key: Key) -> Option<Entry<'a>> {
        self.first(section, key)
            .or_else(|| self.first(Some(GLOBAL), key))
    }

    fn first(&self, section: Option<&str>, key: Key) -> Option<Entry<'a>> {
        self.entries()
            .find(|entry| entry.key == key && section.is_none_or(|name| name == entry.section))
    }

    fn has_section(&self, name: &str) -> bool {
        Lines::new(self.text).any(|line| line == Ok(Line::Header(name)))
    }
}

/// A line that says something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line<'a> {
    Header(&'a str),
    Entry(Entry<'a>),
}

/// The lines that say something, and what is wrong with those that do not.
struct Lines<'a> {
    lines: core::iter::Enumerate<core::str::Split<'a, char>>,
    section: &'a str,
}

impl<'a> Lines<'a> {
    fn new(text: &'a str) -> Self {
        Self {
            lines: text.split('\n').enumerate(),
            section: "",
        }
    }

    fn parse(&mut self, line: usize, text: &'a str) -> Result<Line<'a>, ConfigError<'a>> {
        let bad = |reason| Err(ConfigError::at(line, reason));
        if let Some(header) = text.strip_prefix('[') {
            let Some((name, rest)) = header.split_once(']') else {
                return bad(Reason::UnclosedHeader);
            };
            let name = name.trim_ascii();
            if name.is_empty() {
                return bad(Reason::NamelessSection);
            }
            if !rest.trim_ascii().is_empty() {
                return bad(Reason::TextAfterHeader);
            }
            self.section = name;
            return Ok(Line::Header(name));
        }
        let Some((name, value)) = text.split_once('=') else {
            return bad(Reason::NoEqualsSign(text));
        };
        let Some(key) = Key::from_name(name.trim_ascii()) else {
            return bad(Reason::UnknownKey(name.trim_ascii()));
        };
        if matches!(key, Key::Default | Key::Chain) && self.section != GLOBAL {
            return bad(Reason::OnlyGlobal(key));
        }
        let value = value.trim_ascii();
        if value.is_empty() && key != Key::Options {
            return bad(Reason::NoValue(key));
        }
        Ok(Line::Entry(Entry {
            line,
            section: self.section,
            key,
            value,
        }))
    }
}

impl<'a> Iterator for Lines<'a> {
    type Item = Result<Line<'a>, ConfigError<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (index, text) = self.lines.next()?;
            let text = without_comment(text).trim_ascii();
            if !text.is_empty() {
                return Some(self.parse(index.saturating_add(1), text));
            }
        }
    }
}

/// A comment begins with `#` at the beginning of a line or of a word (so that `a=b#c` keeps its
/// value), or with `;` at the beginning of a line (`;` separates things inside command lines).
fn without_comment(line: &str) -> &str {
    if line.trim_ascii_start().starts_with(';') {
        return "";
    }
    let mut after_space = true;
    for (at, byte) in line.bytes().enumerate() {
        if byte == b'#' && after_space {
            return line.get(..at).unwrap_or(line);
        }
        after_space = byte.is_ascii_whitespace();
    }
    line
}

/// What is wrong with a configuration, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigError<'a> {
    /// The line, from 1, if it is any line in particular.
    pub line: Option<usize>,
    /// What is wrong.
    pub reason: Reason<'a>,
}

impl<'a> ConfigError<'a> {
    const fn at(line: usize, reason: Reason<'a>) -> Self {
        Self {
            line: Some(line),
            reason,
        }
    }
}

/// What can be wrong with a configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason<'a> {
    /// Encoded as UTF-16.
    Utf16,
    /// Neither ASCII nor UTF-8.
    NotText,
    /// `[name` without `]`.
    UnclosedHeader,
    /// `[]`.
    NamelessSection,
    /// Something follows the `]`.
    TextAfterHeader,
    /// Neither a header nor an assignment.
    NoEqualsSign(&'a str),
    /// No key of this dialect.
    UnknownKey(&'a str),
    /// A key that means something in `[global]` only.
    OnlyGlobal(Key),
    /// Nothing behind the `=`.
    NoValue(Key),
    /// A security policy is asked for and would not be in force.
    XsmPolicy,
    /// No such section, in this file.
    NoSuchSection(&'a str),
    /// The section (or the file) names no kernel.
    NoKernel(Option<&'a str>),
}

impl fmt::Display for Reason<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Utf16 => f.write_str("the file is UTF-16, it has to be ASCII or UTF-8"),
            Self::NotText => f.write_str("the line is neither ASCII nor UTF-8"),
            Self::UnclosedHeader => f.write_str("the section's name has no closing bracket"),
            Self::NamelessSection => f.write_str("the section has no name"),
            Self::TextAfterHeader => f.write_str("there is text after the section's name"),
            Self::NoEqualsSign(text) => {
                write!(f, "expected [section] or key=value, found '{text}'")
            }
            Self::UnknownKey(name) => write!(f, "unknown key '{name}'"),
            Self::OnlyGlobal(key) => write!(f, "{}= belongs into [global]", key.name()),
            Self::NoValue(key) => write!(f, "{}= has no value", key.name()),
            Self::XsmPolicy => f.write_str("xsm= is not supported: no policy would be in force"),
            Self::NoSuchSection(name) => write!(f, "there is no section [{name}]"),
            Self::NoKernel(Some(name)) => write!(f, "section [{name}] has no kernel="),
            Self::NoKernel(None) => f.write_str("no section is chosen and there is no kernel="),
        }
    }
}

/// The names, without `.cfg`, under which the configuration of the application `file_name` is
/// looked for: its own without `.efi`, then ever less of it, cut at `.`, `-` and `_`
/// (`galvan-0.1-test.efi`: `galvan-0.1-test`, `galvan-0.1`, `galvan-0`, `galvan`), and last
/// `galvan`, for applications that were renamed (`BOOTX64.EFI`).
pub fn stems(file_name: &str) -> impl Iterator<Item = &str> {
    let full = match file_name.rfind('.') {
        Some(dot) => file_name.get(..dot).unwrap_or(file_name),
        None => file_name,
    };
    let mut next = Some(full);
    core::iter::from_fn(move || {
        let stem = next?;
        next = stem.rfind(['.', '-', '_']).and_then(|cut| stem.get(..cut));
        Some(stem)
    })
    .filter(|stem| !stem.is_empty())
    .chain(Some("galvan"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::string::{String, ToString};
    use std::vec::Vec;

    const TYPICAL: &str = "\
# the usual
[global]
default=debian

[debian]
options=console=com1 com1=115200 dom0_mem=1G
kernel=vmlinuz-6.12 root=/dev/sda1 ro  quiet #earlyprintk=xen
ramdisk=initrd.img-6.12

[rescue]
kernel = vmlinuz-6.12 single
";

    fn found<'a>(text: &'a str, section: Option<&'a str>) -> Selection<'a> {
        match Config::parse(text.as_bytes()).unwrap().select(section) {
            Ok(Lookup::Found(selection)) => selection,
            other => panic!("{other:?}"),
        }
    }

    fn refused(text: &str, section: Option<&str>) -> (Option<usize>, String) {
        let error = match Config::parse(text.as_bytes()) {
            Ok(config) => config.select(section).unwrap_err(),
            Err(error) => error,
        };
        (error.line, error.reason.to_string())
    }

    #[test]
    fn the_default_section_gives_options_kernel_and_ramdisk() {
        let boot = found(TYPICAL, None);
        assert_eq!(boot.section, Some("debian"));
        assert_eq!(
            boot.options.unwrap().value,
            "console=com1 com1=115200 dom0_mem=1G"
        );
        assert_eq!(
            boot.kernel.file_and_cmdline(),
            ("vmlinuz-6.12", "root=/dev/sda1 ro  quiet")
        );
        assert_eq!(boot.kernel.line, 7);
        assert_eq!(
            boot.ramdisk.unwrap().file_and_cmdline(),
            ("initrd.img-6.12", "")
        );
        assert_eq!(boot.ignored, [None; 3]);
    }

    #[test]
    fn a_named_section_wins_over_the_default() {
        let boot = found(TYPICAL, Some("rescue"));
        assert_eq!(boot.kernel.file_and_cmdline(), ("vmlinuz-6.12", "single"));
        assert_eq!((boot.options, boot.ramdisk), (None, None));
    }

    #[test]
    fn global_supplies_what_a_section_lacks() {
        let text =
            "[global]\noptions=loglvl=all\nramdisk=rd\n[a]\nkernel=k\n[b]\nkernel=k\noptions=\n";
        assert_eq!(found(text, Some("a")).options.unwrap().value, "loglvl=all");
        assert_eq!(found(text, Some("a")).ramdisk.unwrap().value, "rd");
        assert_eq!(found(text, Some("b")).options.unwrap().value, "");
    }

    #[test]
    fn without_a_default_headers_do_not_count() {
        let boot = found("[a]\nramdisk=r\n[b]\nkernel=k1\n[c]\nkernel=k2", None);
        assert_eq!(boot.section, None);
        assert_eq!(boot.kernel.value, "k1");
        assert_eq!(boot.ramdisk.unwrap().value, "r");
        assert_eq!(found("kernel=k", None).kernel.value, "k");
    }

    #[test]
    fn the_first_of_two_values_counts() {
        assert_eq!(found("[a]\nkernel=1\nkernel=2", Some("a")).kernel.line, 2);
        assert_eq!(
            found("[a]\nkernel=1\n[b]\n[a]\nramdisk=2", Some("a"))
                .ramdisk
                .unwrap()
                .value,
            "2"
        );
    }

    #[test]
    fn dos_line_ends_and_a_byte_order_mark_are_no_part_of_the_values() {
        let boot = found("\u{feff}[a]\r\nkernel=k  arg \r\n", Some("a"));
        assert_eq!(boot.kernel.value, "k  arg");
    }

    #[test]
    fn a_hash_inside_a_word_is_no_comment() {
        let text = " # c\n;kernel=no\n[a] # c\nkernel=k x=#1 p=a#b;c\t# d";
        assert_eq!(found(text, Some("a")).kernel.value, "k x=#1 p=a#b;c");
        assert_eq!(found("#\n[a]\nkernel=k #x#", Some("a")).kernel.value, "k");
    }

    #[test]
    fn an_unknown_key_names_its_line() {
        let text = "[a]\nkernel=k\n\nkernal=k\n";
        assert_eq!(
            refused(text, Some("a")),
            (Some(4), "unknown key 'kernal'".into())
        );
        // Whether or not its section is to be booted.
        let text = "[global]\ndefault=a\n[b]\nfoo=1\n[a]\nkernel=k\n";
        assert_eq!(refused(text, None).0, Some(4));
    }

    #[test]
    fn syntax_errors_name_their_line() {
        let cases: [(&str, usize, &str); 8] = [
            ("\n[a", 2, "closing bracket"),
            ("[ ]", 1, "no name"),
            ("[a] b", 1, "text after"),
            ("[a]\nkernel", 2, "found 'kernel'"),
            ("[a]\nkernel= # k", 2, "kernel= has no value"),
            ("[a]\ndefault=a", 2, "default= belongs into [global]"),
            ("chain=a", 1, "chain= belongs into [global]"),
            ("=a", 1, "unknown key ''"),
        ];
        for (text, line, reason) in cases {
            let refusal = refused(text, None);
            assert_eq!(refusal.0, Some(line), "{text}");
            assert!(refusal.1.contains(reason), "{text}: {}", refusal.1);
        }
    }

    #[test]
    fn files_that_are_no_text_are_refused() {
        let error = Config::parse(b"\xff\xfe[\0").unwrap_err();
        assert_eq!(error, ConfigError::at(1, Reason::Utf16));
        let error = Config::parse(b"[a]\nkernel=k\nramdisk=\xff").unwrap_err();
        assert_eq!(error, ConfigError::at(3, Reason::NotText));
    }

    #[test]
    fn a_missing_section_is_an_error_and_not_the_default() {
        let refusal = refused(TYPICAL, Some("debain"));
        assert_eq!(refusal, (None, "there is no section [debain]".into()));
        let refusal = refused("[global]\ndefault=b\nkernel=k\n[a]", None);
        assert_eq!(refusal, (Some(2), "there is no section [b]".into()));
        assert!(
            refused("[global]\nkernel=k", Some("global"))
                .1
                .contains("no section")
        );
    }

    #[test]
    fn a_section_without_a_kernel_is_an_error() {
        assert_eq!(
            refused("[a]\nramdisk=r", Some("a")).1,
            "section [a] has no kernel="
        );
        assert!(refused("", None).1.contains("no kernel="));
    }

    #[test]
    fn chain_leads_on_when_the_section_is_not_here() {
        let text = "[global]\ndefault=b\nchain=more.cfg\n[a]\nkernel=k\n[c]\nramdisk=r\n";
        let config = Config::parse(text.as_bytes()).unwrap();
        for (asked, wanted) in [(None, "b"), (Some("z"), "z"), (Some("c"), "c")] {
            match config.select(asked).unwrap() {
                Lookup::Chain { file, section } => {
                    assert_eq!((file.value, file.line), ("more.cfg", 3));
                    assert_eq!(section, Some(wanted));
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(found(text, Some("a")).kernel.value, "k");
        let config = Config::parse(b"[global]\nchain=x").unwrap();
        assert!(matches!(
            config.select(None),
            Ok(Lookup::Chain { section: None, .. })
        ));
    }

    #[test]
    fn unsupported_keys_are_reported_but_a_security_policy_stops_the_boot() {
        let text =
            "[global]\nucode=u.bin\n[a]\nkernel=k\nvideo=gfx-1024x768\n[b]\nkernel=k\nxsm=p\n";
        let ignored: Vec<_> = found(text, Some("a"))
            .ignored
            .into_iter()
            .flatten()
            .map(|entry| (entry.line, entry.key.name()))
            .collect();
        assert_eq!(ignored, [(5, "video"), (2, "ucode")]);
        assert_eq!(refused(text, Some("b")).0, Some(8));
    }

    #[test]
    fn the_name_of_the_configuration_follows_that_of_the_application() {
        let names = |name| stems(name).collect::<Vec<_>>();
        assert_eq!(
            names("xen-4.2-unstable.efi"),
            ["xen-4.2-unstable", "xen-4.2", "xen-4", "xen", "galvan"]
        );
        assert_eq!(names("BOOTX64.EFI"), ["BOOTX64", "galvan"]);
        assert_eq!(names(""), ["galvan"]);
        assert_eq!(names("-x.efi"), ["-x", "galvan"]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused_with_a_line_that_exists(
            bytes in prop::collection::vec(
                prop_oneof![Just(b'\n'), Just(b'['), Just(b']'), Just(b'='), Just(b'#'), any::<u8>()],
                0..200,
            )
        ) {
            let lines = bytes.iter().filter(|&&b| b == b'\n').count() + 1;
            match Config::parse(&bytes) {
                Ok(config) => { let _ = config.select(None); }
                Err(error) => prop_assert!(error.line.is_some_and(|l| (1..=lines).contains(&l))),
            }
        }

        #[test]
        fn what_is_written_is_what_is_read(
            sections in prop::collection::btree_map("[a-f]{1,3}", ("[a-z0-9./-]{1,12}", "[a-z=,]{0,9}"), 1..6)
        ) {
            let mut text = String::new();
            for (name, (file, args)) in &sections {
                text += &std::format!("[{name}]\n# note\nkernel={file} {args}\noptions={args}\n");
            }
            for (name, (file, args)) in &sections {
                let boot = found(&text, Some(name));
                prop_assert_eq!(boot.kernel.file_and_cmdline(), (file.as_str(), args.as_str()));
                prop_assert_eq!(boot.options.unwrap().value, args);
            }
        }
    }
}
