//! One error type for the whole crate. Each variant is one Python exception class and one exit code of the CLI.

use std::fmt::Display;

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong. A message says what failed, where, what was got and expected, and what to do.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// An argument or a batch cannot be used; nothing was changed.
    #[error("{0}")]
    InvalidInput(String),
    /// No artifact (no manifest) at the given place.
    #[error("{0}")]
    ArtifactNotFound(String),
    /// The target already holds an artifact and `overwrite` was not asked for.
    #[error("{0}")]
    ArtifactExists(String),
    /// The artifact breaks a promise its manifest makes.
    #[error("{0}")]
    CorruptArtifact(String),
    /// The artifact is sound but does not fit the dataset, the column or the model.
    #[error("{0}")]
    ArtifactMismatch(String),
    /// The dataset moved on so that the index can no longer be committed as intended.
    #[error("{0}")]
    CommitConflict(String),
    /// Reading or writing failed: disk, network, permissions.
    #[error("{0}")]
    Storage(String),
    /// A device failed: lost, out of order, or its driver is.
    #[error("{0}")]
    Device(String),
    /// A device has too little free memory, also for the smallest batch.
    #[error("{0}")]
    DeviceMemory(String),
    /// The caller interrupted the work.
    #[error("{0}")]
    Interrupted(String),
    /// A defect in this crate or in Lance.
    #[error("{0}")]
    Internal(String),
}

impl Error {
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::InvalidInput(message.into())
    }

    pub fn corrupt(message: impl Into<String>) -> Self {
        Self::CorruptArtifact(message.into())
    }

    pub fn mismatch(message: impl Into<String>) -> Self {
        Self::ArtifactMismatch(message.into())
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::Internal(message.into())
    }

    /// The same error with `context` (what was being done, where) in front.
    pub fn context(self, context: impl Display) -> Self {
        self.reworded(|message| format!("{context}: {message}"))
    }

    /// The same error with another message.
    pub fn reworded(self, reword: impl FnOnce(String) -> String) -> Self {
        match self {
            Self::InvalidInput(m) => Self::InvalidInput(reword(m)),
            Self::ArtifactNotFound(m) => Self::ArtifactNotFound(reword(m)),
            Self::ArtifactExists(m) => Self::ArtifactExists(reword(m)),
            Self::CorruptArtifact(m) => Self::CorruptArtifact(reword(m)),
            Self::ArtifactMismatch(m) => Self::ArtifactMismatch(reword(m)),
            Self::CommitConflict(m) => Self::CommitConflict(reword(m)),
            Self::Storage(m) => Self::Storage(reword(m)),
            Self::Device(m) => Self::Device(reword(m)),
            Self::DeviceMemory(m) => Self::DeviceMemory(reword(m)),
            Self::Interrupted(m) => Self::Interrupted(reword(m)),
            Self::Internal(m) => Self::Internal(reword(m)),
        }
    }
}

/// The message of an error with all its causes, each said once.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        if !message.contains(&text) {
            message.push_str(": ");
            message.push_str(&text);
        }
        source = cause.source();
    }
    message
}

impl From<object_store::Error> for Error {
    fn from(error: object_store::Error) -> Self {
        Self::Storage(with_causes(&error))
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Self::Storage(with_causes(&error))
    }
}

impl From<arrow_schema::ArrowError> for Error {
    fn from(error: arrow_schema::ArrowError) -> Self {
        Self::Internal(with_causes(&error))
    }
}

impl From<tokio::task::JoinError> for Error {
    fn from(error: tokio::task::JoinError) -> Self {
        if error.is_cancelled() {
            Self::Interrupted("a background task was cancelled".into())
        } else {
            Self::Internal(format!("a background task panicked: {error}"))
        }
    }
}
