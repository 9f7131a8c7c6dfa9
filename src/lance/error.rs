//! Lance's errors as ours, and ours through Lance's traits and back unchanged.

use crate::error::{Error, with_causes};

impl From<lance_core::Error> for Error {
    fn from(error: lance_core::Error) -> Self {
        use lance_core::Error as Lance;
        let message = without_source(&with_causes(&error));
        match innermost(&error) {
            Lance::InvalidInput { .. } | Lance::NotSupported { .. } | Lance::Schema { .. } | Lance::Unprocessable { .. } => {
                Self::InvalidInput(message)
            }
            Lance::CommitConflict { .. }
            | Lance::IncompatibleTransaction { .. }
            | Lance::RetryableCommitConflict { .. }
            | Lance::TooMuchWriteContention { .. } => Self::CommitConflict(message),
            Lance::IO { .. } | Lance::NotFound { .. } | Lance::DatasetNotFound { .. } | Lance::Timeout { .. } => Self::Storage(message),
            Lance::CorruptFile { .. } => Self::CorruptArtifact(message),
            Lance::External { source } => source.downcast_ref::<Self>().cloned().unwrap_or(Self::Internal(message)),
            _ => Self::Internal(message),
        }
    }
}

/// What an error is of that several calls got, because they waited for the same read.
pub fn innermost(error: &lance_core::Error) -> &lance_core::Error {
    match error {
        lance_core::Error::Shared { source } => innermost(source),
        other => other,
    }
}

/// Lance ends its messages with the place in its source (", /…/lance-io/src/local.rs:274:24"), which on another machine is nowhere.
fn without_source(message: &str) -> String {
    let is_source = |end: &str| {
        let mut parts = end.rsplit(':');
        let numbers = parts.by_ref().take(2).all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()));
        numbers && parts.next().is_some_and(|file| file.ends_with(".rs")) && !end.contains(' ')
    };
    let mut kept = message;
    while let Some((before, end)) = kept.rsplit_once(", ")
        && is_source(end)
    {
        kept = before;
    }
    kept.to_string()
}

/// Our errors cross Lance's traits as `External` and come back unchanged by the conversion above.
impl From<Error> for lance_core::Error {
    fn from(error: Error) -> Self {
        Self::external(Box::new(error))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn errors_that_several_calls_got_are_of_their_kind() {
        let shared = |error| Error::from(lance_core::Error::Shared { source: Arc::new(error) });
        assert!(matches!(shared(std::io::Error::other("away").into()), Error::Storage(message) if message.contains("away")));
        assert!(matches!(shared(lance_core::Error::invalid_input("odd")), Error::InvalidInput(_)));
        assert!(matches!(shared(Error::corrupt("ours").into()), Error::CorruptArtifact(message) if message == "ours"));
    }

    #[test]
    fn messages_end_without_a_place_in_the_source() {
        let of = |message: &str| without_source(message);
        assert_eq!(of("IO: no space, /a/lance-io-14.0.2/src/local.rs:274:24"), "IO: no space");
        assert_eq!(of("IO: no space, /a/b.rs:1:2, src/lance/file/write.rs:68:9"), "IO: no space");
        for plain in ["no space", "a, b", "got 1, expected 2:3:4", "in file x.rs, line 2", ""] {
            assert_eq!(of(plain), plain);
        }
    }
}
