"""Text as people's editors and captioning tools leave it on disk: UTF-8 with and without a mark, UTF-16 with one, any line ends."""

import codecs

OK = "ok"
UNDECODABLE = "undecodable"


def decode_text(data: bytes) -> tuple[str, str]:
    """The text, its lines ended by line feeds, and "ok"; or "" and "undecodable".

    Read as UTF-8, or as UTF-16 where a byte order mark says so. No other encoding is guessed: a wrong guess would train on
    garbled words and tell nobody.
    """
    utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError:
        return "", UNDECODABLE
    if "\0" in text:  # UTF-16 without its mark, or no text at all
        return "", UNDECODABLE
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text, OK
