"""Several ranks are one training: the real loop, watched from outside while it runs in one and in two processes."""

import errno
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import data
import nmt.log
import train_8p
from nmt import launch, precision
from nmt.errors import UserError

import pytest
import torch
from conftest import REPOSITORY, TEST_PATHS, write_corpus
from harness import SIMULATION, ensure_built, environment

PAIRS, BATCH, EPOCHS = 9, 4, 4  # three steps an epoch; the third has one pair, so that the second rank has none
DEADLINE = 120


def watched_rank(index: int, args, chosen, worlds, meeting, folder: str) -> None:
    """`train_8p.run_rank`, writing down the generator's first state, each step's pairs, loss, gradients and weights."""
    shares, totals, steps, generators = [], [], [], []
    rank_share, step_done, step = data.rank_share, nmt.log.EpochLog.step_done, precision.NativePrecision.step

    def watched_share(indices, rank, world_size):
        share = rank_share(indices, rank, world_size)
        shares.append(share.tolist())
        generators.append(torch.get_rng_state())
        return share

    def watched_step_done(self, sums, pairs):
        totals.append(sums.cpu().clone())
        step_done(self, sums, pairs)

    def watched_step(self, max_norm):
        before = {name: parameter.grad.cpu().clone() for name, parameter in self.model.named_parameters()}
        step(self, max_norm)
        steps.append((before, {name: tensor.cpu().clone() for name, tensor in self.model.state_dict().items()}))

    data.rank_share, nmt.log.EpochLog.step_done, precision.NativePrecision.step = (
        watched_share,
        watched_step_done,
        watched_step,
    )
    train_8p.run_rank(index, args, chosen, worlds, meeting)
    record = {"shares": shares, "totals": totals, "steps": steps, "generator": generators[0]}
    torch.save(record, Path(folder) / f"rank{worlds[index].rank}.pt")


def overflowing_rank(index: int, args, chosen, worlds, meeting, folder: str) -> None:
    """`train_8p.run_rank` with an overflow on rank 1 in the fifth step, writing down the weights after each step."""
    weights = []
    backward, step = precision.NativePrecision.backward, precision.NativePrecision.step

    def overflowing_backward(self, loss):
        overflows = worlds[index].rank == 1 and len(weights) == 4
        backward(self, loss * float("inf") if overflows else loss)

    def watched_step(self, max_norm):
        step(self, max_norm)
        weights.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})

    precision.NativePrecision.backward, precision.NativePrecision.step = overflowing_backward, watched_step
    train_8p.run_rank(index, args, chosen, worlds, meeting)
    torch.save(weights, Path(folder) / f"rank{worlds[index].rank}.pt")


def train_watched(
    corpus: Path, folder: Path, processes: int, device: str = "cpu", *, rank=watched_rank, flags: str = ""
) -> list:
    """What the ranks of a run wrote down, by rank."""
    folder.mkdir()
    args = train_8p.build_parser().parse_args(
        f"--data-dir {corpus} --device {device} --performance --epochs {EPOCHS} --batch-size {BATCH} --dropout 0 "
        "--output-dropout 0 --teacher-forcing-ratio 0.5 --emb-dim 8 --hid-dim 12 --multiprocessing-distributed "
        f"--device-list {','.join(map(str, range(processes)))} --ckptpath {folder / 'model'} {flags}".split()
    )
    kind, indices = train_8p.choose_devices(args)
    worlds = train_8p.make_worlds(args, kind, indices)
    chosen = train_8p.choose_precision(args, kind, indices)
    train_8p.resolve_recipe(args, PAIRS, worlds[0])
    args.epochs, args.performance = EPOCHS, False
    store = launch.host_store("127.0.0.1", 0, 1)
    launch.launch(rank, processes, (args, chosen, worlds, ("127.0.0.1", store.port), str(folder)))
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training in one process and in two."""
    folder = tmp_path_factory.mktemp("runs")
    corpus = write_corpus(folder / "corpus", PAIRS)
    return train_watched(corpus, folder / "one", 1)[0], train_watched(corpus, folder / "two", 2)


@pytest.fixture(scope="module")
def npu_totals(tmp_path_factory):
    """By the number of simulated NPUs: what rank 0 of the same training counted there."""
    ensure_built()
    folder = tmp_path_factory.mktemp("npus")
    corpus = write_corpus(folder / "corpus", PAIRS)
    code = """
import sys
from pathlib import Path
from test_distributed import train_watched

if __name__ == "__main__":
    corpus, folder, processes = sys.argv[1:]
    train_watched(Path(corpus), Path(folder) / processes, int(processes), "npu")
"""
    (folder / "program.py").write_text(code)
    paths = os.pathsep.join(map(str, [SIMULATION, REPOSITORY, *TEST_PATHS]))

    def train(processes: str) -> None:
        command = [sys.executable, folder / "program.py", corpus, folder, processes]
        subprocess.run(command, env=environment(PYTHONPATH=paths), check=True, timeout=DEADLINE)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, ("1", "2")))
    return {count: torch.load(folder / str(count) / "rank0.pt", map_location="cpu")["totals"] for count in (1, 2)}


def training_shares(record: dict) -> list[list[int]]:
    """The pairs of each training step: validation shares its sentences out too, four of them, all in one batch."""
    steps_an_epoch = -(-PAIRS // BATCH)
    shares = record["shares"]
    validations = len(shares) // EPOCHS - steps_an_epoch
    width = steps_an_epoch + validations
    return [share for epoch in range(EPOCHS) for share in shares[epoch * width : epoch * width + steps_an_epoch]]


def test_two_ranks_see_each_pair_once_an_epoch_and_none_twice(runs):
    _, two = runs
    steps = list(zip(*map(training_shares, two), strict=True))
    for epoch in range(EPOCHS):
        seen = [pair for shares in steps[3 * epoch : 3 * epoch + 3] for share in shares for pair in share]
        assert sorted(seen) == list(range(PAIRS))


def test_each_epoch_of_a_run_has_an_order_of_its_own(runs):
    one, _ = runs
    steps = training_shares(one)
    assert len({str(steps[3 * epoch : 3 * epoch + 3]) for epoch in range(EPOCHS)}) == EPOCHS


def test_two_ranks_draw_other_numbers_for_dropout(runs):
    _, two = runs
    assert not torch.equal(two[0]["generator"], two[1]["generator"])


def test_an_uneven_last_batch_leaves_a_rank_without_pairs(runs):
    _, two = runs
    assert sum(share == [] for share in training_shares(two[1])) == EPOCHS


def test_two_ranks_have_the_loss_of_one_process_on_the_joint_batch(runs):
    one, two = runs
    for record in two:
        torch.testing.assert_close(record["totals"], one["totals"], rtol=1e-5, atol=1e-5)


def test_two_ranks_have_the_gradients_of_one_process_on_the_joint_batch(runs):
    one, two = runs
    assert len(one["steps"]) >= 10
    for record in two:
        for (actual, _), (expected, _) in zip(record["steps"], one["steps"], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_two_ranks_hold_equal_weights_after_ten_steps(runs):
    one, two = runs
    (_, first), (_, second) = two[0]["steps"][9], two[1]["steps"][9]
    for name, weights in first.items():
        assert torch.equal(weights, second[name]), name
    torch.testing.assert_close(first, one["steps"][9][1], rtol=1e-3, atol=1e-4)


def test_an_overflow_on_one_rank_skips_the_step_on_all(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", PAIRS)
    first, second = train_watched(corpus, tmp_path / "two", 2, rank=overflowing_rank, flags="--amp")
    assert len(first) == 3 * EPOCHS
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    unchanged = [
        step
        for step in range(1, len(first))
        if torch.equal(*(w["decoder.fc_out.weight"] for w in first[step - 1 : step + 1]))
    ]
    assert unchanged == [4]
    assert all(tensor.isfinite().all() for tensor in first[-1].values())


@pytest.mark.parametrize("count", [1, 2])
def test_simulated_npus_have_the_losses_of_the_cpu_in_float32(runs, npu_totals, count):
    one, _ = runs
    assert len(npu_totals[count]) >= 10
    for (actual, pairs), (expected, _) in zip(npu_totals[count], one["totals"], strict=True):
        assert actual.item() == pytest.approx(expected.item(), rel=1e-6), pairs


def command(*arguments: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess:
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | extra
    return subprocess.run(arguments, cwd=cwd, env=variables, capture_output=True, text=True, timeout=DEADLINE)


PUBLISHED = ["--epoch", "1", "--batch-size", "16", "--multiprocessing-distributed", "--device-list", "0,1"]
PUBLISHED += ["--device", "cpu", "--amp", "--addr", "127.0.0.1", "--workers", "2"]
SMALL = ["--emb-dim", "8", "--hid-dim", "12"]


@pytest.mark.parametrize("launcher", [["-m", "torch.distributed.run", "--nproc-per-node", "2"], []])
def test_the_published_flags_run_two_processes(tiny_corpus, tmp_path, launcher):
    script = str(REPOSITORY / "train_8p.py")
    result = command(
        sys.executable, *launcher, script, "--data_dir", str(tiny_corpus), *PUBLISHED, *SMALL, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "leaked" not in result.stderr
    assert " processes=2 " in result.stdout
    assert result.stdout.count("* FPS@all ") == 1, "rank 0 alone writes the log"
    assert result.stdout.count("BLEU score = ") == 1
    assert (tmp_path / "seq2seq-gru-model.pth.tar").exists()


def test_what_a_library_prints_comes_from_rank_0_alone(tiny_corpus, tmp_path):
    """As apex and torch_npu do when a step overflows; the lines of two ranks on one pipe would break each other."""
    (tmp_path / "program.py").write_text(
        """
import sys
import train_8p
from nmt import launch, precision
from nmt.errors import run_main

step = precision.NativePrecision.step
precision.NativePrecision.step = lambda *args: (print("printed by a library"), step(*args))
launch.leave(run_main(train_8p.main, sys.argv[1:]))
"""
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "program.py"]
    flags = ["--data-dir", str(tiny_corpus), "--performance", "-b", "16", "--device", "cpu", *SMALL]
    result = command(*torchrun, *flags, cwd=tmp_path, PYTHONPATH=str(REPOSITORY))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("printed by a library") == train_8p.PERFORMANCE_STEPS


def die(index: int, how: str) -> None:
    """A rank with a fault, beside one that would wait for it for ever."""
    if index == 0:
        time.sleep(DEADLINE)
    elif how == "raise":
        raise ValueError("the cause")
    elif how == "user":
        raise UserError("data", "what", "where", "todo")
    elif how == "exit":
        os._exit(0)
    else:
        os.kill(os.getpid(), 9)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("raise", "distributed", "rank 1 failed: ValueError: the cause"),
        ("user", "data", "what; where; todo"),
        ("exit", "distributed", "rank 1 ended early with exit code 0"),
        ("kill", "distributed", "rank 1 was killed by signal 9"),
    ],
)
def test_a_rank_that_fails_ends_the_run_with_its_reason(how, kind, message):
    with pytest.raises(UserError) as caught:
        launch.launch(die, 2, (how,))
    assert caught.value.kind == kind
    assert message in str(caught.value)


def fail_after_the_others(index: int) -> None:
    """Rank 0's scoring or saving, say, of which the others do nothing."""
    if index == 0:
        time.sleep(2)
        raise UserError("io", "what", "where", "todo")


def test_a_failure_after_the_other_ranks_have_finished_is_not_laid_to_them():
    with pytest.raises(UserError) as caught:
        launch.launch(fail_after_the_others, 2, ())
    assert str(caught.value) == "error[io]: what; where; todo"


def lose_the_output(index: int, number: int) -> None:
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize(("number", "code"), [(errno.EPIPE, 0), (errno.ENOSPC, 5)])
def test_an_output_that_a_rank_loses_ends_the_run_as_that_of_one_process_does(number, code):
    script = f"""
import sys
sys.path[:0] = {[str(REPOSITORY), *TEST_PATHS]}
import test_distributed
from nmt import launch
from nmt.errors import run_main
if __name__ == "__main__":
    sys.exit(run_main(lambda argv: launch.launch(test_distributed.lose_the_output, 1, ({number},)), []))
"""
    done = command(sys.executable, "-c", script, cwd=REPOSITORY)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.count("\n") == bool(code)


def fail_for_a_reason(index: int) -> None:
    raise UserError("data", "what", "where", "todo") from ValueError("the cause")


@pytest.mark.parametrize("debug", [False, True])
def test_debug_shows_the_traceback_of_a_ranks_error(capfd, debug):
    with pytest.raises(UserError):
        launch.launch(fail_for_a_reason, 1, (), debug)
    assert ("ValueError: the cause" in capfd.readouterr().err) == debug


def say_umlauts(index: int) -> None:
    print("läuft")


def test_a_rank_says_what_its_outputs_encoding_lacks(capfd, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    launch.launch(say_umlauts, 1, ())
    assert capfd.readouterr().out == "l\\xe4uft\n"


def test_a_port_that_is_taken_is_an_error_of_the_distributed_kind():
    store = launch.host_store("127.0.0.1", 0, 1)
    with pytest.raises(UserError) as caught:
        launch.host_store("127.0.0.1", store.port, 1)
    assert caught.value.exit_code == 6


def test_an_absent_master_is_an_error_within_the_timeout():
    with pytest.raises(UserError) as caught:
        launch.join_store("127.0.0.1", 1, 2.0)
    assert caught.value.exit_code == 6
