"""Where a server is and what opens it: an address and a key, which is never shown, logged or sent elsewhere."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit, urlunsplit

from ...errors import WanError

_SHORTEST_LEAK = 6  # consecutive characters of a key that are taken out of a text


@dataclass(frozen=True)
class Endpoint:
    """An address and a key that belong together.

    Both come from the same place, the environment or the settings of whoever runs the program: a workflow that could
    name an address would be sent the key.

    Attributes:
        url: of the API, to which a method's own path is added, such as ``https://api.openai.com/v1``.
        key: sent as a bearer token; "" sends none.
    """

    url: str
    key: str = field(default="", repr=False)

    def check(self) -> None:
        """
        Raises:
            WanError: not http or https, no host, a user name in the address, a key that no header can carry, or one
                that would cross a network unencrypted.
        """
        parts = self._parts()
        if parts.scheme not in ("http", "https"):
            raise WanError(
                f"The server's address is {self.shown!r}: expected one that begins with https:// or http://."
            )
        if not parts.hostname:
            raise WanError(f"The server's address {self.shown} names no host: expected such as https://host/v1.")
        if parts.username or parts.password:
            raise WanError("The server's address holds a user name or a password, which would be shown: set a key.")
        if not (self.key.isascii() and self.key.isprintable() and " " not in self.key):
            raise WanError("The key for prompt extension holds spaces or characters that no key has: copy it again.")
        if self.key and parts.scheme == "http" and not _is_near(parts.hostname):
            raise WanError(
                f"The key would cross the network to {self.shown} unencrypted: use https, or the server's address in "
                "the local network as a number."
            )

    def at(self, path: str) -> str:
        """The URL of a method; a query of the address stays, and so does a path that names the method already."""
        parts = self._parts()
        own = parts.path.rstrip("/")
        whole = own if own.endswith(path) else own + path
        return urlunsplit((parts.scheme, parts.netloc, whole, parts.query, ""))

    @property
    def shown(self) -> str:
        """The address without what may be secret: no query, no user."""
        parts = self._parts()
        port = f":{parts.port}" if parts.port else ""
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
        return f"{parts.scheme}://{host}{port}{parts.path}".rstrip("/")

    def _parts(self) -> SplitResult:
        try:
            parts = urlsplit(self.url.strip())
            _ = parts.port  # read here, where a wrong one can be told
        except ValueError:
            raise WanError("The server's address cannot be read: expected such as https://host/v1.") from None
        return parts


def without_key(text: str, key: str) -> str:
    """A text from outside, without the key or long pieces of it: servers quote what they refuse."""
    if len(key) < _SHORTEST_LEAK:
        return text.replace(key, "…") if key else text
    kept, place = [], 0
    while place < len(text):
        length = _shared(text, place, key)
        kept.append("…" if length else text[place])
        place += length or 1
    return "".join(kept)


def _shared(text: str, place: int, key: str) -> int:
    """Length of the longest piece of the key that stands at a place of the text; 0 where it is short."""
    length = _SHORTEST_LEAK
    if len(text) - place < length or text[place : place + length] not in key:
        return 0
    while place + length < len(text) and text[place : place + length + 1] in key:
        length += 1
    return length


def _is_near(host: str) -> bool:
    """This machine, or a private address in numbers."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_private
