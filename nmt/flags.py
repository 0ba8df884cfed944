"""Command lines that mean what they say.

Plain argparse takes `nan`, `1_0` and `٣` for numbers, abbreviations for flags, and the last of a repeated flag. Here
each of these is an error. A flag may be repeated only if its row says so. Every flag has two spellings, `--data-dir`
and `--data_dir`. Flags behind a lone `--` override the flags in front of it, so a wrapper can hand on its user's flags
after its own.
"""

import argparse
import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

from nmt.errors import UserError

CASES = ("lower", "keep")  # what becomes of capital letters
TOKENIZERS = ("spacy", "space")  # what splits lines into words
INTEGER = re.compile(r"[+-]?[0-9]+")
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


class StrictParser(argparse.ArgumentParser):
    """An ArgumentParser for optional flags. A faulty command line raises a usage `UserError`.

    The help shows defaults by itself. If a flag's default is None, its help text should say what decides instead.

    Args:
        file_flag: the name of the flag whose value is a file of flags, if there is one.
        read_file: gives the flags of such a file, by name.

    Attributes:
        given: the names of the flags that the last command line had, with those of its files.
        of_files: the names of those that its files alone had.
    """

    given: set[str]
    of_files: set[str]

    def __init__(self, *, file_flag: str = "", read_file: "FileReader | None" = None, **options):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **options)
        self.file_flag, self._read_file = file_flag, read_file

    def error(self, message: str):
        todo = f"see {self.prog} --help"
        if found := re.search(r"^unrecognized arguments: (--[\w-]+)", message):
            names = [name for name in self._option_string_actions if name.startswith("--")]
            for near in difflib.get_close_matches(found[1], names, 1, 0.75):
                todo = f"did you mean {near}? {todo}"
        raise UserError("usage", message, f"the command line of {self.prog}", todo)

    def parse_args(self, args: list[str]) -> argparse.Namespace:  # type: ignore[override]  # takes less than argparse's
        """Parses `args`. Flags after a lone `--` override those before it. Flags override a file on their side of it.

        >>> parser = StrictParser(prog="p")
        >>> _ = parser.add_argument("--batch-size", type=positive_int)
        >>> parser.parse_args(["--batch_size=1", "--", "--batch-size", "2"]).batch_size
        2
        """
        own, user = args, []
        if "--" in args:
            cut = args.index("--")
            own, user = args[:cut], args[cut + 1 :]
        namespace = argparse.Namespace()
        self.given, self.of_files = set(), set()
        for section in (own, user):
            section = [hyphenated(arg) for arg in section]
            given = self._refuse_what_argparse_takes(section)
            if self._read_file is not None and self.file_flag in given:
                path = getattr(super().parse_args(section), self.file_flag)
                for name, value in self._read_file(path, self).items():
                    setattr(namespace, name, value)
                    self.given.add(name)
                    self.of_files.add(name)
            for name in given & self.given & self._repeatable:
                setattr(namespace, name, None)  # the values before the `--` do not stay beside those after it
            self.given |= given
            self.of_files -= given
            namespace = super().parse_args(section, namespace)
        return namespace

    @property
    def _repeatable(self) -> set[str]:
        """The names of the flags that may be given several times."""
        return {action.dest for action in self._actions if isinstance(action, argparse._AppendAction)}

    def _refuse_what_argparse_takes(self, section: list[str]) -> set[str]:
        """Refuses a repeated flag that takes one value, and the value `--`, which argparse drops and then fails.

        Returns:
            The names of the flags that are given.
        """
        seen = set()
        for arg in section:
            name, _, value = arg.partition("=") if arg.startswith("--") else (arg[:2], "", arg[2:].removeprefix("="))
            action = self._option_string_actions.get(name)
            if action is None or not arg.startswith("-"):
                continue
            names = "/".join(action.option_strings)
            if action.dest in seen and action.dest not in self._repeatable:
                self.error(f"argument {names}: given more than once")
            if value == "--":
                self.error(f"argument {names}: '--' is not a value")
            seen.add(action.dest)
        return seen


FileReader = Callable[[str, StrictParser], dict[str, Any]]


class Default(str):
    """A default. The script can tell it from the same value given by the user."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each default, but no `(default: None)` and no `(default: False)`. An epilog keeps its lines."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, **{"max_help_position": 36} | options)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, False) else action.help


def hyphenated(arg: str) -> str:
    """The flag's name with hyphens, its value untouched.

    >>> hyphenated("--data_dir=my_data")
    '--data-dir=my_data'
    """
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else arg


# ---------------------------------------------------------------- a table of settings and its flags


class Choices(tuple[str, ...]):
    """Texts that a flag takes.

    Args:
        texts: the choices.
        former: a former name of a choice, and the choice. It still works, and the help does not show it.
    """

    former: dict[str, str]

    def __new__(cls, texts: Iterable[str], former: dict[str, str]) -> "Choices":
        choices = super().__new__(cls, texts)
        choices.former = former
        return choices

    def __call__(self, text: str) -> str:
        return self.former.get(text, text)


def row(
    group: str,
    default: Any,
    takes: Any,
    help: str,
    *,
    unit: str = "",
    also: str = "",
    trains: bool = False,
    repeats: bool = False,
) -> Any:
    """A row of a settings table: a field of a dataclass, and its flag.

    Args:
        group: the flag's group in the help.
        default: the value where the flag is left out. A dict holds each recipe's value, and the default is None.
        takes: how the flag's text is read: a function of this module, a tuple of choices, None for a flag without
            a value, or a name for the value of a free text, which `free_text` reads.
        help: what the flag does.
        unit: names the value in the help.
        also: other spellings of the flag, with spaces between.
        trains: whether training alone reads it. Then it has no effect with --evaluate.
        repeats: whether the flag may be given several times. The value is then the list of those that were given. Its
            default has to be None.
    """
    recipes = default if isinstance(default, dict) else None
    about = {"group": group, "takes": takes, "help": help, "unit": unit, "also": also.split()}
    about |= {"trains": trains, "recipes": recipes, "repeats": repeats}
    return dataclasses.field(default=None if recipes else default, metadata=about)


def values_of_recipe(table: type, recipe: str) -> dict[str, Any]:
    """The values that a recipe gives to its rows."""
    rows = dataclasses.fields(table)
    return {row.name: row.metadata["recipes"][recipe] for row in rows if row.metadata["recipes"]}


def parser_of(table: type, **options: Any) -> StrictParser:
    """The parser with a flag for each row of a table; the options are those of `ArgumentParser`."""
    parser = StrictParser(**options)
    groups: dict[str, Any] = {}
    for row in dataclasses.fields(table):
        about, takes = row.metadata, row.metadata["takes"]
        settings: dict[str, Any] = {"dest": row.name, "default": row.default, "help": about["help"]}
        if about["recipes"]:
            settings["help"] += f" ({', '.join(f'{name}: {value}' for name, value in about['recipes'].items())})"
        if takes is None:
            settings["action"] = "store_true"
        elif isinstance(takes, tuple):
            settings |= {"choices": takes, "type": takes if isinstance(takes, Choices) else None}
        elif isinstance(takes, str):
            settings |= {"type": free_text, "metavar": takes}
        else:
            settings |= {"type": takes, "metavar": about["unit"] or UNITS.get(takes, "N")}
        if about["repeats"]:
            settings["action"] = "append"
        if about["group"] not in groups:
            groups[about["group"]] = parser.add_argument_group(about["group"])
        short, long = ([name for name in about["also"] if (name[1] == "-") == is_long] for is_long in (False, True))
        groups[about["group"]].add_argument(*short, flag_of(row.name), *long, **settings)
    return parser


def flag_of(name: str) -> str:
    """The flag of a row.

    >>> flag_of("batch_size")
    '--batch-size'
    """
    return "--" + name.replace("_", "-")


def as_arguments(values: dict[str, Any]) -> list[str]:
    """The arguments that give these values to rows of a table. A flag without a value is left out where it is False.

    >>> as_arguments({"amp": True, "batch_size": 8, "device_list": [0, 1]})
    ['--amp', '--batch-size=8', '--device-list=0,1']
    """
    given = {name: value for name, value in values.items() if value is not False}
    texts = {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in given.items()}
    return [flag_of(name) + ("" if value is True else f"={value}") for name, value in texts.items()]


def given_in_vain(settings: Any, typed: Collection[str]) -> list[str]:
    """The flags of a table that were typed and that only training reads. A default's own value does not count."""
    rows = [row for row in dataclasses.fields(settings) if row.metadata["trains"] and row.name in typed]
    return [flag_of(row.name) for row in rows if getattr(settings, row.name) != row.default]


# ---------------------------------------------------------------- how a flag's text is read


def free_text(text: str) -> str:
    """A path, a name or an address. It may hold anything but a NUL byte, which no path may have.

    An empty one is most often a variable that a script has not set. The program must not take it for a flag left out.
    """
    refuse_empty(text)
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} has a NUL byte")
    return text


def refuse_empty(text: str) -> None:
    if not text:
        raise argparse.ArgumentTypeError("the flag has an empty value, '': give it a value or leave it out")


def integer(text: str) -> int:
    """A decimal integer in ASCII digits."""
    refuse_empty(text)
    if not INTEGER.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number in the digits 0-9")
    return int(text)


def positive_int(text: str) -> int:
    value = integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 1")
    return value


def non_negative_int(text: str) -> int:
    value = integer(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 0")
    return value


def size(text: str) -> int:
    """A number of features. The largest one is more than memory holds, and no product of sizes overflows."""
    value = positive_int(text)
    if value > 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} must be at most {1 << 16}")
    return value


def zero_or_sentence_length(text: str) -> int:
    """0, or room for `<sos>`, a word and `<eos>`, up to 1000 tokens."""
    value = non_negative_int(text)
    if value in (1, 2) or value > 1000:
        raise argparse.ArgumentTypeError(f"{text!r} must be 0, or from 3 to 1000")
    return value


def translation_length(text: str) -> int:
    """A number of tokens from 1 to 1000. The longest sentence of a corpus has 254."""
    value = positive_int(text)
    if value > 1000:
        raise argparse.ArgumentTypeError(f"{text!r} must be at most 1000")
    return value


def seed(text: str) -> int:
    """A number that every random generator accepts."""
    value = non_negative_int(text)
    if value >= 2**63 - 2**20:  # the ranks add theirs
        raise argparse.ArgumentTypeError(f"{text!r} must be below 2**63 - 2**20")
    return value


def decimal(text: str) -> float:
    """A decimal number in ASCII digits. float32 can hold it, which most of them become."""
    refuse_empty(text)
    if not DECIMAL.fullmatch(text) or not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite decimal number in the digits 0-9")
    value = float(text)
    if abs(value) > 3e38:
        raise argparse.ArgumentTypeError(f"{text!r} must lie between -3e38 and 3e38, for float32")
    return value


def positive_float(text: str) -> float:
    value = decimal(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0")
    return value


def seconds(text: str) -> float:
    """A positive time of at most thirty years. A clock can count it."""
    value = positive_float(text)
    if value > 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} must be at most 1e9")
    return value


def non_negative_float(text: str) -> float:
    value = decimal(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 0")
    return value


def power(text: str) -> float:
    """An exponent from 0 to 10. With 10, a score divided by a sentence's length to that power is still a float32."""
    value = non_negative_float(text)
    if value > 10:
        raise argparse.ArgumentTypeError(f"{text!r} must be at most 10")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    value = decimal(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must lie between 0 and 1")
    return value


def part(text: str) -> float:
    """A number from 0 to below 1."""
    value = fraction(text)
    if value == 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be below 1")
    return value


def case(text: str) -> str:
    """One of `CASES`."""
    return one_of(CASES, text)


def tokenizer(text: str) -> str:
    """One of `TOKENIZERS`."""
    return one_of(TOKENIZERS, text)


def one_of(choices: tuple[str, ...], text: str) -> str:
    if text not in choices:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(choices)}")
    return text


def loss_scale(text: str) -> float | str:
    """`dynamic`, or a positive number. float32 can hold the number and its reciprocal."""
    if text == "dynamic":
        return text
    value = positive_float(text)
    if not 1e-37 < value < 1e37:
        raise argparse.ArgumentTypeError(f"{text!r} must be between 1e-37 and 1e37, for float32")
    return value


def index_list(text: str) -> list[int]:
    """Distinct device indices, separated by commas.

    >>> index_list("4,5,6,7")
    [4, 5, 6, 7]
    """
    parts = text.split(",")
    if not all(re.fullmatch(r"[0-9]+", part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of device indices such as 0,1,2")
    indices = [int(part) for part in parts]
    if len(set(indices)) < len(indices):
        raise argparse.ArgumentTypeError(f"{text!r} names a device twice")
    return indices


def device_id(text: str) -> str:
    """A device's index, or `npu:` and the index, for a run that takes it only on an NPU.

    >>> device_id("npu:3")
    'npu:3'
    """
    if not re.fullmatch(r"(npu:)?[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device index such as 0, or npu:0")
    return text


# How the help names the values that these read. Where a row has no unit of its own, the others are "N".
UNITS = {fraction: "P", part: "P", decimal: "X", positive_float: "X", non_negative_float: "X", index_list: "LIST"}
