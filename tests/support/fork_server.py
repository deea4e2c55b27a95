"""Runs commands in forks of a process with all imports, which take most of the time of a short run.

Reads requests from its standard input, a JSON object a line: ``argv`` (``relvit-d2`` or a script, and arguments),
``env`` (the whole environment), ``out`` and ``err`` (output files). Prints the exit status of each, negative for a
signal. A fork ends without freeing its memory: to free what it shares with the server takes longer than most commands.
Before a fork the server only imports, so forks share no threads and no random state. Environment variables that
libraries read during imports are those of the server.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# Imports of the commands.
import torch.utils.tensorboard  # noqa: F401

import relvit_d2.classification.run
import relvit_d2.detection.run
import relvit_d2.engine.distributed
import relvit_d2.experiments.compare
import relvit_d2.experiments.reproduce
import relvit_d2.pretraining.run
import relvit_d2.report.prediction_files
import relvit_d2.report.run_summary  # noqa: F401
from relvit_d2.cli import main

gc.freeze()  # a collection in a fork would copy the objects of the server

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if not child:
        break
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # processes that the command started
    print(status, flush=True)
else:
    sys.exit()

os.setsid()
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for stream, name in ((1, request["out"]), (2, request["err"])):
    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), stream)
os.environ.clear()
os.environ.update(request["env"])
sys.argv = request["argv"]
try:
    if sys.argv[0] == "relvit-d2":
        sys.exit(main())
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    if not isinstance(end.code, int | None):
        raise
    status = end.code or 0
else:
    status = 0
# What the interpreter does before it frees the memory.
threading._shutdown()  # type: ignore[attr-defined]
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)
