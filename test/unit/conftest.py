"""What all tests share: a small corpus, and caches that go with the test run."""

import contextlib
import os
import random
from pathlib import Path

import train_8p

import harness
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TEST_PATHS = [str(REPOSITORY / "test" / name) for name in ("unit", "simulation")]
MULTI30K = REPOSITORY.parent / "shared" / "data" / "multi30k"

needs_multi30k = pytest.mark.skipif(
    not (MULTI30K / "train.de").exists(), reason="Multi30k is not beside this checkout (../shared/data/multi30k)"
)

FORMER_INITIALISATIONS = getattr(train_8p, "FORMER_INITIALISATIONS", {})  # names of --init in older logs


def flags_of_recipe(name: str, arguments: str = "", **values: object) -> dict[str, str]:
    """What the line `flags:` says about a recipe, except where the arguments of a command line or `values` differ."""
    args = vars(train_8p.build_parser().parse_args(arguments.split()))
    flags = {flag: value if args[flag] is None else args[flag] for flag, value in train_8p.RECIPES[name].items()}
    return with_todays_names({flag: str(value) for flag, value in (flags | values).items()})


def with_todays_names(flags: dict[str, str]) -> dict[str, str]:
    """The flags of a log by the names of today."""
    return flags | {"init": FORMER_INITIALISATIONS.get(flags["init"], flags["init"])}


def pytest_collection_finish(session):
    """The simulated NPU is compiled while those tests run that stand before the first one that needs it."""
    needs = ("simulation", "built", "npu_totals")
    if not session.config.option.collectonly and any(set(needs) & set(item.fixturenames) for item in session.items):
        harness.start_building()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test reads or leaves anything in the user's cache folder."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


def write_corpus(folder: Path, train: int, val: int = 4, test: int = 4) -> Path:
    """A corpus of distinct pairs of unlike lengths, in which every word is frequent enough to be in the vocabulary."""
    words = [("der", "the"), ("hund", "dog"), ("rot", "red"), ("läuft", "runs"), ("und", "and"), ("schnell", "fast")]
    generator = random.Random(5)
    folder.mkdir(parents=True, exist_ok=True)
    seen = set()
    for name, count in (("train", train), ("val", val), ("test", test)):
        sides = ([], [])
        while len(sides[0]) < count:
            sentence = tuple(generator.choice(words) for _ in range(generator.randint(2, 9)))
            if sentence not in seen:
                seen.add(sentence)
                for side, text in zip(sides, zip(*sentence, strict=True), strict=True):
                    side.append(" ".join(text) + " .")
        for side, lang in zip(sides, ("de", "en"), strict=True):
            (folder / f"{name}.{lang}").write_text("\n".join(side) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def tiny_corpus(tmp_path):
    """The folder of a corpus of 64 training pairs."""
    return write_corpus(tmp_path / "corpus", 64)


@pytest.fixture
def as_nobody():
    """A context in which root is no more than a user to whom nothing belongs, so that permissions count."""

    @contextlib.contextmanager
    def nobody():
        before = os.getresuid()
        if before == (0, 0, 0):
            os.setresuid(65534, 65534, 0)
        try:
            yield
        finally:
            os.setresuid(*before)

    return nobody
