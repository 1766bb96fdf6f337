# `make demo` and `make test` set up everything on a fresh machine: they create .venv if it does not exist.
# Lets uv find a local CPU build of torch if pip is configured with one; empty otherwise.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
PYTHON ?= python3

.PHONY: demo test test-slow lint format docs clean

demo: .venv/.ok
	.venv/bin/cellvim demo

# Two processes with one thread each are faster than one process with two. A file stays in one process, so its fixtures
# are created once. Run plain `pytest` to see the output of tests.
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

# An editable installation contains a list of modules, so it is repeated when modules were added, moved or removed.
MODULES := $(sort $(shell find cellvim -name '*.py'))
$(shell mkdir -p .venv && echo '$(MODULES)' > .venv/modules.new && \
    (cmp -s .venv/modules.new .venv/modules || cp .venv/modules.new .venv/modules))

.venv/.ok: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/cpu/* csrc/cuda/*) .venv/modules
	test -x .venv/bin/uv || ($(PYTHON) -m venv .venv && .venv/bin/pip install -q uv)
	.venv/bin/uv pip install -q --python .venv -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv build demo site
