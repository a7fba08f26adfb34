"""One question to a server in JSON: bounded in time and size, tried again where that helps, cancelled at once."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import threading
import time
from collections.abc import Coroutine
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ...errors import WanError
from ...safe_text import safe_text
from .endpoint import Endpoint, without_key
from .question import AnswerFailed, Check

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

LARGEST = 1 << 20  # bytes of an answer; a prompt has a few thousand
TRIES = 4
_CONNECT = 10.0  # seconds for a connection
_LONGEST_WAIT = 30.0  # seconds between tries, whatever the server asks for
_POLL = 0.05  # seconds between looks at whether the user has cancelled
_AGAIN = (408, 429, 500, 502, 503, 504)  # states that pass
_REFUSALS = {401: "refuses the key", 403: "refuses the key", 404: "does not know the page or the model"}
_QUOTED = 200  # characters of what a server says about its refusal

Result = TypeVar("Result")


def post(endpoint: Endpoint, path: str, body: dict[str, Any], *, seconds: float, check: Check) -> Any:
    """The answer to a POST, read as JSON.

    Args:
        seconds: for everything: connecting, all tries, the waits between them.

    Redirects are not followed: whoever answers with one would get the key, or at least the words.

    Raises:
        WanError: the HTTP library is missing.
        AnswerFailed: no answer in time, a refusal, or one that is too large or no JSON; without the key.
    """
    _require_aiohttp()
    return run_cancellable(_post(endpoint, path, body, seconds), check)


def _require_aiohttp() -> None:
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise WanError("Asking a server needs the package aiohttp: pip install aiohttp.") from None


async def _post(endpoint: Endpoint, path: str, body: dict[str, Any], seconds: float) -> Any:
    import aiohttp

    end = time.monotonic() + seconds
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT)
    try:
        # No environment: it would put the password of a .netrc file into the place of the key.
        async with aiohttp.ClientSession(
            timeout=timeout, trust_env=False, cookie_jar=aiohttp.DummyCookieJar()
        ) as session:
            return await asyncio.wait_for(_tried(session, endpoint, path, body, end), seconds)
    except (TimeoutError, asyncio.TimeoutError):
        raise AnswerFailed(f"{endpoint.shown} did not answer within {seconds:g} seconds") from None


class _TryAgain(Exception):
    """A state that passes; ``after``: seconds that the server asks to wait, if it says."""

    def __init__(self, reason: str, after: float | None = None):
        super().__init__(reason)
        self.after = after


async def _tried(session: ClientSession, endpoint: Endpoint, path: str, body: dict[str, Any], end: float) -> Any:
    for attempt in range(1, TRIES + 1):
        try:
            return await _once(session, endpoint, path, body)
        except _TryAgain as again:
            wait = float(2 ** (attempt - 1)) if again.after is None else again.after
            if attempt == TRIES:
                raise AnswerFailed(f"{again}, {TRIES} times") from None
            if wait > _LONGEST_WAIT or time.monotonic() + wait >= end:
                raise AnswerFailed(f"{again}, and can be asked again in {wait:.0f} seconds only") from None
        await asyncio.sleep(wait)
    raise AssertionError("the last try returns or raises")


async def _once(session: ClientSession, endpoint: Endpoint, path: str, body: dict[str, Any]) -> Any:
    import aiohttp

    url, headers = endpoint.at(path), {"Accept": "application/json", "Accept-Encoding": "identity"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    try:
        async with session.post(url, json=body, headers=headers, allow_redirects=False, proxy=_proxy(url)) as answer:
            return await _understood(answer, endpoint)
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientPayloadError, ConnectionResetError):
        raise _TryAgain(f"{endpoint.shown} broke the connection off") from None
    except aiohttp.ClientConnectorCertificateError:
        raise AnswerFailed(f"{endpoint.shown} shows a certificate that is not valid") from None
    except aiohttp.ClientResponseError:
        raise AnswerFailed(f"{endpoint.shown} answers with something that is no HTTP") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        # Not the error's own text, which holds the whole URL; of the system's, what it says of the connection.
        reason = getattr(error, "os_error", None) or type(error).__name__
        raise AnswerFailed(f"{endpoint.shown} could not be asked ({_quoted(reason, endpoint)})") from None


async def _understood(answer: ClientResponse, endpoint: Endpoint) -> Any:
    where, status = endpoint.shown, answer.status
    if 300 <= status < 400:
        target = urlsplit(answer.headers.get("Location", ""))
        elsewhere = f"{target.scheme}://{target.hostname}" if target.hostname else "another page"
        raise AnswerFailed(
            f"{where} sends on to {_quoted(elsewhere, endpoint)} (HTTP {status}), which is not followed: set the "
            "address that answers itself"
        )
    content = await _content(answer, endpoint)
    if status in _AGAIN:
        reason = "has too many requests" if status == 429 else f"is not ready (HTTP {status})"
        raise _TryAgain(f"{where} {reason}{_said(content, endpoint)}", _retry_after(answer))
    if status != 200:
        refusal = _REFUSALS.get(status, "refuses the request")
        raise AnswerFailed(f"{where} {refusal} (HTTP {status}){_said(content, endpoint)}")
    kind = answer.content_type.lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise AnswerFailed(f"{where} answers with {_quoted(kind, endpoint)} instead of JSON, as a page would")
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise AnswerFailed(f"{where} answers with something that is no JSON") from None


async def _content(answer: ClientResponse, endpoint: Endpoint) -> bytes:
    content = bytearray()
    async for chunk in answer.content.iter_any():
        content += chunk
        if len(content) > LARGEST:
            raise AnswerFailed(f"{endpoint.shown} answers with more than {LARGEST >> 20} MB")
    return bytes(content)


def _retry_after(answer: ClientResponse) -> float | None:
    """Seconds, from a number or a date."""
    said = answer.headers.get("Retry-After", "").strip()
    if said.isascii() and said.isdigit():
        return float(said[:9])
    try:
        return max(parsedate_to_datetime(said).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return None


def _said(content: bytes, endpoint: Endpoint) -> str:
    """What the server says of its refusal, as far as it can be read."""
    try:
        message = error_message(json.loads(content))
    except (ValueError, RecursionError):
        message = None
    return f": {_quoted(message, endpoint)}" if message else ""


def error_message(answer: object) -> str | None:
    """The message of an error in an answer: OpenAI's, DashScope's and the usual others."""
    if not isinstance(answer, dict):
        return None
    error = answer.get("error", answer)
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error.get("code")
    return error if isinstance(error, str) and error.strip() else None


def _quoted(text: object, endpoint: Endpoint) -> str:
    return " ".join(safe_text(without_key(str(text), endpoint.key), _QUOTED).split())


def _proxy(url: str) -> str | None:
    """The proxy of the environment or the system for a URL."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host in ("localhost", "127.0.0.1", "::1") or proxy_bypass(host):
        return None
    proxy = getproxies().get(parts.scheme)
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


def run_cancellable(work: Coroutine[Any, Any, Result], check: Check) -> Result:
    """The result of a coroutine, run in a thread of its own while this one keeps looking whether it is cancelled.

    In a thread, because ComfyUI calls nodes where a loop of events runs already.

    Raises:
        whatever ``work`` raises, and ``check``; then the work is cancelled and its connection closed.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="wan_core prompt extension", daemon=True)
    thread.start()
    future = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        while not concurrent.futures.wait([future], _POLL).done:
            check()
        return future.result()
    finally:
        future.cancel()
        asyncio.run_coroutine_threadsafe(_settled(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _settled() -> None:
    """All that was cancelled has closed what it held, and the name look-ups, which cannot be cancelled, are let go."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.sleep(0)  # lets transports close
