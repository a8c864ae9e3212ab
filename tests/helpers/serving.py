"""A fake dataset server: no request leaves this process."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest


def serve(
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    breaks: bool = False,
    reading: Callable[[int], None] = lambda position: None,
) -> None:
    """Answer every request with ``content``; ``reading`` is called with the position before every read."""

    def answer(request: urllib.request.Request, **_: Any) -> _Response:
        return _Response(request.full_url, content, breaks, reading)

    monkeypatch.setattr("urllib.request.urlopen", answer)


def no_network(*_: Any, **__: Any) -> None:
    raise urllib.error.URLError("no route to host")


class _Response:
    """A server's response, which may break off after its first bytes."""

    def __init__(self, url: str, content: bytes, breaks: bool, reading: Callable[[int], None]) -> None:
        self.url, self.content, self.breaks, self.length = url, content, breaks, len(content)
        self.reading, self.position = reading, 0

    def __enter__(self) -> _Response:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, count: int) -> bytes:
        self.reading(self.position)
        if self.breaks and self.position > 0:
            raise ConnectionResetError("connection reset by peer")
        part = self.content[self.position : self.position + count]
        self.position += len(part)
        return part
