# Two commands do everything on a fresh machine with Python 3.11+ and make:
#   make demo   installs, compares quantum and classical kernels on real digits, writes a report
#   make test   installs with the test extras and runs the whole default test-suite
PYTHON ?= python3
BIN := .venv/bin
OUT ?= runs/demo

.PHONY: demo test lint bench clean

demo: .venv/.installed
	$(BIN)/qconv compare --dataset digits --out $(OUT)

test: .venv/.installed-test
	$(BIN)/pytest -n auto

lint: .venv/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.installed-test
	$(BIN)/python -m benchmarks.quanvolution --json runs/benchmark.json $(BENCH)
	$(if $(findstring --quick,$(BENCH)),,$(BIN)/python -m benchmarks.costs)
	$(BIN)/python -m benchmarks.layers --json runs/layers.json $(if $(findstring --quick,$(BENCH)),--quick)

# torch first and pinned: an open range lets the installer fetch gigabytes of GPU libraries on a CPU machine.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"qconv needs Python 3.11 to 3.13, but {sys.executable} is {v[0]}.{v[1]}: call make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,lint]'
	touch $@

clean:
	rm -rf .venv build dist
