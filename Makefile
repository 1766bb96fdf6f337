# `make demo` and `make test` do all the set-up on a fresh machine: they make .venv when it is not there.
# Lets uv see a locally provided CPU torch where pip is pointed at one; empty elsewhere.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
PYTHON ?= python3

.PHONY: demo test test-slow lint format docs clean

demo: .venv/.ok
	.venv/bin/cellvim demo

# Two processes with a thread each are done sooner than one with two; a file stays with one, which makes its fixtures
# once. What tests print is seen with plain `pytest`.
test: .venv/.ok
	.venv/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile

test-slow: .venv/.ok
	.venv/bin/uv pip install -q --python .venv -c constraints.txt -e '.[test,ray]'
	.venv/bin/python -m pytest -m slow

lint: .venv/.ok
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

docs: .venv/.ok
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

format: .venv/.ok
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# Installed in place, but by a list of modules: one that moved is looked for where it was until it is installed again.
MODULES := $(sort $(shell find cellvim -name '*.py'))
$(shell mkdir -p .venv && echo '$(MODULES)' > .venv/modules.new && \
    (cmp -s .venv/modules.new .venv/modules || cp .venv/modules.new .venv/modules))

.venv/.ok: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/cpu/* csrc/cuda/*) .venv/modules
	test -x .venv/bin/uv || ($(PYTHON) -m venv .venv && .venv/bin/pip install -q uv)
	.venv/bin/uv pip install -q --python .venv -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv build demo site
