"""Runs a function once for each of many names, each time in a child process with limits.

The children are forks of this process, so that they do not import torch and transformers again. A child that needs too
much time or memory ends alone. Nothing that it leaves in memory reaches the next child.
"""

import json
import os
import resource
import selectors
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Report = Callable[[dict[str, Any]], None]


def in_children(
    names: Sequence[str],
    work: Callable[[str, Report], None],
    jobs: int = 1,
    seconds: int = 120,
    gigabytes: int = 8,
) -> Iterator[dict[str, Any]]:
    """Calls `work(name, report)` in a child process for each name, and yields the last row that each child reported.

    Args:
        names: The names.
        work: A function that reports a row again and again while it grows. Only the last report counts.
        jobs: How many children run at the same time.
        seconds: The time limit of a child.
        gigabytes: The limit of the address space of a child.

    Yields:
        One row for each name, in the order in which the children end. "seconds" says how long the child ran. "timeout"
        is True if it ran too long. "died" says how it ended, if it ended otherwise before its end.
    """
    waiting = list(names)
    running: dict[int, tuple[str, int, float, list[bytes]]] = {}
    selector = selectors.DefaultSelector()
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            pid, pipe = _start(name, work, seconds, gigabytes)
            running[pipe] = (name, pid, time.time(), [])
            selector.register(pipe, selectors.EVENT_READ)
        for key, _ in selector.select(timeout=1):
            pipe = key.fd
            name, pid, began, parts = running[pipe]
            part = os.read(pipe, 65536)
            if part:
                parts.append(part)
                continue
            selector.unregister(pipe)
            os.close(pipe)
            _, status = os.waitpid(pid, 0)
            del running[pipe]
            yield {"type": name, **_last(b"".join(parts)), **_end(status), "seconds": round(time.time() - began, 1)}


def _start(name: str, work: Callable[[str, Report], None], seconds: int, gigabytes: int) -> tuple[int, int]:
    """Starts a child. Returns its process id and the pipe from which its rows are read."""
    sys.stdout.flush()
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    # This is the child. It never returns.
    try:
        os.close(read)
        # Without a handler, the signal ends the child at once, also inside a function of C.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        resource.setrlimit(resource.RLIMIT_AS, (gigabytes * 2**30, gigabytes * 2**30))
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)

        def report(row: dict[str, Any]) -> None:
            data = json.dumps(row).encode() + b"\n"
            while data:
                data = data[os.write(write, data) :]

        work(name, report)
        os._exit(0)
    except BaseException as error:
        _say(write, error)
        os._exit(1)


def _say(pipe: int, error: BaseException) -> None:
    row = {"died": f"{type(error).__name__}: {error}"[:300]}
    os.write(pipe, json.dumps(row).encode() + b"\n")


def _last(data: bytes) -> dict[str, Any]:
    """Returns the last complete row, joined with the reason why the child died."""
    rows = [json.loads(line) for line in data.split(b"\n")[:-1] if line]
    return {**rows[-2], **rows[-1]} if len(rows) > 1 and "died" in rows[-1] else (rows[-1] if rows else {})


def _end(status: int) -> dict[str, Any]:
    """Returns what the exit status of a child says."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return {"timeout": True} if number == signal.SIGALRM else {"died": signal.Signals(number).name}
    return {}
