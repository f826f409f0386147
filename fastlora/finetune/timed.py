"""http and https answers with an end: what keeps a connection busy without giving any content is given up, too.

A socket's own timeout begins anew with each byte: "100 Continue", a head or a redirect's page could go on for ever.
"""

from __future__ import annotations

import http.client
import io
import time
import urllib.parse
import urllib.request


def open_url(request: urllib.request.Request, timeout: float) -> Answer:
    """The answer to `request`, redirects followed.

    Raises:
        OSError, http.client.HTTPException: as `urllib.request.urlopen`, TimeoutError when the head takes longer than
            `timeout` seconds.
        ValueError: a redirect leads to no http or https address.
    """
    return urllib.request.build_opener(_Plain, _Secure, _Redirects).open(request, timeout=timeout)


class Answer(http.client.HTTPResponse):
    """An answer whose head, and each piece after it, comes within the timeout of its connection."""

    def __init__(self, sock, *args, **kwargs):
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self._timed = _Timed(sock)
        self.fp = io.BufferedReader(self._timed)

    def piece(self, most: int) -> bytes:
        """Up to `most` bytes of the content, none at its end; ConnectionError or TimeoutError when they do not come."""
        self._timed.renew()
        try:
            return self.read1(most)
        except TimeoutError:
            raise
        except OSError as error:  # not to be taken for one of the disk's
            raise ConnectionError(str(error)) from None


class _Timed(io.RawIOBase):
    """A socket's bytes until its timeout has passed since the last `renew`, whatever arrives."""

    def __init__(self, sock):
        super().__init__()
        self._sock, self._raw, self._timeout = sock, sock.makefile("rb", buffering=0), sock.gettimeout()
        self.renew()

    def renew(self) -> None:
        self._end = time.monotonic() + self._timeout

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left)
        try:
            return self._raw.readinto(buffer)
        finally:  # a proxy's socket goes on to TLS when its answer has been read
            self._sock.settimeout(self._timeout)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Answers:
    """urllib's handlers with answers of the kind above."""

    def do_open(self, http_class, *args, **kwargs):
        def connect(*args, **kwargs):
            connection = http_class(*args, **kwargs)
            connection.response_class = Answer
            return connection

        return super().do_open(connect, *args, **kwargs)


class _Plain(_Answers, urllib.request.HTTPHandler):
    pass


class _Secure(_Answers, urllib.request.HTTPSHandler):
    pass


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Does not read the page that tells of a redirect, which may have no end, and leaves http and https for nothing."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        fp.close()
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise ValueError(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)
