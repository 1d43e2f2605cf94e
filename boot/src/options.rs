//! The application's own command line (EFI load options): `galvan.efi [-cfg=FILE] [-mapbs]
//! [-basevideo] [SECTION] [-- HYPERVISOR OPTIONS]`, as `xen.efi` has it.

use core::fmt;

/// What `-help` prints.
pub const USAGE: &str = "\
galvan.efi [OPTIONS] [SECTION] [-- HYPERVISOR OPTIONS]
  -cfg=FILE   the configuration file, beside galvan.efi (default: galvan.cfg)
  -mapbs      keep the memory of EFI boot services, for firmware that still uses it
  -basevideo  leave the video mode alone (always so)
  -help       print this";

/// The parsed command line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadOptions<'a> {
    /// The section to boot instead of the default.
    pub section: Option<&'a str>,
    /// `-cfg=`: the configuration file.
    pub config: Option<&'a str>,
    /// `-mapbs`: memory of EFI boot services stays theirs.
    pub keep_boot_services: bool,
    /// `-help`: say how and do nothing.
    pub help: bool,
    /// What follows `--`: added to the hypervisor's command line.
    pub hypervisor: &'a str,
}

impl<'a> LoadOptions<'a> {
    /// Reads `text`. The EFI shell puts the command itself first, boot entries usually do not: the
    /// first word is dropped if it looks like the application (`file_name`).
    pub fn parse(text: &'a str, file_name: &str) -> Result<Self, BadOption<'a>> {
        let mut options = Self::default();
        let mut rest = text.trim_ascii();
        let mut first = true;
        while !rest.is_empty() {
            let (word, tail) = rest
                .split_once(|c: char| c.is_ascii_whitespace())
                .unwrap_or((rest, ""));
            rest = tail.trim_ascii_start();
            let is_command = core::mem::take(&mut first) && is_command(word, file_name);
            match word {
                _ if is_command => {}
                "--" => {
                    options.hypervisor = rest;
                    break;
                }
                "-mapbs" => options.keep_boot_services = true,
                "-basevideo" => {}
                "-help" | "-h" | "--help" | "-?" => options.help = true,
                _ => match word.strip_prefix("-cfg=") {
                    Some(file) if !file.is_empty() => options.config = Some(file),
                    _ if word.starts_with('-') => return Err(BadOption::Unknown(word)),
                    _ if options.section.is_some() => return Err(BadOption::TwoSections(word)),
                    _ => options.section = Some(word),
                },
            }
        }
        Ok(options)
    }
}

fn is_command(word: &str, file_name: &str) -> bool {
    let word = word.trim_matches('"');
    let name = word.rsplit(['\\', '/', ':']).next().unwrap_or(word);
    let stem = |name: &'_ str| name.rfind('.').unwrap_or(name.len());
    let bare = file_name.get(..stem(file_name)).unwrap_or(file_name);
    name.get(stem(name)..)
        .is_some_and(|ext| ext.eq_ignore_ascii_case(".efi"))
        || name.eq_ignore_ascii_case(bare)
}

/// What is wrong with the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadOption<'a> {
    /// No option of this application.
    Unknown(&'a str),
    /// A second word that could be a section.
    TwoSections(&'a str),
}

impl fmt::Display for BadOption<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(word) => write!(f, "unknown option '{word}' (try -help)"),
            Self::TwoSections(word) => {
                write!(f, "'{word}' is one section too many (try -help)")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> LoadOptions<'_> {
        LoadOptions::parse(text, "BOOTX64.EFI").unwrap()
    }

    #[test]
    fn nothing_given_is_nothing_asked_for() {
        assert_eq!(parse(" "), LoadOptions::default());
    }

    #[test]
    fn the_command_itself_is_no_section() {
        assert_eq!(parse("galvan.efi rescue").section, Some("rescue"));
        assert_eq!(
            parse("FS0:\\EFI\\galvan.EFI rescue").section,
            Some("rescue")
        );
        assert_eq!(parse("bootx64 rescue").section, Some("rescue"));
        assert_eq!(parse("rescue").section, Some("rescue"));
        assert_eq!(parse("-basevideo rescue").section, Some("rescue"));
    }

    #[test]
    fn options_are_recognised_in_any_order() {
        let options = parse("galvan.efi -cfg=other.cfg -mapbs deb  -basevideo -- loglvl=all  x -y");
        assert_eq!(options.config, Some("other.cfg"));
        assert_eq!(options.section, Some("deb"));
        assert!(options.keep_boot_services && !options.help);
        assert_eq!(options.hypervisor, "loglvl=all  x -y");
        assert!(parse("-help").help);
    }

    #[test]
    fn a_typing_error_is_not_ignored() {
        assert_eq!(
            LoadOptions::parse("-cgf=x", ""),
            Err(BadOption::Unknown("-cgf=x"))
        );
        assert_eq!(
            LoadOptions::parse("-cfg=", ""),
            Err(BadOption::Unknown("-cfg="))
        );
        assert_eq!(
            LoadOptions::parse("a b", ""),
            Err(BadOption::TwoSections("b"))
        );
    }
}
