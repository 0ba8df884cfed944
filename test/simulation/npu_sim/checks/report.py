"""Collects what a process checks, runs it, and says on standard output what became of each check."""

import json
import re
import sys
import traceback
from collections.abc import Callable

CHECKS = {}


def works(check: Callable[[], None]) -> None:
    """A check that must go through."""
    CHECKS[check.__name__] = check


def refused(message: str) -> Callable:
    """A check that must raise an error with this in its text, which is a regular expression."""

    def decorate(check: Callable[[], None]) -> None:
        def run():
            try:
                check()
            except Exception as error:
                assert re.search(message, str(error)), f"refused with another text: {error}"
            else:
                raise AssertionError("not refused")

        CHECKS[check.__name__] = run

    return decorate


def report() -> None:
    """Prints JSON: for each check an empty text or, if it failed, the traceback."""
    results = {}
    for name, check in CHECKS.items():
        try:
            check()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    json.dump(results, sys.stdout)
