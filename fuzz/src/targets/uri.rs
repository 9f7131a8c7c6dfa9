//! URIs and storage options: what is no place is refused, and no secret is ever shown. Nothing here needs a network.

use std::collections::HashMap;

use lance_artifact::io::{has_scheme, without_credentials};
use lance_artifact::lance::{LanceStore, static_options};

use super::Target;
use crate::check::typed;
use crate::input::Input;
use crate::place::{Files, Ground};

/// What must not be seen anywhere.
const SECRET: &str = "s3cr3tPW";

struct Uri {
    ground: Ground,
}

pub fn make() -> Box<dyn Target> {
    Box::new(Uri { ground: Ground::new(&Files::new()) })
}

const SCHEMES: [&str; 10] = ["s3", "gs", "az", "abfss", "memory", "file", "https", "s3+ddb", "S3", "x-y.z"];
const SECRET_KEYS: [&str; 12] = [
    "sig",
    "SIG",
    "X-Amz-Signature",
    "x-amz-security-token",
    "X-Goog-Signature",
    "access_token",
    "password",
    "s%69g",
    "sas",
    "aws_secret_access_key",
    "account_key",
    "api-key",
];
/// Options that keep a client from asking a server for what it was not told.
const OPTIONS: [(&str, &str); 9] = [
    ("aws_region", "us-east-1"),
    ("aws_access_key_id", "key"),
    ("aws_secret_access_key", SECRET),
    ("azure_storage_account_name", "account"),
    ("azure_storage_account_key", "czNjcjN0UFc="),
    ("google_service_account_key", r#"{"private_key": "s3cr3tPW", "private_key_id": "", "client_email": "", "disable_oauth": true}"#),
    ("google_skip_signature", "true"),
    ("aws_endpoint", "http://127.0.0.1:9"),
    ("allow_http", "true"),
];

/// Text that ends neither a user's part nor a query's value.
fn plain(text: String) -> String {
    text.chars().filter(|c| !"/?#&@".contains(*c)).collect()
}

/// Text of a part that is shown: what is no secret there may not spell the one that is looked for.
fn harmless(text: String) -> String {
    let mut text = text;
    while text.contains(SECRET) {
        text = text.replace(SECRET, "");
    }
    text
}

impl Target for Uri {
    fn run(&mut self, input: &[u8]) {
        let mut input = Input::new(input);
        let how = input.u8();
        let uri = if how & 1 > 0 { String::from_utf8_lossy(input.rest()).into_owned() } else { with_secrets(&mut input) };
        let shown = without_credentials(&uri);
        assert_eq!(without_credentials(&shown), shown, "of {uri:?}");
        assert_eq!(has_scheme(&shown), has_scheme(&uri));
        if how & 1 == 0 {
            assert!(!shown.contains(SECRET), "{shown:?} shows the secret of {uri:?}");
        }
        let scheme = uri.split_once("://").map_or("", |(scheme, _)| scheme).to_ascii_lowercase();
        // Others are clients of servers whose options are not given here.
        if !["", "file", "memory", "s3", "gs", "az", "x-y.z"].contains(&scheme.as_str()) {
            return;
        }
        let mut options: HashMap<String, String> = OPTIONS.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        if how & 2 > 0 {
            // The rest are no texts that could be a secret.
            let key = OPTIONS[usize::from(how >> 2) % 6].0;
            let value = match key {
                "aws_region" => plain(input.text(16)) + "x",
                // A part of the host's name, and no secret.
                "azure_storage_account_name" => plain(input.text(16)),
                _ => format!("{}{SECRET}{}", input.text(8), input.text(8)),
            };
            options.insert(key.into(), value);
        }
        match self.ground.block_on(LanceStore::open(&uri, Some(&static_options(options)))) {
            Ok(store) => {
                assert_eq!(without_credentials(store.uri()), store.uri());
                if how & 1 == 0 {
                    assert!(!store.uri().contains(SECRET));
                }
            }
            Err(error) => {
                typed(&error);
                assert!(how & 1 > 0 || !error.to_string().contains(SECRET), "{error} shows a secret");
            }
        }
    }
}

/// A URI with a password, or secrets in its query.
fn with_secrets(input: &mut Input<'_>) -> String {
    let mut uri = format!("{}://", input.pick(&SCHEMES));
    let how = input.u8();
    if how & 1 > 0 {
        let hidden = format!("{}{SECRET}{}", plain(input.text(6)), plain(input.text(6)));
        uri.push_str(&format!("{}:{hidden}@", harmless(plain(input.text(6)).replace(':', ""))));
    }
    uri.push_str(&harmless(plain(input.text(12))));
    uri.push('/');
    uri.push_str(&harmless(input.text(20).replace(['?', '#', '@'], "")));
    if how & 2 > 0 {
        uri.push(if how & 4 > 0 { '#' } else { '?' });
        uri.push_str(&format!("{}={}&", harmless(plain(input.text(6)).replace('=', "")), harmless(plain(input.text(6)))));
        uri.push_str(&format!("{}={}{SECRET}{}", input.pick(&SECRET_KEYS), plain(input.text(6)), plain(input.text(6))));
    }
    uri
}
