# make speed | test | train | lint.   VENV=none uses the Python that is there and installs nothing.
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
endif

.PHONY: speed test train lint native clean

speed: $(READY)
	$(RUN) benchmarks/speed.py $(ARGS)

test: $(READY)
	$(RUN) -m pytest $(ARGS)

train: $(READY)
	$(RUN) -m flowkern train configs/digits/flow_grpo.yaml $(ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# The pinned torch first: whatever else wants a torch then takes that one.
$(VENV)/.ready-$(FLOWKERN_BUILD): pyproject.toml constraints.txt setup.py $(shell find csrc -type f)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch setuptools wheel pybind11
	rm -f flowkern/*.so $(VENV)/.ready-*
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[train,triton,dev]'
	$(VENV)/bin/python -c "import flowkern; print('backends:', flowkern.backends())"
	touch $@

native:
	-$(PYTHON) setup.py --quiet build_ext --inplace
	$(RUN) -c "import flowkern; print('backends:', flowkern.backends())"

clean:
	rm -rf build *.egg-info flowkern/*.so $(VENV)/.ready-* .pytest_cache .ruff_cache
