# Each command sets itself up in a virtual environment of its own and needs nothing before it but Python 3.11+.
PYTHON ?= python3
DEMO_ENV ?= .venv
TEST_ENV ?= .venv-test
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check docs clean

demo: $(DEMO_ENV)/.ready  ## a real model thinks, embeds and searches
	$(DEMO_ENV)/bin/search-r3 demo

test: $(TEST_ENV)/.ready  ## all tests, offline, on two cores
	OMP_NUM_THREADS=1 $(TEST_ENV)/bin/python -m pytest -n 2 --dist loadfile

check: $(TEST_ENV)/.ready  ## style and types
	$(TEST_ENV)/bin/ruff check .
	$(TEST_ENV)/bin/ruff format --check .
	$(TEST_ENV)/bin/mypy

$(DEMO_ENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO_ENV)
	$(DEMO_ENV)/bin/python $(PIP_INSTALL) -e '.[all]'
	touch $@

$(TEST_ENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TEST_ENV)
	$(TEST_ENV)/bin/python $(PIP_INSTALL) -e '.[dev]'
	touch $@

docs: $(TEST_ENV)/.ready  ## the documentation as a site, in site/
	$(TEST_ENV)/bin/python $(PIP_INSTALL) -e '.[docs]'
	$(TEST_ENV)/bin/mkdocs build --strict --quiet

clean:
	rm -rf $(DEMO_ENV) $(TEST_ENV) site
