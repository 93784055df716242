"""Rows measured in a process of their own, which may take too long or die."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import subprocess
import sys
import threading
from types import TracebackType
from typing import IO, Any, Self

import torch

from declarative_cvx.comparison.candidate import Candidate
from declarative_cvx.comparison.measure import Reference, Work, measure
from declarative_cvx.comparison.row import Row

# Seconds beyond the time limit for building the layer and for a call that is going on.
_GRACE = 30.0
_READY = b"ready"


class Worker:
    """A Python process that measures rows, started again whenever it had to be stopped.

    Parameters
    ----------
    work : Work
    reference : Reference
    repeats : int
    seconds : float
        Time limit for each row.
    """

    def __init__(self, work: Work, reference: Reference, repeats: int, seconds: float) -> None:
        self._seconds = seconds
        self._task = pickle.dumps((work, reference, repeats, seconds, torch.get_num_threads()))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def can_start(self) -> bool:
        """Whether another process can read the problem (not if its classes are a notebook's)."""
        try:
            process = self._process or self._start()
            assert process.stdout is not None
            return _receive(process.stdout) == _READY
        except (EOFError, OSError):
            self._stop()
            return False

    def measure(self, candidate: Candidate) -> Row:
        """A row; one that says why where the process was too slow or died."""
        if self._process is None and not self.can_start():
            return Row(candidate, failure="no process could be started to measure it in")
        late, process = threading.Event(), self._process
        assert process is not None

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self._seconds + _GRACE, stop)
        timer.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            _send(process.stdin, pickle.dumps(candidate))
            return pickle.loads(_receive(process.stdout))  # type: ignore[no-any-return]
        except (EOFError, OSError):
            code = process.wait()
            self._stop()
            if late.is_set():
                return Row(candidate, failure=f"not done after {self._seconds + _GRACE:g} s")
            return Row(candidate, failure=f"its process died ({_cause(code)})")
        finally:
            timer.cancel()

    def _start(self) -> subprocess.Popen[bytes]:
        paths = os.pathsep.join(path for path in sys.path if path)
        process = subprocess.Popen(
            [sys.executable, "-m", "declarative_cvx.comparison.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths},
        )
        self._process = process
        assert process.stdin is not None
        _send(process.stdin, self._task)
        return process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _cause(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit status {code}"


def _send(stream: IO[bytes], message: bytes) -> None:
    stream.write(struct.pack("!Q", len(message)) + message)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes:
    return _exactly(stream, struct.unpack("!Q", _exactly(stream, 8))[0])


def _exactly(stream: IO[bytes], size: int) -> bytes:
    message = stream.read(size)
    if len(message) < size:
        raise EOFError
    return message


def serve() -> None:
    """Measure what comes in on the standard input until it ends."""
    incoming = sys.stdin.buffer
    outgoing = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # solvers print
    task: tuple[Any, ...] = pickle.loads(_receive(incoming))
    work, reference, repeats, seconds, threads = task
    torch.set_num_threads(threads)
    _send(outgoing, _READY)
    with contextlib.suppress(EOFError):
        while True:
            candidate = pickle.loads(_receive(incoming))
            row = measure(work, candidate, reference, repeats, seconds)
            _send(outgoing, pickle.dumps(row))


if __name__ == "__main__":
    serve()
