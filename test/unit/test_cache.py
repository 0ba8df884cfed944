"""The cache's claims: a second start reads the same corpus, damage is built again, and no fault of it loses a run."""

import contextlib
import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import data
from nmt import storage
from nmt.text import build, cache, tokens

import numpy as np
import pytest
from conftest import REPOSITORY, same_corpus, write_corpus


@pytest.fixture
def builds(monkeypatch):
    """A list that grows with each corpus that is built and not read from a cache."""
    calls, build_corpus = [], build.build_corpus
    monkeypatch.setattr(build, "build_corpus", lambda *args: calls.append(args) or build_corpus(*args))
    return calls


def cached(tmp_path):
    (path,) = (path for path in (tmp_path / "cache").iterdir() if path.name != cache.DIGESTS)
    assert (path / cache.INDEX).is_file()
    return path


@pytest.fixture
def settled(monkeypatch):
    """The clock is so late that nothing has changed of late."""
    now = time.time_ns
    monkeypatch.setattr(cache.time, "time_ns", lambda: now() + 2 * cache.RACY_NS)


# ---------------------------------------------------------------- a second start


def test_second_start_reads_the_same_corpus_from_the_cache(folder, load, builds):
    built = load(folder)
    assert same_corpus(load(folder), built)
    assert load(folder).fingerprint == built.fingerprint
    assert len(builds) == 1


def test_corpus_from_the_cache_is_mapped_and_no_memory_of_its_own(folder, load, tmp_path):
    load(folder)
    corpus = load(folder)
    assert corpus.train.src.ids.tolist()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    rights = {fields[1] for fields in maps if fields[-1] == str(cached(tmp_path) / "train.src.ids")}
    assert rights == {"r--s"}, "a page that could be written would count as this process's"


def test_corpus_that_another_process_has_checked_is_not_read_through(folder, load, monkeypatch, settled):
    load(folder)
    hashed = []
    monkeypatch.setattr(cache, "sha256", lambda *parts: hashed.append(type(parts[0])) or storage.sha256(*parts))
    load(folder)
    assert np.ndarray in hashed
    hashed.clear()
    load(folder, verify=False)
    assert hashed and np.ndarray not in hashed


def test_start_from_the_cache_gives_no_warning(folder, load, recwarn):
    load(folder)
    load(folder)
    assert [str(warning.message) for warning in recwarn] == []


def test_start_from_the_cache_imports_neither_spacy_nor_torchtext(folder, load, tmp_path):
    load(folder)
    code = (
        "import sys, data; data.load(sys.argv[1], cache_dir=sys.argv[2]);"
        "sys.exit(str({'spacy', 'torchtext'} & set(sys.modules)) if {'spacy', 'torchtext'} & set(sys.modules) else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "cache")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---------------------------------------------------------------- the memory of the files' digests


def opened_files(folder, cache_dir):
    """What a new process that loads the corpus opens below its folder."""
    code = (
        "import sys; opened = []; sys.addaudithook(lambda name, args: name == 'open' and opened.append(str(args[0])));"
        "import data; data.load(sys.argv[1], cache_dir=sys.argv[2], log=lambda line: None);"
        "print(*(path for path in opened if path.startswith(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(folder), str(cache_dir)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return [Path(path).name for path in done.stdout.split()]


def test_warm_start_opens_no_text_file(folder, load, tmp_path, settled):
    load(folder)
    assert opened_files(folder, tmp_path / "cache") == []


def test_file_that_has_just_changed_is_read_again(folder, load, tmp_path, monkeypatch):
    changed = max(max(path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in folder.iterdir())
    monkeypatch.setattr(cache.time, "time_ns", lambda: changed + cache.RACY_NS)
    load(folder)
    assert len(opened_files(folder, tmp_path / "cache")) == 6


@pytest.mark.parametrize("damage", ["bit", "other JSON", "gone"])
def test_damaged_memory_of_digests_costs_a_look_at_the_files(folder, load, tmp_path, settled, builds, damage):
    corpus = load(folder)
    path = tmp_path / "cache" / cache.DIGESTS
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-9] + b"0" + content[-8:] if damage == "bit" else b"[]")
    assert same_corpus(load(folder), corpus)
    assert len(builds) == 1
    assert path.read_bytes() == content, "and they are known again"


def test_memory_of_digests_that_cannot_be_written_costs_no_run(folder, load, tmp_path, settled, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    load(write_corpus(tmp_path / "other"))
    path = tmp_path / "cache" / cache.DIGESTS
    content = path.read_bytes()
    monkeypatch.setattr(storage.os, "replace", full)
    assert len(load(folder).train) == 4
    assert any("are not remembered" in line and "No space left" in line for line in load.lines)
    assert path.read_bytes() == content
    assert not list(path.parent.glob(f"{cache.DIGESTS}.*")), "no lock, no half of a file"


def test_half_of_a_memory_of_digests_is_cleared(folder, load, tmp_path, settled):
    """A run was killed while it wrote them."""
    load(write_corpus(tmp_path / "other"))
    half = tmp_path / "cache" / f"{cache.DIGESTS}{storage.PARTIAL}0"
    half.touch()
    load(folder)
    assert not half.exists()


def test_memory_of_digests_forgets_files_that_are_gone(folder, load, tmp_path, settled):
    load(write_corpus(tmp_path / "other"))
    for path in (tmp_path / "other").iterdir():
        path.unlink()
    load(folder)
    known = json.loads((tmp_path / "cache" / cache.DIGESTS).read_bytes().split(b"\n", 1)[1])
    assert sorted(known) == sorted(map(str, folder.iterdir()))


# ---------------------------------------------------------------- another corpus


def test_changed_byte_rebuilds_under_the_same_size_and_time(folder, load, builds, settled, tmp_path):
    """Row 29."""
    old = load(folder)
    path = folder / "train.de"
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"Hund bellt", b"Mund bellt"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    new = load(folder)
    assert len(builds) == 2
    assert not same_corpus(new, old)
    assert new.fingerprint != old.fingerprint
    told = f"tokenising {folder}, these contents for the first time; the result is cached in {tmp_path}/cache"
    assert load.lines[-1] == told


@pytest.mark.parametrize(
    "flags", [{"min_freq": 1}, {"trg_lang": "xx"}, {"tokenizer": "space"}, {"max_vocab": 3}, {"subword": 20}]
)
def test_other_flags_have_another_cache(folder, load, builds, flags):
    for path in list(folder.glob("*.en")):
        path.with_suffix(".xx").write_bytes(path.read_bytes())
    load(folder)
    load(folder, **flags)
    assert len(builds) == 2


def test_another_version_of_spacy_has_another_cache(folder, load, builds, monkeypatch):
    load(folder)
    monkeypatch.setattr(build.importlib.metadata, "version", lambda package: "99")
    load(folder)
    assert len(builds) == 2


# ---------------------------------------------------------------- its files


@pytest.mark.parametrize("damage", ["empty", "half", "truncated", "longer", "bit", "first bit", "text", "gone"])
@pytest.mark.parametrize("name", ["index.json", "train.src.ids", "val.trg.offsets"])
def test_damaged_cache_is_rebuilt_and_says_so(folder, load, builds, tmp_path, name, damage):
    """Row 30."""
    good = load(folder)
    path = cached(tmp_path) / name
    content = path.read_bytes()
    middle = len(content) // 2
    path.unlink()  # and not written to: `good` lies in this file
    if damage != "gone":
        path.write_bytes(
            {
                "empty": b"",
                "half": content[:middle],
                "truncated": content[:-1],
                "longer": content + bytes(4),
                "bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
                "first bit": bytes([content[0] ^ 128]) + content[1:],
                "text": b"hello",
            }[damage]
        )
    assert same_corpus(load(folder), good)
    assert any("is damaged and is built again" in line for line in load.lines)
    assert path.read_bytes() == content
    load(folder)
    assert len(builds) == 2, "rebuilt once"
    assert len(list((tmp_path / "cache").iterdir())) == 1, "nothing is left of the damaged one"


def test_cache_is_numbers_and_json_and_no_pickle(folder, load, tmp_path):
    corpus = load(folder)
    raw = np.fromfile(cached(tmp_path) / "train.src.ids", np.int32)
    assert raw.tolist() == corpus.train.src.ids.tolist()
    header, body = (cached(tmp_path) / cache.INDEX).read_bytes().split(b"\n", 1)
    assert header.decode() == hashlib.sha256(body).hexdigest()
    assert json.loads(body)["about"]["words"]["train"] == [None, None]


def test_cache_respects_the_umask(folder, load, tmp_path):
    before = os.umask(0o027)
    try:
        load(folder)
    finally:
        os.umask(before)
    assert cached(tmp_path).stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in cached(tmp_path).iterdir()} == {0o640}


# ---------------------------------------------------------------- its folder


def test_cache_is_in_the_users_cache_folder(folder, load, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load(folder, cache_dir=None)
    assert len(list((tmp_path / "xdg" / "gru-for-pytorch").glob(f"*/{cache.INDEX}"))) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load(folder, cache_dir=None)
    assert len(list((tmp_path / "home" / ".cache" / "gru-for-pytorch").glob(f"*/{cache.INDEX}"))) == 1


@pytest.fixture
def no_cache_folder(folder, tmp_path, monkeypatch):
    """A cache folder that cannot be made, and where the temporary files go instead."""
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return folder / "train.de" / "below a file"


def test_unwritable_cache_folder_gives_way_to_a_private_one(folder, load, builds, no_cache_folder, tmp_path):
    """Row 28."""
    load(folder, cache_dir=no_cache_folder)
    load(folder, cache_dir=no_cache_folder)
    spare = tmp_path / "tmp" / f"gru-for-pytorch-{os.getuid()}"
    assert spare.stat().st_mode & 0o777 == 0o700
    assert len(builds) == 1
    assert f"caching in {spare} instead" in load.lines


@pytest.mark.parametrize("trap", ["open to others", "a link"])
def test_spare_cache_folder_that_others_may_write_is_not_used(folder, load, no_cache_folder, tmp_path, trap):
    spare, elsewhere = tmp_path / "tmp" / f"gru-for-pytorch-{os.getuid()}", tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if trap == "a link":
        spare.symlink_to(elsewhere)
    else:
        spare.mkdir()
        spare.chmod(0o777)
    assert len(load(folder, cache_dir=no_cache_folder).train) == 4
    assert list(spare.iterdir()) == []
    assert any(line.startswith("the data is not cached") for line in load.lines)


@pytest.mark.parametrize("call", ["append", "translate", "finish"])
def test_full_disk_leaves_the_corpus_and_no_file(folder, load, tmp_path, monkeypatch, call):
    whole, write = load(folder, cache_dir=tmp_path / "other"), getattr(cache.Writer, call)

    @storage.writing()
    def full(writer, *args):
        if writer._folder:
            raise OSError(28, "No space left on device")
        return write(writer, *args)

    monkeypatch.setattr(cache.Writer, call, full)
    assert same_corpus(load(folder), whole)
    assert list((tmp_path / "cache").iterdir()) == []
    assert any("not cached" in line and "No space left" in line for line in load.lines)


@contextlib.contextmanager
def no_larger_files(size):
    """The system lets no file grow beyond so many bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 50, 1000, 9000, 20_000])
def test_disk_that_is_really_full_leaves_the_corpus_and_no_file(load, tmp_path, builds, size):
    """The last writes come when a file is closed. Whichever fails, the run goes on in memory."""
    folder = write_corpus(tmp_path / "large", 4000)
    whole = load(folder, cache_dir=tmp_path / "other")
    assert max(path.stat().st_size for path in (tmp_path / "other").glob("*/*")) > size
    with no_larger_files(size):
        assert same_corpus(load(folder), whole)
    assert any("not cached" in line and "File too large" in line for line in load.lines)
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(builds) == 3


def test_interrupt_on_a_full_disk_is_an_interrupt(folder, load, tmp_path, monkeypatch):
    """What fails while the files are closed hides no earlier error."""
    failed = []

    def interrupted(writer, *args):
        writer.append("train.src.ids", np.zeros(100, np.int32))  # it waits to be written
        (file,) = writer._files.values()
        with pytest.raises(OSError, match="File too large"):
            file.flush()
        failed.append(file)
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "build_corpus", interrupted)
    with no_larger_files(0), pytest.raises(KeyboardInterrupt):
        load(folder)
    assert failed[0].closed
    assert list((tmp_path / "cache").iterdir()) == []


def test_lock_that_cannot_be_taken_leaves_the_corpus_in_memory(folder, load, tmp_path, builds):
    """As where another user is building the same cache, or was killed while they did."""
    whole = load(folder)
    path = cached(tmp_path)
    shutil.rmtree(path)
    path.with_suffix(".lock").mkdir()
    assert same_corpus(load(folder), whole)
    assert len(builds) == 2
    assert any("not cached" in line for line in load.lines)


def test_what_is_no_fault_of_the_cache_is_not_taken_for_one(folder, load, monkeypatch):
    def fails(langs, processes, case, tokenizer):
        raise OSError("no more processes")

    monkeypatch.setattr(tokens, "tokenising", fails)
    with pytest.raises(OSError, match="no more processes"):
        load(folder)
    assert not any("not cached" in line for line in load.lines)


def test_without_any_folder_the_corpus_stays_in_memory(folder, load, tmp_path, monkeypatch):
    """Row 28."""
    whole = load(folder)
    monkeypatch.setattr(cache, "find_folder", lambda cache_dir, log: None)
    monkeypatch.setattr(cache, "BLOCK", 3)
    assert same_corpus(load(folder), whole)


# ---------------------------------------------------------------- several runs


def test_two_runs_build_one_cache(folder, tmp_path, monkeypatch):
    """Row 31."""
    waiting, builds, build_corpus = threading.Event(), [], build.build_corpus

    def slow_build(*args):
        builds.append(args)
        assert waiting.wait(30)
        return build_corpus(*args)

    def log(line):
        if line.startswith("waiting"):
            waiting.set()

    monkeypatch.setattr(build, "build_corpus", slow_build)
    corpora = []
    runs = [
        threading.Thread(target=lambda: corpora.append(data.load(folder, cache_dir=tmp_path / "cache", log=log)))
        for _ in range(2)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(builds) == 1
    assert same_corpus(*corpora)
    assert cached(tmp_path), "and no lock is left"


def test_killed_holder_of_the_lock_keeps_nobody_waiting(folder, load, tmp_path):
    """Row 31."""
    load(folder)
    path = cached(tmp_path)
    half = path.with_suffix(".tmp")
    os.rename(path, half)  # what a run wrote that was killed before it could publish it
    (half / "more").write_bytes(b"what no index tells")
    lock = path.with_suffix(".lock")
    code = f"import fcntl, time; f = open({str(lock)!r}, 'ab'); fcntl.flock(f, 2); print(flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with open(lock, "ab") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def log(line):
        load.lines.append(line)
        if line.startswith("waiting"):
            holder.kill()

    assert len(load(folder, log=log).train) == 4
    assert any(line.startswith("waiting") for line in load.lines)
    holder.wait()
    holder.stdout.close()
    assert not (cached(tmp_path) / "more").exists(), "and nothing else is left"


def in_child(function):
    """Calls `function` in a copy of this process. Returns its number. It ends with 0, or 1 after an error."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return pid


def waits_for_ever(pipe):
    """A building that writes something, tells so, and goes no further."""

    def build_corpus(writer, *args):
        writer.append("train.src.ids", np.zeros(100_000, np.int32))
        os.write(pipe, b"!")
        time.sleep(600)

    return build_corpus


@pytest.fixture
def killed_build(folder, tmp_path, monkeypatch):
    """A function that starts a load of `folder` in another process. That one builds, and goes on until it is killed."""
    started = []

    def start():
        ready, tell = os.pipe()
        with monkeypatch.context() as patch:
            patch.setattr(build, "build_corpus", waits_for_ever(tell))
            pid = in_child(lambda: data.load(folder, cache_dir=tmp_path / "cache", log=lambda line: None))
        assert os.read(ready, 1) == b"!"
        os.close(ready), os.close(tell)
        started.append(pid)
        return pid

    yield start
    for pid in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def names_in(folder):
    return sorted(path.name.partition(".")[2] for path in folder.iterdir())


def test_run_whose_builder_is_killed_builds_itself(folder, load, tmp_path, killed_build):
    """Row 31, with processes: one builds, the other waits, the first is killed."""
    whole = load(folder, cache_dir=tmp_path / "other")
    pid = killed_build()

    def log(line):
        load.lines.append(line)
        if line.startswith("waiting"):
            kill(pid)

    assert same_corpus(load(folder, log=log), whole)
    assert any(line.startswith("waiting") for line in load.lines)
    assert names_in(tmp_path / "cache") == [""], "the cache alone"


@pytest.mark.parametrize("then", ["changed text", "another corpus", "the same"])
def test_what_a_killed_build_left_is_cleared_whatever_the_next_run_is(folder, load, tmp_path, killed_build, then):
    """Row 31, and the house's rule that the next start leaves no temporary file."""
    kill(killed_build())
    assert names_in(tmp_path / "cache") == ["lock", "tmp"]
    if then == "changed text":
        (folder / "train.de").write_bytes((folder / "train.de").read_bytes() + b"Hund.\n")
        (folder / "train.en").write_bytes((folder / "train.en").read_bytes() + b"Dog.\n")
    load(folder if then != "another corpus" else write_corpus(tmp_path / "another"))
    assert names_in(tmp_path / "cache") == [""]


def test_what_a_living_build_writes_is_left_alone(load, tmp_path, killed_build):
    """Row 31: by runs of other corpora, from a cache or not."""
    pid = killed_build()
    other = write_corpus(tmp_path / "other")
    for _ in range(2):
        load(other)
        assert names_in(tmp_path / "cache") == ["", "lock", "tmp"]
    kill(pid)
    load(other)
    assert names_in(tmp_path / "cache") == [""]


def test_only_the_caches_own_strays_are_cleared(folder, load, tmp_path, settled):
    """A cache folder may be one with other files, and a start from the cache clears it too."""
    load(folder)
    for name in ("notes.tmp", "x.lock", f"{'0' * 64}.tmp.old", "tmp"):
        (tmp_path / "cache" / name).mkdir()
    before = sorted((tmp_path / "cache").iterdir())
    for name in (f"{'0' * 64}.tmp", f"{'1' * 64}.lock", f"{cache.DIGESTS}.lock", f"{cache.DIGESTS}{storage.PARTIAL}12"):
        (tmp_path / "cache" / name).touch()
    (tmp_path / "cache" / f"{'2' * 64}.tmp").mkdir()
    (tmp_path / "cache" / f"{'2' * 64}.tmp" / "train.src.ids").touch()
    load(folder)
    left = sorted((tmp_path / "cache").iterdir())
    assert left == sorted([*before, tmp_path / "cache" / f"{'0' * 64}.tmp"]), "a file is no folder of ours"
