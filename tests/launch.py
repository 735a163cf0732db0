"""Several processes of one run, as torchrun starts them, without waiting for their imports: forked from this one."""

from __future__ import annotations

import io
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn


def forget_accelerate() -> None:
    """accelerate keeps one state a process, with the precision and device that were asked for first."""
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@dataclass
class Done:
    """What a command came to: named as in subprocess.CompletedProcess."""

    returncode: int
    stdout: str
    stderr: str


def launch(work: Callable[[], object], processes: int = 2, timeout: float = 600, **environment: str) -> list[Done]:
    """Calls `work` in so many processes, with the environment that torchrun gives each; what each came to, by rank.

    This process keeps the store through which they find each other, as torchrun's own does: the first of them may end
    before the others. One that still runs after `timeout` seconds is killed: its code is then -9.
    """
    import torch
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    common = {
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0", "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": "1", **environment,
    }  # fmt: skip
    sys.stdout.flush()
    sys.stderr.flush()
    with TemporaryDirectory() as folder:
        outs = [[Path(folder, f"{rank}.{stream}") for stream in ("out", "err")] for rank in range(processes)]
        children = []
        for rank in range(processes):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of threads: pytest-xdist's wait, ours do not run
                child = os.fork()
            if child == 0:
                torch.set_num_threads(1)  # a forked process has no other threads to wait for
                _run(work, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, outs[rank])
            children.append(child)
        codes = _wait(children, timeout)
        return [
            Done(code, *(file.read_text("utf-8") for file in files)) for code, files in zip(codes, outs, strict=True)
        ]


def _run(work: Callable[[], object], environment: dict[str, str], files: list[Path]) -> NoReturn:
    """In the child: `work`, with stdout and stderr in files; its exit code is SystemExit's, or 1 after a traceback."""
    code: object = 1
    try:
        for number, file in enumerate(files, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(open(number, "wb", buffering=0), encoding="utf-8", write_through=True) for number in (1, 2)
        )
        os.environ.update(environment)
        forget_accelerate()
        work()
        code = 0
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(int(code or 0))  # type: ignore[call-overload]


def _wait(children: list[int], timeout: float) -> list[int]:
    """Each one's exit code, or the number of the signal that ended it, below zero."""
    codes: dict[int, int] = {}
    end = time.monotonic() + timeout
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[child] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(child, 9)
        time.sleep(0.02)
    return [codes[child] for child in children]
