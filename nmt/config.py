"""A file of flags: `--config run.toml` gives a run the flags that stand there, and each run writes its own.

The file is TOML. A key is a flag without its hyphens in front: `batch-size = 64`, or `batch_size = 64`. Values have
types: 64, 0.003, "tuned", true, [0, 1]. The command line wins over the file.
"""

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any

from nmt.errors import UserError, first_line, not_installed
from nmt.flags import StrictParser, as_arguments, flag_of

PREFIX = "config: "  # in front of a line of the file in a log
NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: 'text in quotes, such as "a"'}
WIDTH = 100  # characters of an error of the reader's

# ---------------------------------------------------------------- reading


def parse(text: str) -> dict[str, Any]:
    """The content of TOML.

    Raises:
        UserError: usage, on a Python 3.10 without tomli.
        ValueError: it is none.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        if told := not_installed(["tomli"], "requirements.txt"):
            raise told
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read(path: str, table: type, parser: StrictParser) -> dict[str, Any]:
    """The flags that a file gives, as the command line would give them.

    Args:
        path: the file.
        table: the settings, see `flags.row`.
        parser: of that table. It checks the values.

    Returns:
        The values by the names of the rows.

    Raises:
        UserError: usage, the file cannot be read, or it has an unknown name, a value of another type, or a wrong value.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            content = parse(file.read())
    except OSError as error:
        todo = "give --config a file of flags, such as CKPTPATH.toml"
        raise UserError("usage", f"cannot read the file of flags: {error.strerror or error}", path, todo) from error
    except ValueError as error:
        todo = "see docs/reference.md, A file of flags"
        raise UserError("usage", f"no TOML: {first_line(error)[:WIDTH]}", path, todo) from error
    rows, hints, found = spellings(table), typing.get_type_hints(table), {}
    for key, value in content.items():
        where = f"{path}: {key}"
        row = rows.get(key.replace("-", "_"))
        if row is None or row.name == parser.file_flag:
            todo = f"see {parser.prog} --help: a key is a flag without its hyphens in front"
            raise UserError("usage", "no flag of this name" if row is None else "a file names no other", where, todo)
        if row.name in found:
            raise UserError("usage", f"{flag_of(row.name)} is given more than once", where, "leave one of the keys out")
        if not fits(value, hints[row.name]):
            raise UserError(
                "usage", f"{shown(value)} is of a wrong type", where, f"expected {expected(hints[row.name])}"
            )
        found[row.name] = checked(row.name, value, row.metadata["repeats"], parser, where)
    return found


def spellings(table: type) -> dict[str, Any]:
    """The rows of a table by all names that a key may have, with underscores."""
    rows: dict[str, Any] = {}
    for row in dataclasses.fields(table):
        names = [row.name, *(name[2:].replace("-", "_") for name in row.metadata["also"] if name[:2] == "--")]
        rows |= dict.fromkeys(names, row)
    return rows


def kinds_of(hint: Any) -> list[Any]:
    """The types of a row's values, without None."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return [kind for kind in kinds if kind is not type(None)]


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of TOML is of a row's type.

    >>> fits(3, float), fits(3.0, int), fits(True, int), fits([0, 1], list[int] | None)
    (True, False, False, True)
    """
    for kind in kinds_of(hint):
        if typing.get_origin(kind) is list:
            if type(value) is list and value and all(fits(each, typing.get_args(kind)[0]) for each in value):
                return True
        elif type(value) is kind or (kind is float and type(value) is int):
            return True
    return False


def expected(hint: Any) -> str:
    """What a row's value has to be.

    >>> expected(float | str), expected(list[int] | None)
    ('a number, or text in quotes, such as "a"', 'a list such as [0, 1]')
    """
    lists = {int: "a list such as [0, 1]", str: 'a list such as ["a", "b"]'}
    names = [lists[typing.get_args(kind)[0]] if typing.get_origin(kind) else NAMES[kind] for kind in kinds_of(hint)]
    return ", or ".join(names)


def shown(value: Any) -> str:
    return "a table" if isinstance(value, dict) else repr(value)[:WIDTH]


def checked(name: str, value: Any, repeats: bool, parser: StrictParser, where: str) -> Any:
    """The value as the command line would give it.

    Raises:
        UserError: usage, the command line would refuse it.
    """
    if value is False:
        return False
    each = [{name: inner} for inner in value] if repeats else [{name: value}]
    try:
        arguments = [argument for given in each for argument in as_arguments(given)]
        return getattr(argparse.ArgumentParser.parse_args(parser, arguments), name)
    except UserError as error:
        what = error.args[1].partition(": ")[2] or error.args[1]
        raise UserError("usage", what, where, error.args[3]) from error


# ---------------------------------------------------------------- writing


def lines(table: type, values: dict[str, Any], header: list[str]) -> Iterator[str]:
    """The lines of a file that gives these values. It is ASCII, and no line is empty.

    Args:
        table: the settings.
        values: by the names of rows. A value None is left out.
        header: comments at the top.
    """
    yield from (f"# {line}" for line in header)
    group = ""
    for row in dataclasses.fields(table):
        if (value := values.get(row.name)) is None:
            continue
        if row.metadata["group"] != group:
            group = row.metadata["group"]
            yield f"# {group.removeprefix('advanced: ').partition(';')[0]}"
        key, text = row.name.replace("_", "-"), as_toml(value)
        yield f"{key} = {text}" if text else f"# {key}: not in UTF-8, so it has to be given by hand"


def as_toml(value: Any) -> str:
    r"""A value as TOML. Empty: TOML cannot say it.

    >>> as_toml(0.003), as_toml([0, 1]), as_toml("\u00e4\n\"a\"")
    ('0.003', '[0, 1]', '"\\u00e4\\u000a\\"a\\""')
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        parts = [as_toml(each) for each in value]
        return f"[{', '.join(parts)}]" if all(parts) else ""
    if not isinstance(value, str):
        return repr(value)
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        return ""
    return f'"{"".join(map(_escaped, value))}"'


def _escaped(letter: str) -> str:
    if letter in '"\\':
        return f"\\{letter}"
    if " " <= letter <= "~":
        return letter
    return f"\\u{ord(letter):04x}" if ord(letter) < 1 << 16 else f"\\U{ord(letter):08x}"
