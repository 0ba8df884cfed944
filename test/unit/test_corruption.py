"""Random damage to text files, compressed files and caches: an error in one line, or the right corpus."""

import collections
import contextlib
import gzip
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from pathlib import Path

import data
from nmt.errors import UserError
from nmt.text import cache, tokens

import pytest
from conftest import DE, EN, UNKNOWN, same_corpus, write_corpus

MEMORY = 1 << 30  # bytes beside what this process has
SECONDS = 30  # for a case


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Another content, of a kind that disks, transfers and editors make."""
    size = len(content)
    start, end = sorted(rng.randint(0, size) for _ in range(2))
    end = min(end, start + 40) if rng.random() < 0.5 else end
    some = rng.randbytes(rng.randint(1, 20))
    if size and rng.random() < 0.3:  # a bit
        place = rng.randrange(size)
        return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    return [
        content[:start],
        content[start:],
        content[:start] + content[end:],
        content[:start] + some + content[start:],
        content[:start] + bytes(end - start) + content[end:],
        content[:end] + content[start:],
        content[end:] + content[:end],
        some * rng.randint(1, 3000),
        content.replace(b"\n", rng.choice([b"\r", b"\r\n", b"\n\n", b""])),
        b"",
    ][rng.randrange(10)]


class Damage:
    """Cases of damage, each with its own random numbers. Loads, and counts what came of it."""

    def __init__(self, folder):
        self._folder, self._cache = folder, folder / "cache"
        self._plain, self._packed = (write_corpus(folder / name, (DE * 20, EN * 20), UNKNOWN, UNKNOWN) for name in "pz")
        for path in list(self._packed.iterdir()):
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
            path.unlink()
        self._right = self._load(self._plain)
        self._fresh_cache = folder / "fresh"
        self._load(self._plain)  # the text's digests are known to it now
        shutil.copytree(self._cache, self._fresh_cache)
        self._lines = []
        self.came = collections.Counter()

    def _load(self, folder):
        return data.load(folder, cache_dir=self._cache, workers=1, log=lambda line: self._lines.append(line))

    _lines: list[str] = []

    def text(self, rng):
        """A damaged text file is read as it is, or refused."""
        folder = rng.choice([self._plain, self._packed])
        path = rng.choice(sorted(folder.iterdir()))
        content = path.read_bytes()
        path.write_bytes(damaged(content, rng))
        try:
            corpus = self._load(folder)
            corpus.check_ids()
            for split in (corpus.train, corpus.val, corpus.test):
                assert len(split.src.offsets) == len(split.trg.offsets) > 1
                assert int(split.src.lengths.min()) > 2 and int(split.trg.lengths.max()) <= tokens.MAX_WORDS + 2
            self.came["read"] += 1
        except UserError as error:
            assert error.kind == "data", error
            assert str(error).isprintable()
            self.came["refused"] += 1
        finally:
            path.write_bytes(content)
            shutil.rmtree(self._cache)
            shutil.copytree(self._fresh_cache, self._cache)

    def cached(self, rng):
        """A damaged cache is built again, once, and never trained on."""
        path = rng.choice(sorted(path for path in self._cache.rglob("*") if path.is_file()))
        content = path.read_bytes()
        changed = damaged(content, rng)
        path.unlink()
        if rng.random() < 0.05:
            path.mkdir()
        elif rng.random() < 0.95:
            path.write_bytes(changed)
        del self._lines[:]
        assert same_corpus(self._load(self._plain), self._right)
        self.came["built again" if any("tokenising" in line for line in self._lines) else "unharmed"] += 1
        if path.is_dir():
            assert path.name == cache.DIGESTS
            path.rmdir()
        elif path.name != cache.DIGESTS:  # which has the times of files that the other cases write anew
            assert path.read_bytes() == content, "it is whole again"
        del self._lines[:]
        assert same_corpus(self._load(self._plain), self._right)
        assert self._lines == []


def endure(folder, cases):
    """Damages text and caches so many times, within limits. Raises if anything is not as it should be."""
    status = Path("/proc/self/status").read_text()
    in_use = int(status.partition("VmSize:")[2].split()[0]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, resource.RLIM_INFINITY))
    now = cache.time.time_ns
    cache.time.time_ns = lambda: now() + 2 * cache.RACY_NS
    damage = Damage(folder)
    for case in range(cases):
        signal.alarm(SECONDS)
        rng = random.Random(case)
        try:
            damage.cached(rng) if case % 4 == 3 else damage.text(rng)
        except Exception as error:
            raise AssertionError(f"case {case}") from error
    signal.alarm(0)
    assert min(damage.came[name] for name in ("read", "refused", "built again")) > cases / 20, damage.came


def endure_in_child(folder, cases):
    """`endure` in a copy of this process, which may run out of memory or time."""
    report = folder / "report"
    pid = os.fork()
    if not pid:
        code = 1
        try:
            endure(folder, cases)
            code = 0
        except BaseException:
            report.write_text(traceback.format_exc())
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert status == 0, report.read_text() if report.exists() else f"it ended with signal {os.WTERMSIG(status)}"


def test_damaged_files_are_refused_or_built_again(tmp_path):
    """Rows 18 to 30: 40 cases."""
    endure_in_child(tmp_path, 40)


@pytest.mark.slow
def test_two_thousand_damaged_files_are_refused_or_built_again(tmp_path):
    """Rows 18 to 30."""
    endure_in_child(tmp_path, 2000)
