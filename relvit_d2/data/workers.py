"""Worker processes that read batches.

Each worker is connected by a socket of its own, so that a worker that is killed at any moment cannot block the others,
and its death is noticed at once. A batch travels as an anonymous file in memory whose descriptor is sent over the
socket: no copy in the main process, no use of ``/dev/shm``, nothing to remove after a crash.
"""

import io
import itertools
import mmap
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

from relvit_d2.utils.errors import ResumableError, UserError, defect, resource_error

_PREFETCH = 2  # batches that a worker reads in advance
_ALIGNMENT = 64  # bytes


# Processes that multiprocessing has spawned would spawn by default, which imports all packages for each worker.
_context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else None)


class _Worker(NamedTuple):
    process: BaseProcess
    connection: socket.socket


_running: set[_Worker] = set()  # of all loaders of this process


def read_in_workers(
    read: Callable[[Any], Any], batches: Iterable[Any], workers: int, timeout: float
) -> Generator[Any, None, None]:
    """Yield ``read(batch)`` for each of ``batches`` in order, read by worker processes, which end with the generator.

    Args:
        read: maps the keys of a batch to the batch.
        batches: keys of the batches; each worker iterates over all of them.
        workers: number of processes, at least 1.
        timeout: seconds to wait for a batch; 0: no limit.

    Raises:
        UserError: ``read`` raised an exception in a worker; a worker died or hangs.
    """
    started: list[_Worker] = []
    try:
        started.extend(_start(read, batches, number, workers) for number in range(workers))
        for (number, worker), _ in zip(itertools.cycle(enumerate(started)), batches, strict=False):
            yield _receive(number, worker, timeout)
    finally:
        for worker in started:
            _running.discard(worker)
            worker.process.kill()  # it holds no state
        for worker in started:
            worker.process.join()
            worker.process.close()
            worker.connection.close()


def _start(read: Callable[[Any], Any], batches: Iterable[Any], number: int, workers: int) -> _Worker:
    ours, theirs = socket.socketpair()
    process = _context.Process(target=_work, args=(theirs, read, batches, number, workers), daemon=True)
    # Ctrl-C and Slurm's SIGTERM reach every process of a run, whose main process finishes its iteration: a worker
    # inherits the mask.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()  # so that the death of the process closes the connection
    worker = _Worker(process, ours)
    _running.add(worker)
    ours.sendall(bytes(_PREFETCH))
    return worker


def _receive(number: int, worker: _Worker, timeout: float) -> Any:
    """Return the next batch of a worker, or raise its error."""
    others = {other.process.sentinel: other for other in _running}
    ready = wait([worker.connection, *others], timeout or None)
    if dead := [others[sentinel] for sentinel in others if sentinel in ready]:
        raise _death(dead[0])
    if not ready:
        raise ResumableError(
            f"data loader worker {number} (process {worker.process.pid}) returned no batch within {timeout:g} s: "
            "check the storage of the images, or raise DATALOADER.TIMEOUT"
        )
    try:
        data, descriptors, _, _ = socket.recv_fds(worker.connection, 4096, 1)
        if descriptors:
            worker.connection.sendall(b"\0")
            return _load(descriptors[0])
        error = data
        while part := worker.connection.recv(4096):
            error += part
    except ConnectionError:
        error = b""
    raise pickle.loads(error) if error else _death(worker)


def _death(worker: _Worker) -> UserError:
    worker.process.join()
    code = worker.process.exitcode or 0
    how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"exited with status {code}"
    return ResumableError(
        f"a data loader worker (process {worker.process.pid}) {how}, probably for lack of memory: lower "
        "DATALOADER.NUM_WORKERS or SOLVER.IMS_PER_BATCH"
    )


def _work(
    connection: socket.socket, read: Callable[[Any], Any], batches: Iterable[Any], number: int, workers: int
) -> None:
    """Run a worker process."""
    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    if (parent := multiprocessing.parent_process()) and parent.pid != os.getppid():
        return  # it has ended before
    torch.set_num_threads(1)
    with suppress(ConnectionError):  # the main process has ended
        _serve(connection, read, batches, number, workers)


def _serve(
    connection: socket.socket, read: Callable[[Any], Any], batches: Iterable[Any], number: int, workers: int
) -> None:
    """Read every ``workers``-th batch from ``number`` on and send it, one for each byte received."""
    mine: Iterator[Any] = itertools.islice(batches, number, None, workers)
    while connection.recv(1):
        try:
            descriptor = _store(read(next(mine)))
        except StopIteration:
            continue
        except Exception as error:
            message = error if isinstance(error, UserError) else resource_error(error) or defect("a worker", error)
            message.details = traceback.format_exc()
            connection.sendall(pickle.dumps(message))  # without a file, which could fail for the same reason
            connection.shutdown(socket.SHUT_WR)
            mine = iter(())  # the process remains until its error is read: its end would be reported instead
            continue
        socket.send_fds(connection, [b"\0"], [descriptor])
        os.close(descriptor)


class _Pickler(pickle.Pickler):
    """Pickles CPU tensors as NumPy arrays, whose memory is passed to the buffer callback."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if type(value) is torch.Tensor else NotImplemented


def _store(message: Any) -> int:
    """Write an object to an anonymous file in memory; return its descriptor.

    Layout: the number of parts and their sizes (int64), then the parts, aligned: the pickle and its buffers.
    """
    stream = io.BytesIO()
    buffers: list[pickle.PickleBuffer] = []
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(message)
    parts = [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]
    header = np.array([len(parts), *(part.nbytes for part in parts)], np.int64).data
    with io.FileIO(_anonymous_file(), "w", closefd=False) as file:
        for part in (header, *parts):
            view = part.cast("B")
            while view:
                view = view[file.write(view) :]
            file.write(bytes(-file.tell() % _ALIGNMENT))
        return file.fileno()


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("batch")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _load(descriptor: int) -> Any:
    """Return the object that :func:`_store` wrote, whose tensors and arrays share the file's memory."""
    try:
        memory = memoryview(mmap.mmap(descriptor, 0))
    finally:
        os.close(descriptor)
    count = int(np.frombuffer(memory, np.int64, 1)[0])
    sizes = np.frombuffer(memory, np.int64, count, offset=8).tolist()
    position, parts = 8 * (1 + count), []
    for size in sizes:
        position += -position % _ALIGNMENT
        parts.append(memory[position : position + size])
        position += size
    return pickle.loads(parts[0], buffers=parts[1:])
