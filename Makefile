PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test test-slow fuzz check clean

setup:
	@$(PYTHON) tools/setup_env.py

$(READY): requirements.txt requirements-detectron2.txt tools/setup_env.py tools/install_detectron2.py
	@$(PYTHON) tools/setup_env.py

demo: $(READY)
	@$(BIN)/python tools/demo.py

# Two files of tests at a time, with a thread each.
test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# Every reader on data sets spoilt at random.
fuzz: $(READY)
	$(BIN)/python -m pytest tests/test_fuzz.py --fuzz 1100 -q

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
