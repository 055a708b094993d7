//! Why an operation failed, and the one table from causes to error numbers (design section 8).

use rustix::io::Errno;

use crate::fetch::FetchError;
use crate::source::SourceError;

/// An error of a file system operation.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// No such name.
    #[error("no such file or directory")]
    NotFound,
    /// An inode that isn't known.
    #[error("unknown inode")]
    Stale,
    /// A directory was needed.
    #[error("not a directory")]
    NotDirectory,
    /// A file was needed.
    #[error("is a directory")]
    IsDirectory,
    /// A symbolic link was needed.
    #[error("not a symbolic link")]
    NotLink,
    /// No such extended attribute.
    #[error("no such attribute")]
    NoAttribute,
    /// Extended attributes of a kind that nothing here has: whoever is told so asks for no more of them.
    #[error("there are no attributes of this kind")]
    NoSuchAttributes,
    /// More bytes than fit into memory.
    #[error("the request is too long")]
    TooLong,
    /// A local file that was there can't be read.
    #[error("a staged file can't be opened")]
    Disk {
        /// The system's error.
        #[source]
        cause: std::io::Error,
    },
    /// Names or content could not be had.
    #[error(transparent)]
    Fetch(#[from] FetchError),
}

impl FsError {
    /// The error number for the caller.
    pub fn errno(&self) -> Errno {
        match self {
            Self::NotFound => Errno::NOENT,
            Self::Stale => Errno::STALE,
            Self::NotDirectory => Errno::NOTDIR,
            Self::IsDirectory => Errno::ISDIR,
            Self::NotLink | Self::TooLong => Errno::INVAL,
            Self::NoAttribute => Errno::NODATA,
            Self::NoSuchAttributes => Errno::OPNOTSUPP,
            Self::Disk { .. } => Errno::IO,
            Self::Fetch(error) => fetch_errno(error),
        }
    }
}

fn fetch_errno(error: &FetchError) -> Errno {
    match error {
        FetchError::Shared(inner) => fetch_errno(inner),
        FetchError::Timeout { .. } => Errno::TIMEDOUT,
        FetchError::Source { cause, .. } => source_errno(cause),
        FetchError::Digest { .. }
        | FetchError::Poisoned { .. }
        | FetchError::Archive { .. }
        | FetchError::Index { .. }
        | FetchError::Referrer { .. }
        | FetchError::OutsideRoot { .. }
        | FetchError::LinkLeaves { .. }
        | FetchError::ListingDiffers { .. }
        | FetchError::ModelKit(_)
        | FetchError::Cache(_)
        | FetchError::TagMoved { .. }
        | FetchError::Stale { .. }
        | FetchError::Policy(_)
        | FetchError::Conflict(_)
        | FetchError::NoRandomAccess { .. }
        | FetchError::NotKept { .. }
        | FetchError::Lost { .. } => Errno::IO,
    }
}

fn source_errno(error: &SourceError) -> Errno {
    match error {
        SourceError::Unauthorized { .. } | SourceError::Forbidden { .. } => Errno::ACCESS,
        SourceError::NotFound { .. }
        | SourceError::RangeIgnored { .. }
        | SourceError::Offline { .. }
        | SourceError::Untrusted { .. }
        | SourceError::Transport { .. }
        | SourceError::Status { .. }
        | SourceError::Refused { .. }
        | SourceError::TagImmutable { .. }
        | SourceError::Damaged { .. }
        | SourceError::Protocol { .. }
        | SourceError::Setup { .. }
        | SourceError::Disk { .. } => Errno::IO,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_shared_error_has_the_number_of_its_cause() {
        let timeout = FetchError::Timeout { what: "layer".to_owned(), after: Duration::from_secs(60), cause: None };
        assert_eq!(FsError::from(FetchError::Shared(Arc::new(timeout))).errno(), Errno::TIMEDOUT);
    }

    #[test]
    fn refused_credentials_are_told_apart_from_other_failures() {
        let source = |cause| FsError::from(FetchError::Source { what: "layer".to_owned(), cause }).errno();
        let refused = SourceError::Unauthorized { host: "h".to_owned(), tried: "none".to_owned() };
        assert_eq!(source(refused), Errno::ACCESS);
        let gone = SourceError::NotFound { what: "blob".to_owned(), source_name: "h".to_owned() };
        assert_eq!(source(gone), Errno::IO);
    }
}
