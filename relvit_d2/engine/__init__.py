"""The trainer of all tasks: hooks, checkpoints, optimiser, schedule, precision, processes and signals."""
