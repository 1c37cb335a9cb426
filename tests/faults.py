"""Faults of the machine, for tests of what is kept."""

import contextlib
import errno
import os
import socketserver
import threading
from collections.abc import Iterator

from avg_mlx.journal import Journal


class Killed(BaseException):
    """The process ends here, and handles nothing any more."""


class FullDisk:
    """A stream to a disk that has room for ten bytes more."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, content: bytes) -> None:
        self.stream.write(content[:10])
        self.stream.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_disk(monkeypatch, calls: int) -> None:
    """Let the disk be full for every journal after so many calls of `append`."""
    append, left = Journal.append, [None] * calls

    def write(journal, *rows):
        if left:
            left.pop()
        else:
            journal._stream = FullDisk(journal._stream)
        append(journal, *rows)

    monkeypatch.setattr(Journal, "append", write)


@contextlib.contextmanager
def rude_server(reply: bytes) -> Iterator[str]:
    """The address of a server that answers whatever it is asked with these bytes, and hangs up."""

    class Rude(socketserver.StreamRequestHandler):
        def handle(self):
            self.request.recv(9999)
            self.wfile.write(reply)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Rude) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/image.png"
        server.shutdown()
