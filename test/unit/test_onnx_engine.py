"""The engine on onnxruntime translates as `nmt.search` does with the model, and refuses an export that is damaged."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading

import data
import export_onnx
import scoring
import train_8p
from nmt import checkpoint, errors, onnx_engine, search
from nmt.errors import UserError, run_main
from nmt.text.vocabulary import EOS, PAD, SOS, Vocabulary

import pytest
import torch
from conftest import MULTI30K, REPOSITORY, SMALL, needs_multi30k, random_checkpoint, refused

MAX_LENGTH = 12
WORDS = 30
LONGEST = 46  # words, as many as the original's sentences had


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model, and its export."""
    folder = tmp_path_factory.mktemp("onnx")
    saved = random_checkpoint(folder / "model", WORDS)
    assert run_main(export_onnx.main, ["--ckptpath", str(folder / "model"), "--out", str(folder / "export")]) == 0
    return scoring.restore(saved, ""), folder / "export"


@pytest.fixture(scope="module")
def model(pair):
    return pair[0]


@pytest.fixture(scope="module")
def engine(pair):
    return onnx_engine.load(pair[1])


@pytest.fixture
def folder(pair, tmp_path):
    """A copy of the export."""
    return shutil.copytree(pair[1], tmp_path / "copy")


def sentences_of(lengths, seed=0):
    rng = random.Random(seed)
    return [[SOS, *(rng.randrange(4, 4 + WORDS) for _ in range(length)), EOS] for length in lengths]


def translated(engine, sentences, beam_size, **options):
    options = {"length_penalty": 1.2, "max_length": MAX_LENGTH} | options
    return engine.translate(sentences, beam_size=beam_size, **options)


def expected(model, sentences, beam_size, n_best=1, length_penalty=1.2, max_length=MAX_LENGTH):
    """What `nmt.search` finds: of each sentence the ids and the score of each hypothesis."""
    src_len = torch.tensor([len(ids) for ids in sentences])
    src = torch.full((int(src_len.max()), len(sentences)), PAD)
    for column, ids in enumerate(sentences):
        src[: len(ids), column] = torch.tensor(ids)
    options = {"beam_size": beam_size, "n_best": n_best, "length_penalty": length_penalty, "max_len": max_length}
    ids, scores = search.beam_search(model, src, src_len, SOS, EOS, **options)
    if beam_size == 1:
        assert torch.equal(ids[:, :, 0], search.greedy(model, src, src_len, SOS, EOS, max_length))
    return [
        [(words_of(ids[:, column, rank].tolist()), float(scores[column, rank])) for rank in range(n_best)]
        for column in range(len(sentences))
    ]


def words_of(ids):
    return ids[: ids.index(EOS)] if EOS in ids else ids


def assert_same(found, expected):
    assert [[ids for ids, _ in hypotheses] for hypotheses in found] == [
        [ids for ids, _ in hypotheses] for hypotheses in expected
    ]
    scores = [[score for own in each for _, score in own] for each in (found, expected)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6, abs=1e-5)


# ---------------------------------------------------------------- translations


@pytest.mark.parametrize("beam_size", [1, 2, 5])
def test_batches_of_1_to_64_sentences_of_1_to_46_words_are_translated_as_by_pytorch(model, engine, beam_size):
    rng = random.Random(beam_size)
    sentences = sentences_of([*range(1, LONGEST + 1), *(rng.randint(1, LONGEST) for _ in range(18))])
    assert len(sentences) == 64
    right = expected(model, sentences, beam_size)
    # Neither endless nor empty, and of many lengths: otherwise nothing narrows, and nothing is dropped.
    assert len({len(ids) for [(ids, _)] in right}) > 5
    for size in range(1, 65):
        batch = rng.sample(range(64), size)
        assert_same(translated(engine, [sentences[i] for i in batch], beam_size), [right[i] for i in batch])
    for length in range(1, LONGEST + 1):
        batch = sentences_of([length] * 3, seed=length)
        assert_same(translated(engine, batch, beam_size), expected(model, batch, beam_size))


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 1.2])
@pytest.mark.parametrize("max_length", [1, 2, 30])
def test_all_hypotheses_their_order_and_their_scores_are_pytorchs(model, engine, length_penalty, max_length):
    sentences = sentences_of(range(1, 21), seed=7)
    options = {"n_best": 6, "length_penalty": length_penalty, "max_length": max_length}
    assert_same(translated(engine, sentences, 6, **options), expected(model, sentences, 6, **options))
    options["n_best"] = 2
    assert_same(translated(engine, sentences, 6, **options), expected(model, sentences, 6, **options))


def test_many_sentences_are_several_batches(model, engine, monkeypatch):
    monkeypatch.setattr(onnx_engine, "BATCH_ROWS", 7)
    sentences = sentences_of([length % 9 + 1 for length in range(40)], seed=3)
    assert_same(translated(engine, sentences, 3), expected(model, sentences, 3))
    assert_same(translated(engine, sentences, 9), expected(model, sentences, 9))
    assert translated(engine, [], 3) == []


def test_a_sentence_without_words_and_one_that_stands_twice_are_sentences(model, engine):
    sentences = [[SOS, EOS], *sentences_of([3]), *sentences_of([3])]
    found = translated(engine, sentences, 4)
    assert_same(found, expected(model, sentences, 4))
    assert found[1] == found[2]


def test_a_beam_that_is_too_wide_or_too_narrow_is_an_error(engine):
    with pytest.raises(ValueError, match="n_best"):
        translated(engine, sentences_of([3]), 2, n_best=3)
    with pytest.raises(ValueError, match="vocabulary"):
        translated(engine, sentences_of([3]), WORDS + 5)
    assert len(translated(engine, sentences_of([3]), WORDS + 4, n_best=WORDS + 4)[0]) == WORDS + 4


WITHOUT_TORCH = """
import json, sys

sys.modules["torch"] = None
from nmt import onnx_engine

engine = onnx_engine.load(sys.argv[1])
found = engine.translate(json.loads(sys.argv[2]), beam_size=3, length_penalty=1.2, max_length=12)
print(json.dumps([[hypothesis.ids for hypothesis in hypotheses] for hypotheses in found]))
"""


def test_torch_is_not_imported(pair, engine):
    sentences = sentences_of([3, 8, 5])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(pair[1]), json.dumps(sentences)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    own = translated(engine, sentences, 3)
    assert json.loads(done.stdout) == [[hypothesis.ids for hypothesis in hypotheses] for hypotheses in own]


def test_a_trained_model_is_translated_as_by_pytorch(tiny_corpus, tmp_path, capsys):
    path, out = str(tmp_path / "model"), str(tmp_path / "export")
    flags = ["--data-dir", str(tiny_corpus), "--ckptpath", path, "--epochs", "4", "--beam-size", "1"]
    assert run_main(train_8p.main, [*SMALL, *flags]) == 0
    assert run_main(export_onnx.main, ["--ckptpath", path, "--out", out]) == 0
    saved, engine = checkpoint.load(path), onnx_engine.load(out)
    vocab = Vocabulary(engine.info.src_words)
    lines = (tiny_corpus / "train.de").read_text().splitlines()
    sentences = [[SOS, *vocab.encode(line.lower().split()), EOS] for line in lines]
    for beam_size in (1, 4):
        assert_same(
            translated(engine, sentences, beam_size), expected(scoring.restore(saved, ""), sentences, beam_size)
        )


@pytest.mark.slow
@needs_multi30k
def test_a_model_of_multi30k_translates_999_of_1000_sentences_as_pytorch(tmp_path, capsys):
    path, out = str(tmp_path / "model"), str(tmp_path / "export")
    flags = ["--data-dir", str(MULTI30K), "--ckptpath", path, "--epochs", "1", "--beam-size", "1"]
    assert run_main(train_8p.main, ["--device", "cpu", "--emb-dim", "64", "--hid-dim", "128", *flags]) == 0
    assert run_main(export_onnx.main, ["--ckptpath", path, "--out", out]) == 0
    saved, engine = checkpoint.load(path), onnx_engine.load(out)
    vocab = Vocabulary(engine.info.src_words)
    corpus = data.load(str(MULTI30K), log=lambda line: None)
    sentences = [[SOS, *vocab.encode(tokens), EOS] for tokens in corpus.test.src_tokens]
    assert len(sentences) == 1000
    model = scoring.restore(saved, "")
    for beam_size in (1, 5):
        found = translated(engine, sentences, beam_size, max_length=50)
        right = expected(model, sentences, beam_size, max_length=50)
        assert sum(own[0].ids == other[0][0] for own, other in zip(found, right, strict=True)) >= 999


# ---------------------------------------------------------------- threads and packages


@pytest.mark.parametrize(
    ("value", "number"),
    [("1", 1), (" 3 ", 3), ("2,1", 2), ("", 0), ("x", 0), ("-1", 0), ("٣", 0), ("99999", 0), (None, 0)],
)
def test_the_number_of_threads_is_that_of_the_environment(monkeypatch, value, number):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert onnx_engine.threads() == number


def test_without_onnxruntime_one_line_names_the_requirements(folder, monkeypatch):
    version = errors.importlib.metadata.version

    def without(name):
        if name == "onnxruntime":
            raise errors.importlib.metadata.PackageNotFoundError
        return version(name)

    monkeypatch.setattr(errors.importlib.metadata, "version", without)
    says = ("not installed: onnxruntime", f"{REPOSITORY / 'requirements-onnx.txt'}")
    refused("usage", onnx_engine.load, folder, says=says)


# ---------------------------------------------------------------- damage


def test_each_flipped_bit_is_noticed(folder):
    """Row 14."""
    info, parts = onnx_engine.read(folder)
    rng = random.Random(0)
    same = 0
    for name in (*onnx_engine.PARTS, onnx_engine.DESCRIPTION):
        path = folder / name
        before = path.read_bytes()
        for _ in range(150):
            place, bit = rng.randrange(len(before)), rng.randrange(8)
            path.write_bytes(before[:place] + bytes([before[place] ^ 1 << bit]) + before[place + 1 :])
            try:
                assert onnx_engine.read(folder) == (info, parts)  # one space of JSON became another
                same += 1
            except UserError as error:
                assert error.exit_code == 4
                assert str(error).count("\n") == 0
        path.write_bytes(before)
    assert same < 10


def test_what_is_cut_or_missing_is_told(folder):
    """Rows 12 and 13."""
    for name in (*onnx_engine.PARTS, onnx_engine.DESCRIPTION):
        path = folder / name
        before = path.read_bytes()
        for content in (
            b"",
            before[:100],
            before[: len(before) // 2],
            before[:-1],
            b"hello",
            b"\xff\xfe",
            b"[]",
            b"{}",
        ):
            if content + b"}" == before:
                continue
            path.write_bytes(content)
            assert "damaged" in refused("checkpoint", onnx_engine.load, folder)
        path.unlink()
        refused("checkpoint", onnx_engine.load, folder, says=f"it has no {name}")
        os.mkfifo(path)
        refused("checkpoint", onnx_engine.load, folder, says=f"it has no {name}")
        path.unlink()
        path.write_bytes(before)
    (folder / "model.json").write_text("[" * 100_000)
    refused("checkpoint", onnx_engine.load, folder, says="no JSON")


def test_another_place_is_told(tmp_path):
    (tmp_path / "file").write_text("hello")
    refused("checkpoint", onnx_engine.load, tmp_path / "none", says="no such folder")
    refused("checkpoint", onnx_engine.load, tmp_path / "file", says="a file, not a folder")
    refused("checkpoint", onnx_engine.load, tmp_path, says="it has no model.json")


def forged(folder, **changes):
    """Changes what an export says about its model, with the sha256 that goes with it."""
    path = folder / "model.json"
    description = json.loads(path.read_text())
    description |= {name: changes.pop(name) for name in ("format", "sha256") if name in changes}
    description["info"] |= changes
    if isinstance(description["sha256"], dict):
        description["sha256"]["info"] = onnx_engine.info_sha256(description["info"])
    path.write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 3}, "format 3, expected at most 2"),
        ({"format": "1"}, "does not say its format"),
        ({"sha256": []}, "no sha256"),
        ({"sha256": {}}, "encoder.onnx has sha256"),
        ({"more": 1}, "info has"),
        ({"trg_words": ["<unk>", "<pad>", "<sos>", "<eos>", "a"]}, "have [34, 5] words, expected [34, 34]"),
        ({"trg_words": ["a"] * 34}, "begins with"),
        ({"src_words": None}, "vocabularies"),
        ({"sizes": {}}, "vocabularies: KeyError"),
        ({"sizes": None}, "vocabularies: TypeError"),
    ],
)
def test_what_contradicts_itself_is_told(folder, changes, says):
    forged(folder, **changes)
    refused("checkpoint", onnx_engine.load, folder, says=says)


def test_what_onnxruntime_does_not_take_is_told(folder):
    (folder / "decoder.onnx").write_bytes(b"hello")
    description = json.loads((folder / "model.json").read_text())
    description["sha256"]["decoder.onnx"] = onnx_engine.sha256(b"hello")
    (folder / "model.json").write_text(json.dumps(description))
    refused(
        "checkpoint", onnx_engine.load, folder, says=("onnxruntime 1.", "does not take it", "requirements-onnx.txt")
    )


def test_two_exports_to_one_place_do_not_mix(folder, tmp_path):
    info, parts = onnx_engine.read(folder)
    out = tmp_path / "out"
    told = []

    def write():
        try:
            onnx_engine.write(out, info, parts)
        except UserError as error:
            told.append(error.exit_code)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == [5] * 7
    assert onnx_engine.read(out) == (info, parts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "out"]
