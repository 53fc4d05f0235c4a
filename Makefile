# One interpreter for everything; `PYTHON=python3.12 make venv` picks another one.
PYTHON ?= python3
VENV := .venv/bin/python
export OMP_NUM_THREADS ?= 1

.PHONY: venv demo test test-host check bench clean

venv:
	@$(PYTHON) tools/make_env.py

demo: venv
	$(VENV) -m training demo --config training/configs/mini.toml run.root=runs

test: venv
	$(VENV) -m pytest tests --ignore=tests/host
	@echo "tests/host was left out: it needs a ComfyUI, see make test-host"

# Needs a ComfyUI checkout at COMFYUI_PATH, and an interpreter that can run it (COMFYUI_PYTHON).
test-host: venv
	@test -n "$(COMFYUI_PATH)" || { echo "set COMFYUI_PATH to a ComfyUI checkout"; exit 2; }
	COMFYUI_PATH="$(COMFYUI_PATH)" $(or $(COMFYUI_PYTHON),$(VENV)) -m pytest tests/host

check: venv
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	$(VENV) -m pyright

bench: venv
	$(VENV) -m benchmarks all --json benchmarks/results.json

clean:
	rm -rf .venv .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
