"""The log: the clock, the means of a line, and who prints it."""

import math
import re
import sys

import nmt.log
import train_8p
from nmt.distributed import World
from nmt.errors import run_main

import pytest
import torch
from conftest import SMALL, refused, step_lines
from test_record import of_kind, strict


def log_of(steps: int, before: int = 0, print_freq: int = 100) -> nmt.log.EpochLog:
    return nmt.log.EpochLog(World(), 0, steps=steps, steps_before=before, print_freq=print_freq)


def test_the_epochs_speed_leaves_out_the_first_five_steps_of_a_run(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(nmt.log.time, "perf_counter", lambda: 0.0)
    monkeypatch.setattr(nmt.log.EpochLog, "_now", lambda self: float(next(clock)))
    for before, steps, expected in ((0, 8, 3), (3, 8, 6), (8, 8, 8), (0, 5, 10 / 3)):
        log = log_of(steps, before)
        for _ in range(steps):
            log.data_ready()
            log.step_done(torch.tensor(1.0), torch.tensor(1.0), 1)
        pairs_per_second, _ = log.finish()
        # The clock is read at the start, after the run's second step, after the warm-up if there is one, at the line,
        # and at the end.
        assert pairs_per_second == pytest.approx(expected / 2)


def test_the_first_two_steps_of_a_run_are_timed_on_their_own(capsys, monkeypatch):
    """As the ModelZoo's CompileTime. A process that goes on with a run compiles again."""
    clock = [0.0]
    monkeypatch.setattr(nmt.log.EpochLog, "_now", lambda self: clock[0])

    def steps(log: nmt.log.EpochLog, number: int) -> None:
        for _ in range(number):
            clock[0] += 1.5
            log.step_done(torch.tensor(1.0), torch.tensor(1.0), 1)

    def said() -> list[str]:
        return [line for line in capsys.readouterr().out.splitlines() if "CompileTime" in line]

    first = log_of(4)
    steps(first, 1)
    assert said() == []
    steps(first, 1)
    assert said() == ["* CompileTime 3.000"]
    steps(first, 1)
    resumed = log_of(4)
    resumed.restore(first.state())
    steps(resumed, 1)
    assert said() == ["* CompileTime 1.500"], "the epoch has no second step any more"
    steps(log_of(4, before=4), 4)
    assert said() == []
    steps(log_of(1), 1)
    assert said() == ["* CompileTime 1.500"]


def test_the_loss_of_a_line_is_the_mean_over_target_positions(capsys):
    log = log_of(4, print_freq=2)
    for loss_sum, count in ((2.0, 1.0), (2.0, 3.0), (30.0, 2.0), (0.0, 1.0)):
        log.data_ready()
        log.step_done(torch.tensor(loss_sum), torch.tensor(count), 1)
    lines = step_lines(capsys.readouterr().out)
    assert [(float(since), round(float(whole), 3)) for *_, since, whole in lines] == [(1.0, 1.0), (10.0, 4.857)]


EXPLODED = [math.nan, math.inf, 101.0, 1e13]


@pytest.mark.parametrize("loss", EXPLODED)
def test_a_loss_that_explodes_and_stays_ends_the_run(loss):
    """Row 44: finite or not."""
    log = log_of(9, print_freq=1)
    tokens = torch.tensor(4.0)
    for each in (3.0, loss, loss):
        log.step_done(each * tokens, tokens, 1)
    said = refused("diverged", log.step_done, loss * tokens, tokens, 1)
    assert f"the last one is {loss:g}" in said
    assert "epoch 1, step 4" in said


@pytest.mark.parametrize("loss", EXPLODED)
def test_a_loss_that_comes_back_ends_no_run(loss):
    """Row 44: a single bad batch is not divergence."""
    log = log_of(9, print_freq=1)
    for each in (loss, loss, 99.0, loss, loss, 3.0):
        log.step_done(torch.tensor(each), torch.tensor(1.0), 1)


def test_an_epoch_that_goes_on_has_the_lines_of_one_that_was_not_stopped(capsys, monkeypatch):
    """Losses, the count of lines without a loss, and the epoch's speed, in which the time between counts nothing."""
    clock = [0.0]
    monkeypatch.setattr(nmt.log.time, "perf_counter", lambda: clock[0])

    def steps(log: nmt.log.EpochLog, losses: list[float]) -> None:
        for loss in losses:
            clock[0] += 2.0
            log.data_ready()
            log.step_done(torch.tensor(loss), torch.tensor(1.0), 6)

    losses = [5.0, 4.0, 3.0, 2.0, math.nan, 1.0, 7.0]
    whole = log_of(7, before=9, print_freq=2)
    steps(whole, losses)
    lines, (rate, _) = step_lines(capsys.readouterr().out), whole.finish()
    first = log_of(7, before=9, print_freq=2)
    steps(first, losses[:3])
    state = first.state()
    clock[0] += 1000.0
    second = log_of(7, before=9, print_freq=2)
    second.restore(state)
    steps(second, losses[3:])
    resumed = step_lines(capsys.readouterr().out)
    assert [line[-2:] for line in resumed] == [line[-2:] for line in lines]
    assert second.finish()[0] == rate == 3.0


@pytest.mark.parametrize("before", [1, 2])
def test_lines_without_a_loss_count_on_in_a_run_that_goes_on(before):
    """Row 44: a run that diverges and is killed in between has diverged too."""
    log, one = log_of(9, print_freq=1), torch.tensor(1.0)
    for _ in range(before):
        log.step_done(one * math.nan, one, 1)
    resumed = log_of(9, print_freq=1)
    resumed.restore(log.state())
    for _ in range(2 - before):
        resumed.step_done(one * math.nan, one, 1)
    refused("diverged", resumed.step_done, one * math.nan, one, 1)


# ---------------------------------------------------------------- the bar of a terminal


@pytest.fixture
def clock(monkeypatch):
    """The seconds that `perf_counter` says, in a list of one."""
    seconds = [0.0]
    monkeypatch.setattr(nmt.log.time, "perf_counter", lambda: seconds[0])
    return seconds


def test_the_time_that_is_left_is_that_of_all_steps_and_validations(clock, capsys):
    bar = nmt.log.RunBar(epochs=3, steps=4, done=0)

    def epoch(steps: int) -> None:
        for _ in range(steps):
            bar.step_done()
        clock[0] += 2.0 * steps
        bar.line(steps, 2.0 * steps, "")

    epoch(2)
    assert bar.seconds_left() == 10 * 2.0, "how long a validation takes, nobody knows yet"
    epoch(2)
    bar.epoch_done()
    clock[0] += 7.0
    epoch(1)
    assert bar.seconds_left() == 7 * 2.0 + 2 * 7.0
    bar.close()
    resumed = nmt.log.RunBar(epochs=3, steps=4, done=8)
    assert resumed.seconds_left() == 0.0
    resumed.step_done()
    resumed.line(1, 3.0, "")
    assert resumed.seconds_left() == 3 * 3.0, "its own pace counts"
    resumed.close()


def test_a_terminal_has_one_bar_for_the_whole_run_and_no_step_lines(tiny_corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(nmt.log.tqdm, "monitor_interval", 0)
    arguments = [*SMALL, "--data-dir", str(tiny_corpus), "--ckptpath", str(tmp_path / "model")]
    assert run_main(train_8p.main, [*arguments, "--epochs", "2", "-b", "4", "-p", "4", "--beam-size", "1"]) == 0
    out = capsys.readouterr().out
    assert not step_lines(out)
    bars = re.findall(
        r"epoch (\d)/2 +\d+%\|[^|]*\| (\d+)/32 steps(?:, (\d\d:\d\d) left, loss [0-9.]+, \d+ pairs/s)?", out
    )
    assert {epoch for epoch, _, _ in bars} == {"1", "2"}
    steps = [int(step) for _, step, _ in bars]
    assert steps == sorted(steps), "one bar that goes on, and not one an epoch"
    assert any(left for _, _, left in bars)
    assert out.count("\nBLEU score = ") == 1
    assert len(of_kind(strict(tmp_path / "model.metrics.jsonl"), "step")) == 8, "the record is that of a pipe"


def test_rank_0_alone_is_heard(capsys, monkeypatch):
    for rank in (1, 0):
        monkeypatch.setattr(sys, "stdout", sys.stdout)  # what the test changes is undone
        nmt.log.only_rank_0_speaks(rank)
        nmt.log.say(f"rank {rank}")
        monkeypatch.undo()
    assert capsys.readouterr().out == "rank 0\n"


@pytest.mark.parametrize("character", ["\n", "\r", "\x0b", "\x1b[1A", "\x85", "\u2028", "\0", "\udcff"])
def test_text_from_outside_makes_no_second_line(capsys, character):
    nmt.log.say(f"saved: a{character}BLEU score = 99.0")
    out = capsys.readouterr().out
    assert out.splitlines() == [out.removesuffix("\n")]
    assert out.isascii()
    assert out.startswith("saved: a\\")


def test_a_line_keeps_its_tabs_and_its_letters(capsys):
    nmt.log.say("Epoch: [0]\tZeit 1 für 東京\t")
    assert capsys.readouterr().out == "Epoch: [0]\tZeit 1 für 東京\t\n"
