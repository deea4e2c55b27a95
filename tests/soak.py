"""Endurance test: runs that are killed, damaged and resumed at random must equal an uninterrupted run.

For each script, with one and with two processes in turn, a chain of starts with ``--resume`` in one folder: each start
gets a random fault, its end is checked, and the completed run is compared with an uninterrupted one. When the time is
over, the chain is completed without faults. Usage: ``python -m tests.soak [--minutes 60] [--seed 0]``. Prints the
number of faults by kind; exits with 1 at the first violation.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from relvit_d2.data.detection.streets import generate
from tests.support import classifiers
from tests.support.labelled_folders import draw_trees
from tests.support.runs import equal, rows
from tests.support.scripts import command, kill_one, ranks, started, workers

ITERATIONS = 60
KEYS = f"SOLVER.MAX_ITER {ITERATIONS} SOLVER.CHECKPOINT_PERIOD 4 TEST.EVAL_PERIOD 25 DATALOADER.NUM_WORKERS 2".split()
LIMIT = 30.0  # seconds from a death to the end of all processes
ONE, TWO = (), ("--num-gpus", 2)
# Scripts and their flags, in the order of the chains.
CHAINS: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("pretrain_ssl.py", TWO),
    ("train_net.py", ONE),
    ("train_cls.py", TWO),
    ("pretrain_ssl.py", ONE),
    ("train_net.py", TWO),
    ("train_cls.py", ONE),
)


class ViolationError(Exception):
    """A guarantee does not hold."""


class Chain:
    """The starts of one script in one folder.

    Args:
        root: data root; the outputs are written into it.
        script: name of the script.
        flags: flags of each start.
        draw: random numbers.
    """

    def __init__(self, root: Path, script: str, flags: tuple[object, ...], draw: random.Random) -> None:
        self.root, self.script, self.flags, self.draw = root, script, flags, draw
        self.name = f"{script} {' '.join(map(str, flags))}".strip()
        self.straight, self.output = (root / what / self.name.replace(" ", "_") for what in ("straight", "chain"))
        self.counts: Counter[str] = Counter()

    def _arguments(self, output: Path, *flags: object) -> tuple[object, ...]:
        """Return the command that writes to ``output``."""
        flags = (*self.flags, *flags)
        if self.script == "train_cls.py":
            crop = ("INPUT.VIEW.CROP", "resized")  # of images of several sizes
            return classifiers.command(self.root / "trees", output, *KEYS, *crop, flags=flags)
        return command(self.script, output, *KEYS, flags=flags)

    def run(self, end: float) -> None:
        """Start the run with random faults until it is complete, without faults from the time ``end`` on."""
        if not self.straight.exists():
            status, output, errors = self._start(self.straight, "", lambda process: None)
            if status:
                raise ViolationError(f"{self.name}: the uninterrupted run failed:\n{output}\n{errors}")
        while not self._step("none" if time.monotonic() > end else self.draw.choice(self._kinds())):
            pass
        one, other = (torch.load(o / "model_final.pth", weights_only=True) for o in (self.straight, self.output))
        if not all(equal(one[key], other[key]) for key in ("model", "optimizer", "iteration")):
            raise ViolationError(f"{self.name}: the weights differ from those of the uninterrupted run")
        encoders = [o / "encoder.safetensors" for o in (self.straight, self.output)]
        if encoders[0].exists() and not equal(*map(load_file, encoders)):
            raise ViolationError(f"{self.name}: the encoder differs from that of the uninterrupted run")
        if rows(self.straight) != rows(self.output):
            raise ViolationError(f"{self.name}: metrics.json differs from that of the uninterrupted run")
        if left := list(self.output.rglob("*.part")):
            raise ViolationError(f"{self.name}: temporary files remain: {left}")
        self.counts["complete runs"] += 1
        shutil.rmtree(self.output)

    def _kinds(self) -> list[str]:
        return ["kill", "worker", "signal", "full disk", "clock", "damage", *(["rank"] if self.flags else [])]

    def _step(self, kind: str) -> bool:
        """Start the run with a fault; return whether it is complete."""
        fault = ""
        expected: tuple[int, ...] = (0,)
        act: Callable[[subprocess.Popen[str]], object] = lambda process: None  # noqa: E731
        if kind == "kill":
            act, expected = (lambda process: process.kill()), (0, -signal.SIGKILL)
        elif kind in ("worker", "rank"):
            members = workers if kind == "worker" else ranks
            act, expected = (lambda process: kill_one(members(process.pid, self.flags), self.draw)), (0, 1)
        elif kind == "signal":
            number = self.draw.choice((signal.SIGINT, signal.SIGTERM))
            act, expected = (lambda process: os.killpg(process.pid, number)), (0, 128 + number, -number)
        elif kind == "full disk":
            fault, expected = f"full:{self.draw.choice((2_000, 50_000, 1_000_000))}", (0, 1)
        elif kind == "clock":
            fault = f"clock:{self.draw.choice((-1, 1)) * self.draw.randrange(10**3, 10**9)}"
        elif kind == "damage" and not self._damage():
            kind = "none"
        self.counts[kind] += 1
        status, output, errors = self._start(self.output, fault, act, "--resume")
        sentences = errors.count("error: ")
        if status not in expected or "Traceback" in output + errors or sentences != (status == 1):
            raise ViolationError(
                f"{self.name}, {kind}: status {status}, {sentences} errors\n{output[-3000:]}\n{errors[-3000:]}"
            )
        return status == 0

    def _start(
        self, output: Path, fault: str, act: Callable[[subprocess.Popen[str]], object], *flags: object
    ) -> tuple[int, str, str]:
        """Run the command, call ``act`` at a random moment, and wait for the end of all its processes."""
        metrics = output / "metrics.json"
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        with started(self.root, *self._arguments(output, *flags), fault=fault) as process:
            moment = time.monotonic() + self.draw.uniform(0, 8)
            if self.draw.random() < 0.85:  # else while it starts
                while process.poll() is None and not (metrics.exists() and metrics.stat().st_mtime_ns > before):
                    time.sleep(0.02)
                moment = time.monotonic() + self.draw.uniform(0, 4)
            while process.poll() is None and time.monotonic() < moment:
                time.sleep(0.02)
            acted = act(process) if process.poll() is None else False
            try:
                printed, errors = process.communicate(timeout=LIMIT if acted is True else 600)
            except subprocess.TimeoutExpired as error:
                raise ViolationError(f"{self.name} has not ended {LIMIT:.0f} s after a death") from error
            if left := _session(process.pid):
                raise ViolationError(f"{self.name} has left processes {left}")
            return process.returncode, printed, errors

    def _damage(self) -> bool:
        """Damage or remove the newest checkpoint if there is one before it; return whether there is."""
        files = sorted(self.output.glob("model_" + "[0-9]" * 7 + ".pth"))
        if len(files) < 2:
            return False
        content = bytearray(files[-1].read_bytes())
        how = self.draw.choice(("flip", "cut", "empty", "remove"))
        if how == "remove":
            files[-1].unlink()
            return True
        if how == "flip":
            content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
        else:
            del content[self.draw.randrange(len(content)) if how == "cut" else 0 :]
        files[-1].write_bytes(content)
        return True


def _session(number: int) -> list[int]:
    """Return the running processes of a session, after 5 seconds in which they may end."""
    end = time.monotonic() + 5
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session, *_ = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(session) == number and state != "Z":
                found.append(int(path.parent.name))
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.1)


def main() -> int:
    """Run the chains one after another; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        generate(root / "svhn/train", 12, seed=1)
        generate(root / "svhn/test", 5, seed=2)
        draw_trees(root / "trees", mixed=True)
        chains = [Chain(root, s, flags, random.Random(f"{args.seed} {s} {flags}")) for s, flags in CHAINS]
        status, end = 0, time.monotonic() + 60 * args.minutes
        try:
            for chain in itertools.cycle(chains):
                if time.monotonic() > end:
                    break
                chain.run(end)
        except ViolationError as violation:
            print(f"violation (seed {args.seed}): {violation}", file=sys.stderr)
            status = 1
        for chain in chains:
            print(f"{chain.name}: {json.dumps(chain.counts)}")
        return status


if __name__ == "__main__":
    sys.exit(main())
