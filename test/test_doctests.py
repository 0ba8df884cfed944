"""The examples in the docstrings are true."""

import doctest
import importlib

import pytest

MODULES = ["checkpoint", "data", "devices", "errors", "flags", "gru", "launch", "precision", "progress", "scoring"]


@pytest.mark.parametrize("name", [*MODULES, "train_8p"])
def test_the_examples_in_the_docstrings_are_true(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
