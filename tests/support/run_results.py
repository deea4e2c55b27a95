"""Results of planned runs, written without running them."""

import json
from typing import Any

from relvit_d2.experiments.runs import Run


def write_results(run: Run, results: dict[str, Any]) -> None:
    """What a script leaves of a run that has found ``results`` on its test set."""
    (run.folder / "inference").mkdir(parents=True)
    tests = run.config.DATASETS.TEST
    (run.folder / "inference/results.json").write_text(json.dumps({", ".join(tests): results}))
    run.finish()
