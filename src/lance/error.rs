//! Lance's errors as ours, and ours through Lance's traits and back unchanged.

use crate::error::{Error, with_causes};

impl From<lance_core::Error> for Error {
    fn from(error: lance_core::Error) -> Self {
        use lance_core::Error as Lance;
        let message = with_causes(&error);
        match error {
            Lance::InvalidInput { .. } | Lance::NotSupported { .. } | Lance::Schema { .. } | Lance::Unprocessable { .. } => {
                Self::InvalidInput(message)
            }
            Lance::CommitConflict { .. }
            | Lance::IncompatibleTransaction { .. }
            | Lance::RetryableCommitConflict { .. }
            | Lance::TooMuchWriteContention { .. } => Self::CommitConflict(message),
            Lance::IO { .. } | Lance::NotFound { .. } | Lance::DatasetNotFound { .. } | Lance::Timeout { .. } => Self::Storage(message),
            Lance::CorruptFile { .. } => Self::CorruptArtifact(message),
            Lance::External { source } => match source.downcast::<Self>() {
                Ok(ours) => *ours,
                Err(_) => Self::Internal(message),
            },
            _ => Self::Internal(message),
        }
    }
}

/// Our errors cross Lance's traits as `External` and come back unchanged by the conversion above.
impl From<Error> for lance_core::Error {
    fn from(error: Error) -> Self {
        Self::external(Box::new(error))
    }
}
