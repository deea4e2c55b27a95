"""The losses and metrics of an iteration, on their way from the device to the log."""

from collections.abc import Mapping

import torch
from detectron2.utils import comm
from torch import Tensor


class IterationValues:
    """Means over processes of an iteration's values, copied to the host without waiting for the device.

    Args:
        iteration: the iteration.
        means: float32 scalars of this process by name, with ``total_loss``. In a run of one process, those on the CPU,
            such as chance levels, are not copied to the device.
        rate: learning rate.
        data_time: seconds spent waiting for data.
        signal: number of the signal that this process has received, 0 for none.
    """

    def __init__(self, iteration: int, means: Mapping[str, Tensor], rate: float, data_time: float, signal: int) -> None:
        self.iteration, self.rate, self.data_time = iteration, rate, data_time
        self._names, self._loss = [*means], means["total_loss"]
        device, world = self._loss.device, comm.get_world_size()
        if world > 1:
            means = {name: value.to(device, non_blocking=True) for name, value in means.items()}
        self._on_host = {name: value.item() for name, value in means.items() if value.device != device}
        on_device = [means[name] for name in self._names if name not in self._on_host]
        # The mean of the signals is above 0 in all processes after the same iteration.
        values = torch.stack([*on_device, torch.full_like(self._loss, signal)])
        if world > 1:
            torch.distributed.all_reduce(values)
            values /= world
        self._values = values.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if values.is_cuda else None
        if self._copied:
            self._copied.record()

    def read(self) -> tuple[dict[str, float], float]:
        """Wait for the copy; return the means by name, and a number above 0 if a process has received a signal."""
        if self._copied:
            self._copied.synchronize()
        *numbers, signal = self._values.tolist()
        on_device = iter(numbers)
        return {n: self._on_host[n] if n in self._on_host else next(on_device) for n in self._names}, signal

    def is_loss_finite(self) -> bool:
        """Whether the total loss of this process is finite; waits for the device."""
        return bool(self._loss.isfinite())
