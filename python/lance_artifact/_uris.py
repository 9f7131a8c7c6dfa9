"""URIs: as they may be shown, and what lies below them. The rules of what is hidden are those of `src/io/uri.rs`."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import unquote_plus

HIDDEN = "***"
# Characters from which on a secret is looked for in any text: a shorter one is part of words.
SHORTEST_SECRET = 6

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
# What no host has.
_NO_HOST = re.compile(r"[\s<>^`{|}%\\\[\]]")
_ADDRESS = re.compile(r"\[[0-9A-Fa-f:.]+\](:[0-9]*)?")
_WHOLE = {"sig", "sas", "pass", "pwd", "key", "auth", "authorization", "jwt"}
_PARTS = (
    "signature",
    "token",
    "secret",
    "password",
    "passwd",
    "credential",
    "apikey",
    "accesskey",
    "accountkey",
)


class _Uri(NamedTuple):
    """A URI as it was written, in parts."""

    scheme: str
    authority: str
    path: str
    # With their marks.
    query: str
    fragment: str


def _split(uri: str) -> _Uri | None:
    scheme, sign, rest = uri.partition("://")
    if not sign or not _SCHEME.fullmatch(scheme):
        return None
    end = min((at for at in map(rest.find, "/?#") if at >= 0), default=len(rest))
    # A password with a slash in it makes no URL; it is a password all the same.
    if not _is_authority(rest[:end]):
        end = max(end, rest.rfind("@") + 1)
    authority, rest = rest[:end], rest[end:]
    rest, mark, fragment = rest.partition("#")
    path, sign, query = rest.partition("?")
    return _Uri(scheme, authority, path, sign + query, mark + fragment)


def _is_authority(text: str) -> bool:
    named = text.rpartition("@")[2]
    if named.startswith("["):
        return _ADDRESS.fullmatch(named) is not None
    host, colon, port = named.partition(":")
    is_number = port == "" or (port.isdecimal() and len(port) <= 5 and int(port) < 1 << 16)
    is_port = not colon or (host != "" and is_number)
    return is_port and not _NO_HOST.search(host) and not (host == "" and "@" in text)


def shown_uri(uri: str) -> str:
    """A URI without passwords, signatures and tokens, for messages, logs and what is printed. It is not for opening anything."""
    parts = _split(uri)
    if parts is None:
        return uri
    pairs = [_shown_pairs(text) for text in (parts.query, parts.fragment)]
    return f"{parts.scheme}://{_shown_authority(parts.authority)}{parts.path}{''.join(pairs)}"


def without_secrets(message: object, uri: str) -> str:
    """What somebody else says of a URI, without its passwords, signatures and tokens."""
    text = str(message).replace(uri, shown_uri(uri))
    for secret in _secrets(uri):
        if len(secret) >= SHORTEST_SECRET:
            text = text.replace(secret, HIDDEN)
    return text


def below(uri: str, path: str) -> str:
    """The URI, or path, of a file or folder below one."""
    parts = _split(uri)
    if parts is None:
        return f"{uri.rstrip('/')}/{path}"
    folder = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.authority}{folder}/{path}{parts.query}{parts.fragment}"


def place(uri: str) -> str:
    """A URI without user, password, query and fragment, which say nothing of where it is; a path as it is."""
    parts = _split(uri)
    if parts is None:
        return uri
    user, at, host = parts.authority.rpartition("@")
    # The container of ``abfss://container@account``.
    container = user.partition(":")[0] + at if ":" not in user or parts.scheme.startswith("abfs") else ""
    return f"{parts.scheme}://{container}{host}{parts.path}"


def _secrets(uri: str) -> list[str]:
    parts = _split(uri)
    if parts is None:
        return []
    user, at, _ = parts.authority.rpartition("@")
    _, colon, password = user.partition(":")
    found = [password] if at and colon else []
    for pair in "&".join((parts.query[1:], parts.fragment[1:])).split("&"):
        found += [pair[start:]] if (start := _secret_of(pair)) else []
    return found


def _shown_authority(authority: str) -> str:
    """``user:password@host``; a user without a password may be the container of ``abfss://container@account``."""
    user, at, host = authority.rpartition("@")
    return f"{user.partition(':')[0]}:{HIDDEN}@{host}" if at and ":" in user else authority


def _shown_pairs(text: str) -> str:
    pairs = text[1:].split("&")
    return text[:1] + "&".join(f"{p[:start]}{HIDDEN}" if (start := _secret_of(p)) else p for p in pairs)


def _secret_of(pair: str) -> int:
    """Where the value of a pair begins that gives access to something; 0 where it does not.

    Of a URI that no parser takes, other marks may be part of what is before the key.
    """
    for found in re.finditer("([^?#/@=]*)=", pair):
        key = re.sub(r"[^a-z0-9]", "", unquote_plus(found[1]).lower())
        if key in _WHOLE or any(part in key for part in _PARTS) or key.startswith(("xamz", "xgoog")):
            return found.end()
    return 0
