# The commands of kvrail's developers; `make help` lists them. Each prints what it does and how long
# it took. What they need beside Rust and Python 3.11 they install themselves (CONTRIBUTING.md).

SHELL := /usr/bin/env bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# Two steps at once would mix their output and fight over cargo's locks.
.NOTPARALLEL:

STEP := scripts/step
WITHIN := scripts/within
# Tests remove their temporary files.
TIDY := scripts/tidy
# How long `make soak` runs, and in how many processes.
SOAK_SECONDS ?= 3600
SOAK_PROCESSES ?= 8
# A test that hangs is ended with a stack trace after its timeout.
PYTEST := python -m pytest -ra --durations=5 --timeout=600

.PHONY: help environment model build demo test bench bench-loops bench-overhead bench-step bench-ttft bench-layerwise bench-lmcache bench-lmcache-adapters bench-heads soak fmt clean clean-cache requirements \
  tools kernels-check headers-check fmt-check clippy rust-test doc-test doc python-lint type-check stub-test python-test e2e-test \
  fuzz concurrency-test sanitize sanitize-all instructions-check

help: ## List the commands.
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' Makefile

demo: build model ## Show kvrail at work: a real vLLM, restarted, takes a long prompt from disk.
	@$(STEP) 'demo: a long document, read once, then taken from disk' $(WITHIN) python scripts/demo.py

test: fmt-check kernels-check headers-check clippy rust-test concurrency-test sanitize fuzz doc-test doc instructions-check python-lint type-check stub-test python-test e2e-test ## Run all checks and tests.
	@printf '\nall checks and tests passed\n'

environment: ## Make the virtual environment with vLLM in the cache folder.
	@$(STEP) 'environment: vLLM and the Python tools' scripts/environment

model: environment ## Make the model of demo and tests in the cache folder.
	@$(STEP) 'model: SmolLM2-135M-Instruct' $(WITHIN) python scripts/make_model.py

build: environment ## Build the release versions of the command and the Python package.
	@$(STEP) 'build: command and Python package' scripts/build

tools: environment
	@$(STEP) 'tools: cargo-nextest, rustfmt, clippy' scripts/rust_tools

fmt-check: tools ## Check the format of the Rust code.
	@$(STEP) 'fmt-check: cargo fmt' cargo fmt --all --check

kernels-check: environment ## Check that the CUDA kernels' source and PTX belong together, and assemble them.
	@$(STEP) 'kernels-check: kvrail.cu and kvrail.ptx' scripts/kernels --check

headers-check: tools ## Compare the binding's C types with NVIDIA's headers.
	@$(STEP) 'headers-check: cuda.h and cufile.h of CUDA 12.0, 12.9 and 13' \
	  env KVRAIL_CUDA_HEADERS="$$(scripts/cuda_headers)" $(WITHIN) \
	  cargo test --package kvrail-cuda --lib --locked --quiet -- --nocapture headers::

clippy: tools ## Lint the Rust code.
	@$(STEP) 'clippy: all targets, warnings are errors' \
	  $(WITHIN) cargo clippy --workspace --all-targets --locked -- -D warnings

rust-test: tools ## Run the Rust tests.
	@$(STEP) 'rust-test: cargo nextest' $(TIDY) env PATH="$$(scripts/rust_tools):$$PATH" \
	  KVRAIL_CUFILE_LIBRARIES="$$(scripts/cufile_libraries)" $(WITHIN) cargo nextest run --workspace --locked --no-fail-fast

# The models print a schedule that fails; the feature is for them alone.
concurrency-test: tools ## Run the store's code through interleavings that shuttle chooses.
	@$(STEP) 'concurrency-test: models of threads' $(TIDY) $(WITHIN) \
	  cargo test --package kvrail --lib --locked --features shuttle --quiet -- models::

sanitize: tools ## Drop handles in flight under AddressSanitizer.
	@$(STEP) 'sanitize: AddressSanitizer, handles dropped in flight' $(TIDY) $(WITHIN) scripts/sanitize address

sanitize-all: tools ## Run all unit tests of the library under AddressSanitizer and ThreadSanitizer.
	@$(STEP) 'sanitize-all: AddressSanitizer' $(TIDY) $(WITHIN) scripts/sanitize address --all
	@$(STEP) 'sanitize-all: ThreadSanitizer' $(TIDY) $(WITHIN) scripts/sanitize thread --all

# Seconds for all targets together; the first build takes about a minute more.
FUZZ_SECONDS ?= 60

fuzz: tools ## Fuzz each parser of bytes from disk, FUZZ_SECONDS in all.
	@$(STEP) 'fuzz: parsers of bytes from disk' $(TIDY) $(WITHIN) scripts/fuzz $(FUZZ_SECONDS)

doc-test: tools ## Run the examples in the Rust documentation.
	@$(STEP) 'doc-test: examples in the documentation' $(TIDY) $(WITHIN) \
	  cargo test --workspace --exclude kvrail-python --locked --doc

# The command and the library have the same name and so the same page; the library's is kept.
doc: tools ## Build the Rust documentation; warnings are errors.
	@$(STEP) 'doc: the command' env RUSTDOCFLAGS='-D warnings' \
	  $(WITHIN) cargo doc --package kvrail-cli --locked --no-deps
	@$(STEP) 'doc: the libraries' env RUSTDOCFLAGS='-D warnings' \
	  $(WITHIN) cargo doc --workspace --exclude kvrail-cli --locked --no-deps

instructions-check: build ## Count the instructions of the inner loops; more than their limits are an error.
	@$(STEP) 'instructions-check: inner loops under callgrind' $(WITHIN) \
	  bash -c 'scripts/system_packages && count-instructions'

python-lint: environment ## Lint the Python code and check its format.
	@$(STEP) 'python-lint: ruff check' $(WITHIN) ruff check python scripts
	@$(STEP) 'python-lint: ruff format' $(WITHIN) ruff format --check python scripts

type-check: environment ## Check the types of the Python package, and of gpu-check, against vLLM's and PyTorch's.
	@$(STEP) 'type-check: kvrail' $(WITHIN) \
	  env MYPYPATH=python python -m mypy --config-file python/pyproject.toml -p kvrail
	@$(STEP) 'type-check: gpu-check' $(WITHIN) \
	  env MYPYPATH=python:scripts/gpu_check python -m mypy --config-file python/pyproject.toml scripts/gpu_check

stub-test: build ## Check the type stubs of kvrail._core against the built module.
	@$(STEP) 'stub-test: stubs of kvrail._core' $(WITHIN) python -m mypy.stubtest kvrail._core

python-test: build ## Run the Python tests that start no vLLM engine.
	@$(STEP) 'python-test: unit, store, gpu-check on the mock, beside and inside LMCache' \
	  $(TIDY) env KVRAIL_CUFILE_LIBRARIES="$$(scripts/cufile_libraries)" $(WITHIN) $(PYTEST) python/tests/unit python/tests/store python/tests/gpu_check python/tests/lmcache_inside python/tests/lmcache_directory

e2e-test: build model ## Run the end-to-end tests with real vLLM processes.
	@$(STEP) 'e2e-test: real vLLM processes' $(TIDY) $(WITHIN) $(PYTEST) python/tests/e2e

bench: build ## Measure store, load and lookup against the raw disk, for four models.
	@mkdir -p target/bench
	@$(STEP) 'bench: store, load and lookup' $(WITHIN) kvrail bench --path target/bench --model all

bench-loops: tools ## Measure hashing and copying of a chunk's bytes.
	@$(STEP) 'bench-loops: hash, copy, and both in one pass or two' $(WITHIN) \
	  cargo bench --package kvrail --bench inner_loops --locked

bench-overhead: build model ## Measure what kvrail costs a vLLM whose prompts never hit.
	@$(STEP) 'bench-overhead: vLLM with and without kvrail' $(WITHIN) python scripts/bench_overhead.py

bench-step: build ## Measure what the connector adds to a vLLM step in which it has nothing to do.
	@$(STEP) 'bench-step: hooks of steps with nothing to do' $(WITHIN) python scripts/bench_step.py

bench-ttft: build ## Measure the first token of a prompt whose KV comes from files, against bare reads.
	@$(STEP) 'bench-ttft: first token against bare reads' $(WITHIN) python scripts/bench_ttft.py

bench-layerwise: build ## Measure whether a load layer by layer would beat the asynchronous one.
	@$(STEP) 'bench-layerwise: ways to load' $(WITHIN) python scripts/bench_layerwise.py

bench-lmcache: build ## Measure vLLM with kvrail, and with LMCache's server over its adapters and over kvrail's.
	@$(STEP) 'bench-lmcache: kvrail, and LMCache over fs, fs_native and kvrail' $(WITHIN) python scripts/bench_lmcache.py

bench-lmcache-adapters: build ## Measure the L2 adapters of LMCache's server alone, kvrail's beside its own.
	@$(STEP) 'bench-lmcache-adapters: fs, fs_native and kvrail' $(WITHIN) python scripts/bench_lmcache_adapters.py

bench-heads: build ## Measure loads of files named by KV heads, at the same and across tensor-parallel sizes.
	@$(STEP) 'bench-heads: files named by heads' $(WITHIN) python scripts/bench_heads.py

soak: tools ## Run the model checker for SOAK_SECONDS (an hour) in SOAK_PROCESSES (8), with a report.
	@$(STEP) 'soak: many processes, faults and crashes against a model' $(WITHIN) \
	  cargo run --release --locked --package kvrail-testing --bin soak -- --seconds $(SOAK_SECONDS) --processes $(SOAK_PROCESSES)

fmt: tools ## Format the Rust and Python code.
	@$(STEP) 'fmt: Rust' cargo fmt --all
	@$(STEP) 'fmt: Python' $(WITHIN) ruff format python scripts

requirements: ## Resolve requirements/*.in again into requirements/lock.txt.
	@cd requirements && $(STEP:%=../%) 'requirements: lock.txt' ../scripts/uv pip compile --quiet \
	  --python-version 3.11 --override overrides.txt --no-annotate --no-header \
	  --output-file lock.txt vllm.in dev.in

clean: ## Remove what was built in the checkout.
	@$(STEP) 'clean: target' rm -rf target

clean-cache: ## Remove what the cache folder holds: environments, model, tools. All checkouts share it.
	@cd "$$(scripts/cache_folder)" && rm -rf venv-* lmcache-* uv-* uv.lock cargo-tools* model.lock \
	  SmolLM2-* .SmolLM2-* wide-kv-* .wide-kv-* demo-* overhead-* step-* ttft-* layerwise-* heads-*
