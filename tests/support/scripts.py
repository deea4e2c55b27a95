"""Run commands and scripts as subprocesses."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the repository
TINY = {
    "pretrain_ssl.py": "SOLVER.MAX_ITER 6 SOLVER.IMS_PER_BATCH 8 SOLVER.WARMUP_ITERS 0 PRETEXT.IMAGE_SIZE 32 "
    "SOLVER.CHECKPOINT_PERIOD 3",
    "train_net.py": "SOLVER.MAX_ITER 4 SOLVER.IMS_PER_BATCH 4 SOLVER.WARMUP_ITERS 0 SOLVER.CHECKPOINT_PERIOD 2",
}
CONFIGS = {"pretrain_ssl.py": "configs/demo/ssl_streets.yaml", "train_net.py": "configs/demo/streets.yaml"}
SCRIPTS = tuple(CONFIGS)


def command(script: str, output: Path, *more: object, flags: tuple[object, ...] = ()) -> tuple[object, ...]:
    """Return the command of a short run of ``script`` on the SVHN of the data root; ``more`` overrides its keys."""
    names = ("DATASETS.TRAIN", "('svhn_train',)", "DATASETS.TEST", "('svhn_test',)", "OUTPUT_DIR", output)
    return (script, "--config-file", CONFIGS[script], *flags, *TINY[script].split(), *names, *more)


def _environment(root: Path) -> dict[str, str]:
    return os.environ | {
        "DETECTRON2_DATASETS": str(root),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(root / "cache"),
    }


@contextmanager
def started(root: Path, *command: object, fault: str = "") -> Iterator[subprocess.Popen[str]]:
    """Start a command with ``root`` as the data root; all its processes are killed after the block.

    Args:
        command: ``relvit-d2`` and its arguments, or a script and its arguments.
        fault: fault to inject; see ``tests/support/faults/sitecustomize.py``.
    """
    environment = _environment(root)
    if fault:
        environment |= {"PYTHONPATH": f"{Path(__file__).with_name('faults')}:{ROOT}", "RELVIT_FAULT": fault}
    arguments = [*map(str, command)]
    if arguments[0] == "relvit-d2":
        arguments[:1] = ["-m", "relvit_d2"]
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@cache
def _fork_server() -> subprocess.Popen[str]:
    """Start ``tests/support/fork_server.py``, which ends with this process."""
    return subprocess.Popen(
        [sys.executable, Path(__file__).with_name("fork_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(Path("/nowhere")),
    )


def _forked(root: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    server = _fork_server()
    assert server.stdin and server.stdout
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        request = {"argv": command, "env": _environment(root), "out": str(out), "err": str(err)}
        print(json.dumps(request), file=server.stdin, flush=True)
        return subprocess.CompletedProcess(command, int(server.stdout.readline()), out.read_text(), err.read_text())


def run(
    root: Path, *command: object, status: int = 0, fault: str = "", fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a command; its exit status must be ``status``, negative for a signal.

    A single process without a fault is forked from the fork server, which saves the time of imports.

    Args:
        fault: fault to inject; see ``tests/support/faults/sitecustomize.py``.
        fresh: always start a new interpreter, for environment variables that are read during imports.
    """
    arguments = [*map(str, command)]
    if fresh or fault or "--num-gpus" in arguments or arguments[0].startswith("-"):
        with started(root, *arguments, fault=fault) as process:
            output, errors = process.communicate()
        done = subprocess.CompletedProcess(arguments, process.returncode, output, errors)
    else:
        done = _forked(root, arguments)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def fails(root: Path, *command: object, fault: str = "", fresh: bool = False) -> str:
    """Run a command that must fail with a one-sentence error; return it."""
    done = run(root, *command, status=1, fault=fault, fresh=fresh)
    assert "Traceback" not in done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str] | None, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timeout"
        assert process is None or process.poll() is None, "".join(process.communicate())
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """Return the process IDs of the children of a process; empty if it has ended."""
    with suppress(OSError):
        return [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    return []


def ranks(pid: int, flags: tuple[object, ...]) -> list[int]:
    """Return the training processes of a command with ``flags``."""
    if "--num-gpus" not in flags:
        return [pid]

    def name(pid: int) -> str:
        with suppress(OSError):
            return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
        return ""

    return [child for child in children(pid) if "resource_tracker" not in name(child)]


def workers(pid: int, flags: tuple[object, ...]) -> list[int]:
    """Return the processes that a command's training processes have started."""
    return [worker for rank in ranks(pid, flags) for worker in children(rank)]


def kill_one(pids: list[int], draw: random.Random) -> bool:
    """Kill a random process; return whether there was one."""
    if not pids:
        return False
    with suppress(ProcessLookupError):
        os.kill(draw.choice(pids), signal.SIGKILL)
        return True
    return False


def digests(folder: Path, pattern: str = "*") -> dict[str, str]:
    """Return the digest of each file in ``folder``, without sub-folders and the log, to which every start appends."""
    files = [path for path in folder.glob(pattern) if path.is_file() and path.name != "log.txt"]
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in files}
