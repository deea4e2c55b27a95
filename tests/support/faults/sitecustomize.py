"""Faults on demand, in scripts that run as a user would run them.

With this folder on ``PYTHONPATH`` Python imports this module when it starts. ``RELVIT_FAULT=PLACE:COUNT`` then kills
the process (SIGKILL) the COUNTth time that it comes to PLACE; ``PLACE:COUNT:RANK`` only that one of several processes.

Places: ``step``, an optimiser's step that is done but not yet kept; ``raise``, the same with a ZeroDivisionError in
place of the kill; ``checkpoint``, a file half written; ``pointer``, a checkpoint that ``last_checkpoint`` does not name
yet; ``evaluation``, one batch into an evaluation; ``nan``, a step's losses, which then are no numbers, in place of the
kill. ``full:BYTES`` kills nothing: a file cannot grow beyond that size, as
on a disk that is full.
"""

import io
import itertools
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FAULT = os.environ.get("RELVIT_FAULT", "")


def install(place: str, count: int, rank: int | None) -> None:
    import torch
    from detectron2.utils import comm

    from relvit_d2.data.loader import Batches
    from relvit_d2.engine.checkpoint import Checkpointer
    from relvit_d2.engine.trainer import Trainer

    visits = itertools.count(1)

    def is_now() -> bool:
        return (rank is None or comm.get_rank() == rank) and next(visits) == count

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        setattr(owner, name, make(getattr(owner, name)))

    def step(original: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if is_now():
                if place == "raise":
                    raise ZeroDivisionError("on demand")
                kill()
            return result

        return stepped

    def spoil(original: Callable[..., Any]) -> Callable[..., Any]:
        def spoilt(*args: Any) -> Any:
            factor = float("nan") if is_now() else 1.0
            return {n: v * factor if isinstance(v, torch.Tensor) else v for n, v in original(*args).items()}

        return spoilt

    def save(original: Callable[..., Any]) -> Callable[..., Any]:
        def saved(data: Any, path: Any) -> None:
            if isinstance(path, Path) and is_now():  # Detectron2's evaluator saves too, into an open file
                whole = io.BytesIO()
                original(data, whole)
                with path.open("wb") as file:
                    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
                kill()
            original(data, path)

        return saved

    def point(original: Callable[..., Any]) -> Callable[..., Any]:
        def pointed(*args: Any) -> None:
            if is_now():
                kill()
            original(*args)

        return pointed

    def read(original: Callable[..., Any]) -> Callable[..., Any]:
        def batches(self: Batches) -> Iterator[Any]:
            fatal = type(self) is Batches and is_now()  # an evaluation's, not the training's
            for batch in original(self):
                yield batch
                if fatal:
                    kill()

        return batches

    if place in ("step", "raise"):
        wrap(torch.optim.AdamW, "step", step)
    elif place == "nan":
        wrap(Trainer, "_forward", spoil)
    elif place == "checkpoint":
        wrap(torch, "save", save)
    elif place == "pointer":
        wrap(Checkpointer, "tag_last_checkpoint", point)
    elif place == "evaluation":
        wrap(Batches, "__iter__", read)
    else:
        raise ValueError(f"no place '{place}'")


if FAULT and not any("multiprocessing.resource_tracker" in argument for argument in sys.orig_argv):
    where, number, *rest = FAULT.split(":")
    if where == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(number), int(number)))
    else:
        install(where, int(number), int(rest[0]) if rest else None)
