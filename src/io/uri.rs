//! URIs as they may be shown.

use url::Url;
use url::form_urlencoded;

/// What stands for what is not shown.
const HIDDEN: &str = "***";
/// Bytes from which on a secret is looked for in any text: a shorter one is part of words.
const SHORTEST_SECRET: usize = 6;

/// A URI without passwords, signatures and tokens, for messages, logs and manifests: everything else of it is kept, so that it
/// still says which place is meant. It is not for opening anything.
pub fn without_credentials(uri: &str) -> String {
    let Some(Parts { scheme, authority, path, query, fragment }) = Parts::of(uri) else {
        return uri.to_string();
    };
    let mut shown = format!("{scheme}://{}{path}", without_password(authority));
    for (mark, pairs) in [('?', query), ('#', fragment)] {
        if let Some(pairs) = pairs {
            shown.push(mark);
            shown.push_str(&pairs.split('&').map(without_secret).collect::<Vec<_>>().join("&"));
        }
    }
    shown
}

/// A URI as it was written, in parts.
struct Parts<'a> {
    scheme: &'a str,
    authority: &'a str,
    path: &'a str,
    query: Option<&'a str>,
    fragment: Option<&'a str>,
}

impl<'a> Parts<'a> {
    fn of(uri: &'a str) -> Option<Self> {
        let (scheme, rest) = uri.split_once("://").filter(|(scheme, _)| is_scheme(scheme))?;
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
        Some(Self { scheme, authority, path, query, fragment })
    }
}

/// The URI, or path, of a file or folder below one, whose query stays behind it.
pub fn uri_below(uri: &str, path: &str) -> String {
    let Some(parts) = Parts::of(uri) else {
        return format!("{}/{path}", uri.trim_end_matches('/'));
    };
    let folder = parts.path.trim_end_matches('/');
    let after = &uri[parts.scheme.len() + 3 + parts.authority.len() + parts.path.len()..];
    format!("{}://{}{folder}/{path}{after}", parts.scheme, parts.authority)
}

/// A URI without user, password, query and fragment, which say nothing of where it is; a path as it is.
pub fn uri_place(uri: &str) -> String {
    let Some(Parts { scheme, authority, path, .. }) = Parts::of(uri) else {
        return uri.to_string();
    };
    let authority = match authority.rsplit_once('@') {
        // The container of `abfss://container@account`.
        Some((user, host)) if scheme.starts_with("abfs") => format!("{}@{host}", user.split(':').next().unwrap_or_default()),
        Some((user, host)) if user.contains(':') => host.to_string(),
        _ => authority.to_string(),
    };
    format!("{scheme}://{authority}{path}")
}

/// What somebody else says of `uri`, without its credentials: it may be quoted there as it was written, or as a parser writes it, whole or
/// in parts.
pub fn without_quoted_credentials(message: &str, uri: &str) -> String {
    let mut message = message.replace(uri, &without_credentials(uri));
    let parsed = Url::parse(uri).map(String::from);
    if let Ok(parsed) = &parsed {
        message = message.replace(parsed, &without_credentials(parsed));
    }
    let mut shown = String::with_capacity(message.len());
    let mut rest = message.as_str();
    while let Some((before, quoted, after)) = quoted_uri(rest) {
        shown.push_str(before);
        shown.push_str(&without_credentials(quoted));
        rest = after;
    }
    shown.push_str(rest);
    // What is left is no URI that could be told from the text around it.
    for uri in std::iter::once(uri).chain(parsed.as_deref().ok()) {
        for secret in secrets(uri).filter(|secret| secret.len() >= SHORTEST_SECRET) {
            shown = shown.replace(secret, HIDDEN);
        }
    }
    shown
}

/// The first URI in a text, between what is before it and what is after it: it ends with the quotation mark that it follows, or with white space.
fn quoted_uri(text: &str) -> Option<(&str, &str, &str)> {
    let mark = text.find("://")?;
    let start = text[..mark].rfind(|c: char| !is_of_scheme(c)).map_or(0, |at| at + text[at..].chars().next().map_or(0, char::len_utf8));
    let opening = text[..start].chars().next_back().filter(|c| "\"'`".contains(*c));
    let end = text[mark..].find(|c: char| opening.map_or(c.is_whitespace(), |quote| c == quote)).map_or(text.len(), |at| mark + at);
    Some((&text[..start], &text[start..end], &text[end..]))
}

/// What [`without_credentials`] hides of a URI.
fn secrets(uri: &str) -> impl Iterator<Item = &str> {
    let parts = Parts::of(uri);
    let password = parts.as_ref().and_then(|parts| parts.authority.rsplit_once('@')).and_then(|(user, _)| user.split_once(':'));
    let values = parts.into_iter().flat_map(|parts| [parts.query, parts.fragment]).flatten().flat_map(|pairs| pairs.split('&'));
    password.into_iter().chain(values.filter_map(secret_of)).map(|(_, secret)| secret)
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
    secret_of(pair).map_or_else(|| pair.to_string(), |(key, _)| format!("{key}={HIDDEN}"))
}

/// The key of a pair as it was written, and its value, where that is a secret.
fn secret_of(pair: &str) -> Option<(&str, &str)> {
    let (key, _) = form_urlencoded::parse(pair.as_bytes()).next()?;
    pair.split_once('=').filter(|_| is_secret(&key))
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
            // A mark may be part of a host that no parser knows.
            ("no pattern for az://h`%EF/a#&sig=secret", "no pattern for az://h`%EF/a#&sig=***"),
            ("not 'az://h'x/a#&sig=secret', nor az", "not 'az://h'x/a#&sig=***', nor az"),
            ("`s3://b?token=x` and `s3://b`", "`s3://b?token=***` and `s3://b`"),
            ("é://x, and nothing: else", "é://x, and nothing: else"),
        ] {
            assert_eq!(without_quoted_credentials(message, uri), shown);
        }
    }
}
