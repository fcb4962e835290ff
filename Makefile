# Two commands matter: `make demo` and `make test`. Each installs what it needs first.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install demo test docs export outputs clean

install: .venv/.installed

.venv/.installed: settings.ini setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install  ## synthetic videos -> transcripts -> features -> classifier -> runs/demo/report.html
	hatemm run nbs/params/demo.yml

test: install  ## notebooks, command line, generated files, docs
	python -m pytest --durations 20 -n 2 --dist loadfile tests

docs: install  ## the site, in _docs/ (with Quarto), or a check that it would build
	if command -v quarto >/dev/null; then rm -rf _proc && PYTHONPATH=$(CURDIR)/tools nbdev_proc_nbs && quarto render _proc --no-cache && rm -rf _docs && mv _proc/_docs _docs; \
	else python -m pytest tests/test_docs.py; fi

export: install  ## notebooks -> hatemm_clip/, README.md and the sidebar; cleans the notebooks
	python tools/prepare.py

outputs: install  ## run every notebook in place, so that the docs show fresh outputs
	python tools/prepare.py --run

clean:
	rm -rf runs demo_data _docs _proc dist build *.egg-info
