"""A ComfyUI server in a process of its own, and a client that queues prompts and listens to it.

Standard library only: the demo uses it from whatever Python it was started with, the tests from theirs. Nothing of
ComfyUI is imported.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACK = "comfyui-wan22"  # the pack's folder in custom_nodes
Graph = dict[str, dict[str, Any]]  # the API format: node id -> class_type, inputs


class ServerFailed(RuntimeError):
    """The server's process ended, or never answered; carries the end of its log."""


class PromptRejected(RuntimeError):
    """The server refused to queue a prompt. ``errors``: node id -> its list of {message, details, ...}."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.answer = answer
        self.errors = {node: entry["errors"] for node, entry in (answer.get("node_errors") or {}).items()}
        details = [error["details"] for errors in self.errors.values() for error in errors]
        super().__init__("; ".join([answer["error"]["message"], *filter(None, details)]))


@dataclass(frozen=True)
class Preview:
    """An image sent while a node worked."""

    node: str | None
    format: str
    image: bytes


@dataclass
class Run:
    """What the server said about one prompt."""

    id: str
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    previews: list[Preview] = field(default_factory=list)
    history: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [data for name, data in self.events if name == kind]

    @property
    def ok(self) -> bool:
        return self.history.get("status", {}).get("status_str") == "success"

    @property
    def interrupted(self) -> bool:
        return bool(self.of("execution_interrupted"))

    @property
    def error(self) -> str | None:
        """The message of the exception that ended the run."""
        return next((data["exception_message"].strip() for data in self.of("execution_error")), None)

    @property
    def executed(self) -> list[str]:
        """Ids of the nodes that really ran, in order; cached ones are not among them."""
        return [data["node"] for data in self.of("executing") if data["node"] is not None]

    def progress(self, node: str) -> list[tuple[int, int]]:
        return [(data["value"], data["max"]) for data in self.of("progress") if data["node"] == node]

    @property
    def files(self) -> list[dict[str, Any]]:
        """The saved files: {filename, subfolder, type}, of every output node."""
        outputs = self.history.get("outputs", {}).values()
        return [
            entry
            for output in outputs
            for value in output.values()
            if isinstance(value, list)
            for entry in value
            if isinstance(entry, dict) and "filename" in entry
        ]


class Client:
    """ComfyUI's HTTP and websocket interface, as the frontend uses it."""

    def __init__(self, url: str, alive: Callable[[], None] = lambda: None) -> None:
        self.url = url
        self.id = uuid.uuid4().hex
        self._alive = alive  # raises when there is no use in waiting any longer

    def request(self, path: str, body: Any = None, timeout: float = 60) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.read()

    def get(self, path: str) -> Any:
        return json.loads(self.request(path))

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        return self.get("/object_info" + (f"/{node}" if node else ""))

    def interrupt(self) -> None:
        self.request("/interrupt", {})

    def free(self) -> None:
        """ComfyUI's "free memory": unload models and forget cached results. The server does it when it is idle."""
        self.request("/free", {"unload_models": True, "free_memory": True})

    def set_setting(self, name: str, value: Any) -> None:
        self.request(f"/settings/{name}", value)

    def download(self, file: dict[str, Any]) -> bytes:
        query = {key: file[key] for key in ("filename", "subfolder", "type") if key in file}
        return self.request(f"/view?{urllib.parse.urlencode(query)}")

    def upload_image(self, name: str, content: bytes) -> str:
        """Put an image into the server's input folder; returns the name LoadImage knows it by."""
        mark = uuid.uuid4().hex
        head = f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'
        body = head.encode() + content + f"\r\n--{mark}--\r\n".encode()
        kind = {"Content-Type": f"multipart/form-data; boundary={mark}"}
        with urllib.request.urlopen(urllib.request.Request(self.url + "/upload/image", body, kind)) as answer:
            return json.load(answer)["name"]

    def submit(self, graph: Graph, extra_data: dict[str, Any] | None = None) -> str:
        """Queue a prompt and return its id.

        Raises:
            PromptRejected: the server found a mistake in it.
        """
        try:
            answer = self.request("/prompt", {"prompt": graph, "client_id": self.id, "extra_data": extra_data or {}})
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise PromptRejected(json.load(error)) from None
        return json.loads(answer)["prompt_id"]

    def run(
        self,
        graph: Graph,
        *,
        timeout: float = 300,
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
        extra_data: dict[str, Any] | None = None,
        until: Callable[[Run], bool] = lambda run: True,
    ) -> Run:
        """Queue a prompt and listen until it ends, well or not, and longer until what may come late has come;
        ``on_event`` hears each message as it comes."""
        start, ended = time.monotonic(), False
        with contextlib.closing(WebSocket(f"{self.url}/ws?clientId={self.id}", self._alive)) as socket_:
            socket_.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
            run = Run(self.submit(graph, extra_data))
            for message in socket_.messages(start + timeout):
                if isinstance(message, bytes):
                    run.previews += _previews(message)
                    continue
                kind, data = message["type"], message["data"]
                if data.get("prompt_id", run.id) != run.id:
                    continue
                run.events.append((kind, data))
                if on_event:
                    on_event(kind, data)
                ended = ended or (kind == "executing" and data["node"] is None)
                if ended and until(run):
                    break
        run.history = self.get(f"/history/{run.id}").get(run.id, {})
        run.seconds = time.monotonic() - start
        return run


def _previews(message: bytes) -> Iterator[Preview]:
    """The image in a binary message: type 1 carries a format number, type 4 a JSON description."""
    (kind, second), rest = struct.unpack(">II", message[:8]), message[8:]
    if kind == 1:
        yield Preview(None, {1: "image/jpeg", 2: "image/png"}[second], rest)
    elif kind == 4:
        about = json.loads(rest[:second])
        yield Preview(about.get("node_id"), about["image_type"], rest[second:])


class WebSocket:
    """The client's side of RFC 6455, as far as ComfyUI's server speaks it."""

    TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10

    def __init__(self, url: str, alive: Callable[[], None]) -> None:
        parts = urllib.parse.urlsplit(url)
        self._alive = alive
        self._socket = socket.create_connection((parts.hostname, parts.port), timeout=30)
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET {parts.path}?{parts.query} HTTP/1.1\r\nHost: {parts.netloc}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._buffer = b""
        while b"\r\n\r\n" not in self._buffer:
            self._receive()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        if b" 101 " not in head.partition(b"\r\n")[0]:
            raise ConnectionError(f"The server refused a websocket: {head.decode(errors='replace')}")
        self._socket.settimeout(1)

    def close(self) -> None:
        self._socket.close()

    def send(self, text: str) -> None:
        self._send(self.TEXT, text.encode())

    def messages(self, deadline: float) -> Iterator[dict[str, Any] | bytes]:
        """Text messages as JSON, binary ones as bytes, until the time is up."""
        while True:
            opcode, payload = self._frame(deadline)
            if opcode == self.TEXT:
                yield json.loads(payload)
            elif opcode == self.BINARY:
                yield payload
            elif opcode == self.PING:
                self._send(self.PONG, payload)
            elif opcode == self.CLOSE:
                raise ConnectionError("The server closed the websocket.")

    def _send(self, opcode: int, payload: bytes) -> None:
        mask, size = os.urandom(4), len(payload)
        length = struct.pack(">B", 0x80 | size) if size < 126 else struct.pack(">BH", 0xFE, size)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
        self._socket.sendall(bytes([0x80 | opcode]) + length + mask + masked)

    def _frame(self, deadline: float) -> tuple[int, bytes]:
        first, size = self._take(2, deadline)
        if size == 126:
            (size,) = struct.unpack(">H", self._take(2, deadline))
        elif size == 127:
            (size,) = struct.unpack(">Q", self._take(8, deadline))
        return first & 0x0F, self._take(size, deadline)

    def _take(self, count: int, deadline: float) -> bytes:
        while len(self._buffer) < count:
            if time.monotonic() > deadline:
                raise TimeoutError("The server did not finish in time.")
            with contextlib.suppress(TimeoutError):
                self._receive()
            self._alive()
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def _receive(self) -> None:
        received = self._socket.recv(1 << 20)
        if not received:
            self._alive()
            raise ConnectionError("The server closed the connection.")
        self._buffer += received


_COLOUR = r"\x1b\[[0-9;]*m"
_LEVEL = rf"^(?:{_COLOUR})*\[(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)\](?:{_COLOUR})* "
_DECORATION = re.compile(f"{_LEVEL}|{_COLOUR}", re.MULTILINE)


class Server:
    """A running ComfyUI. Use it in a ``with``: it is stopped at the end."""

    def __init__(self, process: subprocess.Popen[bytes], base: Path, log: Path, port: int) -> None:
        self.process, self.base, self.log = process, base, log
        self.url = f"http://127.0.0.1:{port}"
        self.client = Client(self.url, self.check)

    @classmethod
    def start(
        cls,
        python: Path | str,
        comfyui: Path,
        base: Path,
        *options: str,
        timeout: float = 400,
        env: dict[str, str] | None = None,
    ) -> Server:
        """Start ComfyUI on a free port, with all its folders under ``base``, and wait until it answers.

        Raises:
            ServerFailed: it ended or did not answer in time.
        """
        port, log = _free_port(), base / "server.log"
        command = [
            str(python),
            str(comfyui / "main.py"),
            "--base-directory",
            str(base),
            "--port",
            str(port),
            "--database-url",
            f"sqlite:///{base / 'comfyui.db'}",
            "--disable-auto-launch",
            *options,
        ]
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", **(env or {})}
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=comfyui, env=env)
        server = cls(process, base, log, port)
        try:
            server._wait(time.monotonic() + timeout)
        except BaseException:
            server.stop()
            raise
        return server

    def _wait(self, deadline: float) -> None:
        while True:
            self.check()
            with contextlib.suppress(OSError):
                self.client.request("/queue", timeout=5)
                return
            if time.monotonic() > deadline:
                raise ServerFailed(f"ComfyUI did not answer in time. The end of its log:\n{self.tail()}")
            time.sleep(0.3)

    def check(self) -> None:
        if self.process.poll() is not None:
            raise ServerFailed(f"ComfyUI ended with code {self.process.returncode}. The end of its log:\n{self.tail()}")

    def tail(self, lines: int = 40) -> str:
        """The end of its log, without Python's import timings."""
        return "\n".join([line for line in self.said().splitlines() if not line.startswith("import time:")][-lines:])

    def said(self, since: int = 0) -> str:
        """Its log as plain text, behind the first ``since`` characters; newer versions colour it and name levels."""
        return _DECORATION.sub("", self.log.read_text(encoding="utf-8", errors="replace"))[since:]

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_base(base: Path, comfyui: Path, pack: Path) -> Path:
    """ComfyUI's folders under ``base``, with the pack as its only custom node and ComfyUI's example photograph."""
    for folder in ("custom_nodes", "models", "input", "output", "temp", "user/default"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    link_pack(pack, base / "custom_nodes" / PACK)
    for photograph in (comfyui / "input").glob("*.png"):
        shutil.copy(photograph, base / "input")
    return base


def link_pack(pack: Path, place: Path) -> None:
    """A link to the pack, or a copy where the system makes no links; an older one is replaced."""
    if place.is_symlink():
        place.unlink()
    elif place.exists():
        shutil.rmtree(place)
    try:
        place.symlink_to(pack, target_is_directory=True)
    except OSError:  # Windows without developer mode
        shutil.copytree(pack, place, ignore=shutil.ignore_patterns(".*", "tests", "output", "__pycache__"))
