# make setup: the environment alone; make test, make demo, make demo-cifar: each makes it first when it is not there.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# One thread a process: small networks gain nothing from more, and tests and demos run side by side.
ONE = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# A process of the tests takes half a gigabyte: on a large machine, cores are not what there is too little of.
PYTEST = -m pytest -n auto --maxprocesses 16 --dist loadgroup
CHECK_PYTHON = $(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('Python 3.11 or newer is needed, as in: make setup PYTHON=python3.12')"

.PHONY: setup browser test test-all test-oldest demo demo-all demo-cifar demo-cifar-all readme site

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

# Chromium, in which the page of results is tested, where it is missing and Debian's packages can be had.
browser:
	command -v chromium > /dev/null || (apt-get update -qq && apt-get install -y -qq chromium > /dev/null)

test: setup
	$(ONE) $(BIN)/python $(PYTEST) -m "not slow"

test-all: setup
	$(ONE) $(BIN)/python $(PYTEST)

# The oldest torch that requirements.txt admits, in an environment of its own; there are packages of it for Python 3.11 to 3.13.
test-oldest: .venv-oldest/.oldest
	$(ONE) .venv-oldest/bin/python $(PYTEST) -m "not slow"

.venv-oldest/.oldest: requirements.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv-oldest
	sed 's/torch>=2.6/torch==2.6.0/; s/torchvision>=0.21/torchvision==0.21.0/' requirements.txt > .venv-oldest/requirements.txt
	.venv-oldest/bin/python -m pip install --quiet -r .venv-oldest/requirements.txt
	touch $@

demo: setup
	$(ONE) $(BIN)/python -m experiments.demo digits

demo-all: setup
	$(ONE) $(BIN)/python -m experiments.demo digits-all

demo-cifar: setup
	$(ONE) $(BIN)/python -m experiments.demo cifar

demo-cifar-all: setup
	$(ONE) $(BIN)/python -m experiments.demo cifar-all

readme: setup
	$(BIN)/python -m experiments.render

site: setup
	$(BIN)/python reproduce.py site
