# Everything runs in .venv, made on first use with Python 3.11 or later.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# uv takes what pip is told: the machine's certificates, and folders of wheels.
export UV_SYSTEM_CERTS ?= 1
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

.PHONY: environment quickstart quickstart-short package test test-fast test-all test-oldest test-serving test-integrations test-axolotl test-llamafactory test-gpu operators gpu fuzz mutants faults docs lint format clean

environment: $(VENV)/ready

# torch first and pinned: another package asking for plain `torch` would pull its newest, several GB larger build.
$(VENV)/ready: pyproject.toml recipes/smollm2-135m/requirements.txt
	@echo "Makes the environment in $(VENV): torch and some hundred packages, a few minutes the first time."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r recipes/smollm2-135m/requirements.txt
	touch $@

# Fine-tunes an aligned SmolLM2 on a small real task and gives it its refusals back: about 10 minutes on a CPU.
quickstart: environment
	@echo "The quickstart, in four stages: about 10 minutes on a CPU."
	$(BIN)/python examples/quickstart.py

# The same in a few steps on a few prompts: shows that it runs, not what it achieves.
quickstart-short: environment
	@echo "The quickstart in a few steps, in four stages: a minute or two."
	$(BIN)/python examples/quickstart.py --short

# Wheel and sdist, and the short quickstart by the two alone in an environment of its own.
package: environment
	rm -rf dist build/package
	$(BIN)/python -m build --outdir dist
	mkdir -p build/package && tar -xzf dist/*.tar.gz -C build/package --strip-components 1
	rm -r build/package/safegene_trl
	$(PYTHON) -m venv build/package/.venv
	build/package/.venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	build/package/.venv/bin/python -m pip install --quiet --disable-pip-version-check "$$(ls dist/*.whl)[quickstart]"
	build/package/.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r recipes/smollm2-135m/requirements.txt
	cd build/package && .venv/bin/python examples/quickstart.py --short && .venv/bin/safegene --version

# Two files at a time, each on a core of its own, the longest first: 14 minutes on 2 idle cores.
test: environment
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# While editing: what needs no training, no process and next to no model, of every part of the package; under a minute on one core.
test-fast: environment
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "fast and not exhaustive and not gpu"

# The same and what is marked `exhaustive`, the rest of the matrix of backends, failures and launchers, in one run: what is
# launched for a quick test serves the others as well.
test-all: environment
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu"

# DeepSpeed compiles two operators where a training first needs them on a CPU, minutes in which a test waits: now instead, by one core.
operators: environment
	DS_ACCELERATOR=cpu MAX_JOBS=1 nice $(BIN)/python -c "from deepspeed.accelerator import get_accelerator; [get_accelerator().create_op_builder(name).load(verbose=False) for name in ('CPUAdamBuilder', 'ShareMemCommBuilder')]"

# The oldest versions that pyproject.toml admits, in an environment of its own: 7 GB, PyTorch's build for GPUs, which a CPU runs.
test-oldest: environment
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python .venv-oldest
	$(BIN)/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct -e ".[dev]"
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What the step writes, read by the newest transformers 4, which is put beside the environment's own, and by the converters
# of llama.cpp, which lie in the source of llama-cpp-python, 77 MB.
test-serving: environment build/llama.cpp/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/transformers-4 "transformers<5" "huggingface_hub<1" "tokenizers<0.23" "peft<0.19"
	SAFEGENE_TRANSFORMERS_4=$(CURDIR)/build/transformers-4 SAFEGENE_LLAMA_CPP=$(CURDIR)/build/llama.cpp $(BIN)/python -m pytest tests/serving

build/llama.cpp/ready: $(VENV)/ready
	rm -rf $(@D) && mkdir -p $(@D)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --dest build llama-cpp-python==0.3.36
	tar -xzf build/llama_cpp_python-0.3.36.tar.gz -C $(@D) --strip-components 3 llama_cpp_python-0.3.36/vendor/llama.cpp
	touch $@

# axolotl and LLaMA-Factory, each with the versions that it pins, in an environment of its own: 4 and 6 GB, some minutes the first time.
test-integrations: test-axolotl test-llamafactory
test-axolotl test-llamafactory: test-%: .venv-%/ready
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest tests/integrations/test_$*.py

# By uv, which is quicker; where that finds no way to the packages, by pip.
AXOLOTL ?= axolotl==0.19.0
LLAMAFACTORY ?= llamafactory==0.9.5
.venv-axolotl/ready: PACKAGES = torch==2.13.0 $(AXOLOTL)
# It imports torchaudio, whose build on PyPI is made for GPUs and needs a torch that is made for them as well; a CPU runs both.
.venv-llamafactory/ready: PACKAGES = torch==2.11.0 torchaudio==2.11.0 $(LLAMAFACTORY)
.venv-axolotl/ready .venv-llamafactory/ready: | $(VENV)/ready
	$(PYTHON) -m venv $(@D)
	$(BIN)/uv pip install --quiet --python $(@D)/bin/python $(PACKAGES) pytest pytest-timeout jsonschema \
		|| $(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(PACKAGES) pytest pytest-timeout jsonschema
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

# On one GPU, about 4 minutes; skipped without one. SAFEGENE_GPU_TESTS_ON_CPU=1 runs the same tests on the CPU.
test-gpu: environment
	$(BIN)/python -m pytest -m gpu tests/gpu

# What the step costs on a GPU, in at most 8 minutes; the same command goes on where it was stopped. Recorded under the name RECORD.
RECORD ?= gpu
gpu: environment
	$(BIN)/python -m benchmarks.gpu --record $(RECORD)

# Ten thousand mutated safety vectors, about 5 minutes (of small kinds there are fewer than are asked for); how each kind ended is recorded.
fuzz: environment
	FUZZ_EXAMPLES=22000 FUZZ_RECORD=benchmarks/results/fuzz.json $(BIN)/python -m pytest tests/test_fuzz.py

# The package broken on purpose, one check at a time, in a copy of the tree: which test notices is recorded.
mutants: environment
	$(BIN)/python -m tests.mutants --record benchmarks/results/mutants.json

# A thousand runs of the safety step, each broken somewhere, most of them while they save: about an hour on 1 idle core; recorded.
faults: environment
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --count 1000 --record benchmarks/results/faults.json

lint: environment
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports --no-cache

format: environment
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

# The site, in build/site; a broken link is an error.
docs: environment
	$(BIN)/python -m mkdocs build --strict --quiet

clean:
	rm -rf build out dist .pytest_cache .ruff_cache .mypy_cache
