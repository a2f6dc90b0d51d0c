"""Credentials in URLs, and what else a text may hold that should not be shown as it is. Imports nothing heavy."""

import re

MASK = "***"

# scheme://user:password@host. A password may hold a slash, where somebody has not encoded it; a port is no password.
_USERINFO = re.compile(r"(?<=://)(?:[^/\s@]*:(?!\d+(?:[/?#\s]|$))[^\s@]{0,512}|[^/\s@]*)(?:@[^/\s@]*)*@")
_QUERY_SECRET = re.compile(
    r"([?&;](?:[\w.-]*(?:token|passw(?:or)?d|pwd|secret|signature|credential|api[_-]?key|access[_-]?key)|sig)=)"
    r"[^&;\s#'\"]+",
    re.IGNORECASE,
)


def mask_urls(text: str) -> str:
    """The text with the credentials in its URLs replaced by ``***``. Masking twice changes nothing more."""
    return _QUERY_SECRET.sub(rf"\g<1>{MASK}", _USERINFO.sub(f"{MASK}@", text))


# Control characters (but for tab and line end), half surrogate pairs, and what turns the direction of writing: a
# terminal would obey some of them, an encoder fail at others, and a reader be misled by the rest.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""The text with characters that do something other than being seen written as ``\x1b`` or ``\u202e``."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
