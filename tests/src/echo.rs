//! A TCP service on this host that sends back what it gets: the far end of a guest's connection
//! through dom0's network card.

use std::io;
use std::net::{Ipv4Addr, TcpListener};

use anyhow::{Context, Result};

/// The service. It ends with the process; one connection after another is served.
#[derive(Debug)]
pub struct Echo {
    port: u16,
}

impl Echo {
    /// Starts it on a free port of the loopback interface, which QEMU's user network reaches.
    pub fn start() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no port is free")?;
        let port = listener.local_addr()?.port();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(from) = stream else { break };
                // A guest that breaks off is its scenario's failure, seen there.
                let _ = from.try_clone().and_then(|mut to| {
                    io::copy(&mut &from, &mut to)?;
                    to.shutdown(std::net::Shutdown::Write)
                });
            }
        });
        Ok(Self { port })
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpStream;

    #[test]
    fn what_is_sent_comes_back_and_then_the_end() {
        let echo = Echo::start().unwrap();
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, echo.port())).unwrap();
        stream.write_all(b"there and back").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut back = String::new();
        stream.read_to_string(&mut back).unwrap();
        assert_eq!(back, "there and back");
    }
}
