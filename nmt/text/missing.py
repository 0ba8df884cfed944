"""Says what to do where text files are missing: what is there instead, and a guess that makes the run work.

A guess is sought in this order: other flags for the files as they are, files that have to be renamed or cut in two, a
folder below. Each guess is complete: whoever follows it has all the files that a run needs.
"""

import functools
import importlib.util
import itertools
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from nmt.errors import UserError
from nmt.text import files

MOST_FOLDERS = 200  # that are looked into
SHOWN = 4  # names of files in a message
PART = 10  # a tenth of the pairs for validation and for test
MOST_SPLIT = 500  # pairs that a guess takes for each of them
ROLES = {
    "train": re.compile(r"train.*|trn"),
    "val": re.compile(r"(val|valid|validation|dev|devel|development|tune)\d*"),
    "test": re.compile(r".*test\d*|tst\d*"),
}
SIDES = {"src": 0, "source": 0, "trg": 1, "tgt": 1, "target": 1}
TABLES = ("tsv", "tab", "txt")


class Wish(NamedTuple):
    """What a run looks for.

    Attributes:
        langs: the languages, source and target.
        names: the stems of train, val and test.
        wanted: the splits that it needs.
        val_split: whether it can take val and test out of train.
    """

    langs: tuple[str, str]
    names: tuple[str, str, str]
    wanted: Sequence[str]
    val_split: bool

    @property
    def is_score(self) -> bool:
        """Whether the test pairs alone are wanted, in a model's languages."""
        return list(self.wanted) == ["test"]

    def stem(self, split: str) -> str:
        return self.names[files.SPLITS.index(split)]


class Guess(NamedTuple):
    """What makes the run work.

    Attributes:
        flags: to be added, such as ["--src-lang fr"].
        first: what to do before that, or "".
    """

    flags: list[str]
    first: str = ""


def error(data_dir: Path, wish: Wish) -> UserError:
    """What to tell the user. `data_dir` is a folder, and it has not all the files."""
    names = sorted({name for folder in _own(data_dir) for name in _names(folder)})
    if guess := _first(_own(data_dir), wish) or _first_below(data_dir, wish):
        flags = f"add {' '.join(guess.flags)}" if guess.flags else ""
        return _told(data_dir, wish, names, ", and ".join(filter(None, (guess.first, flags))))
    src, trg = wish.langs
    train = wish.stem("test" if wish.is_score else "train")
    more = "" if wish.is_score or wish.val_split else ", and add --val-split 100"
    return _told(data_dir, wish, names, f"put {train}.{src} and {train}.{trg} there, one sentence a line{more}")


def can_guess(data_dir: Path, wish: Wish, below: bool) -> bool:
    """Whether some files look like a corpus: those of `data_dir`, of `multi30k` in it and, if `below`, deeper ones."""
    return bool(_first(_own(data_dir), wish) or (below and _first_below(data_dir, wish)))


def _told(data_dir: Path, wish: Wish, names: list[str], todo: str) -> UserError:
    missing = [
        f"{wish.stem(split)}.{'/'.join(wish.langs)}"
        for split in wish.wanted
        if not files.any_pair(data_dir, wish.stem(split), wish.langs)
    ]
    if wish.val_split and wish.stem("train") + "." + "/".join(wish.langs) in missing:
        missing = missing[:1]
    found = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "") if names else "the folder is empty"
    what = f"no {', '.join(missing)}" if missing else "the files are not all in one folder"
    return UserError("data", f"{what}{' of the model' if wish.is_score else ''}, but {found}", str(data_dir), todo)


# ---------------------------------------------------------------- the guesses


def _first(folders: Iterable[Path], wish: Wish) -> Guess | None:
    """The first guess for one of these folders."""
    ways: list[Callable[[Path, Wish], Guess | None]] = [_by_flags, _by_other_half, _by_renaming, _by_cutting]
    return next((guess for way in ways for folder in folders if (guess := way(folder, wish))), None)


def _first_below(data_dir: Path, wish: Wish) -> Guess | None:
    """The first guess for a folder in `data_dir`, with the flag that names it."""
    for folder in _below(data_dir):
        if found := _first([folder], wish):
            return Guess([f"--data-dir {shlex.quote(str(folder))}", *found.flags], found.first)
    return None


def _by_flags(folder: Path, wish: Wish) -> Guess | None:
    """The files are there, under other names or in other languages."""
    flags = _flags({name: folder / name for name in _names(folder)}, wish)
    return Guess(flags) if flags is not None else None


def _by_other_half(folder: Path, wish: Wish) -> Guess | None:
    """One side of a split is there. The user has to find the other one."""
    names = _names(folder)
    stems = _stems(names, wish)
    for split in wish.wanted:
        stem = wish.stem(split)
        langs = _sides(stems.get(stem, set()), wish)
        there = [lang for lang in langs if lang in stems.get(stem, ())]
        if len(there) == 1:
            (other,) = set(langs) - set(there)
            name = f"{stem}.{other}"
            half = next(folder / each for each in names if each.removesuffix(".gz") == f"{stem}.{there[0]}")
            flags = _flags({each: folder / each for each in names} | {name: half}, wish)
            if flags is not None:
                return Guess(flags, f"put {name} beside {stem}.{there[0]}")
    return None


def _by_renaming(folder: Path, wish: Wish) -> Guess | None:
    """The names have .txt at the end, capitals, or no language."""
    names = _names(folder)
    new = {name: _tidy(name, wish) for name in names}
    changed = [(old, name) for old, name in new.items() if old != name]
    if not changed or len(set(new.values())) < len(new):
        return None
    flags = _flags({name: folder / old for old, name in new.items()}, wish)
    if flags is None:
        return None
    if len(changed) > 2:
        (one, other), *_ = changed
        return Guess(flags, f"rename {one} to {other}, and so on")
    return Guess(flags, _in(folder, [f"mv {shlex.quote(old)} {shlex.quote(name)}" for old, name in changed]))


def _by_cutting(folder: Path, wish: Wish) -> Guess | None:
    """A table has both sides in its columns."""
    src, trg = wish.langs
    cuts: dict[str, str] = {}
    tables = [name for name in _names(folder) if name.endswith(TABLES) and _has_columns(folder / name)]
    for name in tables:
        stem = name.rpartition(".")[0]
        splits = [split for split in files.SPLITS if _has_role(stem, split)]
        target = stem if splits or len(tables) > 1 else wish.stem("test" if wish.is_score else "train")
        cuts[target] = name
    made = {f"{stem}.{lang}": folder / name for stem, name in cuts.items() for lang in wish.langs}
    flags = _flags(made, wish) if cuts else None
    if flags is None:
        return None
    if len(cuts) == 1:
        ((stem, name),) = cuts.items()
        table, *sides = (shlex.quote(each) for each in (name, f"{stem}.{src}", f"{stem}.{trg}"))
        return Guess(flags, _in(folder, [f"cut -f1 {table} > {sides[0]}", f"cut -f2 {table} > {sides[1]}"]))
    first = next(iter(cuts))
    return Guess(flags, f"cut {cuts[first]} into {first}.{src} and {first}.{trg} (cut -f1, cut -f2), and so on")


def _in(folder: Path, commands: list[str]) -> str:
    return f"type (cd {shlex.quote(str(folder))} && {' && '.join(commands)})"


def _flags(texts: Mapping[str, Path], wish: Wish) -> list[str] | None:
    """The flags with which some files are a corpus. None: there are no such flags.

    Args:
        texts: the name of each file, and where its text is now.
    """
    stems = _stems(texts, wish)
    langs = wish.langs
    if not wish.is_score and not any(set(langs) <= there for there in stems.values()):
        langs = _other_langs(stems, wish) or langs
    pairs = sorted((stem for stem, there in stems.items() if set(langs) <= there), key=lambda stem: (len(stem), stem))
    flags = [
        f"--{side}-lang {lang}"
        for side, lang, wanted in zip(("src", "trg"), langs, wish.langs, strict=True)
        if lang != wanted
    ]
    has_split = True
    train = wish.stem("train")
    for split in wish.wanted:
        asked = files.stems(wish.stem(split))
        if any(stem in pairs for stem in asked):
            continue
        if any(set(langs) & stems.get(stem, set()) for stem in asked):
            return None  # one side is there: that is the fault
        others = [stem for stem in pairs if stem not in wish.names]
        fitting = [stem for stem in others if _has_role(stem, split)]
        if not fitting and (split == "train" or wish.is_score):
            fitting = [stem for stem in others if not any(_has_role(stem, other) for other in files.SPLITS)]
        if fitting:
            flags.append(f"--{split}-name {shlex.quote(fitting[0])}")
            train = fitting[0] if split == "train" else train
        elif split == "train" or wish.is_score:
            return None
        else:
            has_split = False
    if not has_split and not wish.val_split:
        flags.append(f"--val-split {_part(texts, train, langs)}")
    return flags


def _other_langs(stems: dict[str, set[str]], wish: Wish) -> tuple[str, str] | None:
    """The languages of the training files, or of other ones. A wanted one keeps its side."""
    src, trg = wish.langs
    by_role = sorted(stems, key=lambda stem: (stem != wish.stem("train"), not _has_role(stem, "train"), stem))
    for stem in by_role:
        there = sorted(stems[stem])
        if len(there) >= 2:
            if trg not in there and src in there:
                return src, next(lang for lang in there if lang != src)
            to = trg if trg in there else "en" if "en" in there else there[1]
            return next(lang for lang in there if lang != to), to
    return None


def _sides(there: set[str], wish: Wish) -> tuple[str, str]:
    """The languages of a stem that has one side."""
    src, trg = wish.langs
    if wish.is_score or {src, trg} & there or not there:
        return src, trg
    (lang, *_) = sorted(there)
    return lang, trg


def _part(texts: Mapping[str, Path], stem: str, langs: tuple[str, str]) -> int:
    """How many pairs to take out of train."""
    sides = {f"{stem}.{lang}" for lang in langs}
    path = next(path for name, path in texts.items() if name.removesuffix(".gz") in sides)
    return max(1, files.count_lines(path, PART * MOST_SPLIT) // PART)


def _has_role(stem: str, split: str) -> bool:
    """Whether a stem says that its files are of this split.

    >>> _has_role("newstest2016", "test"), _has_role("corpus.dev", "val"), _has_role("corpus", "train")
    (True, True, False)
    """
    return any(ROLES[split].fullmatch(word) for word in re.split(r"[^a-z0-9]+", stem.lower()))


def _tidy(name: str, wish: Wish) -> str:
    """What a file should be called.

    >>> wish = Wish(("fr", "en"), files.SPLITS, files.SPLITS, False)
    >>> [_tidy(name, wish) for name in ("train.fr.txt", "en.txt", "Dev-FR.txt", "test.tgt", "notes.txt")]
    ['train.fr', 'train.en', 'dev.fr', 'test.en', 'notes.txt']
    """
    lower = name.lower()
    plain = lower.removesuffix(".gz")
    stem, _, suffix = plain.rpartition(".")
    packed = lower[len(plain) :]
    if suffix in SIDES and suffix not in wish.langs:
        return f"{stem}.{wish.langs[SIDES[suffix]]}{packed}"
    if suffix == "txt":
        before, _, lang = re.sub("[_-]", ".", stem).rpartition(".")
        if lang in _languages() or lang in SIDES:
            lang = wish.langs[SIDES[lang]] if lang in SIDES else lang
            return f"{before or wish.stem('test' if wish.is_score else 'train')}.{lang}{packed}"
    return lower if suffix in _languages() else name


# ---------------------------------------------------------------- what is there


def _names(folder: Path) -> list[str]:
    """The files of a folder that are not hidden. None where the user may not look."""
    if not os.access(folder, os.R_OK | os.X_OK):
        return []
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())


def _own(data_dir: Path) -> list[Path]:
    return [folder for folder in files.folders(data_dir) if folder.is_dir()]


def _below(folder: Path) -> Iterator[Path]:
    """Some of the folders in a folder, and of those in them."""
    for depth in ("*/", "*/*/"):
        some = itertools.islice(folder.glob(depth), MOST_FOLDERS)
        yield from sorted(path for path in some if path.is_dir() and path not in files.folders(folder))


def _stems(names: Iterable[str], wish: Wish) -> dict[str, set[str]]:
    """The languages of the files, by their stems."""
    found: dict[str, set[str]] = {}
    for name in names:
        stem, _, lang = name.removesuffix(".gz").rpartition(".")
        if stem and (lang in _languages() or lang in wish.langs):
            found.setdefault(stem, set()).add(lang)
    return found


@functools.cache
def _languages() -> frozenset[str]:
    """spaCy's codes. It is not imported, because that takes seconds."""
    spec = importlib.util.find_spec("spacy")
    assert spec and spec.origin
    return frozenset(path.parent.name for path in Path(spec.origin).parent.glob("lang/*/__init__.py"))


def _has_columns(path: Path) -> bool:
    """Whether the first line has a tab."""
    with open(path, "rb") as file:
        return b"\t" in file.readline(files.LINE_BYTES)
