# `make check` is what CI and pre-commit run before any test; the other targets are the folders of tests.
RUN ?= uv run

.PHONY: check lint format types unit test system

check: lint format types

lint:
	$(RUN) ruff check .

format:
	$(RUN) ruff format --check .

types:
	$(RUN) mypy

unit:
	$(RUN) pytest tests/unit

test:
	$(RUN) pytest

system:
	$(RUN) pytest tests/system -rs
