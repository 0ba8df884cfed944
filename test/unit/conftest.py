"""What several tests share: small corpora and models, caches of the test run, and how to assert a refusal."""

import contextlib
import itertools
import os
import random
import resource
import signal
import tempfile
import time
from pathlib import Path

import gru
import train_8p
from bench import logs
from nmt import checkpoint, cores, precision
from nmt.errors import UserError
from nmt.text.vocabulary import SPECIALS

import harness
import plain_model
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
TEST_PATHS = [str(REPOSITORY / "test" / name) for name in ("unit", "simulation")]
MULTI30K = REPOSITORY.parent / "shared" / "data" / "multi30k"

needs_multi30k = pytest.mark.skipif(
    not (MULTI30K / "train.de").exists(), reason="Multi30k is not beside this checkout (../shared/data/multi30k)"
)

SMALL = ["--emb-dim", "8", "--hid-dim", "12", "--device", "cpu"]  # a model that trains in no time


def parse(*flags: str) -> train_8p.Settings:
    """The settings of a command line, given as one text or in pieces."""
    words = flags[0].split() if len(flags) == 1 else list(flags)
    return train_8p.Settings(**vars(train_8p.build_parser().parse_args(words)))


def choose_precision(settings: train_8p.Settings, device_type: str = "cpu", indices=(0,)) -> precision.Choice:
    """The precision that the settings ask for on these devices."""
    named = settings.named("amp opt_level loss_scale amp_dtype amp_backend")
    return precision.choose_by_flags(device_type, indices, **named)


def step_lines(out: str) -> list[tuple[str, ...]]:
    """Epoch, step, steps, loss and mean loss of each step line of a log."""
    return [line.group("epoch", "step", "steps", "loss", "mean_loss") for line in logs.STEP.finditer(out)]


def flags_of_recipe(name: str, arguments: str = "", **values: object) -> dict[str, str]:
    """What the line `flags:` says about a recipe, except where the arguments of a command line or `values` differ."""
    args = vars(train_8p.build_parser().parse_args(arguments.split()))
    flags = {flag: value if args[flag] is None else args[flag] for flag, value in train_8p.RECIPES[name].items()}
    return with_todays_names({flag: str(value) for flag, value in (flags | values).items()})


def with_todays_names(flags: dict[str, str]) -> dict[str, str]:
    """The flags of a log by the names of today."""
    return flags | {"init": train_8p.FORMER_INITIALISATIONS.get(flags["init"], flags["init"])}


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


DE = ["Ein Hund bellt.", "Ein Hund schläft.", "Eine Katze schläft.", "Der Hund schläft."]
EN = ["A dog barks.", "A dog sleeps.", "A cat sleeps.", "The dog sleeps."]
UNKNOWN = (["Ein Dackel bellt."], ["A dachshund barks."])  # beside a training corpus of DE and EN


def write_corpus(folder: Path, train=64, val=4, test=4, test_name: str = "test") -> Path:
    """Writes six files.

    Args:
        folder: is made if it is not there.
        train, val, test: a split's lines, (source, target), or a number of generated pairs. Generated pairs are
            distinct and of different lengths. From 64 of them, every word is in the vocabulary.
        test_name: the stem of the test files.

    Returns:
        `folder`.
    """
    pairs = _generated_pairs()
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in (("train", train), ("val", val), (test_name, test)):
        if isinstance(split, int):
            split = zip(*itertools.islice(pairs, split), strict=True)
        for lang, lines in zip(("de", "en"), split, strict=True):
            (folder / f"{name}.{lang}").write_bytes("".join(f"{line}\n" for line in lines).encode())
    return folder


def _generated_pairs():
    words = [("der", "the"), ("hund", "dog"), ("rot", "red"), ("läuft", "runs"), ("und", "and"), ("schnell", "fast")]
    generator = random.Random(5)
    seen = set()
    while True:
        sentence = tuple(generator.choice(words) for _ in range(generator.randint(2, 9)))
        if sentence not in seen:
            seen.add(sentence)
            yield tuple(" ".join(side) + " ." for side in zip(*sentence, strict=True))


@pytest.fixture
def tiny_corpus(tmp_path):
    """The folder of a corpus of 64 training pairs."""
    return write_corpus(tmp_path / "corpus", 64)


@pytest.fixture
def folder(tmp_path):
    """The folder of a corpus of the four training pairs DE and EN, and one other pair in val and test."""
    return write_corpus(tmp_path / "corpus", (DE, EN), UNKNOWN, UNKNOWN)


@pytest.fixture
def open_folder(monkeypatch):
    """As `folder`, in a place that every user can reach. Temporary files go beside it."""
    with tempfile.TemporaryDirectory() as above:
        os.chmod(above, 0o755)
        (Path(above) / "tmp").mkdir()
        (Path(above) / "tmp").chmod(0o777)
        monkeypatch.setattr(tempfile, "tempdir", f"{above}/tmp")
        yield write_corpus(Path(above) / "corpus", (DE, EN), UNKNOWN, UNKNOWN)


@pytest.fixture
def load(tmp_path):
    """`data.load` with a cache of the test's own. The lines of its log are in `load.lines`."""
    import data

    def call(folder, **flags):
        return data.load(folder, **{"cache_dir": tmp_path / "cache", "log": call.lines.append} | flags)

    call.lines = []
    return call


@pytest.fixture
def load_test(tmp_path):
    """As `load`, for `data.load_test`."""
    import data

    def call(folder, **flags):
        return data.load_test(folder, **{"cache_dir": tmp_path / "cache", "log": call.lines.append} | flags)

    call.lines = []
    return call


def sentences(side):
    """The ids of each sentence of a `data.Side`."""
    return [side.ids[a:b].tolist() for a, b in zip(side.offsets[:-1], side.offsets[1:], strict=True)]


def same_corpus(one, two):
    """Whether two corpora have the same ids, words, languages and notes."""

    def content(corpus):
        splits = (corpus.train, corpus.val, corpus.test)
        return (
            [(sentences(split.src), sentences(split.trg), split.src_tokens, split.trg_tokens) for split in splits],
            (corpus.src_vocab.itos, corpus.trg_vocab.itos),
            (corpus.src_lang, corpus.trg_lang, corpus.notes, corpus.unknown),
        )

    return content(one) == content(two)


@pytest.fixture
def seeded():
    """Draws by torch and by Python's own generator are the same in each test."""
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture
def model(seeded):
    """`plain_model.small_model`."""
    return plain_model.small_model()


@pytest.fixture
def pairs(seeded):
    """`plain_model.small_pairs`."""
    return plain_model.small_pairs()


def random_checkpoint(path: Path, words: int = 30, std: float = 0.6, seed: int = 0) -> checkpoint.Checkpoint:
    """Saves a small model whose weights are drawn, with a vocabulary of so many words besides the special ones.

    Returns:
        What is in the file.
    """
    vocab = [SPECIALS + [f"{side}{number}" for number in range(words)] for side in ("wört", "word")]
    sizes = {"input_dim": len(vocab[0]), "output_dim": len(vocab[1]), "emb_dim": 10, "hid_dim": 14}
    torch.manual_seed(seed)
    model = gru.build(**sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    about = {"src_lang": "de", "trg_lang": "en"}
    saved = checkpoint.Checkpoint(model.state_dict(), sizes, *vocab, {"lr": 0.1}, {"bleu": 12.5}, about)
    checkpoint.save(path, saved)
    return saved


def refused(kind, function, *args, says=(), **options):
    """Asserts that `function(*args, **options)` raises a UserError.

    Args:
        kind: the error's.
        says: a text that the message has, or several.

    Returns:
        The message.
    """
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    message = str(caught.value)
    assert message.startswith(f"error[{kind}]: ")
    assert "\n" not in message
    for text in [says] if isinstance(says, str) else says:
        assert text in message
    return message


def heed_signals() -> None:
    """Undoes what a test run in the background hands down: signals that are ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def state(pid: int) -> str:
    """A process's state as Linux says it, or nothing if it is gone. One that nobody has waited for is gone too."""
    try:
        found = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""
    return found.replace("Z", "")


def eventually(condition, within: float = 10.0) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def gone(pids) -> bool:
    return not any(state(pid) for pid in pids)


@pytest.fixture
def no_launcher(monkeypatch):
    """The environment of a process that no launcher has started."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def torchrun(no_launcher, monkeypatch):
    """The environment that torchrun gives the second of two processes."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


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


def refusal_with_files_of(most: int, write) -> str:
    """What a process says whose `write()` is refused, because it may write no file of more than `most` bytes."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            write()
        except UserError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    with open(reader) as said:
        return said.read()


@pytest.fixture(autouse=True)
def no_note_on_cores(monkeypatch):
    """A test machine may be busy, and the logs that tests compare must not say so."""
    monkeypatch.setattr(cores, "WATCHED", float("inf"))
