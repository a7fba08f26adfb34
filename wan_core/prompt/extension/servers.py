"""Language models behind HTTP: DashScope in its own format, and whatever speaks OpenAI's chat completions."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import Hint, WanError
from .endpoint import Endpoint, without_key
from .post import error_message, post
from .question import Answer, AnswerFailed, Check, Question

_SEEDS = 2**31  # DashScope's are below it, and every other server's whole numbers hold it


@dataclass(frozen=True)
class Protocol:
    """How a kind of server is spoken to.

    Attributes:
        url: of the API where none is given.
        key_variable, url_variable: of the environment.
        models: the models for text and for pictures where none is named; None: one must be named.
        key_needed: where the server is the usual one.
    """

    title: str
    url: str
    key_variable: str
    url_variable: str
    models: tuple[str, str] | None
    path: Callable[[Question], str]
    body: Callable[[Question, str], dict[str, Any]]
    read: Callable[[Any], Answer | None]

    def endpoint(self, settings: Mapping[str, str], environment: Mapping[str, str]) -> Endpoint:
        """The address and the key: both from the settings if one is set there, else both from the environment."""
        url, key = settings.get("url", "").strip(), settings.get("key", "").strip()
        if not (url or key):
            url, key = (environment.get(name, "").strip() for name in (self.url_variable, self.key_variable))
        return Endpoint(url or self.url, key)


@dataclass(frozen=True)
class ServerMethod:
    """A model at an address.

    Attributes:
        model: its name; "": the protocol's own.
        seconds: for a question, all tries together.
    """

    protocol: Protocol
    endpoint: Endpoint
    model: str = ""
    seconds: float = 60.0

    @property
    def identity(self) -> tuple[str, ...]:
        return self.protocol.title, self.endpoint.url, self.model

    def check(self) -> None:
        """
        Raises:
            WanError: an address or a key that cannot be, no key where one is needed, no model.
        """
        self.endpoint.check()
        if not self.endpoint.key and self.endpoint.url == self.protocol.url:
            raise WanError(f"{self.protocol.title} needs a key.", Hint.SERVER_KEY, variable=self.protocol.key_variable)
        if not self.model and self.protocol.models is None:
            raise WanError(f"A server of {self.protocol.title}'s kind needs the name of a model: name one it has.")

    def ask(self, question: Question, check: Check) -> Answer:
        protocol, endpoint = self.protocol, self.endpoint
        model = self.model or (protocol.models or ("", ""))[bool(question.pictures)]
        reply = post(
            endpoint, protocol.path(question), protocol.body(question, model), seconds=self.seconds, check=check
        )
        answer = protocol.read(reply)
        if answer is None:
            said = error_message(reply)
            more = f": {without_key(said, endpoint.key)[:200]}" if said else ""
            raise AnswerFailed(f"{endpoint.shown} answers without a text{more}")
        return answer


def data_url(picture: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(picture).decode()


# --- DashScope, as its own client calls it: a path for text, another for pictures


def _dashscope_path(question: Question) -> str:
    kind = "multimodal-generation" if question.pictures else "text-generation"
    return f"/services/aigc/{kind}/generation"


def _dashscope_body(question: Question, model: str) -> dict[str, Any]:
    system: object = question.instructions
    user: object = question.text
    if question.pictures:
        system = [{"text": question.instructions}]
        user = [{"text": question.text}, *({"image": data_url(picture)} for picture in question.pictures)]
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return {
        "model": model,
        "input": {"messages": messages},
        "parameters": {"seed": question.seed % _SEEDS, "result_format": "message"},
    }


def _dashscope_read(reply: Any) -> Answer | None:
    return _choice(_at(reply, "output"))


# --- OpenAI's chat completions


def _openai_body(question: Question, model: str) -> dict[str, Any]:
    user: object = question.text
    if question.pictures:
        pictures = ({"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in question.pictures)
        user = [{"type": "text", "text": question.text}, *pictures]
    messages = [{"role": "system", "content": question.instructions}, {"role": "user", "content": user}]
    return {"model": model, "messages": messages, "seed": question.seed % _SEEDS, "stream": False}


# --- what both answer: choices of messages


def _choice(reply: Any) -> Answer | None:
    choice = _at(reply, "choices", 0)
    refusal = _at(choice, "message", "refusal")
    if isinstance(refusal, str) and refusal.strip():
        raise AnswerFailed("the model refuses")
    if _at(choice, "finish_reason") == "content_filter":
        raise AnswerFailed("the server's filter of contents holds the answer back")
    text = _text(_at(choice, "message", "content"))
    return None if text is None else Answer(text, ended=_at(choice, "finish_reason") != "length")


def _text(content: Any) -> str | None:
    """Of a message: a text, or a list of parts with texts."""
    if isinstance(content, list):
        parts = [part for part in (_at(part, "text") for part in content) if isinstance(part, str)]
        return "".join(parts) if parts else None
    return content if isinstance(content, str) else None


def _at(tree: Any, *path: str | int) -> Any:
    """What lies at a path of a tree of dictionaries and lists; None where there is none."""
    for step in path:
        try:
            tree = tree[step]
        except (TypeError, KeyError, IndexError):
            return None
    return tree


PROTOCOLS: dict[str, Protocol] = {
    "dashscope": Protocol(
        "DashScope",
        "https://dashscope.aliyuncs.com/api/v1",
        "DASH_API_KEY",
        "DASH_API_URL",
        ("qwen-plus", "qwen-vl-max"),
        _dashscope_path,
        _dashscope_body,
        _dashscope_read,
    ),
    "openai": Protocol(
        "OpenAI",
        "https://api.openai.com/v1",
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
        None,
        lambda question: "/chat/completions",
        _openai_body,
        _choice,
    ),
}
