"""New Python processes for tests, without the seconds that each would spend importing torch.

This file is also the script of a server. The server imports the libraries that xprune imports, but never xprune. For
each run it forks itself, so the code starts in a process that has not imported xprune. `Processes` talks to the server.
"""

import atexit
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
LIBRARIES = ("torch", "torchvision", "timm", "accelerate", "captum.attr", "rich", "typer", "safetensors.torch")
"""The libraries that the server imports. A test can still hide each of them from xprune."""
HIDDEN = ("xprune", "torch_pruning", "torch_geometric", "transformers")
"""The modules that the server must not import: tests load them anew, or run without them."""


class Processes:
    """Runs code in new processes. A context manager: the server ends with the block."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.communicate()

    def run(
        self, code: str, *arguments: object, cwd: Path = ROOT, path: Sequence[Path] = (), check: bool = False
    ) -> "subprocess.CompletedProcess[str]":
        """Runs code as `python -c` would, and returns its exit status and what it printed.

        Args:
            code: The source.
            arguments: `sys.argv[1:]` of the process.
            cwd: The current folder of the process.
            path: Folders that come first on `sys.path`. The repository follows them.
            check: True raises AssertionError, with the printed errors, where the exit status is not 0.
        """
        if self._server is None:
            self._server = self._started()
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            order = {"code": code, "arguments": [str(each) for each in arguments], "cwd": str(cwd)}
            order |= {"path": [str(each) for each in path], "out": str(out), "err": str(err)}
            assert self._server.stdin and self._server.stdout
            print(json.dumps(order), file=self._server.stdin, flush=True)
            status = int(self._server.stdout.readline())
            done = subprocess.CompletedProcess([code], status, out.read_text(), err.read_text())
        assert not (check and done.returncode), done.stderr
        return done

    def _started(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-W", "ignore", __file__]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )


def _serve() -> dict[str, Any]:
    """Forks at each order, and returns the order in the child. Ends the process when there are no more orders."""
    gc.disable()
    for name in LIBRARIES:
        importlib.import_module(name)
    assert not set(HIDDEN) & set(sys.modules)
    gc.freeze()  # collections in the children need not look at the libraries
    gc.enable()
    for line in sys.stdin:
        if not (child := os.fork()):
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    os._exit(0)  # taking the libraries apart needs a second


def _carry_out(order: dict[str, Any]) -> None:
    """Runs the code of an order, as the main module of this process."""
    for descriptor, name in ((0, os.devnull), (1, order["out"]), (2, order["err"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), descriptor)
    os.chdir(order["cwd"])
    sys.path[:1] = ["", *order["path"]]  # the first was the folder of this script
    sys.argv = ["-c", *order["arguments"]]
    main = sys.modules["__main__"] = ModuleType("__main__")
    exec(compile(order["code"], "<string>", "exec"), vars(main))


def _end(error: BaseException | None) -> None:
    """Ends this process as the interpreter would, but without taking the libraries apart, which needs a second."""
    status = 0
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif error is not None:
        traceback.print_exception(error)
        status = 1
    atexit._run_exitfuncs()  # type: ignore[attr-defined]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    order = _serve()
    try:
        _carry_out(order)
    except BaseException as error:
        _end(error)
    _end(None)
