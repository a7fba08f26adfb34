"""Text that came from files, names and prompts, made fit to be sent, logged and shown."""

from __future__ import annotations

import re

LONGEST = 6000  # characters of a text that somebody shall read
_END = LONGEST // 3  # of them from its end: there a message says what to do

# What breaks a transport, a terminal or the order of the letters around it: control characters but tab and line feed,
# halves of surrogate pairs, line and paragraph separators, marks that turn the direction of writing or cannot be seen,
# tags, and what is no character at all.
_UNFIT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff"
    "\ufdd0-\ufdef\ufeff\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f]"
)


def safe_text(text: object, longest: int = LONGEST) -> str:
    """What can be written as UTF-8, printed in a terminal and read: the rest is shown as Python's escapes.

    Names with bytes outside UTF-8, which Python reads as halves of surrogate pairs, show those bytes: ``\\xff``. HTML
    stays as it is: whoever shows the text must show it as text.

    Args:
        text: a text or anything with one, such as an error.
        longest: more characters than this lose their middle, and the number of those is said.
    """
    shown = _UNFIT.sub(_escaped, _text_of(text).replace("\r\n", "\n"))
    if len(shown) <= longest:
        return shown
    end = min(_END, longest // 3)
    left_out = f" … ({len(shown) - longest} characters left out) … "
    return shown[: longest - end] + left_out + shown[-end:] if end else shown[:longest] + left_out


def _text_of(text: object) -> str:
    try:
        return str(text)
    except Exception as error:  # an error's own __str__ may fail on what it quotes
        return f"a {type(text).__name__} that has no text ({type(error).__name__})"


def _escaped(found: re.Match) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
