"""bench/: the plain loop is the model, the figures follow from what was measured, and each script runs."""

import doctest
import json
import os
import random
import re
import subprocess
import sys
from unittest.mock import MagicMock

import data
import gru
from bench import (
    against,
    communication,
    curves,
    decoding,
    large_corpus,
    logs,
    machine,
    plain,
    soak,
    startup,
    time_to_bleu,
    tokenising,
    training,
    translating,
)
from nmt import search

import pytest
import torch
from conftest import REPOSITORY, SMALL
from torch import nn
from torch.nn import functional as F

SAMPLE = REPOSITORY / "sample"
SIZES = {"input_dim": 13, "output_dim": 11, "emb_dim": 5, "hid_dim": 7}


@pytest.fixture
def models():
    """The plain model and the port's with the same weights, in float64 and without dropout."""
    torch.manual_seed(3)
    own = plain.Seq2Seq(**SIZES, dropout=0.0).double()
    for parameter in own.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        own.decoder.fc_out.bias[data.EOS] += 2  # so that some sentences end and some do not
    port = gru.build(**SIZES).double()
    port.load_state_dict(own.state_dict())
    return own, port


@pytest.fixture
def no_products(monkeypatch):
    """A product rate that takes no time to measure."""
    monkeypatch.setattr(machine, "matmul_rate", lambda dtype, device: 1e9)


def figures(text: str) -> dict[str, float]:
    """Name and value of each figure that a script has printed."""
    return {name: float(value) for name, value in logs.parse_measurement(text).figures.items()}


@pytest.mark.parametrize("module", [communication, curves, decoding, logs, machine], ids=lambda module: module.__name__)
def test_the_examples_in_the_docstrings_are_true(module):
    assert doctest.testmod(module).failed == 0


# ---------------------------------------------------------------- the plain loop


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_the_plain_loop_has_the_models_loss_and_gradients(models, ratio):
    src, trg = torch.randint(4, 11, (6, 4)), torch.randint(4, 11, (8, 4))
    trg[5:, :2] = data.PAD
    own, port = models
    random.seed(3)
    own_loss = plain.mean_loss(own(src, trg, ratio), trg)
    random.seed(3)
    logits = port(src, trg, ratio)
    port_loss = F.cross_entropy(logits[1:].flatten(0, 1), trg[1:].flatten(), ignore_index=data.PAD)
    assert own_loss.item() == pytest.approx(port_loss.item(), abs=1e-10)
    own_loss.backward()
    port_loss.backward()
    for (name, ours), theirs in zip(own.named_parameters(), port.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10, msg=name)


def test_plain_decoding_translates_as_the_model_does(models):
    own, port = models
    src = torch.randint(4, 13, (6, 12))
    expected = search.greedy(port, src, torch.full((12,), 6), data.SOS, data.EOS, plain.MAX_LENGTH)
    ended = 0
    for column in range(12):
        ids = own.greedy(src[:, column : column + 1])
        ended += ids[-1] == data.EOS
        assert ids + [data.EOS] * (plain.MAX_LENGTH - len(ids)) == expected[:, column].tolist()
    assert 0 < ended < 12


# ---------------------------------------------------------------- the figures


def test_the_limit_by_hand():
    # 4 source positions, 4 steps: encoder 4*5*9, decoder 4*5*9 + 3*9, output layer 4*5*10 + 3*10.
    lengths = torch.tensor([3, 5]), torch.tensor([4, 6])
    assert machine.flops_per_pair(*lengths, output_dim=10, emb_dim=2, hid_dim=3) == 6 * (180 + 207 + 230)


def test_the_product_rate_counts_two_operations_for_each_multiply_add(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(machine, "clock", lambda device: next(ticks))
    monkeypatch.setattr(machine, "PRODUCT", (4, 3, 2))
    assert machine.matmul_rate(torch.float32) == 2 * 4 * 3 * 2  # a second each


def test_the_figures_of_training_by_hand():
    middle = {"plain": 20.0, "amp": 400.0, "fp32": 120.0, "amp 0.5": 300.0, "MB amp": 1400.0, "MB fp32": 1450.0}
    middle |= {"GFLOP/s amp": 300.0, "GFLOP/s fp32": 100.0}
    values = {name: value for name, value, _ in training.figures(middle, flops=0.6e9, device="cpu")}
    assert values == pytest.approx(
        {
            "training --amp / plain": 20.0,
            "training fp32 / plain": 6.0,
            "share of the limit, --amp": 0.8,  # 400 pairs of 0.6 GFLOP are 240 of 300 GFLOP/s
            "share of the limit, fp32": 0.72,
            "peak memory --amp, MB": 1400.0,
            "peak memory fp32, MB": 1450.0,
            "forcing 0.5 / 1.0, --amp": 0.75,
        }
    )
    on_gpu = training.figures(middle, flops=0.6e9, device="cuda")
    assert on_gpu[0] == ("training --amp, pairs/s", 400.0, ">= 150000")


def test_the_figures_against_another_checkout_by_hand():
    middle = {"float32 64": 150.0, "float32 64 other": 100.0, "amp 64": 800.0, "amp 64 other": 400.0}
    middle |= {"GFLOP/s float32": 150.0, "GFLOP/s amp": 600.0}
    assert dict(against.figures(middle, flops=0.6e9, batches=[64])) == pytest.approx(
        {
            "training float32, batch 64, this / other": 1.5,
            "share of the limit, float32, batch 64": 0.6,
            "training amp, batch 64, this / other": 2.0,
            "share of the limit, amp, batch 64": 0.8,
        }
    )


def test_the_product_rate_is_that_of_the_fastest_library(monkeypatch):
    monkeypatch.setattr(machine, "product_rates", lambda *args: {"slow": 1.0, "fast": 3.0, "middle": 2.0})
    assert machine.matmul_rate(torch.float32) == 3.0


def test_float32_products_are_measured_by_each_library(monkeypatch):
    monkeypatch.setattr(machine, "PRODUCT", (32, 16, 8))
    monkeypatch.setattr(machine, "ENOUGH_SECONDS", 1e-6)
    assert {"torch.mm", "numpy", "oneDNN"} == machine.product_rates(torch.float32, repetitions=1).keys()
    assert {"torch.mm"} == machine.product_rates(torch.bfloat16, repetitions=1).keys()


# ---------------------------------------------------------------- processes


@pytest.mark.slow
def test_a_process_has_its_own_peak_memory_and_not_its_parents():
    program = "import time\nfor size in (0, 300_000_000): print(len(b'x' * size), flush=True); time.sleep(3)"
    peaks = [line.peak_mb for line in machine.follow([sys.executable, "-c", program])]
    assert peaks[0] < 100 < machine.peak_rss_mb()
    assert 300 < peaks[1] < 400


def test_a_command_that_fails_ends_the_script_with_its_last_lines():
    with pytest.raises(SystemExit, match="failed:\nsome reason"):
        list(machine.follow([sys.executable, "-c", "import sys; sys.exit('some reason')"]))


def test_a_command_is_ended_at_the_line_that_was_awaited():
    program = "import time; print('a 1', flush=True); print('b 2', flush=True); time.sleep(600)"
    line, found = machine.first_line([sys.executable, "-c", program], r"b (\d)")
    assert (line.text, found[1]) == ("b 2", "2")


def test_a_line_that_never_comes_is_an_error():
    with pytest.raises(SystemExit, match="printed no line"):
        machine.first_line([sys.executable, "-c", "print('a')"], "b")


# ---------------------------------------------------------------- the scripts


@pytest.mark.slow
def test_the_plain_loop_runs(tmp_path):
    measured = plain.measure(steps=1, data_dir=SAMPLE, cache_dir=tmp_path, batch_size=4)
    assert measured["pairs_per_second"] > 0 and measured["peak_mb"] > 100


def test_the_plain_loop_times_each_step_but_the_first(tmp_path, monkeypatch, capsys):
    ticks = iter([0, 100, 200, 202, 300, 302])
    monkeypatch.setattr(machine, "clock", lambda device: next(ticks))
    arguments = ["train", "--data-dir", str(SAMPLE), "--cache-dir", str(tmp_path), "--steps", "2", "--batch-size", "4"]
    plain.main(arguments)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["pairs_per_second"] == 2  # 8 pairs in 4 seconds


@pytest.mark.slow
def test_training_runs(tiny_corpus, no_products, capsys):
    training.main(["--data-dir", str(tiny_corpus), "--batch-size", "8", "--plain-steps", "1", "--repetitions", "1"])
    values = figures(capsys.readouterr().out)
    assert len(values) == 7 and all(value > 0 for value in values.values())


@pytest.mark.slow
def test_against_runs(tiny_corpus, no_products, capsys):
    where = ["--other", str(REPOSITORY), "--data-dir", str(tiny_corpus), "--repetitions", "1"]
    small = ["--", "--hid-dim", "8", "--emb-dim", "8"]
    against.main([*where, "--batch-sizes", "8", *small])
    values = figures(capsys.readouterr().out)
    assert len(values) == 4 and all(value > 0 for value in values.values())
    against.main([*where, "--whole", *small, "--epochs", "1"])
    assert figures(capsys.readouterr().out)["ten epochs, this / other"] > 0


@pytest.mark.slow
def test_decoding_runs_and_all_agree_in_float32(tiny_corpus, no_products, capsys):
    decoding.main(["--data-dir", str(tiny_corpus), "--repetitions", "1"])
    values = figures(capsys.readouterr().out)
    assert values["equal to plain, fp32"] == 1
    assert values["decoding bf16 / plain fp32"] > 0


@pytest.mark.slow
def test_translating_runs_beside_ctranslate2(tiny_corpus, tmp_path, capsys, monkeypatch):
    pytest.importorskip("ctranslate2", reason="bench/README.md names it")
    monkeypatch.setattr(translating.os, "sched_setaffinity", lambda pid, cores: None)
    monkeypatch.setattr(translating, "BEAMS", (1, 3))
    path = tmp_path / "model"
    train = ["--data-dir", str(tiny_corpus), "--epochs", "1", "--ckptpath", str(path), *SMALL]
    subprocess.run([*machine.TRAIN, *train], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    translating.main(["--data-dir", str(tiny_corpus), "--ckpt", str(path), "--repetitions", "1"])
    values = figures(capsys.readouterr().out)
    names = ("bf16", "bf16 list", "fp32", "fp32 list")
    assert {f"{name} / CTranslate2, beam {beam}" for name in names for beam in (1, 3)} <= set(values)
    assert {f"BLEU {name} {beam}" for name in names for beam in (1, 3)} <= set(values)
    assert all(value > 0 for name, value in values.items() if "CTranslate2" in name)


@pytest.mark.slow
def test_startup_runs(tiny_corpus, capsys):
    startup.main(["--data-dir", str(tiny_corpus), "--repetitions", "1"])
    values = figures(capsys.readouterr().out)
    assert values["import of torch, s"] > 0 and values["warm start, s"] > 0


def test_communication_runs_in_one_process(tiny_corpus, capsys, no_launcher):
    communication.main(["--data-dir", str(tiny_corpus), "--processes", "1", "--steps", "1", "--repetitions", "1"])
    out = capsys.readouterr().out
    assert re.search(r"^1 processes; [\d,]+ parameters; milliseconds a step:$", out, re.MULTILINE)
    measured = logs.parse_measurement(out)
    assert list(measured.medians) == ["64 averaged", "64 apart", "512 averaged", "512 apart", "all-reduce"]
    assert len(measured.figures) == 5


@pytest.mark.slow
def test_communication_runs_in_two_processes_of_which_one_prints(tiny_corpus, no_launcher):
    line = [sys.executable, "-m", "bench.communication", "--data-dir", str(tiny_corpus), "--steps", "2"]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes; ") == done.stdout.count("    median") == 1
    assert len(logs.parse_measurement(done.stdout).figures) == 5


@pytest.mark.slow
def test_time_to_bleu_stops_at_the_first_validation_that_reaches_it(tiny_corpus, capsys):
    flags = ["--epochs", "50", "--emb-dim", "8", "--hid-dim", "8"]
    where = ["--data-dir", str(tiny_corpus)]
    short = [*where, "--repetitions", "1", "--plain-rate", "10", "--bleu", "0"]
    time_to_bleu.main([*short, "--", *flags])
    values = figures(capsys.readouterr().out)
    seconds = values["seconds to BLEU 0"]
    assert values["time to BLEU 0, plain / port"] == pytest.approx(29000 / seconds, rel=1e-2)
    assert not any("best" in name for name in values)
    time_to_bleu.main([*short, "--whole", "--", "--epochs", "2", *flags[2:]])
    values = figures(capsys.readouterr().out)
    assert values["seconds to the best BLEU of a run"] >= values["seconds to BLEU 0"] > 0
    assert values["best BLEU of a run"] >= 0
    with pytest.raises(SystemExit, match="below 101"):
        time_to_bleu.seconds_to_bleu([f"--data-dir={tiny_corpus}", *flags[2:], "--epochs", "1"], bleu=101.0)


def test_tokenising_runs(capsys):
    tokenising.main(["--pairs=300", "--repetitions=1"])
    out = capsys.readouterr().out
    assert "note: so little text is tokenised in one process" in out
    assert "figure: two workers / one = " in out


@pytest.mark.slow
def test_a_soak_stops_a_run_that_saves_and_tells_by_how_much_it_grew(tiny_corpus, tmp_path, capsys):
    flags = ["--", "--data-dir", str(tiny_corpus), "--emb-dim=8", "--hid-dim=12", "--save-every=0.001"]
    soak.main(["--minutes", "0.25", *flags])
    out = capsys.readouterr().out
    assert int(re.search(r"^states saved: (\d+)$", out, re.MULTILINE)[1]) > 1
    assert set(figures(out)) == {f"growth of {name}" for name in soak.COLUMNS}


def test_growth_compares_the_last_third_with_the_second():
    rows = [dict.fromkeys(soak.COLUMNS, value) for value in (100.0, 90.0, 5.0, 7.0, 9.0, 8.0)]
    assert set(soak.growth(rows).values()) == {8.5 - 6.0}


@pytest.mark.slow
def test_large_corpus_runs(capsys):
    """With a corpus of 300 pairs for the small one and of 900 for the large one."""
    large_corpus.main(["--small=300", "--large=900", "--batch-size=32", "--steps=3", "--repetitions=1"])
    ratios = figures(capsys.readouterr().out)
    assert [re.findall(r"\((\w+)\)", name) for name in ratios] == [["peak"], ["end"]]
    assert all(0.5 < ratio < 2 for ratio in ratios.values())


VALIDATIONS = [
    f"validation: epoch {epoch + 1}/3  train loss {5 - epoch}.0  loss {4 - epoch}.25 (perplexity 70.1)  "
    f"free-running loss {6 - epoch}.5 (perplexity 665.1)  greedy BLEU {bleu}.75  learning rate 2.00e-03"
    for epoch, bleu in enumerate((0, 20, 10))
]
RUN = "run: device=cpu processes=2 nodes=1 batch=96 batch_per_device=48 precision=float32"
WHOLE_RUN = [RUN, *VALIDATIONS]


def test_epochs_of_older_logs_count_from_0(tmp_path):
    older = [re.sub(r"epoch (\d)/3", lambda match: f"epoch {int(match[1]) - 1}", line) for line in WHOLE_RUN]
    assert older[1].startswith("validation: epoch 0  train loss")
    runs = []
    for lines in (older, WHOLE_RUN):
        (tmp_path / "log").write_text("".join(f"{line}\n" for line in lines))
        runs.append(curves.read_log("run", tmp_path / "log"))
    assert runs[0] == runs[1]
    assert [epoch.number for epoch in runs[0].epochs] == [0, 1, 2]


def test_curves_reads_the_validations_that_the_program_prints(tiny_corpus, tmp_path):
    log = tmp_path / "log"
    with log.open("w") as file:
        command = [*machine.TRAIN, "--data-dir", tiny_corpus, "--epochs", "2", "--emb-dim", "8", "--hid-dim", "12"]
        subprocess.run(command, cwd=tmp_path, stdout=file, check=True, timeout=120)
    run = curves.read_log("tiny", log)
    assert [epoch.number for epoch in run.epochs] == [0, 1]
    assert f" batch={run.batch} batch_per_device={run.batch} " in log.read_text()


def test_curves_takes_each_figure_from_its_place(tmp_path):
    log = tmp_path / "log"
    log.write_text("\n".join([*WHOLE_RUN, "BLEU score = 28.0"]))
    run = curves.read_log("name", log)
    assert (run.name, run.batch, run.bleu) == ("name", 96, 20.75)
    values = [(epoch.number, epoch.loss, epoch.free_running_loss, epoch.bleu) for epoch in run.epochs]
    assert values == [(0, 4.25, 6.5, 0.75), (1, 3.25, 5.5, 20.75), (2, 2.25, 4.5, 10.75)]


@pytest.mark.parametrize(
    "lines",
    [[RUN], VALIDATIONS, [RUN, *VALIDATIONS[1:]], WHOLE_RUN + WHOLE_RUN],
    ids=["none", "no line run:", "no first", "two runs"],
)
def test_curves_refuses_what_is_not_one_whole_run(tmp_path, lines):
    (tmp_path / "log").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="expected one run"):
        curves.read_log("name", tmp_path / "log")


@pytest.mark.parametrize(
    ("script", "arguments", "code"),
    [
        ("decoding", ["--data-dir", REPOSITORY / "sample", "--ckpt", "absent"], 4),
        ("exported", ["--data-dir", REPOSITORY / "sample", "--ckpt", "absent"], 4),
        ("training", ["--data-dir", "absent/too"], 3),
        ("plain", ["train", "--data-dir", "absent/too"], 3),
        ("curves", ["--out", "a.png", "name=absent"], 2),
    ],
)
def test_what_a_user_can_mend_is_said_without_a_traceback(tmp_path, script, arguments, code):
    command = [sys.executable, "-m", f"bench.{script}", *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert "absent" in done.stderr.splitlines()[-1]


def test_curves_draws_each_figure_in_its_place():
    epochs = [logs.Epoch(0, 5.0, 4.0, 54.6, 6.0, 10.0), logs.Epoch(1, 4.0, 3.0, 20.1, 5.0, 20.0)]
    runs = [curves.Run("a", 64, epochs), curves.Run("a", 64, epochs), curves.Run("b", 32, epochs[:1])]
    figure, bleu, losses = (MagicMock() for _ in range(3))
    figure.subplots.return_value = (bleu, losses)
    curves.draw_over_epochs(runs, figure)
    drawn = [(*call.args[:2], call.kwargs["color"], call.kwargs["label"]) for call in bleu.plot.call_args_list]
    assert drawn == [([1, 2], [10.0, 20.0], "C0", "a"), ([1, 2], [10.0, 20.0], "C0", None), ([1], [10.0], "C1", "b")]
    drawn = [(call.args[1], call.kwargs["label"]) for call in losses.plot.call_args_list]
    assert drawn[:2] == [([4.0, 3.0], "a, loss"), ([6.0, 5.0], "a, free running loss")]
    assert drawn[4:] == [([4.0], "b, loss"), ([6.0], "b, free running loss")]

    figure.subplots.return_value = axes = MagicMock()
    curves.draw_over_batch(runs, figure)
    assert [call.args for call in axes.errorbar.call_args_list] == [((64,), (20.0,), (0.0,)), ((32,), (10.0,), (0.0,))]


@pytest.mark.parametrize("over", ["epochs", "batch"])
def test_curves_draws(tmp_path, over):
    pytest.importorskip("matplotlib", reason="needs requirements-plots.txt")
    log, picture = tmp_path / "log", tmp_path / "curves.png"
    log.write_text("\n".join(WHOLE_RUN))
    curves.main(["--over", over, "--out", str(picture), f"tuned={log}", f"tuned={log}", f"other={log}"])
    assert picture.read_bytes().startswith(b"\x89PNG")
