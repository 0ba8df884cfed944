"""A checkpoint holds what is needed, survives what can be survived, and is refused if it is not what was written."""

import errno
import fcntl
import os
import random
import stat
from pathlib import Path

import gru
import train_8p
from nmt import checkpoint, storage
from nmt.errors import UserError

import pytest
import torch
from conftest import refused

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


def test_a_truncated_checkpoint_is_refused(saved):
    content = saved.read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:length])
        message = refused("checkpoint", checkpoint.load, saved, says=str(saved))
        assert length == 1 or message.startswith("error[checkpoint]: incomplete, or no checkpoint at all; ")


def test_a_flipped_bit_is_refused_or_without_effect(saved):
    content, expected = saved.read_bytes(), make()
    generator = random.Random(1)
    refused = 0
    for _ in range(200):
        position = generator.randrange(len(content))
        flipped = bytearray(content)
        flipped[position] ^= 1 << generator.randrange(8)
        saved.write_bytes(flipped)
        try:
            loaded = checkpoint.load(saved)
        except UserError as error:
            assert error.exit_code == 4
            refused += 1
        else:
            assert loaded.digest() == expected.digest()
    assert refused > 0


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


def test_the_best_file_keeps_what_an_earlier_run_left_and_then_only_what_is_better(saved):
    lines = []
    best = checkpoint.BestFile(saved, lines.append)
    for merit, seed in (((1.0, 3.0), 1), ((1.0, 3.5), 2)):
        assert merit > best.merit
        best.replace(merit, make(seed))
    previous = saved.with_name(f"{saved.name}.previous")
    assert checkpoint.load(previous).digest() == make().digest()
    assert checkpoint.load(saved).digest() == make(2).digest()
    assert lines == [
        f"note: {saved} was there already: the old one is now {previous.name}",
        f"saved: {saved} (the best so far)",
        f"saved: {saved} (the best so far)",
    ]


def test_an_unwritable_place_is_refused_before_training(tmp_path):
    refused("io", checkpoint.claimed(tmp_path / "no" / "folder" / "model").__enter__, says="cannot write into")
    for folder in (tmp_path, Path(), Path("/"), Path("..")):
        refused("io", checkpoint.claimed(folder).__enter__, says="a folder, not a file")
    os.mkfifo(tmp_path / "pipe")
    refused("io", checkpoint.claimed(tmp_path / "pipe").__enter__, says="a device or a pipe")
    (tmp_path / ".model.lock").mkdir()
    refused("io", checkpoint.claimed(tmp_path / "model").__enter__, says="cannot lock")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.lock", "pipe"]


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
        checkpoint.set_aside(link)
        checkpoint.save(link, make(seed=1))
    assert link.is_symlink()
    digests = [checkpoint.load(path).digest() for path in (saved, saved.with_name(f"{saved.name}.previous"))]
    assert digests == [make(seed=1).digest(), make().digest()]
    assert len(list(saved.parent.iterdir())) == 3


def test_a_second_run_with_the_same_checkpoint_is_refused(tmp_path):
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


def test_an_earlier_runs_checkpoint_is_set_aside(saved):
    previous = checkpoint.set_aside(saved)
    assert previous.name == "model.pth.tar.previous"
    before = previous.read_bytes()
    assert saved.read_bytes() == before, "a run that is killed now leaves the old one under its name, too"
    checkpoint.save(saved, make(seed=1))
    assert previous.read_bytes() == before != saved.read_bytes()
    assert checkpoint.set_aside(saved.with_name("absent")) is None
