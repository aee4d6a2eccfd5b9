# Everything happens in .venv, which the first target that needs it creates.
# A stamp per set of extras records what is installed, so a repeated target goes straight to work.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

.NOTPARALLEL:
.PHONY: demo test lint types docs notebooks bench fuzz zoo clean

demo: $(VENV)/.demo  ## train a small network and watch its flatness
	$(BIN)/python -m lightning_flatness

test: $(VENV)/.dev  ## the whole suite, one torch thread in each of two processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

ifeq ($(NOTEBOOKS),)
notebooks:
	@echo "notebooks: there are none yet"
else
notebooks: $(VENV)/.dev $(VENV)/.notebooks
	$(BIN)/python -m pytest --nbmake $(NOTEBOOKS)
endif

# BackPACK, and with it curvlinops, asks for torchvision: of no use here, and its wheel breaks a CPU build of torch.
bench: $(VENV)/.bench  ## what the monitor costs, against other packages; rewrites docs/reference/performance.md
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		backpack-for-pytorch==1.7.1 curvlinops-for-pytorch==3.0.1
	$(BIN)/python benchmarks/bench.py

fuzz: $(VENV)/.dev  ## 20,000 random draws of each kind instead of the 500 of every day; about three hours
	FUZZ_EXAMPLES=20000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_fuzz.py --hypothesis-seed=1 \
		--hypothesis-show-statistics --timeout=0

zoo: $(VENV)/.dev .zoo/.created  ## some hundred architectures of other libraries against a reference
	PYTHONPATH=.zoo $(BIN)/python zoo/run.py

clean:
	rm -rf $(VENV) .zoo site dist flatness-demo .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: EXTRAS := tensorboard,examples
$(VENV)/.dev: EXTRAS := dev
$(VENV)/.docs: EXTRAS := docs
$(VENV)/.notebooks: EXTRAS := notebooks
$(VENV)/.bench: EXTRAS := bench

$(VENV)/.demo $(VENV)/.dev $(VENV)/.docs $(VENV)/.notebooks $(VENV)/.bench: $(VENV)/.created pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

.zoo/.created: $(VENV)/.created zoo/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target .zoo -r zoo/requirements.txt
	touch $@
