"""The training script: what it decides before it trains, what it logs, what it leaves, what it refuses."""

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gru
import nmt.log
import scoring
import train_8p
from bench import logs
from nmt import checkpoint, curves, devices, distributed, precision, resume, shortlist
from nmt.distributed import World
from nmt.errors import run_main
from nmt.search import beam_search

import pytest
import torch
from conftest import REPOSITORY, SMALL, choose_precision, heed_signals, parse, refused, step_lines, write_corpus

pytestmark = pytest.mark.usefixtures("no_launcher")


def test_what_takes_time_is_done_before_the_group_is_made(monkeypatch, tiny_corpus):
    """The others wait in it, and HCCL not for ever."""
    done = []
    monkeypatch.setattr(train_8p, "load_corpus", lambda *_, **__: done.append("data"))
    monkeypatch.setattr(train_8p, "first_model", lambda *_: done.append("model"))
    monkeypatch.setattr(World, "start", lambda *_: done.append("group"))
    monkeypatch.setattr(train_8p, "train", lambda *_: done.append("training"))
    train_8p.run_rank(World(), parse(), precision.Choice())
    assert done == ["data", "model", "group", "training"]


def test_the_gpus_that_are_asked_for_bfloat16_are_those_that_will_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5)][index])
    settings = parse("--amp", "--amp-dtype", "bfloat16")
    assert "GPU 1 has no bfloat16" in refused("usage", choose_precision, settings, "cuda", [1])
    assert choose_precision(settings, "cuda", [0]).dtype == torch.bfloat16


# ---------------------------------------------------------------- recipes


def resolved(pairs, *flags, local_size=1, nodes=1, device_type="cpu") -> train_8p.Settings:
    settings = parse(*flags)
    world = World(size=nodes * local_size, nodes=nodes, local_size=local_size, device_type=device_type)
    return train_8p.resolved(settings, choose_precision(settings, device_type), world, pairs)


def test_a_flag_beside_the_recipe_wins():
    settings = resolved(29000, "--recipe", "modelzoo", "--lr", "0.5")
    assert settings.lr == 0.5
    for name, value in train_8p.RECIPES["modelzoo"].items():
        assert name == "lr" or getattr(settings, name) == value


def test_the_modelzoo_recipe_is_the_published_one():
    settings = resolved(29000, "--recipe", "modelzoo", "--amp", device_type="npu")
    assert (settings.batch_size, settings.lr, settings.schedule) == (512, 0.003, "constant")
    assert (settings.teacher_forcing_ratio, settings.fixed_length, settings.clip, settings.loss_scale) == (
        0.5,
        0,
        0,
        32,
    )
    assert (settings.init, settings.batching, settings.last_batch, settings.best, settings.epochs) == (
        "normal",
        "random",
        "drop",
        "loss",
        10,
    )


def test_a_recipes_batch_that_cannot_be_shared_out_is_refused():
    refused("usage", resolved, 29000, "--recipe", "modelzoo", local_size=3)


@pytest.mark.parametrize(
    ("pairs", "alone", "of_eight"),
    [(29000, 64, 128), (12701, 64, 128), (12672, 64, 64), (6401, 64, 64), (6336, 32, 32), (4000, 32, 32), (50, 1, 8)],
)
def test_the_tuned_batch_leaves_a_hundred_updates_an_epoch(pairs, alone, of_eight):
    assert resolved(pairs).batch_size == alone
    assert resolved(pairs, local_size=8).batch_size == of_eight


def test_the_tuned_rate_grows_with_the_root_of_the_whole_batch():
    for batch, rate in ((32, 0.003), (64, 0.003), (256, 0.006), (4096, 0.024)):
        assert resolved(29000, "-b", str(batch)).lr == pytest.approx(rate)
        assert resolved(29000, "-b", str(batch), local_size=8).lr == pytest.approx(rate)
    assert resolved(29000, "-b", "128", nodes=2).lr == pytest.approx(0.006)
    assert resolved(256, "-b", "4096").lr == pytest.approx(0.006)  # a batch is never above the corpus


def test_a_rate_that_is_given_or_of_modelzoo_or_of_a_performance_run_is_not_scaled():
    assert resolved(29000, "-b", "256", "--lr", "0.5").lr == 0.5
    assert resolved(29000, "-b", "4096", "--recipe", "modelzoo").lr == 0.003
    assert resolved(29000, "--performance", local_size=8, device_type="npu").lr == 0.003


def test_a_performance_runs_batch_is_the_devices_and_never_above_the_corpus():
    assert resolved(29000, "--performance", local_size=8, device_type="npu").batch_size == 12288
    assert resolved(29000, "--performance", local_size=8).batch_size == 1024
    assert resolved(100, "--performance").batch_size == 100
    assert resolved(29000, "--performance", "--batch-size", "64").batch_size == 64


def test_a_recipes_batch_is_that_of_all_nodes_and_a_flags_that_of_one():
    for flags, total in ((("--recipe", "modelzoo"), 512), (("--recipe", "tuned"), 128), (("-b", "48"), 96)):
        settings = resolved(29000, *flags, nodes=2)
        assert settings.batch_size == total
        assert train_8p.flags_of(settings, World(nodes=2))["batch_size"] == total // 2, "the log says the flag"


def test_the_settings_cannot_change_and_each_is_a_flag():
    settings = resolved(29000)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.lr = 1.0
    assert not [name for name, value in vars(settings).items() if name in train_8p.RECIPES["tuned"] and value is None]
    flags = {action.dest for action in train_8p.build_parser()._actions} - {"help"}
    assert flags == {field.name for field in dataclasses.fields(train_8p.Settings)}


def test_the_choices_of_the_flags_are_those_of_the_code():
    choices = {action.dest: action.choices for action in train_8p.build_parser()._actions}
    assert choices["device"] == ("auto", *devices.DEVICE_TYPES)
    assert choices["opt_level"] == precision.LEVELS
    assert choices["amp_dtype"] == ("auto", *precision.DTYPES)
    assert choices["amp_backend"] == precision.AMP_BACKENDS
    assert set(choices["dist_backend"]) == set(distributed.COLLECTIVES.values())
    assert set(choices["init"]) == set(gru.INITIALISATIONS) == set(train_8p.FORMER_INITIALISATIONS.values())
    assert choices["recipe"] == tuple(train_8p.RECIPES)


@pytest.mark.parametrize(("former", "name"), [("modelzoo", "normal"), ("tuned", "orthogonal")])
def test_the_former_names_of_the_first_weights_still_work(former, name):
    assert resolved(100, "--init", former).init == resolved(100, "--init", name).init == name


def test_the_loss_scale_is_32_and_on_a_cpu_1():
    assert resolved(100, "--amp", device_type="npu").loss_scale == 32
    assert resolved(100, "--amp").loss_scale == 1
    assert resolved(100, "--amp", "--loss-scale", "8").loss_scale == 8


def test_the_rate_rises_then_falls_to_nothing():
    settings = resolved(100)
    rates = [train_8p.learning_rate(step, 1000, settings) for step in range(1000)]
    assert rates[99] == max(rates) == settings.lr
    assert rates[:100] == sorted(rates[:100])
    assert rates[99:] == sorted(rates[99:], reverse=True)
    assert rates[-1] < 1e-4 * settings.lr


# ---------------------------------------------------------------- whole runs in one process


def run(*args, capsys=None):
    """Exit code, stdout and stderr of the program, in this process."""
    code = run_main(train_8p.main, [*SMALL, *args])
    out, err = capsys.readouterr()
    return code, out, err


def output_of_training(folder, *flags):
    """What the program prints that trains a small model in this folder."""
    done = subprocess.run(
        [sys.executable, REPOSITORY / "train_8p.py", *SMALL, *flags],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of two epochs: its folder, the corpus, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    corpus = write_corpus(folder / "corpus", 64, test=6)
    return folder, corpus, output_of_training(folder, "--data-dir", corpus, "--epochs", "2", "-b", "4")


def test_the_log_has_the_lines_that_other_tools_read(trained):
    _, _, out = trained
    steps = [(int(epoch), int(step), int(count)) for epoch, step, count, _, _ in step_lines(out)]
    assert steps == [(0, 10, 16), (0, 16, 16), (1, 10, 16), (1, 16, 16)]
    assert [len(rate.partition(".")[2]) for rate in logs.RATE.findall(out)] == [3, 3]
    (bleu,) = (score["value"] for score in logs.FINAL_SCORE.finditer(out) if score["name"] == "BLEU score")
    assert re.fullmatch(r"\d+\.\d{4}", bleu)
    run_line = logs.RUN.search(out)["facts"]
    for fact in ("device=cpu", "processes=1", "batch=4", "batch_per_device=4", "recipe=tuned", "seed=1234", "torch="):
        assert fact in run_line


def test_each_epoch_shows_losses_perplexity_and_two_translations(trained):
    _, _, out = trained
    first, _ = logs.parse(out).epochs
    assert first.perplexity == pytest.approx(math.exp(first.loss), rel=1e-2)
    for label in ("source", "reference", "model"):
        assert len(re.findall(rf"^  {label} ", out, re.MULTILINE)) == 4


def test_the_checkpoint_can_be_used_without_the_data(trained):
    folder, _, _ = trained
    saved = checkpoint.load(folder / "seq2seq-gru-model.pth.tar")
    assert saved.src_vocab[:4] == saved.trg_vocab[:4] == ["<unk>", "<pad>", "<sos>", "<eos>"]
    assert "hund" in saved.src_vocab
    assert saved.flags["recipe"] == "tuned"
    assert saved.about["vocabularies"] == checkpoint.vocabulary_digest(saved.src_vocab, saved.trg_vocab)
    assert saved.completed
    assert saved.scores["bleu"] >= 0
    assert all(tensor.dtype == torch.float32 for tensor in saved.state_dict.values())


def test_the_checkpoint_has_the_probable_translations_of_each_word(trained):
    folder, _, _ = trained
    saved = checkpoint.load(folder / "seq2seq-gru-model.pth.tar")
    assert saved.shortlist.shape == (len(saved.src_vocab), shortlist.WIDTH)
    for word, translation in (("hund", "dog"), ("rot", "red"), ("läuft", "runs"), ("schnell", "fast")):
        probable = saved.shortlist[saved.src_vocab.index(word)].tolist()
        assert translation in [saved.trg_vocab[index] for index in probable[:2]]


def test_a_performance_run_and_other_ranks_build_no_shortlist(monkeypatch):
    monkeypatch.setattr(train_8p.shortlist, "build", None)
    assert train_8p.translations(parse("--performance"), World(), None) is None
    assert train_8p.translations(parse(""), World(rank=1, size=2), None) is None


def test_evaluate_scores_what_the_training_scored(trained, capsys):
    folder, corpus, out = trained
    path = folder / "seq2seq-gru-model.pth.tar"
    code, again, _ = run("--data-dir", str(corpus), "--evaluate", str(path), capsys=capsys)
    assert code == 0
    assert logs.parse(again).final == logs.parse(out).final
    assert {"BLEU score", "sacreBLEU"} <= logs.parse(again).final.keys()


def test_the_log_has_the_command_that_translates(trained):
    folder, _, out = trained
    (command,) = re.findall(r"^to translate: (.*)$", out, re.MULTILINE)
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = os.environ | {"PATH": path}
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, input="Der Hund läuft.\n", capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr


@pytest.mark.parametrize("name", ["model", "a model's", "-x", "$(date)", "a;b"])
def test_the_command_that_translates_is_one_for_a_shell(name, tmp_path, monkeypatch):
    for folder in (tmp_path, REPOSITORY, REPOSITORY.parent):
        monkeypatch.chdir(folder)
        python, script, flag, path = shlex.split(train_8p.translate_command(name))
        assert python == "python3" or Path(python).exists()
        assert Path(script).samefile(REPOSITORY / "translate.py")
        assert (flag, os.path.normpath(path)) == ("--ckptpath", name)
        assert not path.startswith("-")
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "prefix", "/usr")
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3.12")
    for found, python in (
        ("/usr/bin/python3", "python3"),
        ("/opt/python3", "/usr/bin/python3.12"),
        (None, "/usr/bin/python3.12"),
    ):
        monkeypatch.setattr(shutil, "which", lambda name, found=found: found)
        assert train_8p.translate_command("x") == f"{python} translate.py --ckptpath x"


def test_the_final_score_stands_once_and_says_what_it_compares_with(trained):
    _, _, out = trained
    assert len(re.findall(r"^BLEU score = ", out, re.MULTILINE)) == 1
    assert not re.search("^beam of 10: ", out, re.MULTILINE)
    end = out.partition("\nfinal scores: beam of 10\n")[2].splitlines()
    assert end[0].startswith("note: BLEU score is torchtext's, to compare with the ModelZoo.")


@pytest.mark.parametrize("place", [(scoring, "report"), (curves, "draw_run")], ids=lambda place: place[1])
def test_ctrl_c_in_the_final_score_says_what_is_kept(tiny_corpus, tmp_path, capsys, monkeypatch, place):
    """It was told as if all were lost."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(*place, interrupted)
    path = tmp_path / "model"
    flags = ["--data-dir", str(tiny_corpus), "--ckptpath", str(path), "-b", "16", "--epochs", "1"]
    code, _, err = run(*flags, capsys=capsys)
    assert code == 130
    what = f"the training is complete, and {path} is its best model; to score it, add --resume auto to the command"
    assert err == f"stopped by Ctrl-C: {what}\n"
    monkeypatch.undo()
    code, out, _ = run(*flags, "--resume", "auto", capsys=capsys)
    assert code == 0
    assert "BLEU score = " in out


def test_ctrl_c_says_once_what_is_kept_and_how_to_go_on(tiny_corpus, tmp_path, no_launcher, capfd):
    """In the real program, with a signal. In the first steps there is no model yet."""
    path = tmp_path / "model"
    command = [sys.executable, str(REPOSITORY / "train_8p.py"), *SMALL, "--data-dir", str(tiny_corpus), "-p", "1"]
    command += ["--epochs", "100000", "-b", "16", "--ckptpath", str(path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_signals
    )
    try:
        for line in process.stdout:
            if line.startswith("saved: "):
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    how = r"step \d+ is saved; to go on, add --resume auto to the command; the best model so far is (.*)"
    found = re.fullmatch(f"stopped by Ctrl-C: {how}\n", err)
    assert found, err
    assert found[1] == str(path)
    steps = [json.loads(line).get("step") for line in (tmp_path / "model.metrics.jsonl").read_text().splitlines()]
    assert steps[-1], "whole lines"


def scores_of(out):
    """By name, the BLEU of each way to decode, in order."""
    return {score.name: f"{score.bleu:.4f}" for score in logs.parse(out).scores}


def test_the_final_score_is_the_beams_beside_greedy(trained, capsys):
    folder, corpus, out = trained
    assert list(scores_of(out)) == ["greedy", "beam of 10"]
    assert logs.parse(out).final["BLEU score"] == scores_of(out)["beam of 10"]
    assert "\nlength penalty of the beam: 1.2\n" in out
    assert logs.TEST_LOSS.search(out)
    for line in (r"test free-running loss .*", r"chrF = \S+ \(.*nc:6.*\)"):
        assert re.search(f"^{line}$", out, re.MULTILINE)
    evaluate = ("--data-dir", str(corpus), "--evaluate", str(folder / "seq2seq-gru-model.pth.tar"))
    _, greedy, _ = run(*evaluate, "--beam-size", "1", capsys=capsys)
    assert scores_of(greedy) == {"greedy": scores_of(out)["greedy"]}
    assert logs.parse(greedy).final["BLEU score"] == scores_of(out)["greedy"]
    _, wide, _ = run(*evaluate, "--beam-size", "3", "--length-penalty", "0", capsys=capsys)
    assert list(scores_of(wide)) == ["greedy", "beam of 3"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [([], (3, 0.25)), (["--beam-size", "2"], (2, 0.25)), (["--length-penalty", "0.75"], (3, 0.75))],
)
def test_evaluate_decodes_as_the_flags_say_and_else_as_the_checkpoints_run_did(
    trained, tmp_path, capsys, monkeypatch, flags, expected
):
    folder, corpus, _ = trained
    saved = checkpoint.load(folder / "seq2seq-gru-model.pth.tar")
    saved.flags.update(beam_size=3, length_penalty=0.25)
    checkpoint.save(tmp_path / "model", saved)
    asked = []

    def recorder(*args, **options):
        asked.append((options["beam_size"], options["length_penalty"]))
        return beam_search(*args, **options)

    monkeypatch.setattr(scoring, "beam_search", recorder)
    code, _, err = run("--data-dir", str(corpus), "--evaluate", str(tmp_path / "model"), *flags, capsys=capsys)
    assert code == 0, err
    assert set(asked) == {expected}


def test_each_way_to_decode_has_its_own_scores(trained, capsys, monkeypatch):
    folder, corpus, _ = trained
    found = iter([scoring.Scores(1, 2, "", 3, ""), scoring.Scores(4, 5, "s", 6, "c")])
    monkeypatch.setattr(scoring, "evaluate", lambda translations, references: next(found))
    evaluate = ("--data-dir", str(corpus), "--evaluate", str(folder / "seq2seq-gru-model.pth.tar"))
    _, out, _ = run(*evaluate, "--beam-size", "3", capsys=capsys)
    assert "\ngreedy: BLEU 1.0000  sacreBLEU 2.0000  chrF 3.0000\n" in out
    assert "\nfinal scores: beam of 3\n" in out
    assert out.endswith("\nchrF = 6.0000 (c)\nsacreBLEU = 5.0000 (s)\nBLEU score = 4.0000\n")


@pytest.mark.parametrize(
    ("flags", "fixed_length"), [([], 46), (["--fixed-length", "0"], 0), (["--fixed-length", "9"], 9)]
)
def test_the_losses_of_the_score_have_the_padding_of_the_flag_and_else_of_the_training(
    trained, tmp_path, capsys, flags, fixed_length
):
    folder, corpus, out = trained
    saved = checkpoint.load(folder / "seq2seq-gru-model.pth.tar")
    saved.flags["fixed_length"] = 46
    checkpoint.save(tmp_path / "model", saved)
    _, again, _ = run("--data-dir", str(corpus), "--evaluate", str(tmp_path / "model"), *flags, capsys=capsys)
    how = f"padded or cut to {fixed_length} tokens" if fixed_length else "without padding"
    assert f"\nlosses: {how}\n" in again
    losses = [logs.TEST_LOSS.search(text).group() for text in (out, again)]
    assert (losses[0] == losses[1]) == (fixed_length == 0)


def test_a_beam_wider_than_the_vocabulary_is_as_wide_as_it(trained, capsys):
    folder, corpus, _ = trained
    evaluate = ("--data-dir", str(corpus), "--evaluate", str(folder / "seq2seq-gru-model.pth.tar"))
    code, out, err = run(*evaluate, "--beam-size", "1000", capsys=capsys)
    assert code == 0, err
    types = len(checkpoint.load(folder / "seq2seq-gru-model.pth.tar").trg_vocab)
    assert f"note: the beam is {types} wide, not 1000: " in out
    assert list(scores_of(out)) == ["greedy", f"beam of {types}"]


def test_a_checkpoint_of_the_modelzoo_recipe_is_scored_greedily(trained, tmp_path, capsys):
    folder, corpus, _ = trained
    saved = checkpoint.load(folder / "seq2seq-gru-model.pth.tar")
    saved.flags["beam_size"] = train_8p.RECIPES["modelzoo"]["beam_size"]
    checkpoint.save(tmp_path / "modelzoo", saved)
    _, out, _ = run("--data-dir", str(corpus), "--evaluate", str(tmp_path / "modelzoo"), capsys=capsys)
    assert list(scores_of(out)) == ["greedy"]


def test_the_originals_checkpoint_is_scored_with_the_data_s_vocabulary_if_it_fits(trained, tmp_path, capsys):
    folder, corpus, out = trained
    saved = checkpoint.load(folder / "seq2seq-gru-model.pth.tar")
    torch.save({f"module.{name}": tensor for name, tensor in saved.state_dict.items()}, tmp_path / "original")
    code, again, _ = run("--data-dir", str(corpus), "--evaluate", str(tmp_path / "original"), capsys=capsys)
    assert code == 0
    assert scores_of(again) == {"greedy": scores_of(out)["greedy"]}
    assert "\nlosses: padded or cut to 46 tokens\n" in again

    torch.save(gru.build(99, 98, emb_dim=2, hid_dim=3).state_dict(), tmp_path / "other")
    code, _, err = run("--data-dir", str(corpus), "--evaluate", str(tmp_path / "other"), capsys=capsys)
    assert code == 4
    assert "[99, 98]" in err
    assert err.count("\n") == 1


def contradicting_shapes() -> dict[str, torch.Tensor]:
    """A state dict with this model's names, whose shapes contradict each other."""
    state = gru.build(9, 8, emb_dim=2, hid_dim=4).state_dict()
    return state | {"decoder.fc_out.weight": state["decoder.fc_out.weight"].T.clone()}


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (torch.nn.Linear(2, 2).state_dict(), "no state dict of this model"),
        (contradicting_shapes(), "decoder.fc_out.weight has shape [10, 8], expected [8, 10]"),
    ],
    ids=["another model", "contradicting shapes"],
)
def test_a_file_with_weights_that_do_not_fit_is_refused(tiny_corpus, tmp_path, capsys, state, reason):
    path = tmp_path / "weights"
    torch.save(state, path)
    code, _, err = run("--data-dir", str(tiny_corpus), "--evaluate", str(path), capsys=capsys)
    assert code == 4
    assert err.startswith("error[checkpoint]: ")
    assert reason in err
    assert str(path) in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--src-lang", "fr"],
        ["--trg-lang", "fr"],
        ["--min-freq", "7"],
        ["--case", "keep"],
        ["--tokenizer", "space"],
        ["--subword", "50"],
        ["--max-vocab", "5"],
    ],
    ids=lambda flags: flags[0],
)
def test_a_flag_that_contradicts_the_checkpoint_is_refused(trained, capsys, flags):
    folder, corpus, _ = trained
    evaluate = ("--data-dir", str(corpus), "--evaluate", str(folder / "seq2seq-gru-model.pth.tar"))
    code, out, err = run(*evaluate, *flags, capsys=capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{' '.join(flags)} contradicts the checkpoint, which has " in err
    assert f"leave {flags[0]} out" in err
    assert "scored:" not in out


def test_flags_that_agree_with_the_checkpoint_are_no_contradiction(trained, capsys):
    folder, corpus, out = trained
    evaluate = ("--data-dir", str(corpus), "--evaluate", str(folder / "seq2seq-gru-model.pth.tar"))
    flags = "--src-lang de --trg-lang en --min-freq 2 --case lower --tokenizer spacy --subword 0 --max-vocab 0"
    code, again, err = run(*evaluate, *flags.split(), capsys=capsys)
    assert code == 0, err
    assert logs.parse(again).final == logs.parse(out).final


def test_a_checkpoint_from_before_flags_were_there_is_scored_as_then(trained, tmp_path, capsys):
    folder, corpus, out = trained
    saved = checkpoint.load(folder / "seq2seq-gru-model.pth.tar")
    for name in train_8p.LATER:
        del saved.flags[name]
    checkpoint.save(tmp_path / "model", saved)
    code, again, err = run("--data-dir", str(corpus), "--evaluate", str(tmp_path / "model"), capsys=capsys)
    assert code == 0, err
    assert logs.parse(again).final == logs.parse(out).final
    code, _, err = run(
        "--data-dir", str(corpus), "--evaluate", str(tmp_path / "model"), "--subword", "9", capsys=capsys
    )
    assert code == 2 and "--subword 9 contradicts the checkpoint, which has 0" in err


@pytest.fixture
def no_download(monkeypatch):
    def fails(*args, **options):
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(train_8p.data.download, "download_multi30k", fails)


def lines_of_scores(out):
    """The lines behind that which names the model and the device."""
    return out.partition("\nscored: ")[2].splitlines()[1:]


def test_the_test_pair_alone_is_enough_for_a_score_and_gives_the_same_one(trained, tmp_path, capsys, no_download):
    folder, corpus, _ = trained
    path = ("--evaluate", str(folder / "seq2seq-gru-model.pth.tar"))
    _, whole, _ = run("--data-dir", str(corpus), *path, capsys=capsys)
    for lang in ("de", "en"):
        (tmp_path / f"test.{lang}").write_bytes((corpus / f"test.{lang}").read_bytes())
    for _ in range(2):  # the second time from the cache
        code, alone, err = run("--data-dir", str(tmp_path), *path, capsys=capsys)
        assert code == 0, err
        assert lines_of_scores(alone) == lines_of_scores(whole) != []
        assert f"data: 6 test pairs; 11 de and 11 en types; in {tmp_path}\n" in alone
    assert "tokenising" not in alone
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.de", "test.en"]


def test_a_score_reads_neither_training_nor_validation_files(trained, tmp_path, capsys):
    folder, corpus, _ = trained
    for path in corpus.iterdir():
        broken = path.name.partition(".")[0] != "test"
        (tmp_path / path.name).write_bytes(b"\xff\n" if broken else path.read_bytes())
    flags = ("--data-dir", str(tmp_path), "--evaluate", str(folder / "seq2seq-gru-model.pth.tar"))
    code, out, err = run(*flags, capsys=capsys)
    assert code == 0, err
    assert run("--data-dir", str(tmp_path), "--performance", capsys=capsys)[0] == 3, "the fault must be real"


def test_a_score_without_its_test_pair_says_what_is_there(trained, tmp_path, capsys, no_download):
    folder, corpus, _ = trained
    (tmp_path / "train.de").write_text("ein hund\n")
    (tmp_path / "train.en").write_text("a dog\n")
    (tmp_path / "test.de").write_text("ein hund\n")
    flags = ("--data-dir", str(tmp_path), "--evaluate", str(folder / "seq2seq-gru-model.pth.tar"))
    code, _, err = run(*flags, capsys=capsys)
    says = "no test.de/en of the model, but test.de, train.de, train.en"
    assert (code, err) == (3, f"error[data]: {says}; {tmp_path}; put test.en beside test.de\n")


def test_the_languages_of_a_score_are_the_checkpoints(trained, tmp_path, capsys):
    folder, corpus, out = trained
    saved = checkpoint.load(folder / "seq2seq-gru-model.pth.tar")
    saved.about["src_lang"], saved.about["trg_lang"] = "xx", "de"
    checkpoint.save(tmp_path / "model", saved)
    for lang, own in (("xx", "de"), ("de", "en")):
        (tmp_path / f"test.{lang}").write_bytes((corpus / f"test.{own}").read_bytes())
    code, again, err = run("--data-dir", str(tmp_path), "--evaluate", str(tmp_path / "model"), capsys=capsys)
    assert code == 0, err
    assert "; 11 xx and 11 de types; in " in again
    assert logs.parse(again).final == logs.parse(out).final


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state.pop("encoder.rnn.weight_hh_l0"), "encoder.rnn.weight_hh_l0 is missing"),
        (lambda state: state.update({"encoder.rnn.bias_hh_l1": torch.zeros(36)}), "encoder.rnn.bias_hh_l1 is none of"),
        (lambda state: state.update({"encoder.rnn.bias_hh_l0": torch.zeros(48)}), "has shape [48], expected [36]"),
    ],
    ids=["less", "more", "another shape"],
)
def test_a_changed_models_checkpoint_is_refused_in_one_line(trained, tmp_path, capsys, change, reason):
    folder, corpus, _ = trained
    saved = checkpoint.load(folder / "seq2seq-gru-model.pth.tar")
    change(saved.state_dict)
    checkpoint.save(tmp_path / "model", saved)
    code, out, err = run("--data-dir", str(corpus), "--evaluate", str(tmp_path / "model"), capsys=capsys)
    assert (code, err.count("\n")) == (4, 1)
    assert err.startswith("error[checkpoint]: holds no state dict of this model: ")
    assert reason in err
    assert "the gru.py that it was trained with" in err
    assert "data:" not in out, "before the data is read"


def test_a_checkpoint_does_not_say_where_it_was_trained(tmp_path, capsys, monkeypatch):
    """Neither in its flags nor anywhere else. The state of a run has the folder of its data, which it needs."""
    secret = tmp_path / "telling-name"
    corpus, cache_dir = write_corpus(secret / "corpus"), secret / "cache"
    monkeypatch.chdir(secret)
    flags = ["--data-dir", str(corpus), "--cache-dir", str(cache_dir), "--ckptpath", str(secret / "model")]
    flags += ["--mirror", "https://telling-name.example", "--test-name", str(corpus / "test")]
    monkeypatch.setattr(Path, "unlink", lambda path, **_: None)  # which keeps the run's state
    for more in ([], ["--resume", "auto"]):
        code, _, err = run(*flags, "--epochs", "1", "-b", "32", "--addr", "127.0.0.1", *more, capsys=capsys)
        assert code == 0, err
        content = (secret / "model").read_bytes()
        for text in ("telling-name", str(tmp_path), os.uname().nodename, str(Path.home())):
            assert text.encode() not in content
    saved = checkpoint.load(secret / "model")
    assert saved.flags["test_name"] == "test"
    assert not set(checkpoint.OF_THE_MACHINE) & saved.flags.keys()
    given = resume.load(secret / "model.state").given
    assert given["data_dir"] == str(corpus)
    assert not set(train_8p.OF_THE_COMMAND) & given.keys()


# ---------------------------------------------------------------- letter case

CASED = (["Der Hund bellt.", "DER Hund läuft."] * 8, ["The Dog barks.", "THE dog runs."] * 8)


@pytest.fixture(scope="module")
def cased(tmp_path_factory):
    """As `trained`, but the run keeps case."""
    folder = tmp_path_factory.mktemp("cased")
    corpus = write_corpus(folder / "corpus", CASED, CASED, CASED)
    flags = ["--data-dir", corpus, "--epochs", "12", "-b", "2", "--case", "keep"]
    flags += ["--lr", "0.02", "--dropout", "0", "--output-dropout", "0", "--average", "0"]
    return folder, corpus, output_of_training(folder, *flags)


def test_a_model_that_keeps_case_has_capitals_and_both_scores(cased):
    folder, _, out = cased
    saved = checkpoint.load(folder / "seq2seq-gru-model.pth.tar")
    assert saved.flags["case"] == "keep"
    assert {"Der", "DER", "Hund"} <= set(saved.src_vocab)
    assert {"The", "THE", "Dog", "dog"} <= set(saved.trg_vocab)
    assert "hund" not in saved.src_vocab
    assert re.search("^  model      .*(The|THE|Dog)", out, re.MULTILINE), "a translation with a capital"
    epochs, lines = logs.parse(out).epochs, out.splitlines()
    found = [index for index, line in enumerate(lines) if line.startswith("validation: ")]
    below = [re.fullmatch(r"cased greedy BLEU (\d+\.\d{4})", lines[index + 1]) for index in found]
    assert len(epochs) == len(below) == 12
    assert all(float(cased[1]) <= epoch.bleu for cased, epoch in zip(below, epochs, strict=True))
    assert saved.scores["cased_bleu"] <= saved.scores["bleu"] + 1e-9
    greedy = r"^greedy: BLEU \S+  sacreBLEU \S+  chrF \S+\ngreedy, cased: BLEU "
    assert len(re.findall(greedy, out, re.MULTILINE)) == 1
    assert list(scores_of(out)) == ["greedy", "beam of 10"], "what tools read is of lower case alone"
    assert re.search(r"^cased BLEU = \S+$", out, re.MULTILINE)
    assert re.search(r"^BLEU score = \S+\Z", out.partition("\ndone: ")[0], re.MULTILINE), "at the end, as always"


def test_a_score_of_a_model_that_keeps_case_takes_it_from_the_checkpoint(cased, capsys):
    folder, corpus, out = cased
    evaluate = ("--data-dir", str(corpus), "--evaluate", str(folder / "seq2seq-gru-model.pth.tar"))
    code, again, err = run(*evaluate, capsys=capsys)
    assert code == 0, err
    assert lines_of_scores(again) == lines_of_scores(out.partition("\ndone: ")[0])
    code, _, err = run(*evaluate, "--case", "lower", capsys=capsys)
    assert code == 2
    assert "--case lower contradicts the checkpoint, which has keep" in err


def test_translations_in_other_case_count_in_the_score_of_lower_case_alone(cased, tmp_path, capsys):
    folder, corpus, _ = cased
    (tmp_path / "test.de").write_bytes((corpus / "test.de").read_bytes())
    (tmp_path / "test.en").write_text((corpus / "test.en").read_text().swapcase())
    flags = ("--evaluate", str(folder / "seq2seq-gru-model.pth.tar"))
    _, as_is, _ = run("--data-dir", str(corpus), *flags, capsys=capsys)
    _, swapped, _ = run("--data-dir", str(tmp_path), *flags, capsys=capsys)
    assert scores_of(swapped) == scores_of(as_is)
    assert float(scores_of(as_is)["greedy"]) > 50, "it has learned the pairs"
    (of_swapped,) = re.findall(r"^cased BLEU = (\S+)$", swapped, re.MULTILINE)
    (of_as_is,) = re.findall(r"^cased BLEU = (\S+)$", as_is, re.MULTILINE)
    assert float(of_swapped) < float(of_as_is)


def test_the_original_of_lower_case_says_nothing_about_case(trained):
    """With the default no line is another one. Only the file of flags at the end has the new one."""
    assert "cased" not in trained[2]
    assert trained[2].count("case = ") == trained[2].count("config: case = ") == 1


def test_a_second_run_keeps_the_first_ones_checkpoint_aside(tiny_corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("--data-dir", str(tiny_corpus), "--epochs", "1", "-b", "16")
    assert run(*arguments, capsys=capsys)[0] == 0
    first = Path("seq2seq-gru-model.pth.tar").read_bytes()
    code, out, _ = run(*arguments, "--seed", "2", capsys=capsys)
    assert code == 0
    assert "seq2seq-gru-model.pth.tar.previous" in out
    assert Path("seq2seq-gru-model.pth.tar.previous").read_bytes() == first


@pytest.mark.slow
def test_two_runs_that_are_killed_after_their_first_save_leave_a_finished_model(tiny_corpus, tmp_path):
    """Row 50. `test_checkpoint.py` has the quick form, without the program."""
    path = tmp_path / "model"
    arguments = ("--data-dir", str(tiny_corpus), "-b", "16", "--ckptpath", str(path))
    command = [sys.executable, str(REPOSITORY / "train_8p.py"), *SMALL, *arguments]
    assert subprocess.run([*command, "--epochs", "1"], capture_output=True).returncode == 0
    finished = path.read_bytes()
    for number in range(2):
        with subprocess.Popen([*command, "--epochs", "5000"], stdout=subprocess.PIPE, text=True) as process:
            assert any(line.startswith("saved: ") for line in process.stdout)
            process.kill()
        assert process.returncode == -signal.SIGKILL, "the fault must be real"
        assert not checkpoint.load(path).completed
        assert path.with_name("model.previous.1" if number else "model.previous").read_bytes() == finished
    done = subprocess.run([*command, "--epochs", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "what stood there is now model.previous.2" in done.stdout
    assert path.with_name("model.previous.1").read_bytes() == finished
    assert checkpoint.load(path).completed


def test_a_disk_that_is_full_at_a_later_save_ends_the_run_with_5_and_the_best_so_far(
    tiny_corpus, tmp_path, capsys, monkeypatch
):
    """Row 11. The disk fills in the second of the best epochs, after half of the file."""
    path, saves, fsync = tmp_path / "model", [], os.fsync
    bleus = iter([1.0, 2.0])

    def full(descriptor):
        if "/model.partial-" in os.readlink(f"/proc/self/fd/{descriptor}"):
            saves.append(descriptor)
            if len(saves) == 2:
                raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(scoring, "validate", lambda *_: scoring.Validation(scoring.Losses(1.0, 1.0), next(bleus), []))
    code, out, err = run("--data-dir", str(tiny_corpus), "-b", "16", "--ckptpath", str(path), capsys=capsys)
    assert len(saves) == 2
    assert code == 5
    assert err.startswith("error[io]: cannot write the checkpoint: No space left on device; ")
    assert err.count("\n") == 1
    assert checkpoint.load(path).scores["bleu"] == 1.0
    assert not checkpoint.load(path).completed
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "corpus",
        "model",
        "model.metrics.jsonl",
        "model.state",
        "model.toml",
    ]


def test_the_name_of_a_checkpoint_forges_no_line_of_the_log(tiny_corpus, tmp_path, capsys):
    path = tmp_path / "m\nBLEU score = 99.0000\n* FPS@all 1.000\n"
    flags = ("--data-dir", str(tiny_corpus), "-b", "16", "--epochs", "1", "--ckptpath", str(path))
    for _ in range(2):  # the second says what it replaces, too
        code, out, err = run(*flags, capsys=capsys)
        assert code == 0, err
        assert path.exists()
        assert len(logs.FINAL_SCORE.findall(out)) == 3
        assert len(logs.RATE.findall(out)) == 1
        assert "99" not in logs.parse(out).final.values()


def test_the_same_seed_gives_the_same_run(tiny_corpus, tmp_path, capsys):
    digests = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        path = tmp_path / name
        arguments = ("--data-dir", str(tiny_corpus), "--epochs", "1", "-b", "16", "--seed", seed)
        assert run(*arguments, "--ckptpath", str(path), capsys=capsys)[0] == 0
        digests.append(torch.cat([t.flatten() for t in checkpoint.load(path).state_dict.values()]))
    assert torch.equal(digests[0], digests[1])
    assert not torch.equal(digests[0], digests[2])


# A run in which each of a recipe's settings matters, and another value of each.
PLAIN = {
    "epochs": 2,
    "batch_size": 24,
    "lr": 0.03,
    "schedule": "constant",
    "warmup": 0.0,
    "clip": 0.0,
    "teacher_forcing_ratio": 0.0,
    "dropout": 0.0,
    "output_dropout": 0.0,
    "label_smoothing": 0.0,
    "average": 0.0,
    "init": "normal",
    "update_bias": 0.0,
    "embeddings": "drawn",
    "fixed_length": 0,
    "batching": "random",
    "last_batch": "keep",
    "best": "bleu",
    "beam_size": 1,
}
OTHER = {
    "epochs": 1,
    "batch_size": 16,
    "lr": 0.01,
    "schedule": "cosine",
    "warmup": 0.5,
    "clip": 0.1,
    "teacher_forcing_ratio": 1.0,
    "dropout": 0.5,
    "output_dropout": 0.5,
    "label_smoothing": 0.1,
    "average": 0.5,
    "init": "orthogonal",
    "update_bias": 1.0,
    "embeddings": "cooccurrence",
    "fixed_length": 12,
    "batching": "like-length",
    "last_batch": "drop",
    "best": "loss",
    "beam_size": 2,
}


def test_every_setting_of_a_recipe_reaches_the_run(tiny_corpus, tmp_path, capsys):
    """Each flag changes a loss or a score, except the length penalty, which seldom changes a translation.

    Each flag of training changes the training losses.
    """

    def figures(settings):
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        path = ["--data-dir", str(tiny_corpus), "--ckptpath", str(tmp_path / "model")]
        code, out, err = run(*path, "--print-freq=1", *flags, capsys=capsys)
        assert code == 0, err
        losses = [step[3:] for step in step_lines(out)]
        return losses, re.findall(r"^(?:validation:|test |greedy|beam|BLEU score).*$", out, re.MULTILINE)

    assert {*PLAIN, "length_penalty"} == {*OTHER, "length_penalty"} == set(train_8p.RECIPES["tuned"])
    usual = figures(PLAIN)
    assert figures(PLAIN) == usual
    for name, value in OTHER.items():
        # BLEU is 0 in all epochs. Of twelve, the two losses are lowest in different ones.
        base = PLAIN | ({"epochs": 12} if name == "best" else {})
        plain = figures(base) if name == "best" else usual
        losses, scores = figures(base | {name: value})
        if name in ("average", "best", "beam_size"):
            assert (losses == plain[0], scores == plain[1]) == (True, False), name
        else:
            assert losses != plain[0], name


def test_each_step_draws_anew_what_it_reads(tiny_corpus, tmp_path, capsys, monkeypatch):
    drawn = []
    forced_segments = gru.forced_segments
    monkeypatch.setattr(
        gru, "forced_segments", lambda forced: drawn.append(tuple(forced[:4])) or forced_segments(forced)
    )
    flags = ("--epochs", "1", "-b", "4", "--teacher-forcing-ratio", "0.5", "--ckptpath", str(tmp_path / "model"))
    assert run("--data-dir", str(tiny_corpus), *flags, capsys=capsys)[0] == 0
    assert len({decision for decision in drawn if len(set(decision)) == 2}) > 4


def test_each_epoch_and_each_round_of_a_performance_run_has_an_order_of_its_own(tiny_corpus):
    settings = resolved(64, "--data-dir", str(tiny_corpus), "-b", "8", "--performance")
    corpus = train_8p.load_corpus(settings)

    def order(epoch):
        return torch.cat(list(train_8p.epoch_steps(settings, corpus, epoch))).tolist()

    rounds = order(0)  # 25 steps of 8 pairs, of which 64 make a round
    assert sorted(rounds[:64]) == sorted(rounds[64:128]) == list(range(64))
    assert rounds[:64] != rounds[64:128]
    assert order(1)[:64] == rounds[64:128], "a later epoch is what a round so much later is"


def test_the_best_epoch_is_that_of_the_highest_bleu_or_the_lowest_free_running_loss(tiny_corpus, tmp_path, monkeypatch):
    bleus, losses = [1.0, 3.0, 2.0, 3.0], [4.0, 3.0, 2.0, 2.5]
    for which, expected in (("bleu", 3), ("loss", 2)):  # of the two best by BLEU, the one with the lower loss
        path = tmp_path / which
        settings = resolved(64, "--data-dir", str(tiny_corpus), "--ckptpath", str(path), "--best", which)
        corpus = train_8p.load_corpus(settings)
        best = checkpoint.BestFile(path, "run", log=print)
        model = gru.build(len(corpus.src_vocab), len(corpus.trg_vocab))
        for epoch, (bleu, loss) in enumerate(zip(bleus, losses, strict=True)):
            # Read with the reference, the loss is best elsewhere.
            found = scoring.Validation(scoring.Losses(forced=9.0 - epoch, free_running=loss), bleu, [])
            monkeypatch.setattr(scoring, "validate", lambda *_, found=found: found)
            train_8p.validate(settings, World(), corpus, None, model, best, epoch, 1.0, 0.1)
        assert checkpoint.load(path).scores["epoch"] == expected


def test_of_equally_good_epochs_by_bleu_the_one_of_the_lower_loss_is_best(tiny_corpus, tmp_path, monkeypatch, capsys):
    """Kind B. Once it was the first of them, as here where BLEU is 0 in all."""
    for bleus, expected in (([0.0, 0.0, 0.0, 0.0], 2), ([1.0, 9.0, 9.0, 1.0], 2), ([9.0, 3.0, 1.0, 9.0], 3)):
        path = tmp_path / "model"
        settings = resolved(64, "--data-dir", str(tiny_corpus), "--ckptpath", str(path))
        corpus = train_8p.load_corpus(settings)
        best = checkpoint.BestFile(path, "run", log=print)
        model = gru.build(len(corpus.src_vocab), len(corpus.trg_vocab), emb_dim=2, hid_dim=3)
        for epoch, (bleu, loss) in enumerate(zip(bleus, [4.0, 3.0, 2.0, 2.5], strict=True)):
            found = scoring.Validation(scoring.Losses(forced=loss, free_running=9.0 - epoch), bleu, [])
            monkeypatch.setattr(scoring, "validate", lambda *_, found=found: found)
            train_8p.validate(settings, World(), corpus, None, model, best, epoch, 1.0, 0.1)
        assert checkpoint.load(path).scores["epoch"] == expected
        notes = capsys.readouterr().out.count("note: the best epoch so far has a greedy BLEU of ")
        assert notes == {0.0: 0, 1.0: 1, 9.0: 1}[bleus[0]], "of 0 the end of the run tells"


def test_a_run_without_any_bleu_says_what_its_best_epoch_is(tmp_path, capsys):
    """Kind B: no translation of two words has four in a row."""
    lines = ["ein hund", "eine katze"]
    corpus = write_corpus(tmp_path / "corpus", train=(lines * 8, lines * 8), val=(lines, lines), test=(lines, lines))
    arguments = ("--data-dir", str(corpus), "--epochs", "2", "--ckptpath", str(tmp_path / "model"))
    code, out, err = run(*arguments, capsys=capsys)
    assert code == 0, err
    assert "note: BLEU was 0 on the validation pairs in every epoch" in out
    scores = [(epoch.bleu, epoch.loss) for epoch in logs.parse(out).epochs]
    assert scores[0][0] == scores[1][0] == 0
    assert checkpoint.load(tmp_path / "model").scores["loss"] == pytest.approx(
        min(loss for _, loss in scores), abs=1e-3
    )


def test_a_limit_of_the_translations_length_reaches_each_score(tiny_corpus, tmp_path, capsys, monkeypatch):
    """Kind C: validation, the final score, and --evaluate, which goes by the run that made the checkpoint."""
    limits = []

    def recorder(decode):
        def decode_and_record(*args, **options):
            limits.append(options.get("max_len", args[-1]))
            return decode(*args, **options)

        return decode_and_record

    for name in ("greedy", "beam_search"):
        monkeypatch.setattr(scoring, name, recorder(getattr(scoring, name)))
    data_dir, path = ["--data-dir", str(tiny_corpus)], str(tmp_path / "model")
    for flags, expected in (([], {scoring.MAX_LENGTH}), (["--max-length", "5"], {5})):
        code, out, err = run(*data_dir, "--epochs", "1", "--ckptpath", path, *flags, capsys=capsys)
        assert code == 0, err
        assert len(limits) == 3, "greedy for the validation, both for the score"
        assert set(limits) == expected
        for split in ("validation", "test"):
            note = f" {split} references have more than 5 tokens: their translations end there\n"
            assert (note in out) == bool(flags)
        limits.clear()
    for flags, expected in (([], {5}), (["--max-length", "7"], {7})):
        assert run(*data_dir, "--evaluate", path, *flags, capsys=capsys)[0] == 0
        assert set(limits) == expected
        limits.clear()
    saved = checkpoint.load(Path(path))
    del saved.flags["max_length"]  # as in checkpoints of before
    checkpoint.save(Path(path), saved)
    assert run(*data_dir, "--evaluate", path, capsys=capsys)[0] == 0
    assert set(limits) == {scoring.MAX_LENGTH}


def test_an_empty_evaluate_scores_nothing_trains_nothing_and_replaces_nothing(tiny_corpus, tmp_path, capsys):
    """Kind D. Once it trained, and exit code 0 said that all was well."""
    path = tmp_path / "model"
    path.write_text("of an earlier run")
    code, out, err = run("--data-dir", str(tiny_corpus), "--ckptpath", str(path), "--evaluate", "", capsys=capsys)
    assert (code, out) == (2, "")
    assert err.startswith("error[usage]: argument --evaluate: the flag has an empty value")
    assert path.read_text() == "of an earlier run"


@pytest.mark.parametrize(
    "text",
    [".", "..", "/", "a.b", "../de", "de/../de", "cli", "é", "\udcff", "-", "x" * 5000, "\n"],
    ids=lambda text: ascii(text)[:9],
)
@pytest.mark.parametrize("flag", ["--src-lang", "--trg-lang", "--train-name", "--test-name"])
def test_a_name_of_any_form_is_one_line_with_a_documented_exit_code(tiny_corpus, capsys, flag, text):
    """Row 33's kind for names."""
    code, _, err = run("--data-dir", str(tiny_corpus), f"{flag}={text}", capsys=capsys)
    assert code in (2, 3, 5)
    assert err.startswith("error[")
    assert err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--data-dir", "--evaluate", "--ckptpath"])
def test_a_path_that_is_too_long_is_one_line(tiny_corpus, capsys, flag):
    """Row 33's kind for paths."""
    corpus = [] if flag == "--data-dir" else ["--data-dir", str(tiny_corpus)]
    code, _, err = run(*corpus, f"{flag}={'x' * 5000}", capsys=capsys)
    assert code in (3, 4, 5)
    assert err.startswith("error[")
    assert err.count("\n") == 1


def test_a_language_without_known_words_is_noted_and_min_freq_keeps_them(tmp_path, capsys):
    """Kind N: each word stands once."""
    lines = [" ".join(f"{letter}{number}" for letter in "abcde") for number in range(8)]
    corpus = write_corpus(tmp_path / "corpus", train=(lines, lines), val=(lines, lines), test=(lines, lines))
    arguments = ("--data-dir", str(corpus), "--epochs", "1", "--ckptpath", str(tmp_path / "model"))
    code, out, err = run(*arguments, capsys=capsys)
    assert code == 0, err
    assert "; 4 de and 4 en types; in " in out, "the fault"
    for lang in ("de", "en"):
        assert (
            f"note: 100% of the {lang} words of train are unknown, because they stand there fewer than 2 times" in out
        )
    code, out, err = run(*arguments, "--min-freq", "1", capsys=capsys)
    assert code == 0, err
    assert "; 44 de and 44 en types; in " in out
    assert "are unknown" not in out
    code, out, err = run(*arguments, "--min-freq", "1", "--max-vocab", "10", capsys=capsys)
    assert code == 0, err
    assert "; 14 de and 14 en types; in " in out
    assert "note: 75% of the en words of train are unknown; a lower --min-freq, or a higher --max-vocab, keeps" in out
    path = str(tmp_path / "model")
    assert run("--data-dir", str(corpus), "--evaluate", path, capsys=capsys)[0] == 0, "it has its own vocabularies"


def test_the_modelzoo_recipe_trains(tiny_corpus, tmp_path, capsys):
    arguments = ("--data-dir", str(tiny_corpus), "--recipe", "modelzoo", "--epochs", "1", "-b", "30", "--amp")
    code, out, err = run(*arguments, "--ckptpath", str(tmp_path / "model"), capsys=capsys)
    assert code == 0, err
    assert [step[:3] for step in step_lines(out)] == [("0", "2", "2")], "64 pairs: the last four are left out"


def test_a_performance_run_goes_round_until_25_steps_and_leaves_nothing(tiny_corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    code, out, _ = run("--data-dir", str(tiny_corpus), "--performance", "-b", "16", capsys=capsys)
    assert code == 0
    assert [step[1] for step in step_lines(out)] == ["10", "20", "25"]
    assert "BLEU" not in out.replace("best=bleu", "")
    assert out.count("* FPS@all ") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("evaluates", [False, True])
def test_the_log_names_the_folder_that_was_read_also_from_a_warm_cache(trained, tmp_path, capsys, evaluates):
    """Kind E: with a training, and with --evaluate. Kind M: the share of unknown words stands below."""
    folder = write_corpus(tmp_path / "a\x1b[2Jb" / "multi30k").parent
    flags = ["--evaluate", str(trained[0] / "seq2seq-gru-model.pth.tar")] if evaluates else ["--performance"]
    for _ in range(2):
        code, out, err = run("--data-dir", str(folder), *flags, capsys=capsys)
        assert code == 0, err
        lines = out.splitlines()
        (place,) = (place for place, line in enumerate(lines) if line.startswith("data: "))
        assert lines[place].endswith(f"; in {tmp_path}/a\\x1b[2Jb/multi30k")
        assert lines[place + 1].startswith(f"unknown words: de {'test' if evaluates else 'train'} ")


def test_without_a_data_dir_the_sample_is_used_with_a_notice(monkeypatch, tiny_corpus, capsys):
    monkeypatch.setattr(train_8p, "SAMPLE", tiny_corpus)
    code, out, _ = run("--performance", capsys=capsys)
    assert code == 0
    assert "bundled sample" in out


def test_a_loss_that_stays_nan_ends_the_run_with_7_and_keeps_no_checkpoint(tiny_corpus, tmp_path, capsys, monkeypatch):
    """Row 44."""
    forward = gru.TrainingLoss.forward
    monkeypatch.setattr(gru.TrainingLoss, "forward", lambda self, *args: forward(self, *args) * float("nan"))
    path = tmp_path / "model"
    arguments = ("--data-dir", str(tiny_corpus), "-b", "4", "--print-freq", "1", "--ckptpath", str(path))
    code, out, err = run(*arguments, capsys=capsys)
    assert code == 7
    assert len(out.split("Loss nan")) - 1 == nmt.log.LINES_WITHOUT_A_LOSS
    assert "epoch 1, step 3" in err
    assert not path.exists()


@pytest.mark.parametrize("best", ["bleu", "loss"])
def test_a_nan_loss_of_short_epochs_is_never_the_best(tiny_corpus, tmp_path, capsys, monkeypatch, best):
    """Row 44."""
    forward = gru.TrainingLoss.forward
    monkeypatch.setattr(gru.TrainingLoss, "forward", lambda self, *args: forward(self, *args) * float("nan"))
    path = tmp_path / "model"
    path.write_text("of an earlier run")
    arguments = ("--data-dir", str(tiny_corpus), "-b", "32", "--best", best, "--ckptpath", str(path))
    code, out, err = run(*arguments, capsys=capsys)
    assert code == 7, err
    assert "BLEU score" not in out
    assert not path.exists()
    assert path.with_name("model.previous").read_text() == "of an earlier run"


@pytest.mark.parametrize(
    "flags",
    ["-b 4 -p 1", "-b 64 --epochs 1", "-b 32 --recipe modelzoo", "-b 4 --amp --amp-dtype bfloat16 --opt-level O3"],
    ids=["lines", "one step", "modelzoo", "O3"],
)
def test_a_loss_that_explodes_is_7_and_the_model_of_before_is_kept(tiny_corpus, tmp_path, capsys, flags):
    """Row 44: all numbers are finite. In a run of one step the validation tells."""
    path = tmp_path / "model"
    path.write_text("of an earlier run")
    arguments = ("--data-dir", str(tiny_corpus), "--lr", "1e6", "--warmup", "0", *flags.split())
    code, out, err = run(*arguments, "--ckptpath", str(path), capsys=capsys)
    assert code == 7, err
    assert "nan" not in out + err
    assert "inf" not in (out + err).lower().replace("infer", "")
    assert err.startswith("error[diverged]: ")
    assert err.count("\n") == 1
    assert "saved:" not in out
    assert not path.exists()
    assert path.with_name("model.previous").read_text() == "of an earlier run"


def test_a_weight_that_is_not_finite_is_never_saved(tiny_corpus, tmp_path, capsys, monkeypatch):
    """Row 44: the word of such a vector may stand in no validation pair, so that no loss tells."""
    refresh = precision.NativeTrainer.refresh_model

    def spoil(self):
        refresh(self)
        with torch.no_grad():
            self.model.encoder.embedding.weight[1] = float("inf")  # `<pad>`, which is not read

    monkeypatch.setattr(precision.NativeTrainer, "refresh_model", spoil)
    path = tmp_path / "model"
    arguments = ("--data-dir", str(tiny_corpus), "--epochs", "1", "--average", "0", "--ckptpath", str(path))
    code, out, err = run(*arguments, capsys=capsys)
    assert code == 7
    assert err.startswith("error[diverged]: a weight is not finite; epoch 1; ")
    assert not path.exists()


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--data-dir", "{empty}", "--src-lang", "fr"], 3),
        (["--evaluate", "{empty}/absent"], 4),
        (["--evaluate", "{empty}/absent", "--data-dir", "{empty}/absent/too"], 4),
        (["--ckptpath", "{empty}/no/such/folder/model"], 5),
        (["--ckptpath", "{empty}/folder/"], 2),  # kind L
        (["--ckptpath", "{empty}/none/../model"], 5),
        (["--opt-level", "O3", "--amp", "--loss-scale", "32"], 2),
        (["--amp", "--amp-backend", "apex", "--amp-dtype", "bfloat16"], 2),
        (["--lr", "nan"], 2),
        (["--seed", "99999999999999999999"], 2),
        (["--dist-url", "foo"], 2),
        (["--case", "upper"], 2),
        (["--cache-dir", "{empty}/file/below"], 5),
        (["--data-dir", "{empty}/slip"], 3),
    ],
)
def test_bad_input_is_one_line_with_the_kinds_exit_code(tiny_corpus, tmp_path, flags, code, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "file").touch()
    flags = [flag.format(empty=empty) for flag in flags]
    if "--data-dir" not in flags:
        flags += ["--data-dir", str(tiny_corpus)]
    actual, _, err = run(*flags, capsys=capsys)
    assert actual == code
    assert err.startswith("error[")
    assert err.count("\n") == 1
    assert err.count(";") >= 2


@pytest.mark.parametrize(("overflows", "expected"), [({1}, 0), ({0, 1, 2, 3}, 7)])
def test_steps_that_overflow_are_told_and_a_run_of_nothing_else_has_diverged(
    tiny_corpus, tmp_path, capsys, monkeypatch, overflows, expected
):
    """Row 45."""
    steps = iter(range(4))
    backward = precision.NativeTrainer.backward
    factor = {True: float("inf"), False: 1.0}
    monkeypatch.setattr(
        precision.NativeTrainer,
        "backward",
        lambda self, loss, **how: backward(self, loss * factor[next(steps) in overflows], **how),
    )
    arguments = ("--data-dir", str(tiny_corpus), "-b", "16", "--epochs", "1", "--ckptpath", str(tmp_path / "model"))
    code, out, err = run(*arguments, capsys=capsys)
    assert code == expected, err
    if expected:
        assert "the gradients of 4 of 4 steps were not finite" in err
    else:
        assert "note: 1 of 4 steps changed no weight" in out


@pytest.mark.parametrize(
    ("flags", "dtype", "device_type", "warned"),
    [
        (["--fixed-length", "46"], torch.bfloat16, "cpu", True),
        (["--fixed-length", "46"], torch.bfloat16, "cuda", True),
        (["--fixed-length", "46"], torch.float16, "cpu", True),
        (["--fixed-length", "46"], torch.float16, "cuda", True),
        (["--fixed-length", "46"], torch.float32, "cuda", True),
        (["--fixed-length", "46"], torch.float16, "npu", False),
        (["--fixed-length", "46"], torch.float32, "cpu", False),
        (["--fixed-length", "46", "--performance"], torch.bfloat16, "cpu", False),
        (["--recipe", "tuned"], torch.bfloat16, "cpu", False),
        (["--recipe", "modelzoo"], torch.bfloat16, "cpu", False),
    ],
)
def test_padding_that_is_read_is_warned_of_where_no_run_has_learned(
    tiny_corpus, monkeypatch, flags, dtype, device_type, warned
):
    settings = resolved(64, "--data-dir", str(tiny_corpus), *flags)
    monkeypatch.setattr(World, "describe", lambda self: "")
    world, mixed = World(device_type=device_type), precision.Choice("O2", dtype)
    lines = list(train_8p.description(settings, mixed, world, train_8p.load_corpus(settings), {}))
    assert any(line.startswith("note: with --fixed-length 46 the encoder may never") for line in lines) == warned


def test_flags_without_effect_are_named(tiny_corpus, capsys):
    arguments = ("--data-dir", str(tiny_corpus), "--performance", "-b", "16", "--opt-level", "O2")
    assert "note: --opt-level has no effect without --amp\n" in run(*arguments, capsys=capsys)[1]
    assert "note:" not in run(*arguments, "--amp", "--amp-dtype", "bfloat16", capsys=capsys)[1]
    in_o0 = (*arguments[:-1], "O0", "--amp", "--amp-dtype", "float16", "--amp-backend", "apex")
    assert "note: --amp-dtype and --amp-backend have no effect in O0\n" in run(*in_o0, capsys=capsys)[1]


def test_flags_without_effect_on_a_score_are_named(trained, capsys):
    folder, corpus, _ = trained
    evaluate = ("--data-dir", str(corpus), "--evaluate", str(folder / "seq2seq-gru-model.pth.tar"), "--beam-size", "1")
    note = "note: no effect with --evaluate: --emb-dim, --hid-dim\n"
    assert note in run(*evaluate, "--fixed-length", "8", capsys=capsys)[1], "what `run` gives"
    unused = ("--recipe", "modelzoo", "--amp", "-b", "3", "-p", "7", "--performance")
    expected = "--recipe, --batch-size, --amp, --performance, --emb-dim, --hid-dim, --print-freq"
    assert f"note: no effect with --evaluate: {expected}\n" in run(*evaluate, *unused, capsys=capsys)[1]


def test_the_help_needs_no_package_and_has_common_flags_first_and_examples():
    command = [sys.executable, "-S", REPOSITORY / "train_8p.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    parts = ["\ncommon flags:\n", "\n  --data-dir DIR", "\nadvanced: data:\n", "\nexamples:\n"]
    assert sorted(parts, key=done.stdout.index) == parts
    for field in dataclasses.fields(train_8p.Settings):
        assert f"--{field.name.replace('_', '-')}" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on a CPU")
def test_a_compiled_loss_is_the_same_loss(tiny_corpus, tmp_path):
    def losses(*flags):
        command = [sys.executable, REPOSITORY / "train_8p.py", "--data-dir", tiny_corpus, "--performance", "-p", "1"]
        done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=600, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return [float(step[3]) for step in step_lines(done.stdout)]

    assert losses("--compile-loss") == pytest.approx(losses(), rel=1e-3)


# ---------------------------------------------------------------- one pair of files


@pytest.fixture(scope="module")
def split_run(tmp_path_factory):
    """A finished run with one pair of files, `own.de` and `own.en`: its folder, the corpus, its flags, its output."""
    folder = tmp_path_factory.mktemp("split")
    corpus = write_corpus(folder / "corpus", 80)
    for path in list(corpus.iterdir()):
        if path.stem == "train":
            path.rename(corpus / f"own{path.suffix}")
        else:
            path.unlink()
    flags = ("--data-dir", str(corpus), "--train-name", "own", "--val-split", "8", "--epochs", "2", "-b", "4")
    return folder, corpus, flags, output_of_training(folder, *flags)


def test_val_split_takes_pairs_out_of_train_and_says_so(split_run):
    _, corpus, _, out = split_run
    assert "\ndata: 64 training, 8 validation, 8 test pairs; " in out
    assert "\n--val-split: 8 validation and 8 test pairs were taken out of own.de and own.en\n" in out
    assert sorted(path.name for path in corpus.iterdir()) == ["own.de", "own.en"]


def test_a_score_takes_the_same_test_pairs_out_of_train_as_the_checkpoint_says(split_run, tmp_path, capsys):
    folder, corpus, _, out = split_run
    evaluate = ("--data-dir", str(corpus), "--evaluate", str(folder / "seq2seq-gru-model.pth.tar"))
    for flags in ((), ("--seed", "5"), ("--train-name", "own", "--val-split", "8"), ("--cache-dir", str(tmp_path))):
        code, again, err = run(*evaluate, *flags, capsys=capsys)
        assert code == 0, err
        assert "\n--val-split: 8 validation and 8 test pairs were taken out of own.de and own.en\n" in again
        assert logs.parse(again).final == logs.parse(out).final
        assert "note: the test pairs" not in again
    code, _, err = run(*evaluate, "--val-split", "9", capsys=capsys)
    assert (code, err.count("\n")) == (2, 1) and "--val-split 9 contradicts the checkpoint, which has 8" in err


def test_a_score_says_that_the_text_is_another_one_than_the_models(split_run, tmp_path, capsys):
    folder, corpus, _, _ = split_run
    for path in corpus.iterdir():
        (tmp_path / path.name).write_text(path.read_text() + "neu\n")
    flags = ("--data-dir", str(tmp_path), "--evaluate", str(folder / "seq2seq-gru-model.pth.tar"))
    code, out, err = run(*flags, capsys=capsys)
    assert code == 0, err
    assert "note: the test pairs are taken out of another text than the model was trained on: " in out


def test_a_score_takes_test_files_where_they_are(split_run, tmp_path, capsys):
    folder, corpus, _, _ = split_run
    write_corpus(tmp_path, test=3)
    flags = ("--data-dir", str(tmp_path), "--evaluate", str(folder / "seq2seq-gru-model.pth.tar"))
    code, out, err = run(*flags, capsys=capsys)
    assert code == 0, err
    assert "data: 3 test pairs; " in out and "val-split" not in out


def test_the_split_does_not_depend_on_the_seed_and_its_text_can_be_seen(split_run, tmp_path, capsys):
    _, corpus, flags, _ = split_run
    written = []
    for seed in ("1", "2"):
        more = ("--seed", seed, "--performance", "--write-split", str(tmp_path / seed))
        code, out, err = run(*flags, *more, capsys=capsys)
        assert code == 0, err
        assert f"the text of train, val and test was written to {tmp_path / seed}\n" in out
        written.append({path.name: path.read_bytes() for path in (tmp_path / seed).iterdir()})
    assert written[0] == written[1]
    assert sorted(written[0]) == [f"{name}.{lang}" for name in ("test", "train", "val") for lang in ("de", "en")]
    for lang in ("de", "en"):
        lines = b"".join(text for name, text in written[0].items() if name.endswith(lang)).splitlines()
        assert sorted(lines) == sorted((corpus / f"own.{lang}").read_bytes().splitlines())


@pytest.mark.parametrize("there", [("val",), ("test",), ("val", "test")])
def test_files_that_are_there_are_used_as_they_are(tmp_path, capsys, there):
    folder = write_corpus(tmp_path / "corpus", 64, val=3, test=3)
    for name in {"val", "test"} - set(there):
        for lang in ("de", "en"):
            (folder / f"{name}.{lang}").unlink()
    flags = ("--data-dir", str(folder), "--val-split", "8", "--performance")
    code, out, err = run(*flags, capsys=capsys)
    assert code == 0, err
    sizes = {name: 3 if name in there else 8 for name in ("val", "test")}
    taken = 8 * (2 - len(there))
    assert f"data: {64 - taken} training, {sizes['val']} validation, {sizes['test']} test pairs; " in out
    names = " and ".join(f"{name}.{lang}" for name in there for lang in ("de", "en"))
    assert f"\n--val-split does not concern {names}: these files are used as they are\n" in out


def test_a_written_split_trains_as_the_flag_does_and_stays_as_it_is(split_run, tmp_path, capsys):
    folder, _, flags, out = split_run
    evaluate = (
        *flags[:2],
        "--evaluate",
        str(folder / "seq2seq-gru-model.pth.tar"),
        "--write-split",
        str(tmp_path / "a"),
    )
    for says in ("was written to", "is in"):
        code, again, err = run(*evaluate, capsys=capsys)
        assert code == 0, err
        assert f"the text of train, val and test {says} {tmp_path / 'a'}\n" in again
    model = ("--epochs", "2", "-b", "4", "--ckptpath", str(tmp_path / "model"))
    code, other, err = run("--data-dir", str(tmp_path / "a"), *model, capsys=capsys)
    assert code == 0, err
    assert step_lines(other) == step_lines(out)
    assert logs.parse(other).final == logs.parse(out).final
    (tmp_path / "a" / "val.de").write_text("other\n")
    code, _, err = run(*evaluate, capsys=capsys)
    assert (code, err.count("\n")) == (5, 1) and "the folder has something else in it" in err


@pytest.mark.parametrize(("pairs", "says"), [("21", "give --val-split 20 or less"), ("99999", "20 or less")])
def test_a_split_that_is_too_large_is_one_line(split_run, capsys, pairs, says):
    _, corpus, _, _ = split_run
    code, _, err = run("--data-dir", str(corpus), "--train-name", "own", "--val-split", pairs, capsys=capsys)
    assert (code, err.count("\n")) == (3, 1)
    assert f"--val-split {pairs} takes {2 * int(pairs)} pairs out of 80, and as many must stay for training" in err
    assert says in err
