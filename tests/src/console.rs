//! A dialogue with a machine over its serial port.

use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use regex::{Captures, Regex};

use crate::text::Plain;

/// What ends any dialogue at once: the hypervisor or dom0's kernel has given up.
const FATAL: &str =
    r"(?i)galvan (has panicked|has crashed|cannot start)[^\n]*|kernel panic - not syncing[^\n]*";

/// Why a dialogue failed.
#[derive(Debug)]
pub enum Fault {
    /// The text did not come in time.
    Timeout {
        /// What was waited for.
        pattern: String,
        /// For how long.
        waited: Duration,
    },
    /// The machine went off.
    Off {
        /// What was waited for.
        pattern: String,
    },
    /// The machine said that it cannot go on.
    Fatal(String),
    /// A command did not end with success.
    Command {
        /// The command.
        command: String,
        /// Its exit status.
        status: i32,
        /// What it printed.
        output: String,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Timeout { pattern, waited } => {
                write!(
                    f,
                    "nothing matched /{pattern}/ within {} s",
                    waited.as_secs()
                )
            }
            Self::Off { pattern } => {
                write!(f, "the machine went off while /{pattern}/ was waited for")
            }
            Self::Fatal(line) => write!(f, "the machine gave up: {line}"),
            Self::Command {
                command,
                status,
                output,
            } => write!(f, "`{command}` ended with status {status}:\n{output}"),
        }
    }
}

impl std::error::Error for Fault {}

/// The serial port of a running machine.
pub struct Console {
    input: Box<dyn Write + Send>,
    output: Receiver<Vec<u8>>,
    plain: Plain,
    /// Text that no `expect` has consumed yet.
    text: String,
    /// Up to here nothing in it is fatal: it is not looked through again for each piece that comes.
    harmless: usize,
    /// Bytes that end in the middle of a character.
    odd: Vec<u8>,
    /// The line that the log has not got yet.
    line: String,
    log: Option<File>,
    start: Instant,
    limit: Instant,
    fatal: Option<Regex>,
    commands: u32,
    findings: Vec<String>,
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console")
            .field("text", &self.text)
            .finish_non_exhaustive()
    }
}

impl Console {
    /// A console over a pair of byte streams, logged to `log` and good for `limit`.
    pub fn new(
        input: impl Write + Send + 'static,
        mut output: impl Read + Send + 'static,
        log: Option<File>,
        limit: Duration,
    ) -> Self {
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = output.read(&mut buffer) {
                if sender.send(buffer[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        let start = Instant::now();
        Self {
            input: Box::new(input),
            output: receiver,
            plain: Plain::default(),
            text: String::new(),
            harmless: 0,
            odd: Vec::new(),
            line: String::new(),
            log,
            start,
            limit: start + limit,
            fatal: Regex::new(FATAL).ok(),
            commands: 0,
            findings: Vec::new(),
        }
    }

    /// For scenarios in which a panic is what is expected.
    pub fn panics_are_expected(&mut self) {
        self.fatal = None;
    }

    /// Since the machine was switched on.
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// Waits at most `seconds` for text that matches `pattern`, and consumes all up to its end.
    /// Returns the match and its groups.
    pub fn expect(&mut self, pattern: &str, seconds: u64) -> Result<Vec<String>> {
        let regex = Regex::new(pattern).with_context(|| format!("bad pattern /{pattern}/"))?;
        let waited = Duration::from_secs(seconds);
        let until = (Instant::now() + waited).min(self.limit);
        loop {
            if let Some(found) = regex.captures(&self.text) {
                let groups = groups(&found);
                let end = found.get(0).map_or(0, |m| m.end());
                self.text.drain(..end);
                self.harmless = self.harmless.saturating_sub(end);
                return Ok(groups);
            }
            self.check_fatal()?;
            match self.receive(until) {
                Ok(()) => {}
                Err(RecvTimeoutError::Timeout) => {
                    let pattern = pattern.to_owned();
                    return Err(Fault::Timeout { pattern, waited }.into());
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let pattern = pattern.to_owned();
                    return Err(Fault::Off { pattern }.into());
                }
            }
        }
    }

    /// Waits at most `seconds` for the machine to go off; returns what it still said.
    pub fn expect_off(&mut self, seconds: u64) -> Result<String> {
        let waited = Duration::from_secs(seconds);
        let until = (Instant::now() + waited).min(self.limit);
        loop {
            self.check_fatal()?;
            match self.receive(until) {
                Ok(()) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    self.harmless = 0;
                    return Ok(std::mem::take(&mut self.text));
                }
                Err(RecvTimeoutError::Timeout) => {
                    let pattern = "the machine going off".to_owned();
                    return Err(Fault::Timeout { pattern, waited }.into());
                }
            }
        }
    }

    /// Types `text`.
    pub fn send(&mut self, text: &str) -> Result<()> {
        self.note(&format!("<<< {}", text.escape_debug()));
        self.input
            .write_all(text.as_bytes())
            .and_then(|()| self.input.flush())
            .context("the machine takes no input")
    }

    /// Runs `command` at a shell prompt and returns what it printed and its exit status.
    pub fn status_of(&mut self, command: &str, seconds: u64) -> Result<(i32, String)> {
        self.commands += 1;
        let n = self.commands;
        // The shell echoes what is typed: only the quotes tell the marks from their echo.
        self.send(&format!(
            " echo '@@'begin-{n}; {{ {command}\n}}; echo '@@'end-{n}-$?\n"
        ))?;
        // The hypervisor's lines come between, even within a line of dom0's.
        self.expect(&format!(r"@@begin-{n}(\(galvan\) \[[^\n]*)?\n"), seconds)
            .with_context(|| format!("`{command}` was not started"))?;
        let found = self
            .expect(
                &format!(r"(?s)\A(.*?)@@end-{n}-(\d+)(\(galvan\) \[[^\n]*)?\n"),
                seconds,
            )
            .with_context(|| format!("`{command}` did not end"))?;
        let hypervisor = Regex::new(r"\(galvan\) \[[^\n]*\n?").expect("a constant");
        let output = hypervisor
            .replace_all(&found[1], "")
            .lines()
            .filter(|line| !line.trim_start().starts_with('>'))
            .collect::<Vec<_>>()
            .join("\n");
        Ok((found[2].parse()?, output))
    }

    /// Runs `command` at a shell prompt; an exit status other than 0 is a [`Fault`].
    pub fn run(&mut self, command: &str, seconds: u64) -> Result<String> {
        let (status, output) = self.status_of(command, seconds)?;
        if status != 0 {
            let command = command.to_owned();
            return Err(Fault::Command {
                command,
                status,
                output,
            }
            .into());
        }
        Ok(output)
    }

    /// A number worth telling beside the verdict, such as a time; it goes into the log as well.
    pub fn finding(&mut self, text: &str) {
        self.note(text);
        self.findings.push(text.to_owned());
    }

    /// All findings so far.
    pub fn findings(&self) -> &[String] {
        &self.findings
    }

    /// Writes a line of our own into the log.
    pub fn note(&mut self, text: &str) {
        self.end_line();
        self.line.push_str(text);
        self.end_line();
    }

    fn check_fatal(&mut self) -> Result<()> {
        let Some(fatal) = &self.fatal else {
            return Ok(());
        };
        let new = &self.text[self.harmless..];
        if let Some(found) = fatal.find(new) {
            let rest = &new[found.start()..];
            return Err(Fault::Fatal(rest.lines().next().unwrap_or(rest).to_owned()).into());
        }
        // The last line may go on.
        self.harmless += new.rfind('\n').map_or(0, |end| end + 1);
        Ok(())
    }

    /// Takes what has come, or waits for something.
    fn receive(&mut self, until: Instant) -> Result<(), RecvTimeoutError> {
        let left = until.saturating_duration_since(Instant::now());
        let mut bytes = self.output.recv_timeout(left)?;
        for more in self.output.try_iter() {
            bytes.extend(more);
        }
        self.odd.extend(self.plain.feed(&bytes));
        let whole = match std::str::from_utf8(&self.odd) {
            Ok(_) => self.odd.len(),
            // Cut off in the middle of a character: the rest is on its way.
            Err(error) if error.error_len().is_none() => error.valid_up_to(),
            Err(_) => self.odd.len(),
        };
        let bytes: Vec<u8> = self.odd.drain(..whole).collect();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        for piece in text.split_inclusive('\n') {
            self.line.push_str(piece.trim_end_matches('\n'));
            if piece.ends_with('\n') {
                self.end_line();
            }
        }
        self.text.push_str(&text);
        Ok(())
    }

    fn end_line(&mut self) {
        if let Some(log) = &mut self.log
            && !self.line.is_empty()
        {
            let at = self.start.elapsed().as_secs_f32();
            // A log that cannot be written must not fail the test that it describes.
            let _ = writeln!(log, "[{at:8.3}] {}", self.line);
        }
        self.line.clear();
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // What the machine said last is what one wants to read.
        while let Ok(()) = self.receive(Instant::now() + Duration::from_millis(20)) {}
        self.end_line();
    }
}

fn groups(found: &Captures<'_>) -> Vec<String> {
    found
        .iter()
        .map(|group| group.map_or(String::new(), |m| m.as_str().to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};

    /// A shell, which ends with the test.
    struct Shell(Child);

    impl Drop for Shell {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn shell(script: &str) -> (Shell, Console) {
        let mut child = Command::new("sh")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = child.stdout.take().unwrap();
        let console = Console::new(input, output, None, Duration::from_secs(20));
        (Shell(child), console)
    }

    #[test]
    fn expect_consumes_up_to_the_match_and_returns_groups() {
        let (_shell, mut console) = shell("echo one=1 two=2; sleep 0.1; echo one=3");
        assert_eq!(console.expect(r"one=(\d)", 10).unwrap()[1], "1");
        assert_eq!(console.expect(r"one=(\d)", 10).unwrap()[1], "3");
        console.expect_off(10).unwrap();
    }

    #[test]
    fn what_does_not_come_is_a_timeout_and_names_the_pattern() {
        let (_shell, mut console) = shell("echo x; sleep 5");
        let fault = console.expect("never", 0).unwrap_err();
        assert!(
            matches!(fault.downcast_ref(), Some(Fault::Timeout { pattern, .. }) if pattern == "never")
        );
    }

    #[test]
    fn a_machine_that_goes_off_early_is_told_from_a_slow_one() {
        let (_shell, mut console) = shell("echo x");
        let fault = console.expect("never", 10).unwrap_err();
        assert!(matches!(fault.downcast_ref(), Some(Fault::Off { .. })));
    }

    #[test]
    fn a_panic_ends_the_wait_at_once() {
        let (_shell, mut console) =
            shell("echo '[1.0] Kernel panic - not syncing: no init'; sleep 5");
        let fault = console.expect("never", 10).unwrap_err();
        assert!(fault.to_string().contains("no init"), "{fault}");
    }

    #[test]
    fn a_panic_is_seen_behind_much_text_and_in_pieces() {
        let (_shell, mut console) = shell(
            "seq 5000; printf 'Kernel pa'; sleep 0.1; echo 'nic - not syncing: cut'; sleep 5",
        );
        console.expect(r"\b4999\n", 10).unwrap();
        let fault = console.expect("never", 10).unwrap_err();
        assert!(fault.to_string().contains("not syncing: cut"), "{fault}");
    }

    #[test]
    fn a_status_is_read_to_its_end() {
        let script = "read line; echo '@@begin-1'; printf '@@end-1-1'; sleep 0.2; echo 27; sleep 1";
        let (_shell, mut console) = shell(script);
        assert_eq!(console.status_of("true", 10).unwrap().0, 127);
    }

    #[test]
    fn commands_report_output_and_status() {
        let (_shell, mut console) = shell("exec sh");
        assert_eq!(console.run("echo a; echo b", 10).unwrap(), "a\nb");
        assert_eq!(console.status_of("false", 10).unwrap().0, 1);
        let between = "printf 'ha'; echo '(galvan) [ 1.5] d1: created'; echo sh";
        assert_eq!(console.run(between, 10).unwrap(), "hash");
        let fault = console
            .run("echo why; exit_with() { return 7; }; exit_with", 10)
            .unwrap_err();
        assert!(fault.to_string().contains("status 7:\nwhy"), "{fault}");
    }

    #[test]
    fn the_log_has_lines_with_times() {
        let path = std::env::temp_dir().join(format!("galvan-console-{}.log", std::process::id()));
        let (_shell, mut console) = shell("echo first; printf 'last'");
        console.log = Some(File::create(&path).unwrap());
        console.expect_off(10).unwrap();
        drop(console);
        let log = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let lines: Vec<&str> = log
            .lines()
            .filter_map(|l| l.split_once("] "))
            .map(|l| l.1)
            .collect();
        assert_eq!(lines, ["first", "last"]);
    }

    #[test]
    fn a_line_of_the_hypervisors_may_come_right_behind_the_mark() {
        // What a shell prints for `status_of`, with such a line where there is most room for one.
        let script = "read line; printf '@@begin-1'; echo '(galvan) [ 1.5] d1: destroyed'; \
                      echo '(galvan) [ 1.6] d1: gone'; echo; echo one; echo @@end-1-0; sleep 1";
        let (_shell, mut console) = shell(script);
        let (status, output) = console.status_of("echo one", 10).unwrap();
        assert_eq!((status, output.trim()), (0, "one"));
    }
}
