"""Start and end of the processes of a run, which this module or ``torchrun`` starts."""

import argparse
import gc
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any
from urllib.parse import urlparse

import torch
from detectron2.utils import comm
from torch import distributed, nn
from torch.multiprocessing import ProcessExitedException, start_processes
from torch.nn.parallel import DistributedDataParallel

from relvit_d2.engine import signals
from relvit_d2.engine.error_reporting import guard, print_error
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.hardware import cores
from relvit_d2.utils.processes import end_with_parent

Main = Callable[[argparse.Namespace], None]

# Seconds that a failed process waits, so that other failing processes see that the error was printed.
_EXIT_DELAY = 0.5
# Seconds, twice: until the others get SIGTERM after the failure of a process, and SIGKILL.
_GRACE = 5.0
# Key of torchrun's store: an error that the user must correct ended the run.
_USER_ERROR = "relvit_d2/user_error"


def run(main: Main, args: argparse.Namespace) -> int:
    """Run ``main`` in the number of processes of the command line or ``torchrun``; return the exit status.

    Args:
        main: called with ``args`` in each process; a function that can be pickled.
        args: Detectron2's arguments; ``--dist-url auto`` selects a free port of this machine.

    Raises:
        UserError: a number of processes or machines is invalid.
    """
    if distributed.is_torchelastic_launched():
        if args.num_gpus > 1 or args.num_machines > 1:
            raise UserError("torchrun starts the processes: leave out --num-gpus and --num-machines")
        if int(os.environ["TORCHELASTIC_RESTART_COUNT"]):
            store = _agent_store()
            if store and store.check([_USER_ERROR]):  # printed at the first start; a restart cannot correct it
                return 1
            args.resume |= not (args.eval_only or getattr(args, "eval", None))
        keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        _process(main, args, "env://", *(int(os.environ[key]) for key in keys))
        return 0
    url = _check_distributed_arguments(args)
    if args.num_gpus * args.num_machines > 1:
        return _spawn(main, args, url)
    signals.install(patient=False)
    main(args)
    return 0


def _agent_store() -> distributed.Store | None:
    """Return the store of ``torchrun``, which outlives the processes that it restarts, if it shares one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return distributed.TCPStore(address, port, is_master=False)


def _join(url: str, rank: int, world: int, local_rank: int, local_world: int) -> None:
    """Create the process groups, like Detectron2's ``launch``."""
    on_gpu = torch.cuda.is_available()
    if on_gpu and local_world > torch.cuda.device_count():
        raise UserError(
            f"torchrun started {local_world} processes on a machine with {torch.cuda.device_count()} GPUs: "
            "give that many to --nproc-per-node at most"
        )
    try:
        agent = _agent_store()
        # Keys of an earlier start, such as of a reported failure, must not be found.
        store = agent and distributed.PrefixStore(f"start_{os.environ['TORCHELASTIC_RESTART_COUNT']}", agent)
        where: dict[str, Any] = {"store": store} if store else {"init_method": url}
        distributed.init_process_group("nccl" if on_gpu else "gloo", **where, rank=rank, world_size=world)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"process {rank} could not connect at '{url}' ({str(error).strip().splitlines()[0]}): give --dist-url "
            "tcp://FIRST_MACHINE:PORT with a free port that every machine can reach"
        ) from error
    comm.create_local_process_group(local_world)
    if on_gpu:
        torch.cuda.set_device(local_rank)
    comm.synchronize()


def _check_distributed_arguments(args: argparse.Namespace) -> str:
    """Check the numbers of processes and machines; return the URL of the rendezvous."""
    if args.num_machines < 1 or args.num_gpus < (1 if args.num_machines > 1 else 0):
        raise UserError(f"--num-gpus {args.num_gpus} --num-machines {args.num_machines}: give 1 or more of both")
    if not 0 <= args.machine_rank < args.num_machines:
        raise UserError(
            f"--machine-rank {args.machine_rank} of {args.num_machines} machines: give 0 to {args.num_machines - 1}"
        )
    if torch.cuda.is_available() and args.num_gpus > torch.cuda.device_count():
        raise UserError(f"--num-gpus {args.num_gpus}: this machine has {torch.cuda.device_count()} GPUs")
    if args.dist_url != "auto":
        address = urlparse(args.dist_url)
        try:
            if address.scheme == "tcp":
                socket.getaddrinfo(address.hostname, address.port)
        except (OSError, ValueError) as error:
            raise UserError(f"--dist-url '{args.dist_url}' is not an address: give tcp://FIRST_MACHINE:PORT") from error
        return args.dist_url
    if args.num_machines > 1:
        raise UserError("--num-machines needs --dist-url tcp://FIRST_MACHINE:PORT, the same on every machine")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


def _spawn(main: Main, args: argparse.Namespace, url: str) -> int:
    """Run ``main`` in ``args.num_gpus`` processes; if one of them fails, end the others.

    The first SIGINT or SIGTERM is forwarded to them, a second one kills them.

    Raises:
        Interrupted: a signal arrived before a process had started.
    """
    signals_received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        signals_received.append(number)
        children = multiprocessing.active_children()
        for child in children:
            if len(signals_received) > 1:
                child.kill()
            elif child.pid:
                os.kill(child.pid, number)
        if not children:
            raise signals.Interrupted(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    # Silence torch's reports of lost connections after the error of the first failing process.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    if not torch.cuda.is_available():  # else each process starts one thread per core
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // args.num_gpus)))
    processes = start_processes(_start, (main, args, url), args.num_gpus, join=False)
    try:
        # After a failure: the first seconds are for errors of others, the same time for SIGTERM, then SIGKILL.
        while not processes.join(grace_period=_GRACE):
            pass
    except ProcessExitedException as error:
        if signals_received:
            return 128 + signals_received[0]
        if not error.signal_name:
            return error.exit_code  # that process printed its error
        print_error(
            UserError(
                f"process {error.error_index} was killed ({error.signal_name}), probably for lack of memory: "
                "lower SOLVER.IMS_PER_BATCH or raise SOLVER.GRAD_ACCUM_STEPS, then continue with --resume"
            )
        )
        return 1
    # A process that gets the signal before it handles signals may exit with 0.
    return 128 + signals_received[0] if signals_received else 0


def _start(local_rank: int, main: Main, args: argparse.Namespace, url: str) -> None:
    os.environ["LOCAL_RANK"] = str(local_rank)
    rank, world = args.machine_rank * args.num_gpus + local_rank, args.num_machines * args.num_gpus
    _process(main, args, url, rank, world, local_rank, args.num_gpus)


def _process(main: Main, args: argparse.Namespace, url: str, *ranks: int) -> None:
    """Run ``main`` in one of several processes, with the ranks of :func:`_join`; exit if it fails."""
    # An orphan could still write to a folder that another run uses.
    end_with_parent()
    signals.install(patient=True)
    status = guard(lambda: _work(main, args, url, *ranks), resumes=not args.eval_only)
    if status:
        time.sleep(_EXIT_DELAY)
        # Skip the cleanup, in which threads of the process group may wait for a process that has ended.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def leave_process_group() -> None:
    """Wait for the other processes and end the communication with them.

    The threads of a group that something still refers to would abort the process when it exits.
    """
    comm.synchronize()
    comm._get_global_gloo_group.cache_clear()
    gc.collect()  # a trainer's model refers to the group
    distributed.destroy_process_group()


def _work(main: Main, args: argparse.Namespace, url: str, *ranks: int) -> None:
    try:
        _join(url, *ranks)
        main(args)
        leave_process_group()
    except Exception as error:
        if distributed.is_torchelastic_launched() and type(error) is UserError:
            with suppress(RuntimeError):  # torchrun has ended, and does not restart the processes
                if store := _agent_store():
                    store.set(_USER_ERROR, "")
        signals.uninstall()  # so that the parent process can end this one
        raise


def data_parallel(model: nn.Module) -> nn.Module:
    """Wrap the model in ``DistributedDataParallel`` if there are several processes."""
    if comm.get_world_size() == 1:
        return model
    on_gpu = next(model.parameters()).is_cuda
    return DistributedDataParallel(
        model, device_ids=[comm.get_local_rank()] if on_gpu else None, broadcast_buffers=False
    )
