"""Text files of captions: decoding of UTF-8 and UTF-16 with any line endings, and the error for a file that cannot be used."""

import codecs

OK = "ok"
UNDECODABLE = "undecodable"


class CaptionError(Exception):
    """A caption table or filter list that cannot be used. The message has the dataset, the key, the value and a hint."""


def decode_text(data: bytes) -> tuple[str, str]:
    """Return the text with line feeds as line endings and "ok"; or "" and "undecodable".

    The encoding is UTF-8, or UTF-16 if there is a byte order mark. No other encoding is guessed: a wrong guess would train on
    garbled words without a warning.
    """
    utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError:
        return "", UNDECODABLE
    if "\0" in text:  # UTF-16 without a byte order mark, or binary data
        return "", UNDECODABLE
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text, OK
