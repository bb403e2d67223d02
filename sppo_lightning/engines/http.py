"""JSON over HTTP to a server that may be slow, restarting or gone."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from typing import Any
from urllib.parse import urlsplit

from sppo_lightning.errors import InputError


class Refused(RuntimeError):
    """The server understood and said no (status 4xx): asking again is of no use."""


class Unreachable(RuntimeError):
    """The server did not answer, or failed (status 5xx): another one, or a later moment, may do."""


class JSONClient:
    """Requests to one server; each thread keeps a connection of its own.

    Args:
        url: `http://host:port` or `https://host:port`.
        timeout_seconds: For the server's answer to one request.
    """

    def __init__(self, url: str, timeout_seconds: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"`servers`={url!r} is no address of a server; use such as http://127.0.0.1:8000.")
        self.url = url.rstrip("/")
        self.timeout_seconds = timeout_seconds
        self._parts = parts
        self._local = threading.local()
        self._open: set[http.client.HTTPConnection] = set()
        self._closed = False

    def get(self, path: str) -> Any:
        """The answer to GET, decoded; None where it is empty."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: Any = None) -> Any:
        """The answer to POST with a JSON body, decoded; None where it is empty."""
        return self._ask("POST", path, body)

    def close(self) -> None:
        """End all requests, also those that wait for an answer: they and later ones raise `Unreachable`."""
        self._closed = True
        for connection in list(self._open):
            if connection.sock is not None:
                with contextlib.suppress(OSError):  # the server was first
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def _ask(self, method: str, path: str, body: Any) -> Any:
        if self._closed:
            raise Unreachable(f"{self.url} is asked no more")
        content = None if body is None else json.dumps(body)
        kept = getattr(self._local, "connection", None) is not None
        try:
            status, text = self._exchange(method, path, content)
        except (OSError, http.client.HTTPException) as error:
            self._open.discard(self._local.connection)
            self._local.connection = None
            if kept and isinstance(error, ConnectionError):  # servers hang up when nothing is said for seconds
                return self._ask(method, path, body)
            raise Unreachable(f"{self.url} does not answer ({type(error).__name__}: {error})") from error
        if status >= 400:
            kind = Refused if status < 500 else Unreachable
            raise kind(f"{self.url}{path} answers {status}: {text[:500]}")
        try:
            return json.loads(text) if text.strip() else None
        except ValueError as error:
            raise Refused(f"{self.url}{path} answers something that is no JSON: {text[:200]!r}") from error

    def _exchange(self, method: str, path: str, content: str | None) -> tuple[int, str]:
        """One request on this thread's connection: status and text of the answer."""
        connection = self._connection()
        headers = {"Content-Type": "application/json"}
        connection.request(method, self._parts.path.rstrip("/") + path, content, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")

    def _connection(self) -> http.client.HTTPConnection:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
            connection = kind(self._parts.hostname or "", self._parts.port, timeout=self.timeout_seconds)
            self._local.connection = connection
            self._open.add(connection)
        return connection
