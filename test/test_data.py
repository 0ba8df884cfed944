"""The data's claims: what is read, what is refused and with which words, what a batch holds, what a cache is worth."""

import doctest
import fcntl
import gzip
import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MULTI30K, needs_multi30k

import data
from errors import UserError

ROOT = Path(__file__).resolve().parent.parent

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


def test_the_examples_in_the_docstrings_are_true():
    assert doctest.testmod(data).failed == 0


# ---------------------------------------------------------------- vocabulary


def test_vocabulary_has_torchtexts_order_and_the_special_ids():
    from torchtext.vocab import Vocab

    generator = random.Random(1)
    token_lists = [[generator.choice("äbcdefgzß ") for _ in range(9)] for _ in range(9)] + [["<pad>"] * 50, ["rare"]]
    vocab = data.Vocabulary.build(token_lists, min_freq=2)
    counter = Counter(token for tokens in token_lists for token in tokens)
    assert vocab.itos == Vocab(counter, min_freq=2, specials=["<unk>", "<pad>", "<sos>", "<eos>"]).itos
    assert vocab.itos[:4] == ["<unk>", "<pad>", "<sos>", "<eos>"]
    assert (data.UNK, data.PAD, data.SOS, data.EOS) == (0, 1, 2, 3)
    assert "rare" not in vocab.itos


def test_vocabulary_is_by_frequency_and_ties_are_alphabetical():
    assert data.Vocabulary.build([["b", "c", "a", "c"], ["b", "c", "a", "d"]]).itos[4:] == ["c", "a", "b"]


def test_encoding_never_adds_a_word():
    vocab = data.Vocabulary.build([["a", "a"]])
    assert vocab.encode(["a", "new", "new"]) == [4, 0, 0]
    assert len(vocab) == 5


def test_special_words_in_a_text_are_unknown_words():
    assert data.Vocabulary.build([["a", "a"]]).encode(["<pad>", "<eos>", "a"]) == [0, 0, 4]


def test_decoding_ends_at_eos_and_skips_a_leading_sos():
    vocab = data.Vocabulary.build([["a", "a"]])
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


def test_white_space_tokens_are_read_as_in_training_but_are_no_reference_words(tmp_path, load):
    spaced = [[line.replace(" ", "  ") for line in lines] for lines in (DE, EN)]
    corpus = load(write_corpus(tmp_path / "spaced", train=spaced, val=(spaced[0][0], spaced[1][0])))
    assert " " in corpus.src_vocab.itos
    assert corpus.val.src_tokens == [["ein", " ", "hund", " ", "bellt", "."]]
    assert corpus.val.trg_tokens == [["a", "dog", "barks", "."]]


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


def test_tokens_do_not_depend_on_the_number_of_processes(monkeypatch):
    lines = [f"{word} {index} Hunde bellen." for index in range(5) for word in DE]
    alone = data.tokenise(lines, "de", workers=4)
    monkeypatch.setattr(data, "LINES_PER_PROCESS", 10)
    monkeypatch.setattr(data, "cores", lambda: 8)
    monkeypatch.setattr(data, "_tokenise_here", None)  # in this process; those spawned have their own
    assert data.tokenise(lines, "de", workers=4) == alone
    assert multiprocessing.active_children() == []


def test_killed_tokenising_process_is_an_error_and_leaves_none(monkeypatch):
    def kill_the_first():
        while not multiprocessing.active_children():
            pass
        multiprocessing.active_children()[0].kill()

    killer = threading.Thread(target=kill_the_first)
    killer.start()
    with pytest.raises(RuntimeError, match="tokenising process ended early"):
        data._tokenise_in_processes([["a"], ["b"]], "de")
    killer.join()
    assert multiprocessing.active_children() == []


def test_error_in_a_tokenising_process_reaches_the_caller():
    refused(lambda: data._tokenise_in_processes([["a"]], "qq"), "usage", "no tokenizer for 'qq'")


def test_tokenising_processes_end_with_a_killed_parent():
    code = (
        "import data, multiprocessing, time;"
        "context = multiprocessing.get_context('spawn');"
        "ours, theirs = context.Pipe();"
        "child = context.Process(target=data._serve_share, args=(theirs, 'de'));"
        "child.start();"
        "ours.send([f'{index}' + '(' * 2000 for index in range(1000)]);"  # slow, and too long for a pipe: sent is begun
        "print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = Path("/proc", parent.stdout.readline().strip())
    assert "spawn_main" in (child / "cmdline").read_text()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while child.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists()


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


def test_utf16_is_refused_as_no_utf8(folder, load):
    (folder / "train.en").write_text("\n".join(EN), encoding="utf-16")
    refused(lambda: load(folder), "data", "not UTF-8", "train.en:1", "convert the file")


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
    tokenizer = data._tokenizer("de")
    monkeypatch.setattr(data, "_tokenizer", lambda lang: lambda line: seen.append(len(line)) or tokenizer(line))
    corpus = load(write_corpus(tmp_path / "long", train=(["Hund " * 200_000, "a" * 1_000_000, *DE[2:]], EN)))
    assert max(seen) == data.MAX_CHARACTERS
    assert corpus.train.src.lengths.tolist()[:2] == [256, 3]
    assert corpus.notes == ["warning: 2 sentences of train.de cut to 254 words"]


def test_sentence_of_254_words_is_whole_and_one_of_255_is_cut(tmp_path, load):
    corpus = load(write_corpus(tmp_path / "long", train=(["Hund " * 254, "Hund " * 255, *DE[2:]], EN)))
    assert corpus.train.src.lengths.tolist()[:2] == [256, 256]
    assert corpus.notes == ["warning: 1 sentences of train.de cut to 254 words"]


def test_missing_file_is_refused_with_the_paths_tried(folder, load):
    (folder / "test.en").unlink()
    message = refused(lambda: load(folder), "data", f"{folder}/test.en")
    assert f"{folder}/test2016.en" in message
    assert "train" not in message.partition(";")[0], "those are there"
    assert f"{folder}/test.en.gz" in message
    assert f"{folder}/test.de," not in message, "that one is there"


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
    (path,) = (tmp_path / "cache").iterdir()
    assert path.suffix == ".npz"
    return path


def test_second_start_reads_the_same_corpus_from_the_cache(folder, load, builds):
    built = load(folder)
    assert same(load(folder), built)
    assert load(folder).fingerprint == built.fingerprint
    assert len(builds) == 1


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


def test_changed_byte_rebuilds_under_the_same_size_and_time(folder, load, builds):
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


@pytest.mark.parametrize("damage", ["empty", "header only", "truncated", "bit", "header bit", "text"])
def test_damaged_cache_is_rebuilt_and_says_so(folder, load, builds, tmp_path, damage):
    good = load(folder)
    path = cached(tmp_path)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "empty": b"",
            "header only": content[:65],
            "truncated": content[:-1],
            "bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "header bit": bytes([content[0] ^ 128]) + content[1:],
            "text": b"hello",
        }[damage]
    )
    assert same(load(folder), good)
    assert any("is damaged and is built again" in line for line in load.lines)
    assert cached(tmp_path).read_bytes() == content
    load(folder)
    assert len(builds) == 2, "rebuilt once"


class Spy:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_cache_never_unpickles(folder, load, tmp_path):
    load(folder)
    path = cached(tmp_path)
    with open(tmp_path / "body", "wb") as file:
        np.savez(file, text=np.array([Spy(tmp_path / "ran")], dtype=object), allow_pickle=True)
    body = (tmp_path / "body").read_bytes()
    path.write_bytes(data._sha256(body).encode() + b"\n" + body)
    with pytest.raises(ValueError, match="allow_pickle"):
        load(folder)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load(tmp_path / "body", allow_pickle=False)["text"]


def test_cache_respects_the_umask(folder, load, tmp_path):
    before = os.umask(0o027)
    try:
        load(folder)
    finally:
        os.umask(before)
    assert cached(tmp_path).stat().st_mode & 0o777 == 0o640


def test_cache_is_in_the_users_cache_folder(folder, load, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load(folder, cache_dir=None)
    assert len(list((tmp_path / "xdg" / "gru-for-pytorch").glob("*.npz"))) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load(folder, cache_dir=None)
    assert len(list((tmp_path / "home" / ".cache" / "gru-for-pytorch").glob("*.npz"))) == 1


@pytest.fixture
def no_cache_folder(folder, tmp_path, monkeypatch):
    """A cache folder that cannot be made, and where the temporary files go instead."""
    monkeypatch.setattr(data.tempfile, "tempdir", str(tmp_path / "tmp"))
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


def test_full_disk_leaves_the_corpus_and_no_file(folder, load, tmp_path, monkeypatch):
    def full(path, *parts):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "_write_synced", full)
    assert len(load(folder).train) == 4
    assert list((tmp_path / "cache").iterdir()) == []
    assert any("not cached" in line and "No space left" in line for line in load.lines)


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
    with data._locked(path, log):
        events.append("is in")
    assert events == ["waits", "waits", "is in"]
    assert list(tmp_path.iterdir()) == []


def test_killed_holder_of_the_lock_keeps_nobody_waiting(folder, load, tmp_path):
    load(folder)
    path = cached(tmp_path)
    path.unlink()
    lock = path.with_suffix(".lock")
    path.with_suffix(".tmp").write_bytes(b"what the killed run wrote")
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
    assert cached(tmp_path), "and nothing else is left"


def test_cache_holds_its_words_as_json(folder, load, tmp_path):
    load(folder)
    body = cached(tmp_path).read_bytes().split(b"\n", 1)[1]
    (tmp_path / "body").write_bytes(body)
    with np.load(tmp_path / "body", allow_pickle=False) as arrays:
        assert json.loads(arrays["text"].tobytes())["words"]["train"] == [None, None]
        assert arrays["train.src.ids"].dtype == np.int32


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
    return data.epoch_batches(split.src.lengths, split.trg.lengths, batch_size, **flags)


@pytest.mark.parametrize("like_length", [True, False])
@pytest.mark.parametrize(("pairs", "batch_size"), [(1, 8), (7, 8), (8, 8), (9, 8), (103, 1), (1003, 8)])
def test_each_pair_comes_once_an_epoch(like_length, pairs, batch_size):
    batches = batches_of(random_split(pairs), batch_size, like_length=like_length)
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
        return torch.cat(batches_of(split, 16, like_length=like_length, **flags)).tolist()

    first = order()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    assert order() == first
    assert order(epoch=1) != first
    assert order(seed=1) != first
    assert order(seed=0, epoch=1) != order(seed=1, epoch=0)


def test_drawing_an_order_leaves_the_global_generators_alone():
    before = torch.get_rng_state(), np.random.get_state()[2], random.getstate()
    batches_of(random_split(50, seed=3), 16)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[2], random.getstate()) == before[1:]


def padded(split, batches):
    return sum(data.make_batch(split, batch).trg.numel() for batch in batches)


def test_like_length_reduces_padding():
    split = random_split(3000)
    real = len(split.trg.ids)
    by_length, shuffled = (padded(split, batches_of(split, 32, like_length=way)) for way in (True, False))
    assert by_length < 1.1 * real
    assert shuffled > 1.5 * real


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
def test_batch_is_what_a_naive_loop_makes(fixed_length):
    split = random_split(40)
    for indices in batches_of(split, 16):
        batch = data.make_batch(split, indices, fixed_length=fixed_length)
        assert batch.src.tolist() == naive_columns(split.src, indices, fixed_length)
        assert batch.trg.tolist() == naive_columns(split.trg, indices, fixed_length)
        assert (batch.src.dtype, batch.trg.dtype) == (torch.int64, torch.int64)
        targets = [token for row in batch.trg.tolist()[1:] for token in row]
        assert batch.positions.tolist() == [index for index, token in enumerate(targets) if token != data.PAD]


def test_batch_knows_its_sentences_lengths_unless_they_are_fixed():
    split = random_split(10)
    indices = torch.tensor([3, 1, 4])
    assert data.make_batch(split, indices).src_len.tolist() == split.src.lengths[indices].tolist()
    assert data.make_batch(split, indices, fixed_length=46).src_len is None


@pytest.mark.parametrize(("words", "kept"), [(43, 43), (44, 44), (45, 44), (200, 44)])
def test_fixed_length_of_46_keeps_44_words_and_eos(words, kept):
    vocab = data.Vocabulary([*data.SPECIALS, "a"])
    side = data.Side.encode([["a"] * words], vocab)
    column = data.make_batch(data.Split(side, side), torch.tensor([0]), fixed_length=46).src[:, 0].tolist()
    assert column == [data.SOS, *[4] * kept, data.EOS, *[data.PAD] * (44 - kept)]


@pytest.mark.parametrize("fixed_length", [0, 46])
def test_rank_without_pairs_takes_part_with_weight_zero(fixed_length):
    split = random_split(10)
    nothing = data.rank_share(torch.tensor([7]), 1, 2)
    batch = data.make_batch(split, nothing, fixed_length=fixed_length)
    assert len(batch.positions) == 0
    assert batch.src.tolist() == naive_columns(split.src, [0], fixed_length)


def test_batch_moves_to_a_device_whole():
    batch = data.make_batch(random_split(5), torch.tensor([0, 1])).to("meta")
    assert {field.device.type for field in batch if isinstance(field, torch.Tensor)} == {"meta"}
    assert data.make_batch(random_split(5), torch.tensor([0]), fixed_length=9).to("meta").src_len is None
