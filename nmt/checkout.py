"""Which commit of this repository runs, for the log."""

import functools
import os
import subprocess
from pathlib import Path

SECONDS = 10  # that git may take, on a slow network disk


@functools.lru_cache
def commit_of(folder: Path) -> str:
    """The first 7 hexadecimal digits of the commit that is checked out in `folder`, or "unknown".

    It is unknown without git, and where `folder` is not the top of a checkout: a copy within another repository is not
    at that one's commit. It never fails. Changes that were not committed do not show.
    """
    # Under a git hook these name another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", os.fspath(folder), "rev-parse", "--show-prefix", "HEAD"]
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    prefix, _, commit = done.stdout.decode("ascii", "replace").partition("\n")
    return commit[:7] if not prefix and len(commit.strip()) >= 40 else "unknown"
