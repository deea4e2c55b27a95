"""The tasks by the value of the config key ``TASK``, and the loading of their configs."""

from fvcore.common.config import CfgNode

from relvit_d2.classification.config import CLASSIFICATION
from relvit_d2.config import config_file
from relvit_d2.detection.config import DETECTION
from relvit_d2.pretraining.config import PRETRAINING

TASKS = {task.name: task for task in (PRETRAINING, DETECTION, CLASSIFICATION)}


def load_config(path: str, overrides: list[str], task: str | None = None) -> CfgNode:
    """Load a config of one of :data:`TASKS`; see :func:`relvit_d2.config.config_file.load_config`."""
    return config_file.load_config(path, overrides, TASKS, task)


def read_config(path: str, overrides: list[str], task: str | None = None) -> CfgNode:
    """Read a config of one of :data:`TASKS` without checks; see :func:`relvit_d2.config.config_file.read_config`."""
    return config_file.read_config(path, overrides, TASKS, task)
