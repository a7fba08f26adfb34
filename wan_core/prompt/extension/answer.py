"""From what a language model wrote to a prompt: what stands around it is taken off, what is no prompt is refused."""

from __future__ import annotations

import re
import zlib

from ...safe_text import safe_text
from .question import Answer, AnswerFailed

LONGEST = 4000  # characters; 512 tokens of umT5 are at most about 2,500
_LOOPS_FROM = 300  # bytes from which on repetition is looked for
_LOOPS_BELOW = 0.2  # packed size over size; English and Chinese prose lies above 0.4

_THOUGHTS = re.compile(r"^.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_OPEN_THOUGHT = re.compile(r"^\s*<think(?:ing)?>", re.IGNORECASE)
_FENCE = re.compile(r"^```[\w-]*\s*\n(.*?)\n?```$", re.DOTALL)
_LABEL = re.compile(
    r"^(?:\*\*)?(?:(?:extended |final |rewritten |video |english |chinese )*prompt"
    r"|(?:改写|扩写|优化)?(?:后的?)?(?:视频)?提示词)"
    r"(?:\*\*)?\s*[:：](?:\*\*)?\s*",
    re.IGNORECASE,
)
_QUOTES = {'"': '"', "'": "'", "“": "”", "「": "」", "『": "』", "‘": "’"}
_REFUSALS = re.compile(
    r"^(?:i['’]m (?:very )?sorry|i am sorry|sorry,|i (?:can['’]?t|cannot|can not|am unable|am not able|won['’]t)\b"
    r"|as an ai\b|很抱歉|非常抱歉|抱歉[，,]|对不起[，,]|我无法|我不能|作为(?:一个)?(?:ai|人工智能))",
    re.IGNORECASE,
)
_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u2060\ufeff]")  # some models write them between words
_HAN = re.compile(r"[\u3400-\u9fff]")
_LETTER = re.compile(r"[A-Za-z]")
_SENTENCE = re.compile(r"^.*[.!?。！？]", re.DOTALL)


def prompt_of(answer: Answer, language: str) -> tuple[str, list[str]]:
    """The prompt in an answer, on one line, and what is to be said of it.

    Args:
        language: that was asked for, "en" or "zh".

    Raises:
        AnswerFailed: empty, too long, a refusal, garbled, or going round in circles.
    """
    text, notes = _bare(answer.text), []
    if not text:
        raise AnswerFailed("the answer is empty")
    if len(text) > LONGEST:
        raise AnswerFailed(f"the answer has {len(text)} characters, more than any prompt")
    if _REFUSALS.match(text):
        raise AnswerFailed(f"the model refuses ({safe_text(text, 80)})")
    if safe_text(text, len(text)) != text or "\ufffd" in text or not any(map(str.isalpha, text)):
        raise AnswerFailed("the answer is garbled")
    if _loops(text):
        raise AnswerFailed("the answer repeats itself over and over")
    if not answer.ended:
        cut = _SENTENCE.match(text)
        text = cut[0] if cut else text
        notes.append("The answer was cut at the model's limit of length: its last, unfinished sentence is left out.")
    if not _is_in(text, language):
        notes.append(f"The answer is not in {'Chinese' if language == 'zh' else 'English'}, as was asked for.")
    return text, notes


def _bare(text: str) -> str:
    """Without thoughts, code fences, labels, quotation marks and line breaks."""
    text = _THOUGHTS.sub("", text, count=1).strip()
    if _OPEN_THOUGHT.match(text):
        return ""  # it thought to the end
    if fenced := _FENCE.match(text):
        text = fenced[1].strip()
    text = _LABEL.sub("", text).strip()
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[-1] not in text[1:-1]:
        text = text[1:-1]
    return " ".join(_INVISIBLE.sub("", text).split())


def _loops(text: str) -> bool:
    content = text.encode()
    return len(content) >= _LOOPS_FROM and len(zlib.compress(content, 9)) < _LOOPS_BELOW * len(content)


def _is_in(text: str, language: str) -> bool:
    """Chinese writes one sign where English writes about three letters."""
    chinese = 3 * len(_HAN.findall(text)) > len(_LETTER.findall(text))
    return chinese == (language == "zh")
