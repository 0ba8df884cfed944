"""The data's claims: what is read, what is refused and with which words, what a batch holds, what a cache is worth."""

import contextlib
import dataclasses
import doctest
import fcntl
import gzip
import hashlib
import io
import json
import multiprocessing.connection
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import data
from nmt import storage
from nmt.errors import UserError
from nmt.text import cache
from nmt.text import files as textfiles
from nmt.text import tokens as textwords

import numpy as np
import pytest
import spacy
import torch
from conftest import MULTI30K, TEST_PATHS, needs_multi30k

ROOT = Path(__file__).resolve().parents[2]

DE = ["Ein Hund bellt.", "Ein Hund schläft.", "Eine Katze schläft.", "Der Hund schläft."]
EN = ["A dog barks.", "A dog sleeps.", "A cat sleeps.", "The dog sleeps."]
VAL = ("Ein Dackel bellt.", "A dachshund barks.")


def write_corpus(folder, train=(DE, EN), val=VAL, test=VAL, test_name="test"):
    """Six files in `folder`; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, sides in (("train", train), ("val", [[side] for side in val]), (test_name, [[side] for side in test])):
        for lang, lines in zip(("de", "en"), sides, strict=True):
            (folder / f"{name}.{lang}").write_bytes("".join(f"{line}\n" for line in lines).encode())
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_corpus(tmp_path / "corpus")


@pytest.fixture
def load(tmp_path):
    """`data.load` with a cache of the test's own; the lines of its log are in `load.lines`."""

    def call(folder, **flags):
        return data.load(folder, **{"cache_dir": tmp_path / "cache", "log": call.lines.append} | flags)

    call.lines = []
    return call


def refused(call, kind, *words):
    """Asserts that `call` raises a UserError of `kind` that says `words`."""
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.kind == kind
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


def same(one, two):
    """Whether two corpora are the same in every tensor and word."""
    sides = [(getattr(a, side), getattr(b, side)) for a, b in splits(one, two) for side in ("src", "trg")]
    return (
        all(torch.equal(a.ids, b.ids) and torch.equal(a.offsets, b.offsets) for a, b in sides)
        and all(a.src_tokens == b.src_tokens and a.trg_tokens == b.trg_tokens for a, b in splits(one, two))
        and (one.src_vocab.itos, one.trg_vocab.itos) == (two.src_vocab.itos, two.trg_vocab.itos)
        and (one.src_lang, one.trg_lang, one.notes) == (two.src_lang, two.trg_lang, two.notes)
    )


def splits(one, two):
    return [(getattr(one, name), getattr(two, name)) for name in data.SPLITS]


def sentences(side):
    return [side.ids[a:b].tolist() for a, b in zip(side.offsets[:-1], side.offsets[1:], strict=True)]


@pytest.mark.parametrize("module", [data, textfiles, textwords])
def test_the_examples_in_the_docstrings_are_true(module):
    assert doctest.testmod(module).failed == 0


# ---------------------------------------------------------------- vocabulary


def test_vocabulary_has_torchtexts_order_and_the_special_ids():
    from torchtext.vocab import Vocab

    generator = random.Random(1)
    token_lists = [[generator.choice("äbcdefgzß ") for _ in range(9)] for _ in range(9)] + [["<pad>"] * 50, ["rare"]]
    counter = Counter(token for tokens in token_lists for token in tokens)
    vocab = data.Vocabulary.build(counter, min_freq=2)
    assert vocab.itos == Vocab(counter, min_freq=2, specials=["<unk>", "<pad>", "<sos>", "<eos>"]).itos
    assert vocab.itos[:4] == ["<unk>", "<pad>", "<sos>", "<eos>"]
    assert (data.UNK, data.PAD, data.SOS, data.EOS) == (0, 1, 2, 3)
    assert "rare" not in vocab.itos


def test_vocabulary_is_by_frequency_and_ties_are_alphabetical():
    assert data.Vocabulary.build({"b": 2, "c": 3, "a": 2, "d": 1}).itos[4:] == ["c", "a", "b"]


def test_encoding_never_adds_a_word():
    vocab = data.Vocabulary.build({"a": 2})
    assert vocab.encode(["a", "new", "new"]) == [4, 0, 0]
    assert len(vocab) == 5


def test_special_words_in_a_text_are_unknown_words():
    assert data.Vocabulary.build({"a": 2}).encode(["<pad>", "<eos>", "a"]) == [0, 0, 4]


def test_decoding_ends_at_eos_and_skips_a_leading_sos():
    vocab = data.Vocabulary.build({"a": 2})
    assert vocab.decode([2, 4, 0, 3, 4]) == ["a", "<unk>"]
    assert vocab.decode([4, 4]) == ["a", "a"]
    assert vocab.decode([3, 4]) == []


def test_vocabulary_without_the_specials_is_refused():
    with pytest.raises(ValueError, match="begins with"):
        data.Vocabulary(["a", "b"])


@needs_multi30k
def test_multi30k_has_7853_german_and_5893_english_types(load):
    corpus = load(MULTI30K)
    assert (len(corpus.src_vocab), len(corpus.trg_vocab)) == (7853, 5893)
    assert (len(corpus.train), len(corpus.val), len(corpus.test)) == (29000, 1014, 1000)
    assert corpus.notes == []


# ---------------------------------------------------------------- the corpus


def test_corpus_is_lower_cased_ids_between_sos_and_eos(folder, load):
    corpus = load(folder)
    assert corpus.src_vocab.itos[4:] == [".", "hund", "schläft", "ein"]
    ids = {word: index for index, word in enumerate(corpus.src_vocab.itos)}
    assert sentences(corpus.train.src)[1] == [2, ids["ein"], ids["hund"], ids["schläft"], ids["."], 3]
    assert corpus.train.src.ids.dtype == torch.int32
    assert corpus.train.src.lengths.tolist() == [6, 6, 6, 6]
    assert (corpus.src_lang, corpus.trg_lang) == ("de", "en")


def test_references_keep_words_outside_the_vocabulary(folder, load):
    corpus = load(folder)
    assert corpus.test.trg_tokens == [["a", "dachshund", "barks", "."]]
    assert corpus.test.src_tokens == [["ein", "dackel", "bellt", "."]]
    assert data.UNK in sentences(corpus.test.trg)[0]
    assert corpus.train.src_tokens is None


@pytest.mark.parametrize(("language", "wrong"), [("src", -1), ("trg", 8)])
def test_id_outside_the_vocabulary_is_refused_before_a_device_gets_it(folder, load, language, wrong):
    corpus = load(folder)
    corpus.check_ids()
    side = getattr(corpus.val, language)
    ids = side.ids.clone()
    ids[1] = wrong
    split = dataclasses.replace(corpus.val, **{language: dataclasses.replace(side, ids=ids)})
    assert len(corpus.trg_vocab) == 8
    refused(dataclasses.replace(corpus, val=split).check_ids, "data", f"token id {wrong}", "val")


@pytest.fixture
def spaced(tmp_path, load):
    """A corpus with two spaces between any two words."""
    lines = [[line.replace(" ", "  ") for line in side] for side in (DE, EN)]
    return load(write_corpus(tmp_path / "spaced", train=lines, val=(lines[0][0], lines[1][0])))


def test_white_space_tokens_are_read_as_in_training_but_are_no_reference_words(spaced):
    assert " " in spaced.src_vocab.itos
    assert spaced.val.src_tokens == [["ein", " ", "hund", " ", "bellt", "."]]
    assert spaced.val.trg_tokens == [["a", " ", "dog", " ", "barks", "."]]
    assert spaced.val.references == [["a", "dog", "barks", "."]]


def test_the_words_of_a_split_are_those_of_its_ids(spaced):
    """So that a model with a vocabulary of its own is scored on the sentences that another one is validated on."""
    for split in (spaced.val, spaced.test):
        assert torch.equal(data.Side.encode(split.src_tokens, spaced.src_vocab).ids, split.src.ids)
        assert torch.equal(data.Side.encode(split.trg_tokens, spaced.trg_vocab).ids, split.trg.ids)


def test_min_freq_bounds_the_vocabulary(folder, load):
    assert "bellt" in load(folder, min_freq=1).src_vocab.itos
    assert load(folder, min_freq=4).src_vocab.itos[4:] == ["."]


@pytest.mark.parametrize("test_name", ["test", "test2016", "test_2016_flickr"])
@pytest.mark.parametrize("below", ["multi30k", "."])
def test_files_are_found_under_each_name_and_in_both_folders(tmp_path, test_name, below):
    write_corpus(tmp_path / below, test_name=test_name)
    files = data.find_files(tmp_path, ("de", "en"), data.SPLITS)
    assert {path.parent for pair in files for path in pair} == {tmp_path / below}
    assert [path.name for path in files[2]] == [f"{test_name}.de", f"{test_name}.en"]


def test_files_are_all_of_one_folder(tmp_path):
    write_corpus(tmp_path)
    write_corpus(tmp_path / "multi30k")
    (tmp_path / "multi30k" / "val.en").unlink()
    files = data.find_files(tmp_path, ("de", "en"), data.SPLITS)
    assert {path.parent for pair in files for path in pair} == {tmp_path}
    (tmp_path / "train.de").unlink()
    refused(lambda: data.find_files(tmp_path, ("de", "en"), data.SPLITS), "data", "multi30k/val.en", "train.de")


def test_plain_file_goes_before_a_compressed_one(tmp_path):
    write_corpus(tmp_path)
    (tmp_path / "val.de.gz").write_bytes(b"stale")
    assert data.find_files(tmp_path, ("de", "en"), data.SPLITS)[1] == (tmp_path / "val.de", tmp_path / "val.en")


def test_both_sides_of_a_split_have_one_stem(tmp_path):
    write_corpus(tmp_path, test_name="test2016")
    (tmp_path / "test.de").write_text("stray\n")
    assert [path.name for path in data.find_files(tmp_path, ("de", "en"), data.SPLITS)[2]] == [
        "test2016.de",
        "test2016.en",
    ]


def test_other_languages_and_names_are_read(tmp_path, load):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.fr").write_text("un chien\nun chat\n")
        (tmp_path / f"{name}.it").write_text("un cane\nun gatto\n")
    corpus = load(tmp_path, src_lang="fr", trg_lang="it", train_name="a", val_name="b", test_name="c")
    assert corpus.test.trg_tokens == [["un", "cane"], ["un", "gatto"]]


@pytest.mark.parametrize("lang", ["qq", "ja", "punctuation", ""])
def test_language_without_a_tokenizer_is_a_usage_error(lang):
    if lang == "ja":
        pytest.importorskip("spacy")
        if any(Path(path, "sudachipy").exists() for path in sys.path):
            pytest.skip("this machine has the Japanese tokenizer")
    refused(lambda: data.tokenise(["a"], lang), "usage", f"no tokenizer for '{lang}'", "--src-lang")


def chunks(lines, size=3):
    """Chunks of `size` lines, which are on both sides."""
    texts = [
        "".join(f"{line}\n" for line in lines[first : first + size]).encode() for first in range(0, len(lines), size)
    ]
    paths = Path("train.de"), Path("train.en")
    return [textfiles.Chunk(paths, 1 + size * index, (text, text)) for index, text in enumerate(texts)]


def plain(result):
    """A `TokenChunk` as lists."""
    return result.src.sentences(), result.src.cut, result.trg.sentences(), result.trg.cut, result.dropped


def test_tokens_are_those_of_spacy_line_by_line():
    """However many lines it is given together, white space and special cases at their ends and all."""
    generator = random.Random(3)
    for lang in ("de", "en", "zh", "xx"):
        tokenizer = spacy.blank(lang).tokenizer
        special = list(getattr(tokenizer, "rules", [])) or ["a"]
        letters = "aäßA.,'’-–:)(!?&/%$ \u00a0\u2028\t\x0b\r…019zB\"„“\U0001f600@"
        lines = []
        for _ in range(500):
            words = [
                generator.choice(special) if generator.random() < 0.5 else "".join(generator.choices(letters, k=5))
                for _ in range(generator.randint(0, 8))
            ]
            lines.append(generator.choice(["", " "]).join(words).replace("\n", "").strip())
        assert "" in lines
        expected = [[token.lower_ for token in tokenizer(line)] for line in lines]
        assert textwords.tokenise(lines, lang) == (expected, 0)


def test_lines_that_are_not_stripped_keep_their_words_to_themselves():
    expected = [["zwei", "."], ["ein", "hund", "."], ["a", "b"], []]
    assert textwords.tokenise(["Zwei.", " Ein Hund. \n", "a\nb", "\n"], "de") == (expected, 0)


def test_tokenizer_that_has_seen_too_many_words_starts_anew(monkeypatch):
    lines = ["Ein Hund bellt.", "Geht's?"]
    tokens = textwords.tokenise(lines, "de")
    first = textwords._tokenizer("de")
    assert textwords.tokenise(lines, "de") == tokens
    assert textwords._tokenizer("de") is first
    monkeypatch.setattr(textwords, "WORDS_KEPT", 10)
    assert textwords.tokenise(lines, "de") == tokens
    assert textwords._tokenizer("de") is not first


def test_tokens_do_not_depend_on_the_number_of_processes(monkeypatch):
    lines = [f"{word} {index} Hunde bellen." if index != 3 else "" for index in range(11) for word in DE]
    with textwords.tokenised(("de", "en"), 1) as results:
        alone = list(map(plain, results(chunks(lines))))
    assert sum(result[-1] for result in alone) == 4
    monkeypatch.setattr(textwords, "tokenise_chunk", None)  # in this process; the others have their own
    with textwords.tokenised(("de", "en"), 2) as results:
        assert list(map(plain, results(chunks(lines)))) == alone
        assert list(map(plain, results(chunks(lines[:4])))) == alone[:1] + list(map(plain, results(chunks(lines[3:4]))))


def test_corpus_does_not_depend_on_the_number_of_processes(tmp_path, load, monkeypatch):
    folder = write_corpus(tmp_path / "corpus", train=([f"{line} {n}" for n in range(50) for line in DE], EN * 50))
    alone = load(folder, cache_dir=tmp_path / "other")
    monkeypatch.setattr(textfiles, "CHUNK_BYTES", 100)
    assert same(load(folder, cache_dir=tmp_path / "chunks"), alone)
    monkeypatch.setattr(textwords, "BYTES_PER_PROCESS", 100)
    monkeypatch.setattr(textwords, "tokenise_chunk", None)  # in this process
    monkeypatch.setattr(data, "cores", lambda: 2)
    assert same(load(folder), alone)


def test_killed_tokenising_process_is_an_error_and_leaves_none(monkeypatch):
    server = watch_server(monkeypatch)
    with (
        pytest.raises(RuntimeError, match="tokenising process ended early"),
        textwords.tokenised(("de", "en"), 2) as results,
    ):
        for index, _ in enumerate(results(chunks(DE * 1000))):
            if index == 0:
                os.kill(children(server[0].pid)[-1], signal.SIGKILL)
    assert_group_is_gone(server[0])


def watch_server(monkeypatch):
    """A list of the process that is started, once it is: the one that becomes those that tokenise."""
    started, start = [], subprocess.Popen

    def watched(*args, **options):
        started.append(start(*args, **options))
        return started[-1]

    monkeypatch.setattr(textwords.subprocess, "Popen", watched)
    return started


def processes(*, parent=None, group=None):
    """The processes that have this parent, or are of this group; one that has only not been waited for is none."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            stat = path.read_text()
            state, its_parent, its_group = stat.rpartition(")")[2].split()[:3]
            if state != "Z" and (int(its_parent) == parent or int(its_group) == group):
                found.append(int(stat.split()[0]))
    return found


def children(pid, count=2):
    """The process's children, when there are so many."""
    deadline = time.monotonic() + 60
    while len(found := processes(parent=pid)) < count and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(found) == count
    return found


def assert_group_is_gone(server):
    """The server has been waited for, and none of its group is left; a killed child may need a moment to go."""
    assert server.poll() is not None
    deadline = time.monotonic() + 20
    while processes(group=server.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes(group=server.pid) == []


def test_error_in_a_tokenising_process_reaches_the_caller(monkeypatch):
    server = watch_server(monkeypatch)
    with textwords.tokenised(("de", "qq"), 2) as results:
        refused(lambda: list(results(chunks(DE))), "usage", "no tokenizer for 'qq'")
    assert_group_is_gone(server[0])


def test_chunk_that_takes_long_keeps_its_turn_and_does_not_hold_up_the_others():
    pipes, far_ends = zip(*(multiprocessing.Pipe() for _ in range(2)), strict=True)
    got, count = [], 4 * textwords.AHEAD
    thread = threading.Thread(target=lambda: got.extend(textwords._in_turn(pipes, range(count))), daemon=True)
    thread.start()
    slow = far_ends[0].recv()
    quick = []
    while far_ends[1].poll(1):
        quick.append(far_ends[1].recv())
        far_ends[1].send(-quick[-1])
    assert slow == 0 and 2 * textwords.AHEAD <= len(quick) <= 3 * textwords.AHEAD, "but not without end"
    far_ends[0].send(0)
    while len(got) < count and thread.is_alive():
        for end in multiprocessing.connection.wait(far_ends, 1):
            end.send(-end.recv())
    thread.join()
    assert got == [-number for number in range(count)]


def test_message_that_breaks_off_is_the_end_of_a_process():
    ours, theirs = multiprocessing.Pipe()
    os.write(theirs.fileno(), struct.pack("!i", 1000) + b"half")
    theirs.close()
    with pytest.raises(RuntimeError, match="tokenising process ended early"):
        textwords._receive(ours)


def test_tokenising_processes_that_have_stopped_are_ended_too(monkeypatch):
    monkeypatch.setattr(textwords, "PATIENCE", 0.2)
    server = watch_server(monkeypatch)
    with textwords.tokenised(("de", "en"), 2):
        os.kill(children(server[0].pid)[1], signal.SIGSTOP)
    assert_group_is_gone(server[0])


def test_tokenising_process_imports_no_torch(monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    with textwords.tokenised(("de", "en"), 2) as results:
        assert len(list(results(chunks(DE)))) == 2
    modules = {line.rpartition("|")[2].strip() for line in capfd.readouterr().err.splitlines()}
    assert "spacy" in modules
    assert not any(module.startswith("torch.") for module in modules)


def test_tokenising_processes_end_with_a_killed_parent():
    code = (
        "import os, struct, subprocess, time; from nmt.text import tokens as textwords; start = subprocess.Popen;"
        "subprocess.Popen = lambda *args, **options: print((p := start(*args, **options)).pid, flush=True) or p;"
        "stack = textwords.tokenised(('de', 'en'), 2); pipes = stack.__enter__().args[0];"
        "os.write(pipes[0].fileno(), struct.pack('!i', 1000) + b'half a message'); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    server = int(parent.stdout.readline())
    assert all("nmt.text" in Path(f"/proc/{pid}/cmdline").read_text() for pid in children(server))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while processes(group=server) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes(group=server) == []


INTERRUPTED = """
import os, signal, time
from test_data import DE, chunks
from nmt.text import tokens as textwords
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may inherit that it is ignored
with textwords.tokenised(("de", "en"), 2) as results:
    for index, _ in enumerate(results(chunks(DE * 20))):
        if index == 3:
            try:
                os.kill(0, signal.SIGINT)
                time.sleep(10)
            except KeyboardInterrupt:
                print("interrupted")
print(index + 1 == len(chunks(DE * 20)))
"""


def test_interrupt_is_left_to_the_parent():
    """Ctrl-C goes to all processes of the terminal's foreground group, here to those of a program of its own."""
    paths = os.pathsep.join(map(str, (ROOT, *TEST_PATHS)))
    options = {"env": os.environ | {"PYTHONPATH": paths}, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], start_new_session=True, **options)
    assert done.stdout.split() == ["interrupted", "True"], done.stderr


# ---------------------------------------------------------------- bad input (FAULTS 18 to 28)


@pytest.mark.parametrize("keep", [0, 1, 12, -9, -1])
def test_truncated_or_empty_gz_is_refused(folder, load, keep):
    packed = gzip.compress((folder / "train.de").read_bytes())
    (folder / "train.de").unlink()
    (folder / "train.de.gz").write_bytes(packed[:keep])
    refused(lambda: load(folder), "data", "not a whole gzip file", "train.de.gz")


@pytest.mark.parametrize(
    "packed",
    [
        b"a text\n",
        gzip.compress(b"a")[:-8] + bytes(8),  # a wrong checksum
        gzip.compress(b"a")[:10] + b"\xff" * 20,  # no deflate stream
        gzip.compress(b"a") + b"tail",
    ],
)
def test_corrupt_gz_is_refused(folder, load, packed):
    (folder / "val.en").unlink()
    (folder / "val.en.gz").write_bytes(packed)
    refused(lambda: load(folder), "data", "not a whole gzip file", "val.en.gz")


def test_gz_is_as_plain(folder, load, tmp_path):
    plain = load(folder)
    for path in list(folder.iterdir()):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    packed = load(folder, cache_dir=tmp_path / "other")
    assert same(packed, plain)
    assert packed.fingerprint == plain.fingerprint


def test_different_line_counts_are_refused_with_both_counts(folder, load):
    (folder / "train.en").write_text("\n".join(EN[:3]) + "\n")
    refused(lambda: load(folder), "data", "4 lines and 3 lines", "train.de", "train.en")


@pytest.mark.parametrize("mark", ["\u2028", "\x0b", "\x85", "\x1c", "\x0c", "\r"])
def test_only_newline_ends_a_line(tmp_path, load, mark):
    corpus = load(write_corpus(tmp_path / "odd", train=([f"Ein Hund{mark}bellt.", *DE[1:]], EN)))
    assert len(corpus.train) == 4


def test_invalid_utf8_is_refused_with_file_line_and_byte(folder, load):
    (folder / "train.en").write_bytes("Größe\nA \xff\n".encode()[:-3] + b"\xff\xfe\nc\nd\n")
    message = refused(lambda: load(folder), "data", "byte 3 of line 2, 0xff, is not UTF-8", "train.en:2")
    assert "exit" not in message
    assert UserError("data", "", "", "").exit_code == 3


@pytest.mark.parametrize("name", ["train.de", "train.en"])
def test_utf16_is_refused_as_no_utf8_and_not_for_its_count_of_lines(folder, load, name):
    (folder / name).write_text((folder / name).read_text(), encoding="utf-16")  # a last line that does not end
    refused(lambda: load(folder), "data", "not UTF-8", f"{name}:1", "convert the file")


@pytest.mark.parametrize("change", ["bom", "crlf", "no last newline", "spaces around"])
def test_bom_and_crlf_give_the_same_batches(folder, load, tmp_path, change):
    plain = load(folder)
    for path in folder.iterdir():
        content = path.read_bytes()
        changed = {
            "bom": b"\xef\xbb\xbf" + content,
            "crlf": content.replace(b"\n", b"\r\n"),
            "no last newline": content[:-1],
            "spaces around": b"  " + content.replace(b"\n", b" \t\n"),
        }[change]
        path.write_bytes(changed)
    assert same(load(folder, cache_dir=tmp_path / "other"), plain)


@pytest.mark.parametrize("fault", ["UTF-8", "NUL", "more lines", "fewer lines"])
def test_fault_far_behind_the_first_chunk_is_told_with_its_place(tmp_path, load, monkeypatch, fault):
    monkeypatch.setattr(textfiles, "CHUNK_BYTES", 50)
    folder = write_corpus(tmp_path / "corpus", train=(DE * 10, EN * 10))
    lines = (folder / "train.en").read_bytes().splitlines(keepends=True)
    if fault == "more lines":
        lines += lines[:3]
    elif fault == "fewer lines":
        lines = lines[:-3]
    else:
        lines[29] = b"A \xff\n" if fault == "UTF-8" else b"A \0\n"
    (folder / "train.en").write_bytes(b"".join(lines))
    place = {"UTF-8": "byte 3 of line 30, 0xff", "NUL": "byte 3 of line 30, 0x00"}
    words = place.get(fault) or f"40 lines and {len(lines)} lines"
    refused(lambda: load(folder), "data", words, "train.en")
    assert list((tmp_path / "cache").iterdir()) == [], "no half of a cache"


def test_file_is_read_in_chunks_of_whole_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(textfiles, "CHUNK_BYTES", 40)
    folder = write_corpus(tmp_path, train=(DE, EN))
    paths = folder / "train.de", folder / "train.en"
    found = list(textfiles.pair_chunks(paths, [textfiles.content_sha256(path) for path in paths]))
    assert [chunk.first for chunk in found] == [1, 4]
    assert [text.decode().splitlines() for chunk in found for text in chunk.texts] == [DE[:3], EN[:3], DE[3:], EN[3:]]


def test_byte_order_mark_is_one_at_the_files_start_alone(tmp_path, load, monkeypatch):
    monkeypatch.setattr(textfiles, "CHUNK_BYTES", 20)
    mark = "\ufeff"
    corpus = load(write_corpus(tmp_path / "marks", train=([mark + line for line in DE], EN)), min_freq=1)
    assert [word for word in corpus.src_vocab.itos if mark in word] == [f"{mark}der", f"{mark}ein", f"{mark}eine"]
    assert corpus.train.src.lengths.tolist() == [6, 6, 6, 6]


def test_file_that_changes_while_it_is_read_is_refused(folder, load, monkeypatch):
    pair_chunks = textfiles.pair_chunks

    def changed(paths, digests):
        paths[1].write_text(paths[1].read_text().replace("A", "B"))
        return pair_chunks(paths, digests)

    monkeypatch.setattr(textfiles, "pair_chunks", changed)
    refused(lambda: load(folder), "data", "the file changed while it was read", "train.en")


def test_nul_byte_is_refused_with_its_line(folder, load):
    (folder / "train.en").write_bytes(b"a\nb\nc\0d\ne\n")
    refused(lambda: load(folder), "data", "byte 2 of line 3, 0x00, is a NUL", "train.en:3")


@pytest.mark.parametrize("content", [b"", b"\n\n\n\n", b" \n\t\n\xc2\xa0\n\r\n"])
def test_nothing_usable_is_refused(folder, load, content):
    for lang in ("de", "en"):
        (folder / f"train.{lang}").write_bytes(content)
    refused(lambda: load(folder), "data", "0 usable pairs", "train.de", "train.en")


def test_pair_with_an_empty_side_is_dropped_and_counted(tmp_path, load):
    train = ([*DE, "", "Hund.", " "], [*EN, "Dog.", "\t", ""])
    corpus = load(write_corpus(tmp_path / "holes", train=train))
    assert len(corpus.train) == 4
    assert corpus.notes == ["3 pairs dropped: empty in train.de or train.en"]
    assert same(corpus, load(tmp_path / "holes")), "the notes come from the cache too"


def test_long_line_is_cut_before_it_is_tokenised(tmp_path, load, monkeypatch):
    seen = []

    class Spy:
        def __init__(self, tokenizer):
            self._tokenizer, self.vocab = tokenizer, tokenizer.vocab

        def __call__(self, text):
            seen.append(len(text))
            return self._tokenizer(text)

    tokenizer = textwords._tokenizer
    monkeypatch.setattr(textwords, "_tokenizer", lambda lang: Spy(tokenizer(lang)))
    lines = ["Hund " * 200_000, "a" * 20_000, "a" * (textwords.MAX_CHARACTERS - 2) + "  b", DE[3]]
    corpus = load(write_corpus(tmp_path / "long", train=(lines, EN)))
    assert max(seen) <= textwords.MAX_CHARACTERS
    assert corpus.train.src.lengths.tolist() == [256, 3, 3, 6]
    assert corpus.train.src.ids[corpus.train.src.offsets[1:] - 1].tolist() == [data.EOS] * 4
    assert corpus.notes == ["warning: 3 sentences of train.de cut to 254 words"]


def test_sentence_of_254_words_is_whole_and_one_of_255_is_cut(tmp_path, load):
    corpus = load(write_corpus(tmp_path / "long", train=(["Hund " * 254, "Hund " * 255, *DE[2:]], EN)), min_freq=1)
    assert corpus.train.src.lengths.tolist()[:2] == [256, 256]
    assert corpus.src_vocab.decode(sentences(corpus.train.src)[2]) == ["eine", "katze", "schläft", "."]
    assert corpus.notes == ["warning: 1 sentences of train.de cut to 254 words"]


def test_missing_file_is_refused_with_the_paths_tried(folder, load):
    (folder / "test.en").unlink()
    message = refused(lambda: load(folder), "data", f"{folder}/test.en")
    assert f"{folder}/test2016.en" in message
    assert "train" not in message.partition(";")[0], "those are there"
    assert f"{folder}/test.en.gz" in message
    assert f"{folder}/test.de," not in message, "that one is there"


def test_one_language_twice_is_refused(folder, load):
    refused(lambda: load(folder, trg_lang="de"), "usage", "both languages are de", "--src-lang, --trg-lang")


def no_download(*args, **options):
    raise AssertionError("nothing may be downloaded")


def test_a_file_or_a_mistyped_path_is_refused_and_nothing_is_made(tmp_path, load, monkeypatch):
    monkeypatch.setattr(data, "download_multi30k", no_download)
    (tmp_path / "file").write_text("")
    refused(lambda: load(tmp_path / "file"), "data", "not a folder")
    refused(lambda: load(tmp_path / "typo" / "deep"), "data", "no such folder")
    assert not (tmp_path / "typo").exists()


def test_another_corpus_in_the_folder_is_not_mistaken_for_nothing(tmp_path, load, monkeypatch):
    monkeypatch.setattr(data, "download_multi30k", no_download)
    (tmp_path / "learn.fr").write_text("un\n")
    (tmp_path / "learn.en").write_text("one\n")
    refused(lambda: load(tmp_path), "data", "--train-name", f"{tmp_path}/train.de")


def test_unreadable_file_is_an_io_error(folder, load):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (folder / "val.de").chmod(0)
    refused(lambda: load(folder), "io", "cannot read", "val.de")


@pytest.mark.parametrize("closed", ["", "corpus"])
def test_a_folder_that_one_may_not_look_into_is_an_io_error(tmp_path, load, closed, as_nobody):
    """Neither the data's own, nor the one above it."""
    folder = write_corpus(tmp_path / "above" / "corpus")
    (folder.parent / closed).chmod(0)
    with as_nobody():
        refused(lambda: load(folder), "io", "cannot read: Permission denied", str(folder), "--data-dir")
    (folder.parent / closed).chmod(0o700)


def test_nothing_is_written_beside_the_data(folder, load):
    before = sorted(folder.iterdir())
    folder.chmod(0o555)
    load(folder)
    folder.chmod(0o755)
    assert sorted(folder.iterdir()) == before


# ---------------------------------------------------------------- the cache (FAULTS 28 to 31)


@pytest.fixture
def builds(monkeypatch):
    """A list that grows with each corpus that is built and not read from a cache."""
    calls, build = [], data._build
    monkeypatch.setattr(data, "_build", lambda *args: calls.append(args) or build(*args))
    return calls


def cached(tmp_path):
    (path,) = (path for path in (tmp_path / "cache").iterdir() if path.name != cache.DIGESTS)
    assert (path / cache.INDEX).is_file()
    return path


def test_second_start_reads_the_same_corpus_from_the_cache(folder, load, builds):
    built = load(folder)
    assert same(load(folder), built)
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


@pytest.fixture
def settled(monkeypatch):
    """The clock is so late that nothing has changed of late."""
    now = time.time_ns
    monkeypatch.setattr(cache.time, "time_ns", lambda: now() + 2 * cache.RACY_NS)


def opened_files(folder, cache_dir):
    """What a new process that loads the corpus opens below its folder."""
    code = (
        "import sys; opened = []; sys.addaudithook(lambda name, args: name == 'open' and opened.append(str(args[0])));"
        "import data; data.load(sys.argv[1], cache_dir=sys.argv[2], log=lambda line: None);"
        "print(*(path for path in opened if path.startswith(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(folder), str(cache_dir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
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
    assert same(load(folder), corpus)
    assert len(builds) == 1
    assert path.read_bytes() == content, "and they are known again"


def test_memory_of_digests_forgets_files_that_are_gone(folder, load, tmp_path, settled):
    load(write_corpus(tmp_path / "other"))
    for path in (tmp_path / "other").iterdir():
        path.unlink()
    load(folder)
    known = json.loads((tmp_path / "cache" / cache.DIGESTS).read_bytes().split(b"\n", 1)[1])
    assert sorted(known) == sorted(map(str, folder.iterdir()))


def test_start_from_the_cache_imports_neither_spacy_nor_torchtext(folder, load, tmp_path):
    load(folder)
    code = (
        "import sys, data; data.load(sys.argv[1], cache_dir=sys.argv[2]);"
        "sys.exit(str({'spacy', 'torchtext'} & set(sys.modules)) if {'spacy', 'torchtext'} & set(sys.modules) else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "cache")], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_changed_byte_rebuilds_under_the_same_size_and_time(folder, load, builds, settled):
    old = load(folder)
    path = folder / "train.de"
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"Hund bellt", b"Mund bellt"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    new = load(folder)
    assert len(builds) == 2
    assert not same(new, old)
    assert new.fingerprint != old.fingerprint
    assert load.lines[-1] == f"tokenising {folder}: no readable cache has these contents"


@pytest.mark.parametrize("flags", [{"min_freq": 1}, {"trg_lang": "xx"}])
def test_other_flags_have_another_cache(folder, load, builds, flags):
    for path in list(folder.glob("*.en")):
        path.with_suffix(".xx").write_bytes(path.read_bytes())
    load(folder)
    load(folder, **flags)
    assert len(builds) == 2


def test_another_version_of_spacy_has_another_cache(folder, load, builds, monkeypatch):
    load(folder)
    monkeypatch.setattr(data.importlib.metadata, "version", lambda package: "99")
    load(folder)
    assert len(builds) == 2


@pytest.mark.parametrize("damage", ["empty", "half", "truncated", "longer", "bit", "first bit", "text", "gone"])
@pytest.mark.parametrize("name", ["index.json", "train.src.ids", "val.trg.offsets"])
def test_damaged_cache_is_rebuilt_and_says_so(folder, load, builds, tmp_path, name, damage):
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
    assert same(load(folder), good)
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

    @cache._writing()
    def full(writer, *args):
        if writer._folder:
            raise OSError(28, "No space left on device")
        return write(writer, *args)

    monkeypatch.setattr(cache.Writer, call, full)
    assert same(load(folder), whole)
    assert list((tmp_path / "cache").iterdir()) == []
    assert any("not cached" in line and "No space left" in line for line in load.lines)


def test_lock_that_cannot_be_taken_leaves_the_corpus_in_memory(folder, load, tmp_path, builds):
    """As where another user is building the same cache, or was killed while they did."""
    whole = load(folder)
    path = cached(tmp_path)
    shutil.rmtree(path)
    path.with_suffix(".lock").mkdir()
    assert same(load(folder), whole)
    assert len(builds) == 2
    assert any("not cached" in line for line in load.lines)


def test_what_is_no_fault_of_the_cache_is_not_taken_for_one(folder, load, monkeypatch):
    def fails(langs, processes):
        raise OSError("no more processes")

    monkeypatch.setattr(textwords, "tokenised", fails)
    with pytest.raises(OSError, match="no more processes"):
        load(folder)
    assert not any("not cached" in line for line in load.lines)


def test_read_error_names_the_file_that_it_is_of(folder, monkeypatch):
    paths = folder / "train.de", folder / "train.en"

    class Failing(io.BytesIO):
        def read(self, size=-1):
            raise OSError(5, "Input/output error")

    real = textfiles._opened

    @contextlib.contextmanager
    def opened(path):
        with real(path) as file:
            yield Failing() if path == paths[0] else file

    monkeypatch.setattr(textfiles, "_opened", opened)
    refused(lambda: list(textfiles.pair_chunks(paths, ("", ""))), "io", "Input/output error", "train.de")


def test_without_any_folder_the_corpus_stays_in_memory(folder, load, tmp_path, monkeypatch):
    whole = load(folder)
    monkeypatch.setattr(cache, "find_folder", lambda cache_dir, log: None)
    monkeypatch.setattr(cache, "BLOCK", 3)
    assert same(load(folder), whole)


def test_two_runs_build_one_cache(folder, tmp_path, monkeypatch):
    waiting, builds, build = threading.Event(), [], data._build

    def slow_build(*args):
        builds.append(args)
        assert waiting.wait(30)
        return build(*args)

    def log(line):
        if line.startswith("waiting"):
            waiting.set()

    monkeypatch.setattr(data, "_build", slow_build)
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
    assert same(*corpora)
    assert cached(tmp_path), "and no lock is left"


def test_lock_on_a_removed_file_lets_nobody_in(tmp_path):
    path, events, holders = tmp_path / "lock", [], []

    def hold():
        holders.append(os.open(path, os.O_CREAT | os.O_RDWR))
        fcntl.flock(holders[-1], fcntl.LOCK_EX)

    def log(line):
        events.append("waits")
        if len(events) == 1:  # the first holder's file goes, and another process is quicker with the next
            path.unlink()
            hold()
        os.close(holders[len(events) - 1])

    hold()
    with storage.locked(path, log):
        events.append("is in")
    assert events == ["waits", "waits", "is in"]
    assert list(tmp_path.iterdir()) == []


def test_killed_holder_of_the_lock_keeps_nobody_waiting(folder, load, tmp_path):
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


# ---------------------------------------------------------------- batches


def random_split(pairs, longest=60, seed=0):
    """A split of random sentences with known ids."""
    generator = torch.Generator().manual_seed(seed)
    vocab = data.Vocabulary([*data.SPECIALS, *map(str, range(4, 100))])

    def side():
        lengths = torch.randint(1, longest, (pairs,), generator=generator).tolist()
        ids = [torch.randint(4, 100, (length,), generator=generator).tolist() for length in lengths]
        return data.Side.encode([list(map(str, sentence)) for sentence in ids], vocab)

    return data.Split(side(), side())


def batches_of(split, batch_size, **flags):
    flags = {"seed": 1234, "epoch": 0} | flags
    return data.epoch_batches(split, batch_size, **flags)


@pytest.mark.parametrize("like_length", [True, False])
@pytest.mark.parametrize(("pairs", "batch_size"), [(1, 8), (7, 8), (8, 8), (9, 8), (103, 1), (1003, 8)])
def test_each_pair_comes_once_an_epoch(like_length, pairs, batch_size):
    batches = list(batches_of(random_split(pairs), batch_size, like_length=like_length))
    assert sorted(torch.cat(batches).tolist()) == list(range(pairs))
    sizes = sorted(map(len, batches), reverse=True)
    assert sizes == [batch_size] * (pairs // batch_size) + [pairs % batch_size] * (pairs % batch_size > 0)
    assert batches[0].dtype == torch.int64


@pytest.mark.parametrize("world_size", range(1, 9))
def test_ranks_see_disjoint_batches_that_are_the_whole(world_size):
    for batch in batches_of(random_split(107), 16):
        shares = [data.rank_share(batch, rank, world_size) for rank in range(world_size)]
        assert sorted(torch.cat(shares).tolist()) == sorted(batch.tolist())
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_drop_last_leaves_the_incomplete_batch_out():
    for like_length in (True, False):
        batches = batches_of(random_split(107), 16, like_length=like_length, drop_last=True)
        assert list(map(len, batches)) == [16] * 6


def test_drop_last_keeps_the_only_batch_and_a_complete_one():
    assert list(map(len, batches_of(random_split(7), 16, drop_last=True))) == [7]
    assert list(map(len, batches_of(random_split(32), 16, drop_last=True))) == [16, 16]


@pytest.mark.parametrize("like_length", [True, False])
def test_order_is_drawn_from_seed_and_epoch_alone(like_length):
    split = random_split(500)

    def order(**flags):
        return torch.cat(list(batches_of(split, 16, like_length=like_length, **flags))).tolist()

    first = order()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    assert order() == first
    assert order(epoch=1) != first
    assert order(seed=1) != first
    assert order(seed=0, epoch=1) != order(seed=1, epoch=0)


def test_drawing_an_order_leaves_the_global_generators_alone():
    before = torch.get_rng_state(), np.random.get_state()[2], random.getstate()
    list(batches_of(random_split(50, seed=3), 16))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[2], random.getstate()) == before[1:]


def test_batch_can_be_asked_for_by_its_number(monkeypatch):
    monkeypatch.setattr(data, "POOL", 4)
    batches = batches_of(random_split(300), 16)
    in_order = [batch.tolist() for batch in batches]
    assert len(in_order) == len(batches) == 19
    backwards = batches_of(random_split(300), 16)
    assert [backwards[step].tolist() for step in reversed(range(19))] == in_order[::-1]
    with pytest.raises(IndexError):
        batches[19]


def test_nothing_is_drawn_before_a_batch_is_asked_for(monkeypatch):
    split = random_split(300)
    monkeypatch.setattr(data.np.random, "default_rng", None)
    assert len(batches_of(split, 16)) == 19


def test_an_epoch_holds_one_permutation_of_four_bytes_a_pair_and_one_pool(monkeypatch):
    pairs = 100_000
    offsets = torch.arange(0, 5 * (pairs + 1), 5)
    side = data.Side(torch.zeros(1, dtype=torch.int32).expand(5 * pairs), offsets)
    monkeypatch.setattr(data, "POOL", 4)
    batches = batches_of(data.Split(side, side), 16)
    tracemalloc.start()
    for step in range(0, len(batches), 500):
        batches[step]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 4 * pairs <= held < 4.2 * pairs


def padding(split, batches):
    """The share of the positions of padded batches that are padding, of the sources and of the targets."""
    batches = list(batches)
    shares = []
    for side in (split.src, split.trg):
        positions = sum(int(side.lengths_of(batch).max()) * len(batch) for batch in batches)
        shares.append(1 - len(side.ids) / positions)
    return shares


def translated_split(pairs):
    """A split in which a target is about as long as its source."""
    generator = torch.Generator().manual_seed(0)
    lengths = 4 + torch.poisson(torch.full((pairs,), 10.0), generator=generator).long()
    other = (lengths + torch.randint(-2, 3, (pairs,), generator=generator)).clamp(min=3)
    sides = [
        data.Side.encode([["x"] * n for n in each.tolist()], data.Vocabulary(data.SPECIALS))
        for each in (lengths, other)
    ]
    return data.Split(*sides)


def test_like_length_leaves_little_padding_in_either_language():
    split = translated_split(6400)
    grouped, shuffled = (padding(split, batches_of(split, 32, like_length=way)) for way in (True, False))
    assert max(grouped) < 0.1
    assert min(shuffled) > 0.3


def test_pools_are_of_like_size_and_so_is_their_padding(monkeypatch):
    monkeypatch.setattr(data, "POOL", 10)
    split = translated_split(32 * 36 + 5)
    batches = batches_of(split, 32)
    assert len(batches) == 37
    pools = []
    for step in range(37):
        batches[step]
        pools.append(batches._pool)
    assert [pools.count(pool) for pool in range(4)] == [9, 9, 9, 10]


def test_like_length_does_not_train_the_short_sentences_first():
    split = random_split(3000)
    longest = [int(split.trg.lengths[batch].max()) for batch in batches_of(split, 32)]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.4


def naive_columns(side, indices, fixed_length):
    """The padded sentences one by one, as torchtext's Field(fix_length=...) has them."""
    rows = [sentences(side)[index] for index in indices]
    if fixed_length:
        rows = [[data.SOS, *row[1:-1][: fixed_length - 2], data.EOS] for row in rows]
    length = fixed_length or max(map(len, rows))
    return [[row[step] if step < len(row) else data.PAD for row in rows] for step in range(length)]


@pytest.mark.parametrize("fixed_length", [0, 5, 46, 70])
def test_padded_sentences_are_what_a_naive_loop_makes(fixed_length):
    split = random_split(40)
    for indices in batches_of(split, 16):
        for side in (split.src, split.trg):
            columns, lengths = data.pad(side, indices, fixed_length)
            assert columns.tolist() == naive_columns(side, indices, fixed_length)
            assert columns.dtype == torch.int64
            assert lengths.tolist() == side.lengths[indices].tolist() == side.lengths_of(indices).tolist()


@pytest.mark.parametrize(("words", "kept"), [(43, 43), (44, 44), (45, 44), (200, 44)])
def test_fixed_length_of_46_keeps_44_words_and_eos(words, kept):
    vocab = data.Vocabulary([*data.SPECIALS, "a"])
    side = data.Side.encode([["a"] * words], vocab)
    column = data.pad(side, torch.tensor([0]), 46)[0][:, 0].tolist()
    assert column == [data.SOS] + [4] * kept + [data.EOS] + [data.PAD] * (44 - kept)
