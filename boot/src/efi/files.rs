//! Files from the directory the application was started from.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use galvan_boot::info::PhysRange;
use uefi::proto::device_path::DevicePathNodeEnum;
use uefi::proto::loaded_image::LoadedImage;
use uefi::proto::media::file::{Directory, File, FileAttribute, FileInfo, FileMode, RegularFile};
use uefi::proto::media::fs::SimpleFileSystem;
use uefi::{CString16, Status};

use crate::failure::Failure;
use crate::firmware::get_protocol;
use crate::memory::Pages;

/// Firmware's file systems are not all at ease with reads of hundreds of megabytes.
const CHUNK: usize = 4 << 20;

/// Where the application came from.
#[derive(Debug)]
pub struct Origin {
    root: Directory,
    /// Path of the directory, with a backslash at its end.
    directory: String,
    /// The application's own file name.
    pub file_name: String,
}

/// A file in memory, from a page boundary, zeroes behind it.
#[derive(Debug)]
pub struct Loaded {
    pages: Pages,
    len: usize,
}

impl Loaded {
    /// The file's bytes.
    pub fn range(&self) -> PhysRange {
        PhysRange::new(self.pages.phys(), self.len as u64)
    }
}

impl Origin {
    /// Finds the file system and the directory.
    pub fn find(image: &LoadedImage) -> Result<Self, Failure> {
        let path = file_path(image);
        let (directory, file_name) = match path.rfind('\\') {
            Some(at) => path.split_at(at + 1),
            None => ("\\", path.as_str()),
        };
        let device = image.device().ok_or(Status::NOT_FOUND.into());
        let root = device
            // SAFETY: a file system serves any number of openers; no file is written to.
            .and_then(|device| unsafe { get_protocol::<SimpleFileSystem>(device) })
            .and_then(|mut volume| volume.open_volume())
            .map_err(|error| {
                Failure::new(
                    error.status(),
                    "not started from a file system: there is no place to look for files",
                )
            })?;
        Ok(Self {
            root,
            directory: directory.to_string(),
            file_name: file_name.to_string(),
        })
    }

    /// The whole of a small file, or `None` if there is no such file.
    pub fn read(&mut self, name: &str) -> Result<Option<Vec<u8>>, Failure> {
        let Some((mut file, len)) = self.open(name)? else {
            return Ok(None);
        };
        let mut bytes = alloc::vec![0; len];
        read_all(&mut file, &mut bytes, name)?;
        Ok(Some(bytes))
    }

    /// Loads a file into pages of its own.
    pub fn load(&mut self, name: &str) -> Result<Loaded, Failure> {
        let (mut file, len) = self.open(name)?.ok_or_else(|| {
            Failure::new(
                Status::NOT_FOUND,
                alloc::format!("{name}: there is no such file in {}", self.directory),
            )
        })?;
        if len == 0 {
            return Err(Failure::new(
                Status::LOAD_ERROR,
                alloc::format!("{name}: the file is empty"),
            ));
        }
        let mut pages = Pages::new(len, name)?;
        let bytes = pages.bytes_mut().get_mut(..len).unwrap_or_default();
        read_all(&mut file, bytes, name)?;
        Ok(Loaded { pages, len })
    }

    /// Opens a file, by a path relative to the application's directory unless it begins with a
    /// backslash; and its length.
    fn open(&mut self, name: &str) -> Result<Option<(RegularFile, usize)>, Failure> {
        let name_in_path = name.replace('/', "\\");
        let path = if name_in_path.starts_with('\\') {
            name_in_path
        } else {
            alloc::format!("{}{name_in_path}", self.directory)
        };
        let cannot = |status: Status, why: &str| {
            Failure::new(status, alloc::format!("{name}: cannot be read ({why})"))
        };
        let path = CString16::try_from(path.as_str())
            .map_err(|_| cannot(Status::INVALID_PARAMETER, "impossible file name"))?;
        let handle = match self
            .root
            .open(&path, FileMode::Read, FileAttribute::empty())
        {
            Ok(handle) => handle,
            Err(error) if error.status() == Status::NOT_FOUND => return Ok(None),
            Err(error) => return Err(cannot(error.status(), &error.status().to_string())),
        };
        let mut file = handle
            .into_regular_file()
            .ok_or_else(|| cannot(Status::LOAD_ERROR, "it is a directory"))?;
        let info = file
            .get_boxed_info::<FileInfo>()
            .map_err(|error| cannot(error.status(), &error.status().to_string()))?;
        let len = usize::try_from(info.file_size())
            .map_err(|_| cannot(Status::OUT_OF_RESOURCES, "too large"))?;
        Ok(Some((file, len)))
    }
}

fn read_all(file: &mut RegularFile, mut buffer: &mut [u8], name: &str) -> Result<(), Failure> {
    while !buffer.is_empty() {
        let chunk = buffer.len().min(CHUNK);
        let (now, _) = buffer.split_at_mut(chunk);
        let done = match file.read(now) {
            Ok(0) => Err(Status::END_OF_FILE),
            Ok(done) => Ok(done),
            Err(error) => Err(error.status()),
        }
        .map_err(|status| {
            Failure::new(
                status,
                alloc::format!("{name}: error while reading ({status})"),
            )
        })?;
        buffer = buffer.split_at_mut(done.min(chunk)).1;
    }
    Ok(())
}

/// The path of the application in its file system. It may be spread over several nodes.
fn file_path(image: &LoadedImage) -> String {
    let mut path = String::new();
    let nodes = image.file_path().into_iter().flat_map(|p| p.node_iter());
    for node in nodes {
        if let Ok(DevicePathNodeEnum::MediaFilePath(node)) = node.as_enum() {
            let units: Vec<u16> = node.path_name().iter().take_while(|&c| c != 0).collect();
            if !path.ends_with('\\') && units.first() != Some(&u16::from(b'\\')) {
                path.push('\\');
            }
            path.push_str(&String::from_utf16_lossy(&units));
        }
    }
    path
}
