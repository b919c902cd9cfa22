# Everything sets itself up in .venv; no root, no GPU, package registries only.
PYTHON ?= python3
BIN := .venv/bin
COMFYUI := $(shell cd tests && $(PYTHON) -c "from host.find import find_comfyui; print(find_comfyui() or '')" 2>/dev/null)

# Named after what that ComfyUI needs, so that one which is found later, or updated, is set up too.
NEEDS := $(if $(COMFYUI),.venv/comfyui-$(shell cksum < "$(COMFYUI)/requirements.txt" | cut -d" " -f1).ready)

# Where `make test-hosts` keeps what a host has of its own.
HOSTS ?= .venv/hosts
OLDEST ?=

# tests/host finds, starts and browses the ComfyUI that a tool writes with.
TOOL := PYTHONPATH=tests $(BIN)/python -m tools

# The checker of web/; a folder for each version, so that another one is installed anew.
NPM := $(shell command -v npm)
TYPESCRIPT := 5.9.3
TSC := build/typescript-$(TYPESCRIPT)/node_modules/.bin/tsc

.PHONY: demo test test-hosts demo-comfyui faults fuzz full-size bench lint style spelling types web-types workflows pictures help-tables in-step pretrain clean

demo: .venv/demo.ready  ## The main job without ComfyUI: train, average, quantise, cache; ends with a report page
	$(BIN)/python -m comfyui_braid.engine.playground.demo

# In the order of their folders: by count, the slowest files, of few tests, would come last and one worker wait.
test: .venv/test.ready $(NEEDS)  ## The whole suite; parts that need a ComfyUI or chromium say so when they are skipped
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-hosts: .venv/test.ready $(NEEDS)  ## The parts with a ComfyUI, also with the newest packages and on OLDEST=checkout
	cd tests && ../$(BIN)/python -m host.matrix --folder "$(abspath $(HOSTS))" $(if $(OLDEST),--oldest "$(abspath $(OLDEST))")

demo-comfyui: $(if $(NEEDS),.venv/test.ready $(NEEDS))  ## Run the example workflow in a real ComfyUI over its API
	PYTHONPATH=tests $(if $(NEEDS),$(BIN)/python,$(PYTHON)) -m tools.demo

faults: .venv/test.ready $(NEEDS)  ## Some 60 processes killed while they write: nothing damaged, nothing left
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m faults

fuzz: .venv/test.ready $(NEEDS)  ## 100,000 damaged files and hostile texts: each accepted, or refused in one sentence
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m fuzz

full-size: .venv/test.ready $(NEEDS)  ## Real models with random weights: loaded, trained and sampled; 25 GB of disk, half an hour
	cd tests && ../$(BIN)/python -m full_size

bench: .venv/test.ready $(NEEDS)  ## Ratios measured side by side, one thread
	for bench in tests/bench/bench_*.py; do OMP_NUM_THREADS=1 $(BIN)/python $$bench || exit 1; done

lint: style spelling types web-types  ## ruff, codespell, mypy, TypeScript's checker on web/; `make -k lint` runs all to the end

style: .venv/test.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

spelling: .venv/test.ready
	$(BIN)/codespell

types: .venv/test.ready  # mypy, strict on the engine without comfyui/
	mkdir -p build/lint && ln -sfn ../.. build/lint/comfyui_braid
	cd build/lint && ../../$(BIN)/mypy --config-file ../../pyproject.toml

web-types: $(if $(NPM),$(TSC))
	$(if $(NPM),$(TSC) --project tools/web_types,@echo "SKIPPED: web/ is not type-checked: there is no npm here" >&2)

$(TSC):
	$(NPM) install --silent --no-audit --no-fund --prefix $(@D)/../.. typescript@$(TYPESCRIPT)

workflows: .venv/test.ready $(NEEDS)  ## Write example_workflows/ and subgraphs/ again, in a real ComfyUI and Chromium
	$(TOOL).examples $(ONLY)
	$(TOOL).blueprints

pictures: .venv/test.ready $(NEEDS)  ## Take every picture of README and help again: ten minutes; ONLY="looks" takes some
	$(TOOL).pictures
	$(TOOL).photographs $(ONLY)

help-tables: .venv/test.ready $(NEEDS)  ## Bring the tables of the help pages in step with node schemas and published lists
	$(TOOL).help_tables
	$(TOOL).published_settings

in-step: .venv/test.ready $(NEEDS)  ## After translating: Japanese and Chinese match the English as it is now
	$(TOOL).in_step $(ONLY)

pretrain: .venv/demo.ready  ## Train the playground's weights again: 40 minutes, and the goldens change with them
	$(TOOL).pretrain

clean:
	rm -rf .venv build demo_report

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
