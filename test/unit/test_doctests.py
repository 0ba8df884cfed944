"""The examples in the docstrings are true."""

import doctest
import importlib

import pytest
from conftest import REPOSITORY

FILES = [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("nmt/**/*.py")]
MODULES = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in FILES if path.name[0] != "_"]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_examples_in_the_docstrings_are_true(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
