//! A copy of each event for journald, in its native protocol: one datagram of fields.
//!
//! It is a copy: the record is the file. So where nobody listens, or the journal is busy, nothing waits and nothing fails.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use super::{Event, Outcome};

/// Where journald listens.
pub(super) const SOCKET: &str = "/run/systemd/journal/socket";

/// Marks our events, for `journalctl MESSAGE_ID=…`; drawn at random, as its documentation asks for.
const MESSAGE_ID: &str = "6f1d3a0c52be4e0f9d41c7a8e0b95d27";

/// syslog's numbers for what is normal and for what went wrong.
const INFO: &str = "6";
const WARNING: &str = "4";

/// Sends an event, if somebody listens.
pub(super) fn send(socket: &Path, event: &Event) {
    match try_send(socket, event) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => tracing::debug!(socket = %socket.display(), %error, "the journal did not take an event"),
    }
}

fn try_send(socket: &Path, event: &Event) -> io::Result<()> {
    if !socket.exists() {
        return Ok(());
    }
    let sender = UnixDatagram::unbound()?;
    sender.set_nonblocking(true)?;
    sender.send_to(&datagram(event)?, socket).map(drop)
}

fn datagram(event: &Event) -> io::Result<Vec<u8>> {
    let text = |digest: &Option<crate::digest::Digest>| digest.as_ref().map(ToString::to_string);
    let (priority, why) = match &event.outcome {
        Outcome::Done => (INFO, None),
        Outcome::Failed(why) => (WARNING, Some(why.clone())),
    };
    let fields = [
        ("MESSAGE", Some(event.to_string())),
        ("PRIORITY", Some(priority.to_owned())),
        ("SYSLOG_IDENTIFIER", Some("kitfs".to_owned())),
        ("MESSAGE_ID", Some(MESSAGE_ID.to_owned())),
        ("KITFS_ACTION", Some(event.action.to_string())),
        ("KITFS_REFERENCE", Some(event.reference.clone())),
        ("KITFS_DIGEST", text(&event.digest)),
        ("KITFS_FROM", text(&event.from)),
        ("KITFS_MOUNT_POINT", event.mount_point.as_ref().map(|dir| dir.display().to_string())),
        ("KITFS_ERROR", why),
        // All of it, as it is in the file.
        ("KITFS_EVENT", Some(serde_json::to_string(event)?)),
    ];
    let mut bytes = Vec::new();
    for (name, value) in fields {
        let Some(value) = value else { continue };
        bytes.extend(name.as_bytes());
        if value.contains('\n') {
            bytes.push(b'\n');
            bytes.extend((value.len() as u64).to_le_bytes());
        } else {
            bytes.push(b'=');
        }
        bytes.extend(value.as_bytes());
        bytes.push(b'\n');
    }
    Ok(bytes)
}
