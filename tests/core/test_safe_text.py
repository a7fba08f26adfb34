"""Text of files and names: nothing of it breaks what carries it, and nothing disappears."""

from __future__ import annotations

import json
import sys

import pytest

from wan_core.safe_text import LONGEST, safe_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a plain\nmessage\twith tab", "a plain\nmessage\twith tab"),
        ("one\r\ntwo\rthree", "one\ntwo\\x0dthree"),
        ("\x1b[31mred\x1b[0m\x07", "\\x1b[31mred\\x1b[0m\\x07"),
        ("null \x00, C1 \x9b, delete \x7f", "null \\x00, C1 \\x9b, delete \\x7f"),
        ("half \ud83d of a pair \udfff", "half \\ud83d of a pair \\udfff"),
        ("lora_\udcff\udc80.safetensors", "lora_\\xff\\x80.safetensors"),
        ("gpj.\u202eexe", "gpj.\\u202eexe"),
        ("line\u2028separator", "line\\u2028separator"),
        ("tag \U000e0041", "tag \\U000e0041"),
        ("noch \ufffe eins \ufeff", "noch \\ufffe eins \\ufeff"),
        ("Привет, 世界, été, 👩‍🚀 🇩🇪", "Привет, 世界, été, 👩‍🚀 🇩🇪"),
        ("<img src=x onerror=alert(1)> & \"'`", "<img src=x onerror=alert(1)> & \"'`"),
    ],
)
def test_what_is_unfit_is_shown_escaped(text: str, shown: str):
    assert safe_text(text) == shown


def test_every_character_can_be_sent_and_printed():
    """All of Unicode: what comes out is UTF-8, survives JSON without its escapes, and keeps to one line's controls."""
    for start in range(0, sys.maxunicode + 1, 4096):
        given = "".join(map(chr, range(start, start + 4096)))
        shown = safe_text(given, longest=1 << 20)
        assert json.loads(json.dumps(shown, ensure_ascii=False).encode()) == shown
        assert not any(char < " " and char not in "\n\t" or "\x7f" <= char <= "\x9f" for char in shown)
        assert len(shown) >= len(given) - given.count("\r\n")


def test_a_long_text_loses_its_middle_and_says_so():
    text = "begin " + "x" * 100_000 + " the end says what to do"
    shown = safe_text(text)
    assert shown.startswith("begin xx") and shown.endswith("says what to do")
    assert f"({len(text) - LONGEST} characters left out)" in shown and len(shown) < LONGEST + 60
    assert safe_text("\x00" * 100_000)[:4] == "\\x00" and len(safe_text("\x00" * 100_000)) < LONGEST + 60
    assert safe_text("abcdefgh", longest=2) == "ab … (6 characters left out) … "


def test_errors_and_things_without_text():
    class Silent(Exception):
        def __str__(self) -> str:
            raise UnicodeError("no")

    assert safe_text(ValueError("a \udc80 b")) == "a \\x80 b"
    assert safe_text(Silent()) == "a Silent that has no text (UnicodeError)"
    assert safe_text(b"\xff") == "b'\\xff'"
    assert safe_text(None) == "None"
