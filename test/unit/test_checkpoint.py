"""A checkpoint holds what is needed, survives what can be survived, and is refused if it is not what was written."""

import copy
import dataclasses
import errno
import fcntl
import itertools
import math
import os
import random
import stat
from pathlib import Path

import gru
import scoring
import train_8p
from nmt import checkpoint, keeping, sealed, storage
from nmt.errors import UserError, run_main

import pytest
import torch
from conftest import refusal_with_files_of, refused
from test_sealed import SWEEPS, flipping, killed, with_seal

SIZES = {"input_dim": 6, "output_dim": 7, "emb_dim": 3, "hid_dim": 4}


def make(seed: int = 0) -> checkpoint.Checkpoint:
    torch.manual_seed(seed)
    return checkpoint.Checkpoint(
        state_dict=gru.build(**SIZES).state_dict(),
        sizes=SIZES,
        src_vocab=["<unk>", "<pad>", "<sos>", "<eos>", "der", "hund"],
        trg_vocab=["<unk>", "<pad>", "<sos>", "<eos>", "the", "dog", "."],
        flags={"lr": 0.1, "data_dir": None},
        scores={"bleu": 12.5},
        about={"src_lang": "de", "trg_lang": "en"},
    )


def save_unsealed(path: Path, saved: checkpoint.Checkpoint) -> None:
    """Saves as earlier versions of this program did: with a digest, and without a seal."""
    content = {name: getattr(saved, name) for name in checkpoint.CONTENT}
    torch.save(content | {"format": 1, "sha256": saved.digest()}, path)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.pth.tar"
    checkpoint.save(path, make())
    return path


def test_what_is_loaded_is_what_was_saved(saved):
    loaded, original = checkpoint.load(saved), make()
    for field in ("sizes", "src_vocab", "trg_vocab", "flags", "scores", "about"):
        assert getattr(loaded, field) == getattr(original, field)
    torch.testing.assert_close(loaded.state_dict, original.state_dict, rtol=0, atol=0)


def test_saving_leaves_no_other_file_and_respects_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        checkpoint.save(tmp_path / "model", make())
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o640


def test_a_save_that_fails_keeps_the_old_checkpoint_and_says_so(saved, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    before = saved.read_bytes()
    monkeypatch.setattr(checkpoint.os, "fsync", full)
    refused("io", checkpoint.save, saved, make(seed=1), says="No space left")
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_disk_that_is_full_is_told_and_the_old_checkpoint_stays(saved):
    """Row 11: a process that may write no file of more than 2,000 bytes."""
    before = saved.read_bytes()
    assert len(before) > 2000
    said = refusal_with_files_of(2000, lambda: checkpoint.save(saved, make(seed=1)))
    assert said.startswith(f"error[io]: cannot write the checkpoint: File too large; {saved}; make room there")
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_truncated_checkpoint_is_refused(saved):
    """Row 12."""
    content = saved.read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:length])
        message = refused("checkpoint", checkpoint.load, saved, says=str(saved))
        assert length == 1 or message.startswith("error[checkpoint]: incomplete, or no checkpoint at all; ")


def test_no_random_truncation_is_accepted(saved):
    """Row 12, 100 times."""
    content, generator = saved.read_bytes(), random.Random(2)
    for length in sorted((generator.randrange(len(content)) for _ in range(100)), reverse=True):
        os.truncate(saved, length)
        refused("checkpoint", checkpoint.load, saved, says=str(saved))


def test_no_flipped_bit_is_accepted(saved):
    """Row 14: all bits of the seal and of the keys, and 200 others."""
    content, generator = saved.read_bytes(), random.Random(1)
    positions = list(range(len(content) - sealed.SEAL_SIZE, len(content)))
    for key in (b"format", b"state_dict", b"encoder.rnn.weight_hh_l0"):
        positions += range(content.index(key), content.index(key) + len(key))
    flips = list(itertools.product(positions, range(8)))
    flips += [(generator.randrange(len(content)), generator.randrange(8)) for _ in range(200)]
    for position, bit in flips:
        with flipping(saved, position, bit):
            refused("checkpoint", checkpoint.load, saved, says=str(saved))


def test_a_flipped_bit_of_an_earlier_versions_file_is_refused_or_without_effect(saved):
    """Row 14: 200 bits, and all of the keys. One in `format` once made it count as the original's, without a check."""
    save_unsealed(saved, make())
    content, expected, generator = saved.read_bytes(), make(), random.Random(1)
    assert checkpoint.load(saved).digest() == expected.digest()
    assert checkpoint.load(saved).completed
    flips = [(generator.randrange(len(content)), generator.randrange(8)) for _ in range(200)]
    for key in (b"format", b"sha256", *(name.encode() for name in checkpoint.CONTENT)):
        start = content.index(key)
        flips += itertools.product(range(start, start + len(key)), range(8))
    found = []
    for position, bit in flips:
        try:
            with flipping(saved, position, bit):
                found.append(checkpoint.load(saved).digest())
        except UserError as error:
            assert error.exit_code == 4
    assert saved.read_bytes() == content
    assert set(found) <= {expected.digest()}
    assert len(found) < 100


def test_every_flipped_bit_of_the_weights_is_refused(saved):
    content = saved.read_bytes()
    weights = make().state_dict["encoder.rnn.weight_hh_l0"].numpy().tobytes()
    start = content.index(weights)
    for offset in range(0, len(weights), 7):
        flipped = bytearray(content)
        flipped[start + offset] ^= 1
        saved.write_bytes(flipped)
        message = refused("checkpoint", checkpoint.load, saved, says=str(saved))
        assert "sha256" in message or "read" in message


def test_a_text_file_is_no_checkpoint(tmp_path):
    """Row 13."""
    path = tmp_path / "text"
    path.write_text("hello")
    refused("checkpoint", checkpoint.load, path, says=str(path))


def test_a_missing_file_is_named(tmp_path):
    refused("checkpoint", checkpoint.load, tmp_path / "absent", says=["no such file", f"{tmp_path}/absent"])


def test_a_file_that_one_may_not_read_is_refused(saved, as_nobody):
    saved.chmod(0)
    with as_nobody():
        refused("checkpoint", checkpoint.load, saved, says=["cannot be read: Permission denied", str(saved)])


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    """Row 16."""
    path, touched = tmp_path / "model", tmp_path / "touched"
    torch.save({"format": checkpoint.FORMAT, "state_dict": Harmful(touched)}, path)
    torch.load(path, weights_only=False)
    assert touched.exists(), "the fault must be real"
    touched.unlink()
    refused("checkpoint", checkpoint.load, path, says=["nothing of it was run", str(path)])
    assert not touched.exists()


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("nested", [False, True])
def test_the_originals_state_dict_loads(tmp_path, prefix, nested):
    model = gru.build(**SIZES)
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state} if nested else state, tmp_path / "original")
    loaded = checkpoint.load(tmp_path / "original")
    assert (loaded.sizes, loaded.src_vocab) == ({}, None), "it does not say"
    assert loaded.flags == {"fixed_length": 46, "beam_size": 1, "length_penalty": 1.0}
    torch.testing.assert_close(loaded.state_dict, dict(model.state_dict()), rtol=0, atol=0)


def test_the_flags_of_an_originals_checkpoint_are_those_of_modelzoo_and_its_padding():
    recipe = train_8p.RECIPES["modelzoo"] | {"fixed_length": 46}
    assert {name: recipe[name] for name in checkpoint.ORIGINAL_FLAGS} == checkpoint.ORIGINAL_FLAGS


@pytest.mark.parametrize("content", [[1.0], {"state_dict": 3}, {"a": torch.zeros(1), "b": "text"}])
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other")
    refused("checkpoint", checkpoint.load, tmp_path / "other", says=["holds no state dict", f"{tmp_path}/other"])


# ---------------------------------------------------------------- what contradicts itself

WEIGHT = "decoder.fc_out.weight"


def with_weight(change):
    """A change of one weight of a file's content."""

    def call(content):
        content["state_dict"][WEIGHT] = change(content["state_dict"][WEIGHT])

    return call


def with_value(part, name, value):
    """A change of one value of a file's content."""
    return lambda content: content[part].__setitem__(name, value)


def without(part, name):
    return lambda content: content[part].pop(name)


def with_part(part, value):
    return lambda content: content.__setitem__(part, value)


def with_attribute(tensor):
    tensor.is_contiguous = 3
    return tensor


CONTRADICTIONS = {
    "a size that is not that of the weights": with_value("sizes", "hid_dim", 5),
    "a size that no machine has room for": with_value("sizes", "emb_dim", 1 << 28),
    "a size above all counters": with_value("sizes", "emb_dim", 1 << 80),
    "a size of zero": with_value("sizes", "emb_dim", 0),
    "a size of True": with_value("sizes", "emb_dim", True),
    "a size that is text": with_value("sizes", "emb_dim", "3"),
    "a size missing": without("sizes", "emb_dim"),
    "a size too many": with_value("sizes", "layers", 1),
    "no sizes": with_part("sizes", {}),
    "sizes that are a list": with_part("sizes", [6, 7, 3, 4]),
    "a vocabulary too short": lambda content: content["src_vocab"].pop(),
    "a vocabulary too long": lambda content: content["trg_vocab"].append("cat"),
    "a word twice": with_value("src_vocab", 5, "der"),
    "a special word twice": with_value("src_vocab", 5, "<pad>"),
    "a word that is a number": with_value("src_vocab", 5, 5),
    "a word that is bytes": with_value("src_vocab", 5, b"hund"),
    "a word that is half a character": with_value("src_vocab", 5, "\ud800"),
    "a special word missing": with_value("trg_vocab", 1, "pad"),
    "special words in another order": lambda content: content["trg_vocab"].reverse(),
    "no vocabulary": with_part("src_vocab", None),
    "a vocabulary that is a text": with_part("src_vocab", "abcdef"),
    "a vocabulary that is a dict": with_part("src_vocab", {"der": 0}),
    "no weights": with_part("state_dict", {}),
    "weights that are a list": lambda content: content.__setitem__("state_dict", list(content["state_dict"].values())),
    "a weight missing": without("state_dict", WEIGHT),
    "a weight too many": with_value("state_dict", "attention.weight", torch.zeros(2)),
    "a weight with a number as its name": with_value("state_dict", 3, torch.zeros(2)),
    "a weight of another shape": with_weight(lambda weight: weight.reshape(-1)),
    "a weight that is a number": with_weight(lambda weight: 3.0),
    "a weight that is a list": with_weight(lambda weight: weight.tolist()),
    "float64": with_weight(torch.Tensor.double),
    "float16": with_weight(torch.Tensor.half),
    "integers": with_weight(torch.Tensor.int),
    "complex numbers": with_weight(lambda weight: weight.to(torch.complex64)),
    "a negated view": with_weight(torch._neg_view),
    "a sparse weight": with_weight(torch.Tensor.to_sparse),
    "a compressed sparse weight": with_weight(torch.Tensor.to_sparse_csr),
    "a weight without values": with_weight(lambda weight: weight.to("meta")),
    "a quantised weight": with_weight(lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)),
    "a nested weight": with_weight(lambda weight: torch.nested.nested_tensor([weight, weight])),
    "a weight that is not contiguous": with_weight(lambda weight: weight.T.contiguous().T),
    "a weight that repeats one value": with_weight(lambda weight: torch.zeros(1, 1).expand(weight.shape)),
    "requires_grad": with_weight(lambda weight: weight.clone().requires_grad_()),
    "a parameter": with_weight(torch.nn.Parameter),
    "a weight with attributes": with_weight(with_attribute),
    "NaN": with_weight(lambda weight: weight.index_fill(0, torch.tensor([1]), math.nan)),
    "infinity": with_weight(lambda weight: weight.index_fill(0, torch.tensor([1]), -math.inf)),
    "flags that are no dict": with_part("flags", ["lr", 0.1]),
    "a flag without a name": with_value("flags", 3, 0.1),
    "a flag that is a tensor": with_value("flags", "lr", torch.zeros(2)),
    "a beam of -1": with_value("flags", "beam_size", -1),
    "a beam of None": with_value("flags", "beam_size", None),
    "a length penalty that is a list": with_value("flags", "length_penalty", [1.0]),
    "a length penalty of NaN": with_value("flags", "length_penalty", math.nan),
    "a fixed length that is text": with_value("flags", "fixed_length", "long"),
    "scores that are no dict": with_part("scores", 12.5),
    "a score that is text": with_value("scores", "bleu", "12.5"),
    "a score of NaN": with_value("scores", "bleu", math.nan),
    "about nothing": with_part("about", None),
    "about without languages": with_part("about", {}),
    "a language that is a number": with_value("about", "src_lang", 49),
    "another vocabulary's fingerprint": with_value("about", "vocabularies", "0" * 64),
    "deep nesting": with_value("about", "deep", [[[[[[[]]]]]]]),
    "a missing part": lambda content: content.pop("scores"),
    "a format of its own": with_part("format", "x"),
    "a format of True": with_part("format", True),
    "a format of more than one number": with_part("format", torch.ones(2)),
    "a later format": with_part("format", 4),
}


def make_with_shortlist(table: object) -> checkpoint.Checkpoint:
    return dataclasses.replace(make(), shortlist=table)


TABLE = torch.tensor([[4, 5], [0, 6], [0, 0], [6, 0], [5, 0], [1, 2]], dtype=torch.int32)  # a row a source word


def test_a_shortlist_is_saved_with_the_model_and_may_be_missing(saved):
    assert checkpoint.load(saved).shortlist is None
    assert "shortlist" not in sealed.read(saved)
    checkpoint.save(saved, make_with_shortlist(TABLE))
    loaded = checkpoint.load(saved)
    assert torch.equal(loaded.shortlist, TABLE) and loaded.shortlist.dtype == torch.int32
    digests = [
        made.digest() for made in (make(), loaded, make_with_shortlist(TABLE), make_with_shortlist(TABLE.flip(0)))
    ]
    assert digests[1] == digests[2] and len(set(digests)) == 3


def test_the_best_file_gets_the_shortlist_of_its_run(tmp_path):
    best = checkpoint.BestFile(tmp_path / "model", "a run", log=lambda line: None, shortlist=TABLE)
    best.replace((1.0,), make())
    assert torch.equal(checkpoint.load(tmp_path / "model").shortlist, TABLE)


def test_no_flipped_bit_of_a_shortlist_is_accepted(saved):
    checkpoint.save(saved, make_with_shortlist(TABLE))
    content = saved.read_bytes()
    start = content.index(TABLE.numpy().tobytes())
    for offset in range(TABLE.numel() * 4):
        with flipping(saved, start + offset, 0):
            refused("checkpoint", checkpoint.load, saved, says=str(saved))


SHORTLISTS = {
    "a number": 3,
    "a list": TABLE.tolist(),
    "of int64": TABLE.long(),
    "of floats": TABLE.float(),
    "of one dimension": TABLE.flatten(),
    "of too few rows": TABLE[:5],
    "with an id too high": TABLE + 2,
    "with an id below 0": TABLE - 1,
    "that repeats its values": torch.zeros(1, 1, dtype=torch.int32).expand(6, 2),
    "that is not contiguous": TABLE.T.contiguous().T,
    "that is sparse": TABLE.to_sparse(),
    "without values": TABLE.to("meta"),
    "with attributes": with_attribute(TABLE.clone()),
}


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, where such tensors are made
@pytest.mark.parametrize("table", SHORTLISTS.values(), ids=SHORTLISTS)
def test_a_shortlist_that_cannot_be_one_is_refused(saved, table):
    sealed.write(
        saved, {name: getattr(make(), name) for name in checkpoint.CONTENT} | {"format": 2, "shortlist": table}
    )
    refused("checkpoint", checkpoint.load, saved, says=["shortlist", str(saved)])


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, where such tensors are made
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("change", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_file_that_contradicts_itself_ends_the_program_with_4_in_one_line(saved, capsys, change, number):
    """Rows 14 and 15, kind Q: files that somebody signed, as this version does or as earlier ones did."""
    content = {name: copy.deepcopy(getattr(make(), name)) for name in checkpoint.CONTENT} | {"format": number}
    change(content)
    if number == 2:
        sealed.write(saved, content)
    else:
        signed = dataclasses.replace(make(), **{name: content.get(name) for name in checkpoint.CONTENT})
        try:
            digest = signed.digest()
        except Exception:
            digest = "0" * 64
        torch.save(content | {"sha256": digest}, saved)
    assert run_main(train_8p.main, ["--device", "cpu", "--evaluate", str(saved)]) == 4
    out, err = capsys.readouterr()
    assert err.startswith("error[checkpoint]: ")
    assert err.count("\n") == 1
    assert str(saved) in err
    assert out == ""


@pytest.mark.parametrize("count", [pytest.param(200, id="200"), pytest.param(2000, id="2000", marks=pytest.mark.slow)])
def test_random_bytes_in_a_signed_file_end_in_no_traceback(saved, count):
    """What somebody writes who knows how to seal. It loads if it still makes sense, otherwise one line refuses it."""
    content, generator, refusals = saved.read_bytes()[: -sealed.SEAL_SIZE], random.Random(count), 0
    end = content.index(b".format_version")  # before it stand the keys, the words and what the tensors are
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(generator.choice([1, 2, 5])):
            changed[generator.randrange(end)] = generator.randrange(256)
        saved.write_bytes(with_seal(bytes(changed)))
        try:
            scoring.restore(checkpoint.load(saved), saved)
        except UserError as error:
            assert error.exit_code == 4
            refusals += 1
    assert count // 2 < refusals < count


def test_a_file_that_contradicts_nothing_loads(saved):
    """Without this, the test of contradictions could pass by refusing everything."""
    assert scoring.restore(checkpoint.load(saved), saved) is not None
    save_unsealed(saved, make())
    assert scoring.restore(checkpoint.load(saved), saved) is not None


def test_two_words_that_changed_places_are_told_with_both_fingerprints(saved):
    """Row 15: a vocabulary of the same size, in another order."""
    trained = make()
    expected = checkpoint.vocabulary_digest(trained.src_vocab, trained.trg_vocab)
    words = [*trained.src_vocab[:4], *reversed(trained.src_vocab[4:])]
    actual = checkpoint.vocabulary_digest(words, trained.trg_vocab)
    assert len({expected, actual, checkpoint.vocabulary_digest(trained.trg_vocab, trained.src_vocab)}) == 3
    about = trained.about | {"vocabularies": expected}
    checkpoint.save(saved, dataclasses.replace(trained, about=about))
    assert checkpoint.load(saved).about["vocabularies"] == expected
    checkpoint.save(saved, dataclasses.replace(trained, src_vocab=words, about=about))
    refused("checkpoint", checkpoint.load, saved, says=[actual, expected, str(saved)])


ORIGINALS = {
    "NaN": with_weight(lambda weight: torch.full_like(weight, math.nan)),
    "too large for float32": with_weight(lambda weight: torch.full_like(weight, 1e300, dtype=torch.float64)),
    "repeats its values": with_weight(lambda weight: torch.zeros(1, 1).expand(weight.shape)),
    "expected floats": with_weight(torch.Tensor.int),
    "plain tensor": with_weight(torch.Tensor.to_sparse),
    "is missing": without("state_dict", WEIGHT),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", ORIGINALS.values(), ids=ORIGINALS)
def test_an_originals_state_dict_that_cannot_be_one_is_refused(tmp_path, change):
    """Kind Q."""
    content = {"epoch": 3, "state_dict": dict(make().state_dict)}
    change(content)
    torch.save(content, tmp_path / "original")

    def read():
        return scoring.restore(checkpoint.load(tmp_path / "original"), tmp_path / "original")

    refused("checkpoint", read, says=[WEIGHT, f"{tmp_path}/original"])


def test_what_no_check_foresees_ends_in_one_line_too(tmp_path):
    """A tensor brings attributes along, and this one hides a method that reading it calls."""
    state = dict(make().state_dict)
    state[WEIGHT] = state[WEIGHT].clone()
    state[WEIGHT].detach = 3
    torch.save(state, tmp_path / "original")
    assert torch.load(tmp_path / "original", weights_only=True)[WEIGHT].detach == 3, "the fault must be real"
    refused("checkpoint", checkpoint.load, tmp_path / "original", says=["damaged: TypeError", f"{tmp_path}/original"])


def test_an_originals_parameters_in_half_precision_load(tmp_path):
    state = {name: torch.nn.Parameter(tensor.half()) for name, tensor in make().state_dict.items()}
    torch.save(state, tmp_path / "original")
    loaded = checkpoint.load(tmp_path / "original")
    assert not any(tensor.requires_grad for tensor in loaded.state_dict.values())
    assert {tensor.dtype for tensor in loaded.state_dict.values()} == {torch.float32}


# ---------------------------------------------------------------- what stays of earlier runs


def test_the_best_file_keeps_what_an_earlier_run_left_and_then_only_what_is_better(saved):
    lines = []
    best = checkpoint.BestFile(saved, "run", lines.append)
    for merit, seed in (((1.0, 3.0), 1), ((1.0, 3.5), 2)):
        assert merit > best.merit
        best.replace(merit, make(seed))
    previous = saved.with_name(f"{saved.name}.previous")
    assert checkpoint.load(previous).digest() == make().digest()
    assert checkpoint.load(saved).state_dict.keys() == make(2).state_dict.keys()
    assert all(
        torch.equal(tensor, make(2).state_dict[name]) for name, tensor in checkpoint.load(saved).state_dict.items()
    )
    assert checkpoint.load(saved).about == make(2).about | {"run": "run", "merit": [1.0, 3.5]}
    assert lines == [
        f"note: what an earlier run left at {saved} is now {previous.name}; 1 earlier run is kept, 0.0 MB",
        f"saved: {saved} (the best so far)",
        f"saved: {saved} (the best so far)",
    ]


def previous_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.previous")


def a_run(path: Path, number: int, *, completed: bool, saves: int = 2) -> list[str]:
    """What a run leaves. Its models have its number as a score.

    Returns:
        The lines that it logged about the files of earlier runs.
    """
    lines = []
    best = checkpoint.BestFile(path, f"run {number}", lines.append)
    for merit in range(saves):
        best.replace((merit,), dataclasses.replace(make(), scores={"number": number}))
    if completed:
        best.complete()
    return [line for line in lines if line.startswith("note: ")]


def numbers(path: Path) -> list[int]:
    """The runs whose models are at `path`, at `NAME.previous`, and at `NAME.previous.1` and so on."""
    files = [path, previous_of(path), *(Path(f"{previous_of(path)}.{number}") for number in range(1, 20))]
    return [checkpoint.load(file).scores["number"] for file in files if file.exists()]


def test_no_run_pushes_out_what_another_one_left(tmp_path):
    """Row 50: a completed run, then runs that are killed after their first save, then a completed one."""
    path = tmp_path / "model"
    assert a_run(path, 1, completed=True) == []
    assert checkpoint.load(path).completed
    for number in (2, 3, 4):
        (note,) = a_run(path, number, completed=False)
        assert note.startswith(f"note: what an earlier run left at {path} is now model.previous; ")
        assert not checkpoint.load(path).completed
    assert "what stood there is now model.previous.2; 3 earlier runs are kept" in note
    a_run(path, 5, completed=True)
    assert numbers(path) == [5, 4, 1, 2, 3]


def test_files_of_earlier_versions_and_of_the_original_are_kept_too(tmp_path):
    """Row 50."""
    path = tmp_path / "model"
    for save in (save_unsealed, lambda path, saved: torch.save(saved.state_dict, path)):
        save(path, make(seed=4))
        a_run(path, 1, completed=False)
        kept = checkpoint.load(previous_of(path)).state_dict
        torch.testing.assert_close(kept, dict(make(seed=4).state_dict), rtol=0, atol=0)
        path.unlink()


def test_a_file_that_is_no_checkpoint_is_kept_too(tmp_path):
    """Row 50."""
    path = tmp_path / "model"
    path.write_text("a damaged checkpoint, or a text of the user's")
    a_run(path, 2, completed=False)
    assert checkpoint.load(path).scores["number"] == 2
    assert previous_of(path).read_text().startswith("a damaged")


def test_a_run_that_goes_on_replaces_its_own_file(tmp_path):
    """Row 50: the file of a run that is resumed is its own, also if it was completed after the state was saved."""
    path, lines = tmp_path / "model", []
    a_run(path, 1, completed=True)
    for completed in (False, True):
        a_run(path, 2, completed=completed)
        best = checkpoint.BestFile(path, "run 2", lines.append)
        best.restore({"merit": [0.0, 3.0]})
        assert best.merit == (1,), "of the file, which is newer than the state"
        best.replace((4.0,), dataclasses.replace(make(), scores={"number": 3}))
        assert lines == [f"saved: {path} (the best so far)"]
        assert numbers(path)[:2] == [3, 1]
        assert not checkpoint.load(path).completed
        path.unlink()
        previous_of(path).rename(path)
        lines.clear()


def test_a_run_that_goes_on_can_be_completed_although_none_of_its_later_epochs_is_better(tmp_path):
    path = tmp_path / "model"
    a_run(path, 1, completed=False)
    best = checkpoint.BestFile(path, "run 1", print)
    best.restore({"merit": [4.0]})
    best.complete()
    assert checkpoint.load(path).completed


@pytest.mark.parametrize("there", ["another run's", "nothing"])
def test_a_run_does_not_go_on_without_its_best_model(tmp_path, there):
    path = tmp_path / "model"
    if there != "nothing":
        a_run(path, 1, completed=True)
    best = checkpoint.BestFile(path, "run 2", print)
    refused("checkpoint", best.restore, {"merit": [4.0]}, says=[str(path), "--ckptpath"])
    best.restore({"merit": []})  # it had none yet


def test_a_run_that_wrote_nothing_owns_and_marks_nothing(tmp_path):
    path, lines = tmp_path / "model", []
    checkpoint.BestFile(path, "run 0", print).complete()
    a_run(path, 1, completed=False)
    resumed = checkpoint.BestFile(path, "run 2", lines.append)
    resumed.restore(checkpoint.BestFile(path, "run 2", print).state())  # it was stopped before its first epoch ended
    resumed.complete()
    assert not checkpoint.load(path).completed
    resumed.replace((0.0,), make())
    assert "is now model.previous" in lines[0]


def test_a_mark_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    path = tmp_path / "model"
    best = checkpoint.BestFile(path, "run", print)
    best.replace((1.0,), make())

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sealed, "complete", full)
    refused("io", best.complete, says=["completed run: No space left", str(path)])


@pytest.mark.parametrize("kills", SWEEPS)
def test_a_killed_run_leaves_the_last_completed_model_and_its_own_last_or_next(tmp_path, kills):
    """Rows 10 and 50: run after run is killed at a random moment. No model that a run has saved is lost."""
    path, generator = tmp_path / "model", random.Random(kills)
    lives, saved_last = itertools.count(1), {}

    def runs(acknowledge):
        for number in itertools.count(first):
            best = checkpoint.BestFile(path, f"run {number}", lambda line: None)
            for merit in range(2):
                best.replace((merit,), dataclasses.replace(make(), scores={"number": number, "merit": merit}))
                acknowledge(b"%d %d\n" % (number, merit))
            if number % 3 == 0:
                best.complete()
                acknowledge(b"%d 9\n" % number)

    for _ in range(kills):
        first = 1000 * next(lives)
        words = killed(runs, generator).split()
        saved_last |= {int(words[index]): int(words[index + 1]) for index in range(0, len(words), 2)}
        with checkpoint.claimed(path):
            pass
        standing = {}
        for file in tmp_path.iterdir():
            found = checkpoint.load(file)
            standing[found.scores["number"]] = 9 if found.completed else found.scores["merit"]
        assert len(standing) == len(list(tmp_path.iterdir()))
        assert saved_last.keys() <= standing.keys()
        assert all(standing[number] >= merit for number, merit in saved_last.items())
        for number in sorted(standing)[:-20]:  # so that reading them all again takes no time
            saved_last.pop(number, None)
        for file in tmp_path.iterdir():
            if checkpoint.load(file).scores["number"] not in saved_last and file != path:
                file.unlink()
    assert max(saved_last) > 1000


# ---------------------------------------------------------------- the place


def test_an_unwritable_place_is_refused_before_training(tmp_path):
    refused("io", checkpoint.claimed(tmp_path / "no" / "folder" / "model").__enter__, says="cannot write into")
    for folder in (tmp_path, Path(), Path("/"), Path("..")):
        refused("io", checkpoint.claimed(folder).__enter__, says="a folder, not a file")
    os.mkfifo(tmp_path / "pipe")
    refused("io", checkpoint.claimed(tmp_path / "pipe").__enter__, says="a device or a pipe")
    (tmp_path / ".model.lock").mkdir()
    refused("io", checkpoint.claimed(tmp_path / "model").__enter__, says="cannot lock")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.lock", "pipe"]


def test_the_name_of_a_folder_that_is_not_there_is_a_usage_error(tmp_path):
    """Kind L: it once made a file of that name."""
    for name in ("folder/", "folder//", "folder/.", "folder/below/"):
        says = ["the name of a folder", f"--ckptpath {tmp_path}/{name}"]
        refused("usage", checkpoint.claimed(f"{tmp_path}/{name}").__enter__, says=says)
    assert list(tmp_path.iterdir()) == []


def test_a_place_in_which_the_save_would_fail_is_refused_before_training(tmp_path):
    """A way through a folder that is not there, a name too long for its later companions, a folder at one of those."""
    for path in (f"{tmp_path}/none/../model", f"{tmp_path}/none/..", tmp_path / ("m" * 245), tmp_path / ("m" * 300)):
        refused("io", checkpoint.claimed(path).__enter__, says="cannot")
    with pytest.raises(OSError, match="too long"), storage.replacing(tmp_path / ("m" * 245)):
        raise AssertionError("the fault must be real")
    previous_of(tmp_path / "model").mkdir()
    refused("io", checkpoint.claimed(tmp_path / "model").__enter__, says="a folder, where a run keeps a file: ")
    assert [path.name for path in tmp_path.iterdir()] == ["model.previous"]


def test_a_place_that_one_may_not_look_into_is_refused(tmp_path, as_nobody):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0)
    with as_nobody():
        refused("io", checkpoint.claimed(folder / "model").__enter__, says="cannot write into")


def test_a_file_that_only_its_owner_may_replace_is_refused(saved, monkeypatch):
    saved.parent.chmod(0o1777)
    with checkpoint.claimed(saved):
        pass
    monkeypatch.setattr(os, "geteuid", lambda: saved.stat().st_uid + 1)
    refused("io", checkpoint.claimed(saved).__enter__, says="another user's file")
    with checkpoint.claimed(saved.with_name("new")):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_the_owner_of_a_folder_may_replace_the_files_of_others_there(saved, monkeypatch):
    saved.parent.chmod(0o1777)
    os.chown(saved.parent, 65534, 65534)
    os.chown(saved, 65533, 65533)
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    with checkpoint.claimed(saved):
        pass


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def unsupported(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(storage.fcntl, "flock", unsupported)
    refused("io", checkpoint.claimed(tmp_path / "model").__enter__, says=f"cannot lock: {os.strerror(errno.ENOLCK)}")


def test_a_run_that_ends_while_another_takes_the_lock_leaves_it_one_that_counts(tmp_path, monkeypatch):
    path, flock = tmp_path / "model", fcntl.flock

    def late(file, operation):
        monkeypatch.undo()
        (tmp_path / ".model.lock").unlink()
        flock(file, operation)

    monkeypatch.setattr(storage.fcntl, "flock", late)
    with checkpoint.claimed(path):
        refused("io", checkpoint.claimed(path).__enter__, says=f"in use by pid {os.getpid()}")


def test_what_a_link_leads_to_is_written_and_the_link_stays(saved):
    link = saved.parent / "link"
    link.symlink_to(saved.name)
    with checkpoint.claimed(link):
        refused("io", checkpoint.claimed(saved).__enter__, says="in use")
        keeping.make_room(link, print)
        checkpoint.save(link, make(seed=1))
    assert link.is_symlink()
    digests = [checkpoint.load(path).digest() for path in (saved, saved.with_name(f"{saved.name}.previous"))]
    assert digests == [make(seed=1).digest(), make().digest()]
    assert len(list(saved.parent.iterdir())) == 3


def test_a_second_run_with_the_same_checkpoint_is_refused(tmp_path):
    """Row 32."""
    path = tmp_path / "model"
    with checkpoint.claimed(path):
        refused("io", checkpoint.claimed(path).__enter__, says=f"in use by pid {os.getpid()}")
        with checkpoint.claimed(tmp_path / "another"):
            pass
    with checkpoint.claimed(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_save_left_is_cleared(tmp_path):
    stray = tmp_path / f"model{storage.PARTIAL}abc"
    stray.write_text("half a checkpoint")
    with checkpoint.claimed(tmp_path / "model"):
        assert not stray.exists()
