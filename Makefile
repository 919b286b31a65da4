# make speed | algorithms | test | train | lint | docs | fuzz | sanitize | gpu | wheel | kernels | versions.   VENV=none uses the Python that is there and installs nothing.
VENV ?= .venv
PYTHON ?= python3
FLOWKERN_BUILD ?= auto
export FLOWKERN_BUILD

ifeq ($(VENV),none)
RUN = PYTHONPATH=$(CURDIR) $(PYTHON)
READY = native
else
RUN = $(VENV)/bin/python
READY = $(VENV)/.ready-$(FLOWKERN_BUILD)
# Its modules are compiled by the first process that imports them, not by each of dozens: torch's alone take six seconds.
unexport PYTHONDONTWRITEBYTECODE
endif

.PHONY: speed algorithms test train lint docs fuzz sanitize gpu wheel kernels versions native clean

speed: $(READY)
	$(RUN) benchmarks/speed.py $(ARGS)

algorithms: $(READY)
	$(RUN) benchmarks/algorithms.py $(ARGS)

# A worker to each core; beyond eight the longest test lasts longer than the rest. ARGS="-n 0": in one process, as plain pytest does.
test: $(READY)
	$(RUN) -m pytest -n logical --maxprocesses 8 --dist worksteal $(ARGS)

train: $(READY)
	$(RUN) -m flowkern train configs/digits/flow_grpo.yaml $(ARGS)

# csrc too where there is a clang-format: the one of the dev extra, as another version formats in another way.
CLANG_FORMAT = $(if $(filter none,$(VENV)),$(shell command -v clang-format),$(wildcard $(VENV)/bin/clang-format))
lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(if $(CLANG_FORMAT),$(CLANG_FORMAT) --dry-run -Werror $$(find csrc -type f),@echo "csrc: not looked at, there is no clang-format")

# The pages as a site, build/site/index.html; a link that leads nowhere is an error. With VENV=none mkdocs-material has to be there.
docs: $(filter-out native,$(READY))
	$(if $(filter none,$(VENV)),,FLOWKERN_BUILD=none $(PIP) --no-build-isolation --editable '.[docs]')
	$(RUN) scripts/configuration_page.py --check
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict $(ARGS)

# Random calls against float64 and, in sanitize, for memory errors and undefined behavior: make fuzz CALLS=1000 ARGS="--seed 7"
CALLS ?= 10000
fuzz: $(READY)
	$(RUN) tests/fuzz --calls $(CALLS) $(ARGS)

# A module of its own in build/sanitize. The interpreter does not know of the sanitizers: they are loaded before it, and libstdc++
# with them, whose exceptions they watch. Its own leaks are not ours. Twice as many calls again that no formula is asked about.
SANITIZED = build/sanitize/lib
WATCHED = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0:exitcode=99 UBSAN_OPTIONS=print_stacktrace=1:exitcode=99 PYTHONPATH=$(CURDIR)/$(SANITIZED)
WATCHED_PYTHON = $(WATCHED) $(if $(filter none,$(VENV)),$(PYTHON),$(VENV)/bin/python)
sanitize: $(READY)
	FLOWKERN_BUILD=cpu FLOWKERN_SANITIZE=1 $(RUN) setup.py --quiet build --build-base build/sanitize --build-lib $(SANITIZED)
	$(WATCHED_PYTHON) -P -c "from flowkern import _cpu; assert 'sanitize' in _cpu.__file__, _cpu.__file__"
	$(WATCHED_PYTHON) tests/fuzz --calls $(CALLS) $(ARGS)
	$(WATCHED_PYTHON) tests/fuzz --calls $$((2 * $(CALLS))) --seed 1 --no-check
	$(WATCHED_PYTHON) -P -m pytest -q -p no:cacheprovider tests/ops/test_hazards.py -k "not compil"

# On a CUDA device, with the Python that is there: PART=A kernels, B a large model, C tools, D a network call, E FLUX.1-dev and Wan; docs/gpu.md. 26 minutes at most for all.
# GPU_REHEARSE=1 walks the same way on the CPU at a tiny size.
PART ?= all
gpu:
	$(PYTHON) scripts/gpu $(PART)

# Manylinux wheels with the CPU kernels, each tested where nothing of the tree is in reach; they go to dist/.
# make wheel PYTHONS="3.11 3.12 3.13 3.14" ARGS=--sdist: versions or interpreters; without, the Python that is there. docs/install.md
wheel: $(READY)
	$(RUN) scripts/build_wheel.py $(PYTHONS) $(ARGS)

# The folder that Hugging Face's kernels package loads, build/kernels/flowkern, and that package loading it.
kernels: $(READY)
	$(RUN) scripts/kernels_folder.py --check $(ARGS)

# The core tests on the lowest, the tested and the newest torch and triton that pyproject.toml allows: rows of the table in docs/install.md.
versions: $(READY)
	$(RUN) scripts/versions.py $(ARGS)

# The kernels are compiled while pip, which takes one core, installs what needs no compiler. The pinned torch first: whatever else
# wants a torch then takes that one. Modules become bytecode when they are first imported: of the many that are installed few are.
PIP = $(VENV)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt
$(VENV)/.ready-$(FLOWKERN_BUILD): pyproject.toml constraints.txt setup.py $(shell find csrc -type f)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel pybind11
	rm -f flowkern/*.so $(VENV)/.ready-*
	$(VENV)/bin/python setup.py --quiet build_ext --inplace & built=$$!; \
	$(PIP) torch && FLOWKERN_BUILD=none $(PIP) --no-build-isolation --editable '.[train,triton,agent,sandbox,math,data,ocr,serve,tensorboard,video,dev]'; \
	installed=$$?; wait $$built && exit $$installed
	$(VENV)/bin/python -c "import flowkern; print('backends:', flowkern.backends())"
	touch $@

native:
	-$(PYTHON) setup.py --quiet build_ext --inplace
	$(RUN) -c "import flowkern; print('backends:', flowkern.backends())"

clean:
	rm -rf build dist *.egg-info flowkern/*.so $(VENV)/.ready-* .pytest_cache .ruff_cache
