"""A server on the loopback that cuts, stalls, drips, lies, corrupts and replaces."""

from __future__ import annotations

import contextlib
import http.server
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` by path. `plan` says what to do with each request in turn; when it is used up, serve well.

    ("cut", n): close after n bytes; ("reset", n): break the connection after n bytes; ("stall", n): send n bytes and
    then nothing; an int: that status; ("flip", n): the byte n of the content inverted; "no range": ignore a Range
    header; "drip": in small pieces; ("late range", n): a range that begins n bytes too late, and says so; "portal": a
    page in the place of the file; "noise": no HTTP at all; ("redirect", url): there, with a page that has no end;
    ("reason", text): status 500 for that reason; ("endless", line): that line over and over, after a status line
    unless it is one itself; "endless trailer": a chunked content, and lines after it that have no end.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.plan: list = []
        self.ranges: list[int] = []
        self.stop_stalling = threading.Event()

    def handle_error(self, request, client_address):
        """A client that was killed or has heard enough is no error of ours."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, content = self.server, self.server.files[self.path]
        what = server.plan.pop(0) if server.plan else None
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        server.ranges.append(start)
        if isinstance(what, int):
            self.send_error(what)
            return
        kind, number = what if isinstance(what, tuple) else (what, 0)
        if kind == "noise":
            self.wfile.write(b"\0" * 200)
            self.close_connection = True
            return
        if kind in ("redirect", "reason", "endless", "endless trailer"):
            self._raw(kind, number)
            self.close_connection = True
            return
        if kind == "portal":
            content, asked, start = b"<html>Please log in</html>", None, 0
        if kind == "late range" and asked:
            start += number
        if start >= len(content):
            self.send_error(416)
            return
        if kind == "flip":
            content = content[:number] + bytes([content[number] ^ 255]) + content[number + 1 :]
        if asked and kind != "no range":
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            start = 0
            self.send_response(200)
        body = content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self._send(kind, number, body)
        self.close_connection = True

    def _raw(self, kind: str, text: str | int) -> None:
        """What no server of the library's would send."""
        if kind == "reason":
            self.wfile.write(f"HTTP/1.1 500 {text}\r\nContent-Length: 0\r\n\r\n".encode("latin1"))
            return
        head, again = {
            "redirect": (f"HTTP/1.1 302 Found\r\nLocation: {text}\r\n\r\n", "page"),
            "endless": ("" if str(text).startswith("HTTP") else "HTTP/1.1 200 OK\r\n", text),
            "endless trailer": ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", "A: b\r\n"),
        }[kind]
        self.wfile.write(head.encode("latin1"))
        while not self.server.stop_stalling.wait(0.001):  # until the client leaves
            self.wfile.write(str(again).encode("latin1") * 100)

    def _send(self, kind: str | None, number: int, body: bytes) -> None:
        if kind == "drip":
            piece = len(body) // 20 + 1
            for at in range(0, len(body), piece):
                self.wfile.write(body[at : at + piece])
                self.wfile.flush()
                time.sleep(0.001)
            return
        self.wfile.write(body[:number] if kind in ("cut", "stall", "reset") else body)
        self.wfile.flush()
        if kind == "stall":
            self.server.stop_stalling.wait(20)
        if kind == "reset":  # closing now sends RST and drops what was not delivered
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Server]:
    """A `Server` of `files`, running."""
    with Server(files) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield server
        finally:
            server.stop_stalling.set()
            server.shutdown()
