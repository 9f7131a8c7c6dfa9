//! URIs as they may be shown.

use url::Url;
use url::form_urlencoded;

/// What stands for what is not shown.
const HIDDEN: &str = "***";

/// A URI without passwords, signatures and tokens, for messages, logs and manifests: everything else of it is kept, so that it
/// still says which place is meant. It is not for opening anything.
pub fn without_credentials(uri: &str) -> String {
    let Some((scheme, rest)) = uri.split_once("://").filter(|(scheme, _)| is_scheme(scheme)) else {
        return uri.to_string();
    };
    let mut end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    // A password with a slash in it makes no URL; it is a password all the same.
    if Url::parse(uri).is_err()
        && let Some(at) = rest.rfind('@')
    {
        end = end.max(at + 1);
    }
    let (authority, rest) = rest.split_at(end);
    let (path, fragment) = rest.split_once('#').map_or((rest, None), |(path, fragment)| (path, Some(fragment)));
    let (path, query) = path.split_once('?').map_or((path, None), |(path, query)| (path, Some(query)));
    let mut shown = format!("{scheme}://{}{path}", without_password(authority));
    for (mark, pairs) in [('?', query), ('#', fragment)] {
        if let Some(pairs) = pairs {
            shown.push(mark);
            shown.push_str(&pairs.split('&').map(without_secret).collect::<Vec<_>>().join("&"));
        }
    }
    shown
}

/// What somebody else says of `uri`, without its credentials: it may be quoted there as it was written, or as a parser writes it.
pub fn without_quoted_credentials(message: &str, uri: &str) -> String {
    let message = message.replace(uri, &without_credentials(uri));
    let ends = |c: char| c.is_whitespace() || "\"'`".contains(c);
    message.split_inclusive(ends).map(hidden_in_word).collect()
}

/// Of a word that holds a URI, wherever it begins.
fn hidden_in_word(word: &str) -> String {
    let Some(mark) = word.find("://") else { return word.to_string() };
    let start = word[..mark].rfind(|c: char| !is_of_scheme(c)).map_or(0, |at| at + word[at..].chars().next().map_or(0, char::len_utf8));
    // What ended the word is none of its last value.
    let end = word.trim_end_matches(|c: char| c.is_whitespace() || "\"'`".contains(c)).len().max(start);
    format!("{}{}{}", &word[..start], without_credentials(&word[start..end]), &word[end..])
}

/// Whether a text begins like a URI: a scheme, and `://`.
pub fn has_scheme(uri: &str) -> bool {
    uri.split_once("://").is_some_and(|(scheme, _)| is_scheme(scheme))
}

fn is_scheme(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic()) && text.chars().all(is_of_scheme)
}

fn is_of_scheme(c: char) -> bool {
    c.is_ascii_alphanumeric() || "+-.".contains(c)
}

/// `user:password@host`; a user without a password may be the container of `abfss://container@account`.
fn without_password(authority: &str) -> String {
    match authority.rsplit_once('@') {
        Some((user, host)) if user.contains(':') => format!("{}:{HIDDEN}@{host}", user.split(':').next().unwrap_or_default()),
        _ => authority.to_string(),
    }
}

fn without_secret(pair: &str) -> String {
    let key = form_urlencoded::parse(pair.as_bytes()).next().map(|(key, _)| key.into_owned()).unwrap_or_default();
    match pair.split_once('=') {
        Some((written, _)) if is_secret(&key) => format!("{written}={HIDDEN}"),
        _ => pair.to_string(),
    }
}

/// Whether the value of a query's key gives access to something.
fn is_secret(key: &str) -> bool {
    const WHOLE: [&str; 8] = ["sig", "sas", "pass", "pwd", "key", "auth", "authorization", "jwt"];
    const PARTS: [&str; 9] = ["signature", "token", "secret", "password", "passwd", "credential", "apikey", "accesskey", "accountkey"];
    let key: String = key.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect();
    WHOLE.contains(&key.as_str()) || PARTS.iter().any(|part| key.contains(part)) || key.starts_with("xamz") || key.starts_with("xgoog")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_secret_is_kept() {
        for uri in [
            "/data/a b/c",
            "relative/a",
            "a:b@c",
            "s3://bucket/a",
            "abfss://container@account.dfs.core.windows.net/a/b",
            "az://container/a",
            "file:///data/a%20b",
            "memory://a",
            "s3+ddb://bucket/t.lance?ddbTableName=locks",
            "https://host/a?sv=2022-11-02&se=2026-01-01&list=1#part",
            "weird/path://user:pw@x",
        ] {
            assert_eq!(without_credentials(uri), uri);
        }
    }

    #[test]
    fn passwords_and_signatures_are_not_shown() {
        for (uri, shown) in [
            ("s3://user:pw@bucket/a", "s3://user:***@bucket/a"),
            ("s3://user:p@w@bucket/a", "s3://user:***@bucket/a"),
            ("s3://AKIA:se/cr/et@bucket/a", "s3://AKIA:***@bucket/a"),
            ("abfss://container:pw@account/a", "abfss://container:***@account/a"),
            ("https://h/a?sig=abc%3D&sv=1", "https://h/a?sig=***&sv=1"),
            ("https://h/a?SIG=abc", "https://h/a?SIG=***"),
            ("https://h/a?s%69g=abc", "https://h/a?s%69g=***"),
            ("s3://b/a?X-Amz-Signature=x&X-Amz-Date=y&ddbTableName=t", "s3://b/a?X-Amz-Signature=***&X-Amz-Date=***&ddbTableName=t"),
            ("s3://b?session_token=x", "s3://b?session_token=***"),
            ("https://h/a#access_token=x", "https://h/a#access_token=***"),
        ] {
            assert_eq!(without_credentials(uri), shown);
        }
    }

    #[test]
    fn what_others_quote_is_hidden_too() {
        let uri = "S3:///#=&sig=secret";
        for (message, shown) in [
            ("no such place: S3:///#=&sig=secret", "no such place: S3:///#=&sig=***"),
            (
                "URL did not match any pattern for scheme: s3:///#=&sig=secret, at aws.rs",
                "URL did not match any pattern for scheme: s3:///#=&sig=*** at aws.rs",
            ),
            ("(s3://u:secret@b/x) is \"s3://b?token=secret\"", "(s3://u:***@b/x) is \"s3://b?token=***\""),
            ("é://x, and nothing: else", "é://x, and nothing: else"),
        ] {
            assert_eq!(without_quoted_credentials(message, uri), shown);
        }
    }
}
