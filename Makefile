# `make demo` and `make test` are all that a newcomer types; both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
# Tests that run at a time; 0 is one after the other. More is faster, and a few that count turns may miss theirs.
JOBS ?= 0
BIN = $(VENV)/bin

.PHONY: help demo test test-abuse bench lint format generate check-generated clean clean-venv

help:
	@echo "make demo      set up, then serve the demo model, ask it for frames, and write demo/demo.mp4"
	@echo "make test      the whole test suite"
	@echo "make test-abuse  hostile, broken and greedy clients against a server, and half an hour of soak: an hour in all"
	@echo "make bench     measure this engine beside the design that it replaces: half an hour, on an idle machine"
	@echo "make lint      ruff, mypy, and the check that generated code is up to date"
	@echo "make format    put the code into its one format"
	@echo "make generate  the Python classes of api/optimized_lipsyncsrv.proto, and the tables in README.md"
	@echo "make clean     remove what these made, but the environment; make clean-venv removes that too"

$(VENV)/.done: pyproject.toml constraints.txt tools/setup.sh tools/check_pillow.py
	@PYTHON="$(PYTHON)" sh tools/setup.sh "$(VENV)"
	@touch $@

demo: $(VENV)/.done
	$(BIN)/lipsync demo --out demo

test: $(VENV)/.done
	@sh tools/setup_chromium.sh
	@sh tools/setup_nginx.sh
	@PYTHON="$(PYTHON)" sh tools/setup_agents.sh
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# Some rows alone: make test-abuse ROWS=12,28. Another length of the soak, in minutes: make test-abuse SOAK=1.
test-abuse: $(VENV)/.done
	@sh tools/setup_abuse.sh "$(VENV)"
	$(BIN)/python -m tests.abuse $(if $(ROWS),--rows $(ROWS)) $(if $(SOAK),--soak-minutes $(SOAK))

bench: $(VENV)/.done
	$(BIN)/lipsync bench --out bench

lint: $(VENV)/.done check-generated
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

generate: $(VENV)/.done
	$(BIN)/python tools/generate.py
	$(BIN)/python tools/readme_tables.py

check-generated: $(VENV)/.done
	$(BIN)/python tools/generate.py --check
	$(BIN)/python tools/readme_tables.py --check

clean:
	rm -rf demo bench abuse dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './.venv-agents/*' -prune -exec rm -rf {} +

clean-venv: clean
	rm -rf $(VENV) .venv-agents
