"""How several processes start and end: Detectron2's ``launch``, or ``torchrun``."""

import argparse
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from urllib.parse import urlparse

import torch
from detectron2.engine import launch
from detectron2.utils import comm
from torch import distributed
from torch.multiprocessing import (  # type: ignore[attr-defined]
    ProcessExitedException,
    ProcessRaisedException,
    _prctl_pr_set_pdeathsig,
)

from relvit_d2.engine import signals
from relvit_d2.engine.error_reporting import guard, print_error
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.hardware import cores

Main = Callable[[argparse.Namespace], None]

# Seconds that a process which failed stays, for others that fail too to learn that the user was told.
_REACH = 0.5


def run(main: Main, args: argparse.Namespace) -> int:
    """Run ``main`` in as many processes as the command line or ``torchrun`` asks for; return the exit status.

    Args:
        main: what each process does with ``args``; importable by name, since processes are spawned.
        args: Detectron2's arguments; ``--dist-url auto`` chooses a free port of this machine.

    Raises:
        UserError: for numbers of processes or machines that cannot be.
    """
    if distributed.is_torchelastic_launched():
        if args.num_gpus > 1 or args.num_machines > 1:
            raise UserError("torchrun starts the processes: leave --num-gpus and --num-machines to it")
        _process(main, args)
        return 0
    url = _meeting_point(args)
    if args.num_gpus * args.num_machines > 1:
        return _spawn(main, args, url)
    signals.install(patient=False)
    main(args)
    return 0


def _join_torchrun() -> None:
    """Join the processes of ``torchrun`` as Detectron2's ``launch`` joins its own."""
    local_rank, local_world = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpu = torch.cuda.is_available()
    if on_gpu and local_world > torch.cuda.device_count():
        raise UserError(
            f"torchrun started {local_world} processes on a machine with {torch.cuda.device_count()} GPUs: "
            "give --nproc-per-node that many at most"
        )
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    comm.create_local_process_group(local_world)
    if on_gpu:
        torch.cuda.set_device(local_rank)
    comm.synchronize()


def _meeting_point(args: argparse.Namespace) -> str:
    """Check the numbers of processes and machines and return where the processes meet."""
    if args.num_machines < 1 or args.num_gpus < (1 if args.num_machines > 1 else 0):
        raise UserError(f"--num-gpus {args.num_gpus} --num-machines {args.num_machines}: give 1 or more of both")
    if not 0 <= args.machine_rank < args.num_machines:
        raise UserError(
            f"--machine-rank {args.machine_rank} of {args.num_machines} machines: they count from 0 to "
            f"{args.num_machines - 1}"
        )
    if torch.cuda.is_available() and args.num_gpus > torch.cuda.device_count():
        raise UserError(f"--num-gpus {args.num_gpus}: this machine has {torch.cuda.device_count()} GPUs")
    if args.dist_url != "auto":
        address = urlparse(args.dist_url)
        try:
            if address.scheme == "tcp":
                socket.getaddrinfo(address.hostname, address.port)
        except (OSError, ValueError) as error:
            raise UserError(f"--dist-url '{args.dist_url}' is no address: give tcp://FIRST_MACHINE:PORT") from error
        return args.dist_url
    if args.num_machines > 1:
        raise UserError("--num-machines needs --dist-url tcp://FIRST_MACHINE:PORT, the same on every machine")
    return "auto"


def _spawn(main: Main, args: argparse.Namespace, url: str) -> int:
    """Run ``main`` in processes of Detectron2's ``launch``.

    The first SIGINT or SIGTERM is passed on to them, a second one kills them.

    Raises:
        Interrupted: after a signal that came before any of them had started.
    """
    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        children = multiprocessing.active_children()
        for child in children:
            if child.pid:
                os.kill(child.pid, number if len(asked) == 1 else signal.SIGKILL)
        if not children:
            raise signals.Interrupted(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    # Of a failure the user gets one sentence, not how each process lost the others.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    if not torch.cuda.is_available():  # else each process starts a thread for every core
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // args.num_gpus)))
    try:
        launch(_process, args.num_gpus, args.num_machines, args.machine_rank, url, args=(main, args))
    except ProcessExitedException as error:
        if asked:
            return 128 + asked[0]
        if not error.signal_name:
            return error.exit_code  # that process said its sentence
        print_error(
            UserError(
                f"process {error.error_index} was killed ({error.signal_name}), which the system does where memory "
                "runs out: lower SOLVER.IMS_PER_BATCH or raise SOLVER.GRAD_ACCUM_STEPS, then go on with --resume"
            )
        )
        return 1
    except ProcessRaisedException as error:  # before main: the processes did not meet
        reason = str(error).strip().splitlines()[-1]
        print_error(
            UserError(
                f"the processes could not meet at '{url}' ({reason}): give --dist-url tcp://FIRST_MACHINE:PORT with a "
                "free port that every machine reaches"
            )
        )
        return 1
    return 128 + asked[0] if asked else 0  # a process that is asked before it handles signals may end with 0


def _process(main: Main, args: argparse.Namespace) -> None:
    """Run one of several processes; it ends here if it fails."""
    # Without who started it, it would still write to a folder where another run may have begun.
    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    signals.install(patient=True)
    status = guard(lambda: _work(main, args), resumes=True)
    if status:
        time.sleep(_REACH)
        # No tidy end: threads of the process group may wait for a process that is gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _work(main: Main, args: argparse.Namespace) -> None:
    try:
        if not distributed.is_initialized():
            _join_torchrun()
        main(args)
        # A process that leaves while another still talks to it takes that one down.
        comm.synchronize()
        distributed.destroy_process_group()
    except Exception:
        signals.uninstall()  # who started the processes ends this one if it knows the reason
        raise
