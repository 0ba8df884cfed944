"""docs/change-the-model.md: each change that it shows applies to gru.py, trains, decodes and is saved."""

import importlib.util
import re
import sys

import data
import gru
import scoring
import train_8p
from bench import logs, tables
from nmt import search
from nmt.errors import run_main

import pytest
import torch
from conftest import REPOSITORY, SMALL, flags_of_recipe, random_checkpoint, refused, step_lines, with_todays_names

PAGE = (REPOSITORY / "docs" / "change-the-model.md").read_text(encoding="utf-8")
MODEL = (REPOSITORY / "gru.py").read_text(encoding="utf-8")
SECTIONS = {section.partition("\n")[0]: section for section in PAGE.split("\n## ")[1:]}
DIFFS = {
    title: found[1]
    for title, section in SECTIONS.items()
    if (found := re.search(r"```diff\n(.*?)```", section, re.DOTALL))
}
CHANGES = pytest.mark.parametrize("title", DIFFS)

pytestmark = pytest.mark.usefixtures("no_launcher", "seeded")


def applied(text: str, diff: str) -> str:
    """A text with the changes of a diff whose hunks name their places without line numbers."""
    for hunk in re.split(r"^@@ .*\n", diff, flags=re.MULTILINE)[1:]:
        lines = [line or " " for line in hunk.splitlines()]
        old, new = ("".join(f"\n{line[1:]}" for line in lines if line[0] in f" {kind}") + "\n" for kind in "-+")
        assert text.count(old) == 1, f"gru.py has {text.count(old)} times: {old}"
        text = text.replace(old, new)
    return text


@pytest.fixture
def changed(title, tmp_path, monkeypatch):
    """The module gru.py with a change. The program trains with it and scores with it."""
    path = tmp_path / "gru.py"
    path.write_text(applied(MODEL, DIFFS[title]), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("changed_gru", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "changed_gru", module)
    spec.loader.exec_module(module)
    for user in (train_8p, scoring):
        monkeypatch.setattr(user, "gru", module)
    return module


def test_the_page_has_the_changes_that_it_promises():
    assert list(DIFFS) == ["A bidirectional encoder", "A second layer", "An LSTM"]
    assert "--hid-dim 256" in SECTIONS["Another hidden size"]


@pytest.mark.parametrize("row", tables.CHANGES, ids=lambda row: row.name)
def test_the_rows_of_the_table_have_the_logs_of_such_runs(row):
    (path,) = row.logs
    run = tables.read(path)
    assert flags_of_recipe("tuned", row.flags).items() <= with_todays_names(run.flags).items()
    assert (run.flags["seed"], run.facts["precision"], run.facts["batch"]) == ("1234", "bfloat16/O2", "64")
    assert [epoch.number for epoch in run.epochs] == list(range(10))
    assert run.flags["hid_dim"] == ("256" if row.flags else "512")


def a_batch(words=20, pairs=6):
    """Pairs of different lengths, padded and as a batch of training."""
    lengths = torch.tensor([7, 3, 5, 2, 7, 4])[:pairs]
    sides = [
        data.Side(
            torch.randint(4, words, (int(lengths.sum()),), dtype=torch.int32),
            torch.cumsum(torch.cat((torch.zeros(1, dtype=torch.int64), lengths)), 0),
        )
        for lengths in (lengths, lengths.flip(0))
    ]
    for side in sides:
        side.ids[side.offsets[:-1]], side.ids[side.offsets[1:] - 1] = data.SOS, data.EOS
    split = data.Split(*sides)
    padded = [data.pad(side, torch.arange(pairs)) for side in sides]
    return padded, data.Loader(split, torch.device("cpu"))(torch.arange(pairs))


def a_model(module, words=20):
    model = module.build(words, words, emb_dim=6, hid_dim=8).double()
    module.init_orthogonal(model)
    module.raise_update_gates(model, 1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@CHANGES
def test_a_changed_model_decodes_what_it_trains(changed):
    """Both roads give the same logits. And no sentence depends on those beside it, or on padding."""
    model = a_model(changed)
    ((src, src_len), (trg, trg_len)), batch = a_batch()
    logits = model(src, trg, 1.0, src_len)
    memory, hidden = model.start(src, src_len)
    for step in range(len(trg) - 1):
        found, hidden = model.step(trg[step], hidden, memory)
        torch.testing.assert_close(found, logits[step + 1], rtol=0, atol=1e-10)
    for column, length in enumerate(src_len.tolist()):
        alone = model(src[:length, column : column + 1], trg[:, column : column + 1], 1.0, src_len[column : column + 1])
        torch.testing.assert_close(alone[1:], logits[1:, column : column + 1], rtol=0, atol=1e-10)
    targets = trg[1:].masked_fill(torch.arange(1, len(trg)).unsqueeze(1) >= trg_len, data.PAD)
    expected = torch.nn.functional.cross_entropy(
        logits[1:].flatten(0, 1), targets.flatten(), ignore_index=data.PAD, reduction="sum"
    )
    loss = changed.TrainingLoss(model, pad_index=data.PAD)(batch, 1.0)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    loss.backward()
    assert {name for name, parameter in model.named_parameters() if not parameter.grad.any()} == set()


@CHANGES
def test_a_changed_model_is_decoded_greedily_and_by_beams(changed):
    model = a_model(changed)
    ((src, src_len), _), _ = a_batch()
    found = search.greedy(model, src, src_len, data.SOS, data.EOS, 9)
    one = search.beam_search(model, src, src_len, data.SOS, data.EOS, beam_size=1, max_len=9)
    assert torch.equal(found, one.ids[:, :, 0])
    wide = search.beam_search(model, src, src_len, data.SOS, data.EOS, beam_size=4, max_len=9, length_penalty=0.0)
    ids = wide.ids[:, :, 0]  # [max len, batch]
    read = torch.cat((torch.full_like(ids[:1], data.SOS), ids))
    log_probs = model(src, read, 1.0, src_len)[1:].log_softmax(2)  # [max len, batch, words]
    chosen = log_probs.gather(2, ids.unsqueeze(2)).squeeze(2)
    has_ended = (read[:-1] == data.EOS).cumsum(0) > 0
    scores = chosen.masked_fill(has_ended, 0).sum(0)
    torch.testing.assert_close(wide.scores[:, 0].double(), scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("title", ["A bidirectional encoder"])
def test_the_bidirectional_encoder_reads_as_pytorchs_does(changed):
    encoder = a_model(changed).encoder
    both = torch.nn.GRU(6, 8, bidirectional=True).double()
    for suffix, rnn in (("", encoder.rnn), ("_reverse", encoder.backward_rnn)):
        for name, parameter in rnn.named_parameters():
            getattr(both, name + suffix).data.copy_(parameter)
    ((src, src_len), _), _ = a_batch()
    packed = torch.nn.utils.rnn.pack_padded_sequence(encoder.embedding(src), src_len, enforce_sorted=False)
    _, last = both(packed)  # [2, batch, hid dim]
    expected = torch.tanh(encoder.join(torch.cat((last[0], last[1]), dim=1)))
    torch.testing.assert_close(encoder(src, src_len)[0], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("title", ["A second layer"])
def test_the_second_layer_of_the_encoder_is_pytorchs(changed):
    encoder = a_model(changed).encoder
    both = torch.nn.GRU(6, 8, num_layers=2).double()
    for layer, rnn in enumerate((encoder.rnn, encoder.rnn_2)):
        for name, parameter in rnn.named_parameters():
            getattr(both, f"{name[:-1]}{layer}").data.copy_(parameter)
    ((src, src_len), _), _ = a_batch()
    packed = torch.nn.utils.rnn.pack_padded_sequence(encoder.embedding(src), src_len, enforce_sorted=False)
    torch.testing.assert_close(encoder(src, src_len)[0], both(packed)[1][1], rtol=0, atol=1e-10)


@CHANGES
def test_a_changed_model_trains_on_the_sample_and_its_checkpoint_is_its_own(changed, monkeypatch, tmp_path, capsys):
    """In bfloat16, through the program. The model of before does not take the file."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for path in (REPOSITORY / "sample").glob("*.*"):
        if path.suffix in (".de", ".en"):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            (corpus / path.name).write_text("".join(lines[: 128 if path.stem == "train" else 8]), encoding="utf-8")
    flags = ["--data-dir", str(corpus), *SMALL]
    training = [
        "-b",
        "8",
        "--epochs",
        "1",
        "-p",
        "1",
        "--beam-size",
        "2",
        "--amp",
        "--amp-dtype",
        "bfloat16",
        "--lr",
        "0.03",
    ]
    path = str(tmp_path / "model")
    assert run_main(train_8p.main, [*flags, *training, "--ckptpath", path]) == 0
    out = capsys.readouterr().out
    losses = [float(line[3]) for line in step_lines(out)]
    assert len(losses) == 16
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    assert run_main(train_8p.main, [*flags, "--evaluate", path]) == 0
    assert logs.parse(capsys.readouterr().out).final == logs.parse(out).final
    for user in (train_8p, scoring):
        monkeypatch.setattr(user, "gru", gru)
    assert run_main(train_8p.main, [*flags, "--evaluate", path]) == 4
    assert capsys.readouterr().err.startswith("error[checkpoint]: holds no state dict of this model: ")


@CHANGES
def test_a_changed_model_is_not_exported_as_the_one_of_before(changed, tmp_path):
    pytest.importorskip("onnx")
    import export_onnx

    model = changed.build(20, 20, emb_dim=6, hid_dim=8).eval()
    saved = random_checkpoint(tmp_path / "model")
    refused("usage", export_onnx.export, saved, model, tmp_path / "export", says="computes another model")
    assert not (tmp_path / "export").exists()
