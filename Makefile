PYTHON ?= python3
# Build of PyTorch: make setup TORCH=cpu.
TORCH ?=
SETUP := $(PYTHON) tools/setup_env.py $(if $(TORCH),--torch $(TORCH))
BIN := .venv/bin
READY := .venv/.ready
DOCS := .venv/.docs
BCCD ?= $(if $(RELVIT_SAMPLES),$(RELVIT_SAMPLES)/bccd/BCCD,.venv/BCCD_Dataset/BCCD)

.PHONY: setup demo test test-slow fuzz soak check docs clean

setup:
	@$(SETUP)

$(READY): requirements.txt tools/setup_env.py $(wildcard relvit_d2/utils/*detectron2*)
	@$(SETUP)

demo: $(READY)
	@$(BIN)/python -m relvit_d2 demo

# Two files of tests at a time, with a thread each.
test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" --durations 30

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# Every reader on randomly damaged data sets.
fuzz: $(READY)
	$(BIN)/python -m pytest tests/data/test_fuzz.py --fuzz 1100 -q

# Runs that are killed and damaged at random for an hour, against uninterrupted runs.
soak: $(READY)
	$(BIN)/python -m tests.soak

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(DOCS): $(READY) requirements-docs.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $(DOCS)

# Images of the notebook; without them, as offline, it is not executed.
$(BCCD):
	-git clone --quiet --depth 1 https://github.com/Shenggan/BCCD_Dataset $(@D)

# The documentation as pages to read in a browser, site/index.html; a warning is an error. Takes some minutes, for the
# notebook is executed.
docs: $(DOCS) $(BCCD)
	BCCD=$(BCCD) NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "written: site/index.html"

clean:
	rm -rf .venv build site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
