# make demo ARGS="--steps 10 --json"     make test ARGS="-k leak"
# Needs Python 3.11 with pip and venv; everything else goes into .venv (nox and uv) and .nox (an environment per session).

PYTHON ?= python3
NOX = .venv/bin/nox
ARGS =

.PHONY: demo test check lint clean

demo: .venv/ready
	@$(NOX) -s demo -- $(ARGS)

test: .venv/ready
	@$(NOX) -t ci -- $(ARGS)

check: .venv/ready
	@$(NOX) -s lint check -- $(ARGS)

lint: .venv/ready
	@$(NOX) -s lint

.venv/ready: pyproject.toml
	@$(PYTHON) -m venv .venv
	@.venv/bin/pip install --quiet $$(grep -oE '(nox|uv)==[0-9.]+' pyproject.toml)
	@touch $@

clean:
	rm -rf .venv .nox .mypy_cache .pytest_cache .ruff_cache build *.egg-info
