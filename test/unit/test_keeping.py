"""What a run left is never written over by another one, and its files stay together, whoever is killed when."""

import os
import shutil
import signal
from pathlib import Path

from nmt import checkpoint, keeping
from nmt.storage import PARTIAL, lock_path, locked

import pytest
from conftest import refused


def leave(base: Path, number: int, suffixes=keeping.SUFFIXES) -> None:
    """The files of a run, each with its number in it."""
    for suffix in suffixes:
        Path(f"{base}{suffix}").write_text(f"{number} {suffix}\n")


def standing(base: Path) -> dict[str, set[str]]:
    """What stands beside `base`: the name that a run is kept under → the files that it has there."""
    found: dict[str, set[str]] = {}
    for path in base.parent.iterdir():
        number, suffix = path.read_text().rstrip("\n").split(" ")
        assert path.name.endswith(suffix)
        found.setdefault(f"{path.name.removesuffix(suffix)} {number}", set()).add(suffix)
    return found


ALL = set(keeping.SUFFIXES)


def test_each_run_keeps_what_the_one_before_left_all_files_together(tmp_path):
    base, lines = tmp_path / "model", []
    keeping.make_room(base, lines.append)
    assert lines == [], "there was nothing"
    for number in range(4):
        leave(base, number)
        keeping.make_room(base, lines.append)
        assert keeping.files_of(base) == []
    expected = {
        "model.previous 3": ALL,
        "model.previous.1 0": ALL,
        "model.previous.2 1": ALL,
        "model.previous.3 2": ALL,
    }
    assert standing(base) == expected
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert lines[-1] == (
        f"note: what an earlier run left at {base} is now model.previous, model.previous.curves.png, "
        "model.previous.metrics.jsonl, model.previous.state, model.previous.toml; what stood there is now "
        f"model.previous.3; that run did not end: --resume {base}.previous.state goes on with it; "
        f"4 earlier runs are kept, {size / 1e6:.1f} MB"
    )


def test_a_complete_run_has_no_state_to_go_on_with_and_needs_not_all_files(tmp_path):
    base, lines = tmp_path / "model", []
    leave(base, 1, ["", ".toml"])
    keeping.make_room(base, lines.append)
    leave(base, 2, [".toml"])
    keeping.make_room(base, lines.append)
    assert standing(base) == {"model.previous.1 1": {"", ".toml"}, "model.previous 2": {".toml"}}
    assert not any("--resume" in line for line in lines)
    assert "1 earlier run is kept" in lines[0]


def test_a_number_is_never_given_twice(tmp_path):
    base = tmp_path / "model"
    for number in range(4):
        leave(base, number)
        keeping.make_room(base, print)
    for path in keeping.files_of(f"{base}.previous.2"):
        path.unlink()
    leave(base, 4)
    keeping.make_room(base, print)
    assert sorted(standing(base)) == [
        "model.previous 4",
        "model.previous.1 0",
        "model.previous.3 2",
        "model.previous.4 3",
    ]


@pytest.mark.parametrize("renamings", range(2 * len(keeping.SUFFIXES) + 1))
def test_a_kill_between_two_renamings_parts_no_runs_files(tmp_path, renamings):
    """Rows 10 and 50: after any number of renamings. The next run here, or at the kept one, completes them."""
    base = tmp_path / "folder" / "model"
    base.parent.mkdir()
    leave(base, 1)
    keeping.make_room(base, print)
    leave(base, 2)
    if (pid := os.fork()) == 0:
        die_after(renamings)
        keeping.make_room(base, print)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the fault must be real"
    assert keeping.plan_path(base).exists()
    twin = tmp_path / "twin"
    shutil.copytree(base.parent, twin)
    for place, claimed in ((base, base), (twin / "model", twin / "model.previous")):
        with checkpoint.claimed(claimed):
            pass
        assert standing(place) == {"model.previous 2": ALL, "model.previous.1 1": ALL}
        keeping.make_room(place, pytest.fail)


def die_after(renamings: int) -> None:
    """This process will be killed in the next renaming, or after the last one."""
    rename, unlink, done = os.rename, Path.unlink, []

    def die_or_rename(source, target):
        if len(done) == renamings:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(rename(source, target))

    def die_or_unlink(path, **options):
        if path.name.endswith(".moving"):
            os.kill(os.getpid(), signal.SIGKILL)
        unlink(path, **options)

    os.rename, Path.unlink = die_or_rename, die_or_unlink


def test_files_that_stay_in_use_are_copied(tmp_path):
    base = tmp_path / "model"
    leave(base, 1)
    keeping.make_room(base, print, copies=True)
    with open(f"{base}.metrics.jsonl", "a") as file:
        file.write("more")
    assert Path(f"{base}.previous.metrics.jsonl").read_text() == "1 .metrics.jsonl\n"
    assert len(keeping.files_of(base)) == len(keeping.files_of(f"{base}.previous")) == len(ALL)


def test_overwriting_removes_the_last_run_alone_and_says_so(tmp_path):
    base, lines = tmp_path / "model", []
    leave(base, 1)
    keeping.make_room(base, print)
    leave(base, 2, ["", ".toml"])
    keeping.make_room(base, lines.append, overwrites=True)
    assert standing(base) == {"model.previous 1": ALL}
    assert lines == ["note: --overwrite: what an earlier run left is removed: model, model.toml"]


def test_other_files_have_the_same_rule(tmp_path):
    base = tmp_path / "metrics"
    for number in range(3):
        leave(base, number, [".jsonl"])
        keeping.make_room(base, print, [".jsonl"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.previous.1.jsonl",
        "metrics.previous.2.jsonl",
        "metrics.previous.jsonl",
    ]


def test_a_kept_run_that_goes_on_is_not_moved_away_under_it(tmp_path):
    base = tmp_path / "model"
    leave(base, 1)
    keeping.make_room(base, print)
    leave(base, 2)
    kept = keeping.previous_of(base)
    with locked(lock_path(kept), None) as file:
        file.write(b"77")
        file.flush()
        refused("io", keeping.make_room, base, print, says=["in use by pid 77", str(kept), "--ckptpath"])
    assert standing(base) == {"model 2": ALL, "model.previous 1": ALL}


def test_what_cannot_be_moved_is_told_and_stays(tmp_path, monkeypatch):
    base = tmp_path / "model"
    leave(base, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    refused("io", keeping.make_room, base, print, says=["cannot keep what an earlier run left: No space", "--ckptpath"])
    assert keeping.files_of(base) == keeping.paths_of(base)


def test_what_a_link_leads_to_is_moved_and_the_link_stays(tmp_path):
    base, link = tmp_path / "model", tmp_path / "link"
    leave(base, 1)
    link.symlink_to("model")
    keeping.make_room(link, print)
    assert link.is_symlink() and not base.exists()
    link.unlink()
    assert standing(base) == {"model.previous 1": ALL}


def test_what_a_living_run_writes_where_an_earlier_one_is_kept_is_not_cleared(tmp_path):
    """A run that goes on from `model.previous.state` writes there while a new run begins at `model`."""
    base = tmp_path / "model"
    kept = keeping.previous_of(base)
    half_written = Path(f"{kept}.state{PARTIAL}1")
    half_written.touch()
    with locked(lock_path(kept), None):
        keeping.finish_all(base)
        assert half_written.exists()
    keeping.finish_all(base)
    assert not half_written.exists()
