//! Running other programs: what they print is kept for the case that they fail, and whoever waits
//! sees what is being done and for how long.

use std::fs::{self, File};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

use crate::paths;

/// How many lines of a failed program's output are shown.
const TAIL: usize = 25;

/// One thing that takes a while: a spinner with the elapsed time on a terminal, plain lines
/// elsewhere.
#[derive(Debug)]
pub struct Step {
    what: String,
    since: Instant,
    bar: Option<ProgressBar>,
    lines: u64,
}

impl Step {
    /// Starts the clock and says what is being done.
    pub fn start(what: impl Into<String>) -> Self {
        let what = what.into();
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{spinner} {msg} ({elapsed})")
                .unwrap_or_else(|_| ProgressStyle::default_spinner());
            let bar = ProgressBar::new_spinner().with_style(style);
            bar.set_message(what.clone());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        if bar.is_none() {
            eprintln!("{what} ...");
        }
        Self {
            what,
            since: Instant::now(),
            bar,
            lines: 0,
        }
    }

    /// Without a terminal, says every half minute that it is still going on.
    fn tick(&mut self) {
        let halves = self.since.elapsed().as_secs() / 30;
        if self.bar.is_none() && halves > self.lines {
            self.lines = halves;
            eprintln!("{} ... {} s", self.what, self.since.elapsed().as_secs());
        }
    }

    /// Says that it is done, and how long it took.
    pub fn done(self) {
        let line = format!("{}: {:.1} s", self.what, self.since.elapsed().as_secs_f32());
        match &self.bar {
            Some(bar) => {
                bar.finish_and_clear();
                eprintln!("{line}");
            }
            None => eprintln!("{line}"),
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Runs `command` under a [`Step`]; on failure the error carries the end of its output.
pub fn step(what: &str, command: &mut Command) -> Result<()> {
    let mut step = Step::start(what);
    captured(command, || step.tick())?;
    step.done();
    Ok(())
}

/// Runs `command` without a word; on failure the error carries the end of its output.
pub fn quiet(command: &mut Command) -> Result<()> {
    captured(command, || {}).map(drop)
}

/// What `command` writes to its standard output.
pub fn output(command: &mut Command) -> Result<String> {
    let name = shown(command);
    let out = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {name}"))?;
    if !out.status.success() {
        bail!(
            "{name}: {}\n{}",
            out.status,
            String::from_utf8_lossy(&out.stderr).trim_end()
        );
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Runs `command` with this process's terminal.
pub fn through(command: &mut Command) -> Result<()> {
    let name = shown(command);
    let status = command
        .status()
        .with_context(|| format!("cannot start {name}"))?;
    if !status.success() {
        bail!("{name}: {status}");
    }
    Ok(())
}

fn captured(command: &mut Command, mut tick: impl FnMut()) -> Result<()> {
    let name = shown(command);
    let log = scratch("log")?;
    let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        std::thread::sleep(Duration::from_millis(20));
        tick();
    };
    let text = String::from_utf8_lossy(&fs::read(&log).unwrap_or_default()).into_owned();
    let _ = fs::remove_file(&log);
    if !status.success() {
        bail!("{name}: {status}\n{}", tail(&text, TAIL));
    }
    Ok(())
}

/// The last `n` lines of `text`.
pub fn tail(text: &str, n: usize) -> String {
    let lines: Vec<&str> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(n)..].join("\n")
}

/// A path for a temporary file or directory of this process, below the target directory.
pub fn scratch(suffix: &str) -> Result<PathBuf> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let dir = paths::out().join("tmp");
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    Ok(dir.join(format!("{}-{n}.{suffix}", std::process::id())))
}

fn shown(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        text.push(' ');
        text.push_str(&arg.to_string_lossy());
    }
    match text.char_indices().nth(300) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_carries_the_end_of_the_output() {
        let error = quiet(Command::new("sh").args(["-c", "echo first; echo last >&2; exit 3"]))
            .unwrap_err()
            .to_string();
        assert!(error.contains("first\nlast"), "{error}");
        assert!(error.contains("exit status: 3"), "{error}");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = output(&mut Command::new("/no/such/program")).unwrap_err();
        assert!(format!("{error:#}").contains("/no/such/program"));
    }

    #[test]
    fn tail_of_a_short_text_is_all_of_it() {
        assert_eq!(tail("a\nb\n", 5), "a\nb");
        assert_eq!(tail("a\nb\nc", 2), "b\nc");
    }
}
