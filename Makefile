# Everything sets itself up in .venv; no root, no GPU, package registries only.
PYTHON ?= python3
BIN := .venv/bin
COMFYUI := $(shell cd tests && $(PYTHON) -c "from host.find import find_comfyui; print(find_comfyui() or '')" 2>/dev/null)

# Named after what that ComfyUI needs, so that one which is found later, or updated, is set up too.
NEEDS := $(if $(COMFYUI),.venv/comfyui-$(shell cksum < "$(COMFYUI)/requirements.txt" | cut -d" " -f1).ready)

# Where `make test-hosts` keeps what a host has of its own.
HOSTS ?= .venv/hosts
OLDEST ?=

.PHONY: demo test test-hosts demo-comfyui bench lint clean

demo: .venv/demo.ready  ## The main job without ComfyUI: train, average, quantise, cache; ends with a report page
	$(BIN)/python -m comfyui_braid.engine.playground.demo

test: .venv/test.ready $(NEEDS)  ## The whole suite; parts that need a ComfyUI or chromium say so when they are skipped
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-hosts: .venv/test.ready $(NEEDS)  ## The parts with a ComfyUI, also with the newest packages and on OLDEST=checkout
	cd tests && ../$(BIN)/python -m host.matrix --folder "$(abspath $(HOSTS))" $(if $(OLDEST),--oldest "$(abspath $(OLDEST))")

demo-comfyui: $(if $(NEEDS),.venv/test.ready $(NEEDS))  ## Run the example workflow in a real ComfyUI over its API
	cd tests && $(if $(NEEDS),../$(BIN)/python,$(PYTHON)) -m host.demo

bench: .venv/test.ready $(NEEDS)  ## Ratios measured side by side, one thread
	for bench in tests/bench/bench_*.py; do OMP_NUM_THREADS=1 $(BIN)/python $$bench || exit 1; done

lint: .venv/test.ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf .venv demo_report

.venv/demo.ready: tests/requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r tests/requirements.txt
	$(BIN)/pip install -q --no-deps -e .
	touch $@

.venv/test.ready: .venv/demo.ready tests/requirements-test.txt
	$(BIN)/pip install -q -r tests/requirements-test.txt
	touch $@

.venv/comfyui-%.ready: .venv/test.ready
	cd tests && ../$(BIN)/python -m host.requirements > ../.venv/comfyui-requirements.txt
	$(BIN)/pip install -q -r .venv/comfyui-requirements.txt
	touch $@
