"""nmt/jsonlines.py: what is whole is read, and what is written is strict JSON."""

import json
import math
import subprocess
import sys

from nmt import jsonlines

import pytest
from conftest import REPOSITORY


@pytest.mark.parametrize(
    "rest",
    [
        b'{"kind": "step"}',  # whole, but perhaps a part of a longer one
        b'{"kind": "st',
        b'{"kind": "st\n{"kind": "step"}\n',
        b'["no object"]\n{"kind": "step"}\n',
        b'\xff\xfe\n{"kind": "step"}\n',
        b'\n{"kind": "step"}\n',
    ],
)
def test_what_is_torn_ends_a_file(tmp_path, rest):
    path = tmp_path / "file.jsonl"
    path.write_bytes(b'{"kind": "run"}\n{"kind": "epoch"}\n' + rest)
    assert jsonlines.read(path) == [{"kind": "run"}, {"kind": "epoch"}]


def test_a_file_that_cannot_be_read_has_no_objects(tmp_path):
    assert jsonlines.read(tmp_path / "none") == []
    assert jsonlines.read(tmp_path) == []


def test_an_object_is_one_line_that_is_read_again(tmp_path):
    entry = {
        "text": "a\nb\u2028\ud800 \U0001f600",
        "loss": 1.5,
        "lost": math.nan,
        "most": (math.inf, {"least": -math.inf}),
    }
    line = jsonlines.as_line(entry)
    assert line.count(b"\n") == 1 and line.endswith(b"\n") and b"NaN" not in line and b"Infinity" not in line
    (tmp_path / "file.jsonl").write_bytes(line * 2)
    expected = {"text": entry["text"], "loss": 1.5, "lost": None, "most": [None, {"least": None}]}
    assert jsonlines.read(tmp_path / "file.jsonl") == [expected, expected] == [json.loads(line)] * 2


def test_it_and_the_readers_of_logs_need_no_package():
    """The wrappers' result.py starts in a fraction of a second, and where the run was that of another interpreter."""
    command = [sys.executable, "-S", "-c", "import nmt.jsonlines, bench.logs"]  # -S: no site-packages
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
