"""Make text safe for any terminal: unencodable and control characters are replaced."""

import codecs
import contextlib
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any

_HANDLER = "ntt-eqx"
# The program's own words, and the frames of its help, where a terminal has ASCII alone.
_ASCII = {
    **dict.fromkeys("–—−─━═╌┄╴╶╸╺", "-"),
    **dict.fromkeys("│┃║╎┆", "|"),
    **dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼┏┓┗┛┡┩╇╈╋", "+"),
    **{
        "±": "+/-",
        "×": "x",
        "…": "...",
        "•": "*",
        "’": "'",
        "“": '"',
        "”": '"',
        "≥": ">=",
        "≤": "<=",
    },
}


@contextlib.contextmanager
def every_character_shown() -> Iterator[None]:
    """While the body runs, standard output and error replace what their encoding does not have.

    Letters lose their accents, lines and dashes become ASCII ones, anything else an escape. A byte
    of a file's name that is no text is written as it is.
    """
    codecs.register_error(_HANDLER, _replaced)
    streams: list[Any] = [s for s in (sys.stdout, sys.stderr) if hasattr(s, "reconfigure")]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors=_HANDLER)
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            with contextlib.suppress(ValueError):  # it was closed meanwhile
                stream.reconfigure(errors=errors)


def plain(text: str, *, lines: bool = True) -> str:
    """`text` with control characters, by which a name could steer a terminal, as escapes."""
    kept = "\n" if lines else ""
    return "".join(c if c in kept or c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    # half of a pair stands for a byte of a name that is no text, which `_replaced` takes care of
    if unicodedata.category(character) in ("Cs", "Zs"):
        return character
    return character.encode("unicode_escape").decode()


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if 0xDC80 <= ord(character) <= 0xDCFF:
        return bytes([ord(character) - 0xDC00]), error.start + 1
    letters = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    text = _ASCII.get(character) or letters
    return text or character.encode("unicode_escape").decode(), error.start + 1
