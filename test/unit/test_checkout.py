"""Which commit runs: of this repository, or unknown, and never an error."""

import os
import subprocess
from pathlib import Path

from nmt.checkout import commit_of

import pytest

IDENTITY = ("-c", "user.name=a", "-c", "user.email=a@b")


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *IDENTITY, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "x")
    commit_of.cache_clear()
    return tmp_path


def test_the_commit_is_that_of_the_checkout(checkout, monkeypatch):
    assert commit_of(checkout) == git(checkout, "rev-parse", "HEAD")[:7]
    other = checkout / "other"
    other.mkdir()
    git(other, "init", "-q")
    git(other, "commit", "-q", "--allow-empty", "-m", "another")
    monkeypatch.setenv("GIT_DIR", str(checkout / ".git"))
    assert commit_of(other) != commit_of(checkout), "a hook's variables name another repository"


def test_a_copy_within_another_repository_is_not_at_its_commit(checkout):
    (checkout / "copy").mkdir()
    assert commit_of(checkout / "copy") == "unknown"


def test_without_git_or_a_commit_it_is_unknown(checkout, tmp_path_factory, monkeypatch):
    assert commit_of(tmp_path_factory.mktemp("no repository")) == "unknown"
    empty = tmp_path_factory.mktemp("empty")
    git(empty, "init", "-q")
    assert commit_of(empty) == "unknown"
    assert commit_of(checkout / "no such folder") == "unknown"
    monkeypatch.setenv("PATH", "")
    commit_of.cache_clear()
    assert commit_of(checkout) == "unknown"
