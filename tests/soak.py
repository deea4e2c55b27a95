"""Endurance test: runs that are killed, damaged and resumed at random must equal an uninterrupted run.

For each script a chain of starts with ``--resume`` in one folder: each start gets a random fault, its end is checked,
and when the run is complete it is compared with an uninterrupted run and the chain begins again. Usage:
``python -m tests.soak [--minutes 60] [--seed 0]``. Prints the number of faults by kind; exits with 1 at the first
violation.
"""

import argparse
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
from PIL import Image

from relvit_d2.data.detection.streets import generate
from tests.support.classifiers import SMALL
from tests.support.runs import equal, rows
from tests.support.scripts import children, command, started

ITERATIONS = 60
KEYS = f"SOLVER.MAX_ITER {ITERATIONS} SOLVER.CHECKPOINT_PERIOD 4 TEST.EVAL_PERIOD 25 DATALOADER.NUM_WORKERS 2".split()
LIMIT = 30.0  # seconds from a death to the end of all processes
TWO = ("--num-gpus", 2)


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
        self.straight = root / f"straight_{script}"
        self.output = root / f"chain_{script}"
        self.counts: Counter[str] = Counter()

    def arguments(self, output: Path, *flags: object) -> tuple[object, ...]:
        """Return the command that writes to ``output``."""
        if self.script != "train_cls.py":
            return command(self.script, output, *KEYS, flags=(*self.flags, *flags))
        trees = self.root / "trees"
        keys = SMALL | {"DATASETS.TRAIN": f"('{trees}',)", "DATASETS.TEST": "()", "OUTPUT_DIR": output}
        given = [part for pair in keys.items() for part in pair]
        config = ("--config-file", "configs/cls/cifar10_vit_s4.yaml")
        return (self.script, *config, *self.flags, *flags, *given, *KEYS)

    def run_straight(self) -> None:
        """Run without interruption."""
        status, output, _ = self._start(self.straight, "", lambda process: None)
        if status:
            raise ViolationError(f"the uninterrupted run failed:\n{output}")

    def step(self) -> None:
        """Start the run with a random fault; compare the result if it is complete."""
        kinds = ("kill", "worker", "rank", "signal", "full disk", "clock", "damage")
        kind = self.draw.choice(kinds if self.flags else [k for k in kinds if k != "rank"])
        fault = ""
        expected: tuple[int, ...] = (0,)
        act: Callable[[subprocess.Popen[str]], object] = lambda process: None  # noqa: E731
        if kind == "kill":
            act, expected = (lambda process: process.kill()), (0, -signal.SIGKILL)
        elif kind in ("worker", "rank"):
            act, expected = (lambda process: self._kill_descendant(process, kind)), (0, 1)
        elif kind == "signal":
            number = self.draw.choice((signal.SIGINT, signal.SIGTERM))
            act, expected = (lambda process: os.killpg(process.pid, number)), (0, 128 + number, -number)
        elif kind == "full disk":
            fault, expected = f"full:{self.draw.choice((2_000, 50_000, 1_000_000))}", (0, 1)
        elif kind == "clock":
            fault = f"clock:{self.draw.choice((-1, 1)) * self.draw.randrange(10**3, 10**9)}"
        elif kind == "damage":
            self._damage()
        self.counts[kind] += 1
        status, output, errors = self._start(self.output, fault, act, "--resume")
        if status not in expected or "Traceback" in errors or errors.count("error: ") > 1:
            raise ViolationError(f"{self.script}, {kind}: status {status}\n{output[-3000:]}\n{errors[-3000:]}")
        if (self.output / "model_final.pth").exists() and status == 0:
            self._compare()

    def _start(
        self, output: Path, fault: str, act: Callable[[subprocess.Popen[str]], object], *flags: object
    ) -> tuple[int, str, str]:
        """Run the command, call ``act`` at a random moment, and wait for the end of all its processes."""
        metrics = output / "metrics.json"
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        with started(self.root, *self.arguments(output, *flags), fault=fault) as process:
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
                raise ViolationError(f"{self.script} has not ended {LIMIT:.0f} s after a death") from error
            if left := _descendants(process.pid):
                raise ViolationError(f"{self.script} has left processes {left}")
            return process.returncode, printed, errors

    def _kill_descendant(self, process: subprocess.Popen[str], kind: str) -> bool:
        """Kill a random worker or rank; return whether there was one."""
        spawned = [pid for pid in children(process.pid) if "resource_tracker" not in _command(pid)]
        ranks = spawned if self.flags else [process.pid]
        victims = ranks if kind == "rank" else [pid for rank in ranks for pid in children(rank)]
        if not victims:
            return False
        os.kill(self.draw.choice(victims), signal.SIGKILL)
        return True

    def _damage(self) -> None:
        """Damage the newest checkpoint if there is an earlier one."""
        files = sorted(self.output.glob("model_" + "[0-9]" * 7 + ".pth"))
        if len(files) < 2:
            return
        content = bytearray(files[-1].read_bytes())
        how = self.draw.choice(("flip", "cut", "empty"))
        if how == "flip":
            content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
        else:
            del content[self.draw.randrange(len(content)) if how == "cut" else 0 :]
        files[-1].write_bytes(content)

    def _compare(self) -> None:
        one, other = (torch.load(o / "model_final.pth", weights_only=True) for o in (self.straight, self.output))
        if not all(equal(one[key], other[key]) for key in ("model", "optimizer", "iteration")):
            raise ViolationError(f"{self.script}: the weights differ from those of the uninterrupted run")
        if rows(self.straight) != rows(self.output):
            raise ViolationError(f"{self.script}: metrics.json differs from that of the uninterrupted run")
        self.counts["complete runs"] += 1
        shutil.rmtree(self.output)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def _descendants(group: int) -> list[int]:
    """Return the running processes of a session, after a second in which they may end."""
    end = time.monotonic() + 5
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, number, *_ = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(number) == group and state != "Z":
                found.append(int(path.parent.name))
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.1)


def main() -> int:
    """Run the chains alternately; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        generate(root / "svhn/train", 12, seed=1)
        generate(root / "svhn/test", 5, seed=2)
        for number in range(24):
            image = root / "trees" / "ab"[number % 2] / f"{number}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((16, 16), 50).save(image)
        scripts = {"pretrain_ssl.py": TWO, "train_net.py": (), "train_cls.py": TWO}
        chains = [Chain(root, s, flags, random.Random(f"{args.seed} {s}")) for s, flags in scripts.items()]
        status = 0
        try:
            for chain in chains:
                chain.run_straight()
            end = time.monotonic() + 60 * args.minutes
            while time.monotonic() < end:
                for chain in chains:
                    chain.step()
        except ViolationError as violation:
            print(f"violation (seed {args.seed}): {violation}", file=sys.stderr)
            status = 1
        for chain in chains:
            print(f"{chain.script}: {json.dumps(chain.counts)}")
        return status


if __name__ == "__main__":
    sys.exit(main())
