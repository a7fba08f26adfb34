"""A server on loopback that speaks DashScope's format and OpenAI's chat completions, and misbehaves when it is told to.

What it demands of a request is what the two services demand of their own clients; a request that lacks it is refused
as they refuse it.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

KEY = "sk-test-7f3a9c1d5e8b4a60"
ENGLISH = (
    "Daytime, soft lighting, medium shot, center composition. A white cat sits on a surfboard in the shallow water, "
    "turns its head slowly from the sea to the camera and blinks, while small waves rock the board."
)
CHINESE = (
    "白天，柔光，中景，中心构图，一只白猫坐在浅水中的冲浪板上，慢慢把头从海面转向镜头，眨了眨眼，小浪轻轻摇动冲浪板。"
)


@dataclass
class Asked:
    """A request as it came."""

    path: str
    headers: dict[str, str]
    body: Any
    at: float

    @property
    def system(self) -> str:
        content = self.messages[0]["content"]
        return content if isinstance(content, str) else content[0]["text"]

    @property
    def user(self) -> str:
        content = self.messages[1]["content"]
        return content if isinstance(content, str) else next(part["text"] for part in content if "text" in part)

    @property
    def messages(self) -> list[dict]:
        return self.body["input"]["messages"] if "input" in self.body else self.body["messages"]

    @property
    def pictures(self) -> list[Image.Image]:
        content = self.messages[1]["content"]
        urls = [part.get("image") or part.get("image_url", {}).get("url") for part in content if isinstance(part, dict)]
        return [opened(url) for url in urls if url]


def opened(url: str) -> Image.Image:
    head, _, data = url.partition(",")
    assert head == "data:image/jpeg;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert picture.format == "JPEG"
    picture.load()
    return picture


@dataclass
class LanguageServer:
    """
    Attributes:
        answer: what it answers well; None: in the language that the instructions are in.
        faults: what it does instead, one for each of the next requests; the last one for ever where ``forever``.
    """

    url: str
    answer: str | None = None
    faults: list[Callable[[Handler], None]] = field(default_factory=list)
    forever: Callable[[Handler], None] | None = None
    asked: list[Asked] = field(default_factory=list)
    broken_off: threading.Event = field(default_factory=threading.Event)  # a client left while it was kept waiting

    @property
    def dashscope(self) -> str:
        return self.url + "/api/v1"

    @property
    def openai(self) -> str:
        return self.url + "/v1"

    def again(self) -> None:
        self.answer, self.forever = None, None
        self.faults.clear(), self.asked.clear(), self.broken_off.clear()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:  # noqa: N802
        self.reply(405, {"error": {"message": "Only POST."}})

    def do_POST(self) -> None:  # noqa: N802
        own: LanguageServer = self.server.own
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked = Asked(self.path, dict(self.headers), body, time.monotonic())
        own.asked.append(self.asked)
        fault = own.faults.pop(0) if own.faults else own.forever
        if fault:
            fault(self)
            return
        if self.headers["Authorization"] != f"Bearer {KEY}":
            self.refuse(401, "InvalidApiKey", f"Incorrect API key provided: {self.headers['Authorization']}.")
        elif self.path.startswith("/api/v1/"):
            self.dashscope(body)
        elif self.path == "/v1/chat/completions":
            self.openai(body)
        else:
            self.refuse(404, "NotFound", "There is no such page.")

    def dashscope(self, body: dict) -> None:
        kind = self.path.removeprefix("/api/v1/services/aigc/").removesuffix("/generation")
        messages, parameters = body["input"]["messages"], body["parameters"]
        if kind not in ("text-generation", "multimodal-generation"):
            return self.refuse(404, "NotFound", "url error")
        parts = all(isinstance(message["content"], list) for message in messages)
        if parts != (kind == "multimodal-generation"):
            return self.refuse(400, "InvalidParameter", "url error, please check url!")
        if not 0 <= parameters["seed"] < 2**31:
            return self.refuse(400, "InvalidParameter", "Range of seed should be [0, 2147483647]")
        text = self.text()
        message = {"role": "assistant", "content": [{"text": text}] if parts else text}
        output = {"choices": [{"finish_reason": "stop", "message": message}]}
        return self.reply(200, {"output": output, "usage": {"total_tokens": 90}, "request_id": "1"})

    def openai(self, body: dict) -> None:
        if not isinstance(body["messages"][0]["content"], str) or not isinstance(body["seed"], int):
            return self.refuse(400, "invalid_request_error", "The request cannot be read.")
        message = {"role": "assistant", "content": self.text(), "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        return self.reply(200, {"id": "1", "object": "chat.completion", "choices": [choice]})

    def text(self) -> str:
        own: LanguageServer = self.server.own
        return own.answer if own.answer is not None else CHINESE if "万相" in self.asked.system else ENGLISH

    def refuse(self, status: int, code: str, message: str, **headers: str) -> None:
        """In the words of whoever is asked."""
        said = {"code": code, "message": message, "request_id": "1"}
        self.reply(status, said if self.path.startswith("/api/") else {"error": {**said, "type": code}}, **headers)

    def reply(self, status: int, body: Any, kind: str = "application/json", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def wait_for_the_client(self, seconds: float) -> None:
        """Keep the client waiting; notes when it leaves."""
        self.connection.settimeout(seconds)
        try:
            left = self.connection.recv(1) == b""
        except TimeoutError:
            left = False
        except OSError:
            left = True
        if left:
            self.server.own.broken_off.set()
        self.close_connection = True


# --- faults


def refuses(status: int, message: str = "No.", **headers: str) -> Callable[[Handler], None]:
    return lambda handler: handler.refuse(status, "Refused", message, **headers)


def refuses_until(seconds: float) -> Callable[[Handler], None]:
    """Too many requests, until a date."""
    return lambda handler: handler.refuse(429, "Throttling", "Slow down.", Retry_After=http_date(seconds))


def http_date(seconds: float) -> str:
    return formatdate(time.time() + seconds, usegmt=True)


def silent(handler: Handler) -> None:
    handler.wait_for_the_client(20)


def drips(handler: Handler) -> None:
    """A byte now and then, for ever."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.close_connection = True
    try:
        for _ in range(200):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.1)
    except OSError:
        handler.server.own.broken_off.set()


def breaks_off(handler: Handler) -> None:
    """In the middle of its answer."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def endless(handler: Handler) -> None:
    """JSON without an end, in chunks."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.close_connection = True
    piece = b'"' + b"a" * 65536
    try:
        for _ in range(4000):
            handler.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
    except OSError:
        handler.server.own.broken_off.set()


def answers(body: Any, kind: str = "application/json", status: int = 200, **headers: str) -> Callable[[Handler], None]:
    return lambda handler: handler.reply(status, body, kind, **headers)


def says(text: Any, **more: Any) -> Callable[[Handler], None]:
    """A completion with this content, in both formats at once."""
    message = {"role": "assistant", "content": text, **more.pop("message", {})}
    choices = [{"index": 0, "finish_reason": "stop", "message": message, **more}]
    return answers({"choices": choices, "output": {"choices": choices}})


def no_http(handler: Handler) -> None:
    handler.wfile.write(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
    handler.close_connection = True


@contextmanager
def language_server() -> Iterator[LanguageServer]:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    httpd.own = LanguageServer(f"http://127.0.0.1:{httpd.server_address[1]}")
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield httpd.own
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
