"""The exported graphs compute what the model does. The command writes an export, or says in one line why not."""

import math
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import export_onnx
import gru
from nmt import checkpoint, onnx_engine, storage
from nmt.errors import run_main
from nmt.torch_engine import info_of

import onnx
import onnxruntime
import pytest
import torch
from conftest import REPOSITORY, random_checkpoint, refusal_with_files_of, refused
from onnx import numpy_helper

PROGRAM = str(REPOSITORY / "export_onnx.py")


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "model.pth.tar"
    random_checkpoint(path)
    return path


def export(model_file, out, *flags) -> int:
    return run_main(export_onnx.main, ["--ckptpath", str(model_file), "--out", str(out), *flags])


@pytest.fixture
def out(model_file, tmp_path, capsys):
    """An export."""
    assert export(model_file, tmp_path / "export") == 0
    return tmp_path / "export"


def sessions(folder):
    return [onnxruntime.InferenceSession(folder / name) for name in onnx_engine.PARTS]


# ---------------------------------------------------------------- what is exported


def test_the_command_writes_an_export_that_onnxs_checker_and_onnxruntime_take(model_file, tmp_path):
    done = subprocess.run(
        [sys.executable, PROGRAM, "--ckptpath", model_file.name, "--out", "export"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("exported: export (decoder.onnx ")
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
        "decoder.onnx",
        "encoder.onnx",
        "model.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "model.pth.tar"]
    for name in onnx_engine.PARTS:
        onnx.checker.check_model(str(tmp_path / "export" / name), full_check=True)
    assert sessions(tmp_path / "export")
    onnx_engine.load(tmp_path / "export")


@pytest.mark.parametrize("std", [0.3, 2.0, 8.0])  # with the last one the largest logit is above 100
def test_the_graphs_compute_the_models_numbers(tmp_path, capsys, std):
    saved = random_checkpoint(tmp_path / "model", std=std)
    assert export(tmp_path / "model", tmp_path / "export") == 0
    encoder, decoder = sessions(tmp_path / "export")
    model = export_onnx.restore(saved, "")
    generator = torch.Generator().manual_seed(1)
    src = torch.randint(4, 34, (9, 5), generator=generator)
    src_len = torch.tensor([9, 1, 5, 2, 8])
    hidden, *context = encoder.run(None, {"src": src.numpy(), "src_len": src_len.int().numpy()})
    with torch.no_grad():
        memory, expected = model.start(src, src_len)
        torch.testing.assert_close(torch.tensor(hidden), expected)
        torch.testing.assert_close(torch.tensor(context[0]), memory.context_gates, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(torch.tensor(context[1]), memory.context_logits, rtol=1e-5, atol=1e-4)

        sentence = torch.tensor([0, 0, 0, 2, 4, 4])  # of each row; some sentences are done
        prev_token = torch.randint(2, 34, (6,), generator=generator)
        states = torch.randn(6, 14, generator=generator)
        feeds = {"prev_token": prev_token, "hidden": states, "sentence": sentence, "k": torch.tensor([4])}
        feeds = {name: value.numpy() for name, value in feeds.items()}
        feeds |= {"context_gates": context[0], "context_logits": context[1]}
        names = [output.name for output in decoder.get_outputs()]
        found = {name: torch.tensor(value) for name, value in zip(names, decoder.run(names, feeds), strict=True)}
        logits, next_hidden = model.step(prev_token, states, memory.select(sentence))
    torch.testing.assert_close(found["next_hidden"], next_hidden)
    torch.testing.assert_close(found["logits"], logits, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found["log_sum"], logits.logsumexp(1), rtol=1e-5, atol=1e-4)
    top = found["logits"].topk(4)
    assert torch.equal(found["top_logits"], top.values)
    assert torch.equal(found["top_tokens"], top.indices)
    if std == 8.0:
        assert logits.max() > 100


def test_in_int8_the_logits_are_near_the_models(tmp_path, capsys):
    saved = random_checkpoint(tmp_path / "model", words=300)
    exports = [tmp_path / "float32", tmp_path / "int8"]
    assert export(tmp_path / "model", exports[0]) == 0
    assert export(tmp_path / "model", exports[1], "--int8") == 0
    assert onnx_engine.load(exports[1]).info.about == info_of(saved).about | {"export": "int8"}
    generator = torch.Generator().manual_seed(1)
    feeds = {"prev_token": torch.randint(4, 34, (40,), generator=generator), "k": torch.tensor([4])}
    feeds |= {"hidden": torch.rand(40, 14, generator=generator) * 2 - 1, "sentence": torch.arange(40) % 5}
    feeds |= {"context_gates": torch.randn(5, 42, generator=generator)}
    feeds |= {"context_logits": torch.randn(5, 304, generator=generator)}
    feeds = {name: value.numpy() for name, value in feeds.items()}
    names = ["next_hidden", "logits", "top_tokens"]
    (hidden, logits, top), (rough_hidden, rough_logits, rough_top) = (
        sessions(path)[1].run(names, feeds) for path in exports
    )
    assert 1e-4 < abs(rough_hidden - hidden).max() < 0.05
    assert 1e-3 < abs(rough_logits - logits).max() < 0.05 * logits.std() * 4
    assert (rough_top[:, 0] == top[:, 0]).mean() > 0.9

    decoder = onnx.load(exports[1] / "decoder.onnx")
    assert [node.op_type for node in decoder.graph.node].count("MatMulInteger") == 3
    integers = [numpy_helper.to_array(tensor) for tensor in decoder.graph.initializer]
    integers = [values for values in integers if values.dtype == "int8"]
    assert len(integers) == 3
    for values in integers:  # two products with 255 add up to a 16-bit integer
        assert abs(values.astype(int)).max() == 63
        assert 255 * 2 * 63 < 1 << 15


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_in_int8_a_word_whose_weights_are_all_0_has_no_part_in_the_logits(tmp_path, capsys):
    saved = random_checkpoint(tmp_path / "model")
    saved.state_dict["decoder.fc_out.weight"][7] = 0
    checkpoint.save(tmp_path / "model", saved)
    assert export(tmp_path / "model", tmp_path / "export", "--int8") == 0
    ids = [2, 5, 6, 3]
    found = onnx_engine.load(tmp_path / "export").translate([ids], beam_size=2, length_penalty=1.0, max_length=9)
    assert math.isfinite(found[0][0].score)


def test_the_export_says_what_the_checkpoint_says(model_file, out):
    saved, info = checkpoint.load(model_file), onnx_engine.load(out).info
    assert (info.src_words, info.trg_words) == (saved.src_vocab, saved.trg_vocab)
    assert (info.sizes, info.flags, info.scores) == (saved.sizes, saved.flags, saved.scores)
    assert info.about == info_of(saved).about | {"export": "float32"}
    assert (info.src_lang, info.trg_lang, info.case) == ("de", "en", "lower")
    assert '"wört0"'.encode() in (out / "model.json").read_bytes()


def test_what_utf_8_cannot_hold_comes_back(tmp_path, capsys):
    saved = random_checkpoint(tmp_path / "model")
    saved.flags["train_name"] = "\udcff\ud800\\udcff\\\n"
    checkpoint.save(tmp_path / "model", saved)
    assert export(tmp_path / "model", tmp_path / "export") == 0
    (tmp_path / "export" / "model.json").read_bytes().decode()
    assert onnx_engine.load(tmp_path / "export").info.flags == saved.flags


def test_no_path_of_the_training_machine_is_in_the_export(tmp_path, capsys):
    saved = random_checkpoint(tmp_path / "model")
    for name in checkpoint.OF_THE_MACHINE:
        saved.flags[name] = f"/home/me/{name}"
    checkpoint.save(tmp_path / "model", saved)
    assert export(tmp_path / "model", tmp_path / "export") == 0
    for path in (tmp_path / "export").iterdir():
        assert b"/home/" not in path.read_bytes()
        assert str(tmp_path).encode() not in path.read_bytes()
    assert onnx_engine.load(tmp_path / "export").info.flags == {"lr": 0.1}


# ---------------------------------------------------------------- what is refused


def test_help_needs_no_package():
    done = subprocess.run([sys.executable, "-S", PROGRAM, "--help"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--ckptpath FILE" in done.stdout


WITHOUT_ONNX = """
import importlib.metadata, runpy, sys

version = importlib.metadata.version

def without_onnx(name):
    if name == "onnx":
        raise importlib.metadata.PackageNotFoundError
    return version(name)

importlib.metadata.version = without_onnx
sys.modules["torch"] = None  # nothing is imported before
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_without_onnx_one_line_names_the_requirements():
    command = [sys.executable, "-c", WITHOUT_ONNX, PROGRAM, "--ckptpath", "none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error[usage]: not installed: onnx; ")
    assert f"-m pip install -r {REPOSITORY / 'requirements-onnx.txt'}" in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_is_at_the_place_stays(model_file, out, tmp_path, capsys, monkeypatch):
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert export(model_file, out) == 5
    assert "an earlier export is there" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    assert export(model_file, tmp_path / "mine") == 5
    assert "a folder with other files in it" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter"]

    assert export(model_file, model_file) == 5
    assert "a file, not a folder" in capsys.readouterr().err
    assert export(model_file, tmp_path / "none" / "export") == 5
    assert "No such file" in capsys.readouterr().err
    assert export(model_file, "/") == 5

    monkeypatch.chdir(tmp_path)
    assert export(model_file, ".") == 5
    assert export(model_file, "") == 2


def test_an_empty_folder_is_taken_and_a_link_stays(model_file, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    assert export(model_file, tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink()
    onnx_engine.load(tmp_path / "empty")


def test_a_place_that_may_not_be_written_to_is_told(model_file, tmp_path, as_nobody):
    (tmp_path / "closed").mkdir(mode=0o555)
    with as_nobody():
        refused("io", onnx_engine.check_place, tmp_path / "closed" / "export", says="Permission denied")


def test_faulty_checkpoints_are_told(model_file, tmp_path, capsys):
    assert export(tmp_path / "none", tmp_path / "export") == 4
    model_file.write_bytes(model_file.read_bytes()[:-100])
    assert export(model_file, tmp_path / "export") == 4
    assert capsys.readouterr().err.count("\n") == 2
    assert [path.name for path in tmp_path.iterdir()] == [model_file.name]


def test_a_model_of_the_original_is_refused_because_it_has_no_vocabulary(model_file, tmp_path, capsys):
    torch.save(checkpoint.load(model_file).state_dict, model_file)
    assert export(model_file, tmp_path / "export") == 4
    assert "holds no vocabulary" in capsys.readouterr().err


def test_a_model_that_is_too_large_for_the_format_is_refused(model_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export_onnx, "LARGEST", 1000)
    assert export(model_file, tmp_path / "export") == 2
    assert "ONNX files end at 2" in capsys.readouterr().err
    assert not (tmp_path / "export").exists()


def test_a_full_disk_leaves_nothing(out, tmp_path):
    """Row 11: a process that may write no file of more than 5,000 bytes."""
    info, parts = onnx_engine.read(out)
    said = refusal_with_files_of(5000, lambda: onnx_engine.write(tmp_path / "other", info, parts))
    assert said.startswith("error[io]: cannot write the export: File too large; ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "model.pth.tar"]


def killing(after: int):
    """What takes the place of `os.fsync`, and kills this process when it has been called so often."""
    calls = iter(range(after))

    def fsync(descriptor):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    return fsync


def test_a_killed_export_leaves_none_or_a_whole_one_and_the_next_one_clears_up(out, tmp_path):
    """Row 10: killed each time that it waits for the disk: for three files, their folder, and the one above."""
    info, parts = onnx_engine.read(out)
    ends = []
    for waits in range(6):
        place = tmp_path / f"export{waits}"
        if (pid := os.fork()) == 0:
            storage.os.fsync = killing(after=waits)
            onnx_engine.write(place, info, parts)
            os._exit(0)
        ends.append(os.waitpid(pid, 0)[1])
        assert Path(f"{place}.partial-export").exists() == (waits < 4)
        if waits < 4:
            assert not place.exists()
            onnx_engine.write(place, info, parts)
        assert onnx_engine.read(place) == (info, parts)
    assert ends == [signal.SIGKILL] * 5 + [0]
    names = {path.name for path in tmp_path.iterdir()}
    assert {name for name in names if name.startswith("export")} == {"export"} | {f"export{n}" for n in range(6)}


def test_the_documents_lines_decode_greedily(out):
    text = (REPOSITORY / "docs" / "reference.md").read_text()
    [lines] = re.findall(r"\n(    import numpy as np, onnxruntime\n(?:    .*\n)*)", text)
    values = {"folder": out}
    exec(textwrap.dedent(lines), values)
    engine = onnx_engine.load(out)
    [[found]] = engine.translate([[2, 5, 6, 3]], beam_size=1, length_penalty=1.0, max_length=49)
    assert found.ids == [number for number in values["ids"][1:] if number != 3]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("owner", "name"), [(gru.Encoder, "encode_rows"), (gru.Decoder, "decode_rows"), (gru.Decoding, "step")]
)
def test_a_changed_formula_is_not_exported(tmp_path, monkeypatch, owner, name, int8):
    """The weights have the names of before."""
    saved = random_checkpoint(tmp_path / "model")
    model = gru.restore(saved.state_dict, saved.sizes)
    computed = getattr(owner, name)

    def halved(*args):
        found = computed(*args)
        return tuple(0.5 * part for part in found) if isinstance(found, tuple) else 0.5 * found

    monkeypatch.setattr(owner, name, halved)
    refused("usage", export_onnx.export, saved, model, tmp_path / "export", int8, says="the formula of ")
    monkeypatch.setattr(owner, name, computed)
    export_onnx.export(saved, model, tmp_path / "export", int8)
