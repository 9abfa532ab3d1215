"""Commands in real processes without waiting for imports: a server that has imported all of it, and forks.

The server reads requests from its standard input, one JSON object a line. ``start`` forks a child that runs
``stillhouse`` with ``argv`` in ``cwd``, its output going to ``log``; ``wait`` answers with its exit code
(negative: the signal that ended it). ``die`` kills the child from within by SIGKILL at the ``call``-th call of
``function`` (``module:qualified.name``), ``before`` or ``after`` it; ``full`` makes that call fail as a full disk does;
``quick`` leaves the picture out; ``interrupt`` sends the signal of Ctrl-C (or ``signal``) there, as many ``times``;
``limit`` is the most bytes that a file may have; ``unread`` gives standard output to a pipe that nobody reads; ``env``
are variables of the child's own.
"""

from __future__ import annotations

import errno
import functools
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Forks:
    """The test's end of the server."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
        )
        assert self._read() == {"ready": True}

    def _read(self) -> dict[str, Any]:
        return json.loads(self._server.stdout.readline())

    def _ask(self, **request: Any) -> dict[str, Any]:
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return self._read()

    def start(self, argv: Sequence[object], cwd: Path, log: Path, **faults: Any) -> int:
        """Begin a command; its process id."""
        words = [str(word) for word in argv]
        return self._ask(op="start", argv=words, cwd=str(cwd), log=str(log), **faults)["pid"]

    def wait(self, pid: int) -> int:
        """The exit code, or minus the signal."""
        return self._ask(op="wait", pid=pid)["code"]

    def run(self, argv: Sequence[object], cwd: Path, log: Path, **faults: Any) -> int:
        """A command from start to end."""
        return self.wait(self.start(argv, cwd, log, **faults))

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait(30)


def _patch(target: str, call: int, do: Any, when: str) -> None:
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, last = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, last)
    calls = [0]

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and when == "before":
            do()
        made = original(*args, **kwargs)
        if calls[0] == call and when == "after":
            do()
        return made

    setattr(owner, last, patched)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _interrupt(times: int, number: int) -> None:
    for _ in range(times):
        os.kill(os.getpid(), number)


def _output(request: dict[str, Any]) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 2)
    if request.get("unread"):
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    else:
        os.dup2(log, 1)


def _child(request: dict[str, Any]) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _output(request)
    os.chdir(request["cwd"])
    os.environ.update(request.get("env", {}))
    if "limit" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
    for name in ("die", "full", "interrupt"):
        if name in request:
            fault = request[name]
            sends = functools.partial(_interrupt, fault.get("times", 1), fault.get("signal", signal.SIGINT))
            do = {"die": _kill, "full": _full, "interrupt": sends}[name]
            _patch(fault["function"], fault["call"], do, fault.get("when", "before"))
    if request.get("quick"):
        import stillhouse.runs.page

        stillhouse.runs.page.curve = lambda *given: None
    from stillhouse.cli.main import main

    try:
        return main(request["argv"])
    except SystemExit as leaving:
        return int(leaving.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _serve() -> None:
    import matplotlib.figure  # noqa: F401
    import sklearn.datasets
    import torch

    from stillhouse.kernels import softmax_kl

    torch.set_num_threads(1)
    sklearn.datasets.load_digits()
    logits = torch.zeros(4, 10, requires_grad=True)
    softmax_kl(logits, torch.ones(4, 10)).backward()  # the kernel is compiled
    answers = os.fdopen(os.dup(1), "w")
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    answer(ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "wait":
            answer(code=os.waitstatus_to_exitcode(os.waitpid(request["pid"], 0)[1]))
            continue
        pid = os.fork()
        if pid == 0:
            try:
                code = _child(request)
            except BaseException:
                import traceback

                traceback.print_exc()
                sys.stderr.flush()
                code = 70
            os._exit(code)
        answer(pid=pid)


if __name__ == "__main__":
    _serve()
