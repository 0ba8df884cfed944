"""Command lines: what is taken, and what is refused with exit code 2 and the flag's name."""

import dataclasses
import inspect

import scoring
import train_8p
from nmt import flags

import pytest
import torch
from conftest import refused


def parse(*flags: str):
    return train_8p.build_parser().parse_args(list(flags))


ROWS = {flags.flag_of(row.name): row for row in dataclasses.fields(train_8p.Settings)}
NUMBERS = [flag for flag, row in ROWS.items() if inspect.isfunction(row.metadata["takes"])]
TEXTS = [flag for flag, row in ROWS.items() if isinstance(row.metadata["takes"], str)]


def test_every_flag_with_a_value_is_a_number_a_choice_or_a_text():
    choices = [flag for flag, row in ROWS.items() if isinstance(row.metadata["takes"], tuple)]
    switches = [flag for flag, row in ROWS.items() if row.metadata["takes"] is None]
    assert sorted([*NUMBERS, *TEXTS, *choices, *switches]) == sorted(ROWS)
    assert {"--lr", "--epochs", "--device-list", "--npu", "--seed"} <= set(NUMBERS)
    assert {"--evaluate", "--data-dir", "--ckptpath", "--src-lang", "--addr", "--train-name"} <= set(TEXTS)


@pytest.mark.parametrize(
    "text", ["nan", "inf", "-inf", "1_0", "٣", "", "abc", "0x10", "1e999", "1e39", " 1", "1 ", "1\n", "1\0", "９"]
)
@pytest.mark.parametrize("flag", NUMBERS)
def test_what_is_no_plain_number_is_refused_with_flag_and_value(flag, text):
    """Row 33."""
    message = refused("usage", parse, f"{flag}={text}")
    assert flag in message
    assert repr(text).replace("\\", "") in message.replace("\\", "")


MAY_BE_0 = ["--workers", "--warmup", "--clip", "--teacher-forcing-ratio", "--dropout", "--output-dropout"]
MAY_BE_0 += [
    "--val-split",
    "--label-smoothing",
    "--average",
    "--update-bias",
    "--fixed-length",
    "--length-penalty",
    "--seed",
]
MAY_BE_0 += ["--subword", "--bpe-dropout", "--max-vocab", "--patience", "--device-id"]
MAY_BE_0 += ["--npu", "--gpu", "--bleu-npu", "--device-list", "--rank", "--world-size"]  # `plan` refuses a world of 0


@pytest.mark.parametrize("flag", NUMBERS)
def test_0_and_less_are_refused_where_they_have_no_meaning(flag):
    """Row 33. `plan` reads --rank and --world-size, of which -1 is the default."""
    if flag in MAY_BE_0:
        parse(f"{flag}=0")
    else:
        assert flag in refused("usage", parse, f"{flag}=0")
    if flag in ("--rank", "--world-size", "--update-bias"):
        parse(f"{flag}=-1")
    else:
        assert flag in refused("usage", parse, f"{flag}=-1")


@pytest.mark.parametrize("flag", TEXTS)
@pytest.mark.parametrize(("text", "reason"), [("", "has an empty value"), ("a\0b", "has a NUL byte")])
def test_a_text_is_not_empty_and_has_no_nul_byte(flag, text, reason):
    """Kind D: most often an empty value is a variable that is not set. Once it trained instead of scoring."""
    for arguments in ([f"{flag}={text}"], [flag, text], ["--lr=1", "--", flag, text]):
        message = refused("usage", parse, *arguments)
        assert flag in message
        assert reason in message
    if flag == "--config":  # it is read
        refused("usage", parse, flag, " ", says="cannot read the file of flags: No such file or directory;  ;")
    else:
        assert vars(parse(flag, " "))[ROWS[flag].name] == " "


@pytest.mark.parametrize("flag", [flag for flag in ROWS if flag not in (*NUMBERS, *TEXTS)])
def test_an_empty_choice_and_a_value_for_a_switch_are_refused(flag):
    """Kind D."""
    assert flag in refused("usage", parse, f"{flag}=")


@pytest.mark.parametrize(
    ("flag", "most", "more"),
    [
        ("--emb-dim", "65536", "65537"),
        ("--hid-dim", "65536", "65537"),
        ("--max-length", "1000", "1001"),
        ("--fixed-length", "1000", "1001"),
        ("--dist-timeout", "1e9", "1.1e9"),
        ("--lr", "3e38", "3.1e38"),
        ("--clip", "3e38", "3.1e38"),
        ("--update-bias", "-3e38", "-3.1e38"),
    ],
)
def test_a_number_that_would_overflow_is_refused(flag, most, more):
    """Row 33. Beyond it there are tracebacks, or numbers that are not finite."""
    parse(f"{flag}={most}")
    assert flag in refused("usage", parse, f"{flag}={more}")


@pytest.mark.parametrize(
    "flag", ["--dropout=1", "--dropout=1.5", "--teacher-forcing-ratio=2", "--label-smoothing=-0.1"]
)
def test_a_probability_lies_between_0_and_1(flag):
    refused("usage", parse, flag)


@pytest.mark.parametrize("flag", ["--batch", "--mult", "--eval", "--no-such-flag", "stray"])
def test_an_abbreviated_or_unknown_flag_is_refused(flag):
    """Row 34."""
    refused("usage", parse, flag, "4") if flag != "--mult" else refused("usage", parse, flag)


@pytest.mark.parametrize("args", [["--lr", "1", "--lr", "2"], ["--lr=1", "--learning_rate=2"], ["-b", "1", "-b2"]])
def test_a_repeated_flag_is_refused(args):
    """Row 34."""
    assert "more than once" in refused("usage", parse, *args)


@pytest.mark.parametrize("text", ["0,0", "0,,1", "-1", "a", "", "0,", "0 1", "٣"])
def test_a_faulty_device_list_is_refused(text):
    """Row 35."""
    assert "--device-list" in refused("usage", parse, f"--device-list={text}")


def test_every_flag_has_two_spellings():
    parser = train_8p.build_parser()
    for action in parser._actions:
        for name in action.option_strings:
            assert "_" not in name, "the hyphened spelling is the one in the help"
    args = parse("--data_dir", "a_b", "--batch_size=8", "--multiprocessing_distributed", "--epoch", "3")
    assert (args.data_dir, args.batch_size, args.multiprocessing_distributed, args.epochs) == ("a_b", 8, True, 3)


def test_the_originals_flags_are_all_taken():
    args = parse(
        *"-j 4 --data-dir d --epochs 2 -b 32 --lr 0.1 --print-freq 5 --seed 7 --ckptpath c --evaluate e".split(),
        *"--world-size 1 --rank 0 --addr 127.0.0.1 --dist-url env:// --dist-backend gloo".split(),
        *"--multiprocessing-distributed --device cpu --npu 0 --gpu 0 --device-list 0,1 --bleu-npu 1".split(),
        *"--amp --opt-level O1 --loss-scale dynamic".split(),
    )
    assert (args.workers, args.batch_size, args.loss_scale, args.device_list) == (4, 32, "dynamic", [0, 1])


def test_what_stands_behind_a_lone_dash_dash_wins():
    """Row 34: the user's flag over a wrapper's."""
    args = parse("--lr=0.1", "--epochs=3", "--", "--lr=0.2")
    assert (args.lr, args.epochs) == (0.2, 3)
    refused("usage", parse, "--lr=0.1", "--", "--lr=0.2", "--lr=0.3")


@pytest.mark.parametrize("flag", ["--batch-size=--", "--data_dir=--", "-b--", "-b=--"])
def test_dash_dash_is_no_value(flag):
    """Kind D. argparse would drop it and fail with a TypeError."""
    assert "'--' is not a value" in refused("usage", parse, flag)
    assert "'--' is not a value" in refused("usage", parse, "--lr=0.1", "--", flag)


def test_values_are_taken_as_they_are():
    assert parse("--data-dir=-a b$(c)*\n").data_dir == "-a b$(c)*\n"


def test_the_help_shows_every_default_and_no_none(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for shown in (
        "(default: 10)",
        "(default: O2)",
        "(modelzoo: 512, tuned: 64)",
        "(modelzoo: 0.003, tuned: 0.003)",
        "(default: 1234)",
        f"left out: {scoring.MAX_LENGTH}, or as many",
        "(default: ./seq2seq-gru-model.pth.tar)",
    ):
        assert shown in text
    assert "None" not in text


def test_with_the_highest_length_penalty_scores_are_still_normal_numbers():
    highest = parse("--length-penalty=10").length_penalty
    longest = parse("--max-length=1000").max_length
    least = torch.tensor(-1e-6) / float(longest) ** highest  # of a hypothesis that is all but certain
    assert least <= -torch.finfo(torch.float32).tiny


def test_numbers_are_taken_in_plain_forms():
    assert [flags.decimal(text) for text in ("1", "0.5", ".5", "1e-3", "2.")] == [1.0, 0.5, 0.5, 0.001, 2.0]


@dataclasses.dataclass(frozen=True)
class Repeating:
    names: list[str] | None = flags.row("flags", None, "NAME", "names", also="-n", repeats=True)
    number: int = flags.row("flags", 3, flags.positive_int, "a number")


def test_a_flag_may_be_repeated_if_its_row_says_so():
    def parse(*arguments):
        parsed = flags.parser_of(Repeating, prog="p").parse_args(list(arguments))
        return parsed.names, parsed.number

    assert parse() == (None, 3)
    assert parse("--names", "a") == (["a"], 3)
    assert parse("--names", "a", "-n", "b", "--names=c") == (["a", "b", "c"], 3)
    refused("usage", parse, "--number=1", "--number=2", says="more than once")
    refused("usage", parse, "--names=a", "--names=", says="empty")
    refused("usage", parse, "--names=a", "--names", "--", says="--names")


def test_repeated_flags_behind_a_lone_hyphen_override_those_before_it():
    def parse(*arguments):
        return flags.parser_of(Repeating, prog="p").parse_args(list(arguments)).names

    assert parse("--names=a", "--names=b", "--", "--names=c", "--names=d") == ["c", "d"]
    assert parse("--names=a", "--names=b", "--", "--number=1") == ["a", "b"]
    assert parse("--", "--names=c") == ["c"]


def test_a_slip_of_the_pen_gets_the_flag_that_was_meant():
    assert "did you mean --val-split? see " in refused("usage", parse, "--val-splt=100")
    assert "did you mean" not in refused("usage", parse, "--nothing-like-it")
