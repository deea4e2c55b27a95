"""Work that the first process does while the others wait."""

import time
from datetime import timedelta
from pathlib import Path

from torch import distributed
from torch.multiprocessing import start_processes

from relvit_d2.utils.processes import first_process_first


def take_turns(rank: int, folder: str) -> None:
    limit = timedelta(seconds=1)
    distributed.init_process_group("gloo", f"file://{folder}/meet", timeout=limit, rank=rank, world_size=2)
    for turn in range(2):
        with first_process_first() as is_first:
            assert is_first is (rank == 0)
            if is_first:
                time.sleep(3)  # longer than the limit
                Path(folder, f"{turn}").touch()
            assert Path(folder, f"{turn}").exists()


def test_the_first_process_may_work_longer_than_the_time_limit_of_the_group(tmp_path: Path) -> None:
    start_processes(take_turns, (str(tmp_path),), 2, start_method="fork")
    with first_process_first() as is_first:  # without a process group
        assert is_first
