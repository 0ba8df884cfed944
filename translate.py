"""Translates text with a trained model.

    python3 translate.py < in.de > out.en
    python3 translate.py --ckptpath FILE --input in.de --output out.en

Without a file, on a terminal, it asks for sentences. Ctrl-D ends it. The scores of a translation, and whether a second
model is better than the first one by more than chance:

    python3 translate.py --input test.de --output out.en --reference test.en
    python3 translate.py --input test.de --output out.en --reference test.en --ckptpath ONE --ckptpath OTHER

What a model is, in a few lines:

    python3 translate.py --ckptpath FILE --about

From top to bottom: the settings, `main`, the model, translating a stream or at a prompt, scores, files, the model card.
What takes long to import is imported where it is needed: PyTorch only by the model, sacreBLEU only for scores.
"""

import contextlib
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:  # with PYTHONSAFEPATH=1
    sys.path.insert(0, HERE)

from nmt import flags
from nmt.errors import NO_ROOM, UserError, lacks_memory, not_installed, printable, run_main
from nmt.signals import end_imports_at_sigterm
from nmt.storage import InUse, clear_partial, locked, replacing

if TYPE_CHECKING:
    from nmt.engine import Engine, ModelInfo
    from nmt.text.stream import Changes
    from nmt.translating import Translation, Translator

DEFAULT_CKPTPATH = "./seq2seq-gru-model.pth.tar"  # where train_8p.py writes
DEFAULT_EXPORT = "./seq2seq-gru-model-onnx"  # where export_onnx.py writes
MANY_UNKNOWN = 0.3  # of a text's words

# ---------------------------------------------------------------- the settings

COMMON = "common flags"
OUTPUT = "what is printed"
SEARCH = "advanced: decoding; what is left out is as in the model's run"
ENGINE = "advanced: engine"
EXAMPLES = f"""output:
  One line for each input line, whatever it holds. An empty line stays empty. With --scores and --n-best, tabs separate
  the fields of a line: its number (with --n-best), the score (with --scores), the translation. With --n-best N each
  input line gives N lines. An empty line has the score 0. A line of several sentences has the mean of their scores.

examples:
  python3 translate.py < in.de > out.en                translate with {DEFAULT_CKPTPATH}
  python3 translate.py                                 ask for sentences
  python3 translate.py --input test.de --output out.en --reference test.en
                                                       translate and score
  python3 translate.py --ckptpath FILE --about         say what a model is

Every flag may be written with underscores too. Flags after a lone -- override those before it.
"""


@dataclass(frozen=True)
class Settings:
    """All that a translation can be told: each row is an attribute and its flag. See `flags.row`."""

    # fmt: off
    ckptpath: list[str] | None = flags.row(COMMON, None, "FILE",
        f"the model, as train_8p.py has written it; left out: {DEFAULT_CKPTPATH}; given again, with --reference: a "
        "model to compare with the first one", repeats=True)
    input: str | None = flags.row(COMMON, None, "FILE",
        "text to translate; left out: standard input, or on a terminal a prompt")
    output: str | None = flags.row(COMMON, None, "FILE",
        "where the translations go; it is replaced when all are there; left out: standard output")
    reference: str | None = flags.row(COMMON, None, "FILE",
        "right translations, line by line: print BLEU and chrF, on standard error unless --output is given")
    about: bool = flags.row(COMMON, False, None, "say what the model is, and translate nothing")

    tokenized: bool = flags.row(OUTPUT, False, None, "print tokens with spaces between, as the model gives them")
    replace_unknown: bool = flags.row(OUTPUT, False, None,
        "copy the source's unknown words to where the translation has <unk>, if there are as many of them")
    scores: bool = flags.row(OUTPUT, False, None,
        "print each translation's score: its log probability, divided by its length to the power of --length-penalty")
    n_best: int = flags.row(OUTPUT, 1, flags.positive_int, "translations of each line; at most --beam-size")

    beam_size: int | None = flags.row(SEARCH, None, flags.positive_int, "hypotheses in the beam; 1 decodes greedily")
    length_penalty: float | None = flags.row(SEARCH, None, flags.power,
        "a hypothesis's log probability is divided by its length to this power", unit="POWER")
    max_length: int | None = flags.row(SEARCH, None, flags.translation_length,
        "most words or pieces of a sentence's translation; if the run had none: as many as the sentence has, rounded "
        "up to 50s")

    backend: str = flags.row(ENGINE, "torch", ("torch", "onnx"),
        "what computes; onnx: --ckptpath is a folder that export_onnx.py has written, and PyTorch is not needed")
    precision: str = flags.row(ENGINE, "auto", ("auto", "float32", "bfloat16"),
        "format of the numbers; auto: bfloat16 where the processor is faster in it; torch only")
    shortlist: int | None = flags.row(ENGINE, None, flags.non_negative_int,
        "target words that are tried for each source word, beside the most frequent ones; left out or 0: all "
        "words; torch only")
    debug: bool = flags.row(ENGINE, False, None, "show the traceback of every error")
    # fmt: on

    @property
    def models(self) -> list[str]:
        """The paths of the models, at least one."""
        return self.ckptpath or [DEFAULT_EXPORT if self.backend == "onnx" else DEFAULT_CKPTPATH]


def build_parser() -> flags.StrictParser:
    return flags.parser_of(
        Settings,
        prog="translate.py",
        usage="python3 translate.py [--flag value]...",
        description="Translates text, line by line, with a model that train_8p.py has trained.",
        epilog=EXAMPLES,
    )


def main(argv: list[str]) -> None:
    """Translates what the flags name, or tells about the model."""
    settings = Settings(**vars(build_parser().parse_args(argv)))
    check(settings)
    check_installed(settings)
    if settings.about:
        engine = engine_of(settings, settings.models[0])
        for line in card(engine.info, settings.models[0]):
            print(printable(line))
        return
    from nmt.text.tokens import import_spacy

    import_spacy()
    with source(settings) as file, target(settings, file) as out:
        engines = [engine_of(settings, path) for path in settings.models]
        translators = [translator_of(settings, engine) for engine in engines]
        if settings.input is None and sys.stdin.isatty():
            info = engines[0].info
            where = "" if settings.output is None else f" into {settings.output}"
            how = f"translates {info.src_lang} to {info.trg_lang}{where}, line by line; Ctrl-D ends it"
            print(printable(how), file=sys.stderr)
            if settings.output is None and sys.stdout.isatty():
                prompt(translators[0], settings)
                return
        if settings.reference is None:
            for _ in translate(file, out, translators, settings):
                pass
            return
        scored = Scored(settings, [engine.info for engine in engines], file)
        for window in translate(file, out, translators, settings):
            scored.add(window)
    scored.check_lines()
    for line in scored.lines():
        print(printable(line), file=sys.stderr if settings.output is None else sys.stdout)


def check(settings: Settings) -> None:
    """Raises a usage UserError if flags contradict each other."""
    todo = "see translate.py --help"
    if len(settings.models) > 1 and settings.reference is None:
        what = "a second model is only compared with the first one by its scores"
        raise UserError("usage", what, "--ckptpath", "give --reference, or one model")
    if settings.beam_size is not None and settings.n_best > settings.beam_size:
        what = f"{settings.n_best} translations from a beam of {settings.beam_size}"
        raise UserError("usage", what, "--n-best, --beam-size", "lower the one or raise the other")
    if settings.backend == "onnx":
        for flag, is_given in (("--precision", settings.precision != "auto"), ("--shortlist", settings.shortlist)):
            if is_given:
                raise UserError("usage", "has no effect with --backend onnx", flag, todo)
    if settings.reference is not None and settings.input is None and sys.stdin is not None and sys.stdin.isatty():
        raise UserError("usage", "no input to score", "--reference", "give --input FILE, or redirect one")


def check_installed(settings: Settings) -> None:
    """Raises a usage UserError that names the packages which these settings need and which are not installed."""
    needed = ["numpy", "spacy", "tqdm"]
    if settings.backend == "torch" or settings.reference is not None:
        needed.append("torch")
    if not settings.tokenized or settings.reference is not None:
        needed.append("sacremoses")
    if settings.reference is not None:
        needed += ["torchtext", "sacrebleu"]
    told = not_installed(needed, "requirements.txt")
    if told is None and settings.backend == "onnx":
        told = not_installed(["onnxruntime"], "requirements-onnx.txt")
    if told is not None:
        raise told


# ---------------------------------------------------------------- the model


def engine_of(settings: Settings, path: str) -> "Engine":
    """The engine that computes the model at `path`.

    Raises:
        UserError: usage or checkpoint.
    """
    if settings.backend == "onnx":
        if os.path.isfile(path):
            todo = "give the folder that export_onnx.py has written, or leave --backend out"
            raise UserError("usage", "a file, not a folder", f"--ckptpath {path}", todo)
        from nmt import onnx_engine

        return onnx_engine.load(Path(path))
    if os.path.isdir(path):
        todo = "add --backend onnx if export_onnx.py has written it, or give a file of train_8p.py"
        raise UserError("usage", "a folder, not a checkpoint", f"--ckptpath {path}", todo)
    import gru
    from nmt import checkpoint, keeping
    from nmt.torch_engine import TorchEngine, choose_dtype, info_of, shortlist_of

    if settings.ckptpath is None and not os.path.exists(path) and not keeping.previous_of(path).exists():
        todo = "train one with train_8p.py, or name a model with --ckptpath"
        raise UserError("checkpoint", "there is no model here", path, todo)
    saved = checkpoint.load(path)
    if saved.src_vocab is None:
        todo = "translate with a model of train_8p.py; train_8p.py --evaluate scores this one, with the data it had"
        raise UserError("checkpoint", "holds no vocabularies, as the original's checkpoints", path, todo)
    try:
        model = gru.restore(saved.state_dict, saved.sizes)
    except ValueError as error:
        todo = "use the file as train_8p.py wrote it, and the gru.py that it was trained with"
        raise UserError("checkpoint", f"holds no model of this gru.py: {error}", path, todo) from error
    words = shortlist_of(saved, settings.shortlist, path)
    dtype = choose_dtype(settings.precision)
    saved.vocabularies(path)  # pieces that contradict their models are told now
    return TorchEngine(model, info_of(saved), dtype=dtype, shortlist=words, scores=settings.scores)


def translator_of(settings: Settings, engine: "Engine") -> "Translator":
    """The translator of these settings.

    Raises:
        UserError: usage, more translations are asked for than the beam has.
    """
    from nmt.translating import Translator

    translator = Translator(
        engine,
        beam_size=settings.beam_size,
        length_penalty=settings.length_penalty,
        max_length=settings.max_length,
        n_best=settings.n_best,
        replace_unknown=settings.replace_unknown,
        detokenise=not settings.tokenized or settings.reference is not None,
    )
    if settings.n_best > translator.beam_size:
        what = f"{settings.n_best} translations from a beam of {translator.beam_size}"
        raise UserError("usage", what, "--n-best", f"give --beam-size {settings.n_best}, or fewer translations")
    return translator


# ---------------------------------------------------------------- translating


def translate(
    file: int, out: IO[bytes], translators: list["Translator"], settings: Settings
) -> Iterator[list[list["Translation"]]]:
    """Translates a file to its end, a window of lines at a time, and writes what the first translator gives.

    Args:
        file: a descriptor.
        out: takes the translations.
        translators: with one model each.
        settings: say what is written of each translation.

    Yields:
        For each window, and in it for each translator, the best translation of each line.
    """
    from nmt.text import stream

    changes = stream.Changes()
    number = 0
    with progress() as bar:
        for lines in stream.windows(file, changes, settings.input or "standard input"):
            found = [translator(lines) for translator in translators]
            for translations in found[0]:
                number += 1
                out.write("".join(written(number, one, settings) for one in translations).encode())
            out.flush()
            yield [[translations[0] for translations in window] for window in found]
            bar.update(len(lines))
    tell(changes, translators[0].changes)
    if translators[0].unknown > MANY_UNKNOWN * translators[0].words:
        part = translators[0].unknown / translators[0].words
        print(f"note: the model does not know {part:.0%} of the words: see what it was trained on", file=sys.stderr)


def written(number: int, translation: "Translation", settings: Settings) -> str:
    """The line that is written for one translation of the input line of this number."""
    fields = [str(number)] if settings.n_best > 1 else []
    if settings.scores:
        fields.append(f"{translation.score:.4f}")
    fields.append(translation.tokens_line if settings.tokenized else translation.text)
    return "\t".join(fields) + "\n"


def progress() -> Any:
    """A bar on standard error, if that is a terminal, and standard output is none."""
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is shared by processes, and one that is killed leaves it behind
    hidden = not sys.stderr.isatty() or sys.stdout.isatty()
    return tqdm(unit=" lines", desc="translated", disable=hidden, leave=False)


def tell(of_lines: "Changes", of_sentences: "Counter[str] | None" = None) -> None:
    """Says what had to be changed in the input, one line for each kind."""
    for what, count in (of_lines + (of_sentences or Counter())).items():
        first = of_lines.first.get(what)
        print(f"note: {count} {what}{f' (the first is line {first})' if first else ''}", file=sys.stderr)


def prompt(translator: "Translator", settings: Settings) -> None:
    """Asks for lines on a terminal and translates them, until Ctrl-D."""
    from nmt.text import stream

    with contextlib.suppress(ImportError):  # Python may be built without it
        import readline  # noqa: F401  (gives `input` a history)
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    number = 0
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        changes = stream.Changes()
        text = stream.readable(line.encode(errors="surrogateescape"), changes)
        translator.changes.clear()
        for translations in translator([text]):
            number += 1
            print("".join(written(number, one, settings) for one in translations), end="", flush=True)
        tell(changes, translator.changes)


# ---------------------------------------------------------------- scores


class Scored:
    """Collects translations and scores them against the reference. All of them are in memory.

    Args:
        settings: name the reference and the models.
        infos: of each model.
        file: the input's descriptor.

    Raises:
        UserError: the reference cannot be read, or has other lines than the input. The models have other languages.
    """

    def __init__(self, settings: Settings, infos: list["ModelInfo"], file: int):
        from nmt.text import stream

        assert settings.reference is not None
        self._path, self._models, self._infos = settings.reference, settings.models, infos
        pairs = {(info.src_lang, info.trg_lang) for info in infos}
        if len(pairs) > 1:
            what = f"the models translate {' and '.join(f'{src} to {trg}' for src, trg in sorted(pairs))}"
            raise UserError("usage", what, "--ckptpath", "compare models of the same languages")
        with opened(self._path) as reference:
            changes = stream.Changes()
            self._reference = [line for window in stream.windows(reference, changes, self._path) for line in window]
        tell(changes)
        self._found: list[list[Translation]] = [[] for _ in infos]
        if settings.input is not None and os.path.isfile(settings.input):
            with opened(settings.input) as again:
                self._check(sum(len(window) for window in stream.windows(again, stream.Changes(), settings.input)))

    def add(self, window: list[list["Translation"]]) -> None:
        """Takes what `translate` yields."""
        for found, translations in zip(self._found, window, strict=True):
            found += translations

    def check_lines(self) -> None:
        """Raises a data UserError if the reference has another number of lines than the input."""
        self._check(len(self._found[0]))

    def _check(self, lines: int) -> None:
        if lines != len(self._reference) or not lines:
            what = f"the input has {lines} lines, the reference {len(self._reference)}"
            todo = "give the translation of each line of the input"
            raise UserError("data", what, self._path, todo)

    def lines(self) -> Iterator[str]:
        """The scores, a line each."""
        import scoring
        from nmt.text.tokens import tokenise

        for path, info, found in zip(self._models, self._infos, self._found, strict=True):
            yield f"scores of {path} on {len(found)} lines:"
            tokens = [translation.tokens for translation in found]
            reference = [
                [token for token in sentence if not token.isspace()]
                for sentence in tokenise(self._reference, info.trg_lang, "keep", info.tokenizer)[0]
            ]
            if info.case == "lower":  # words that were copied from the source have the source's case
                tokens, reference = scoring.lowered(tokens), scoring.lowered(reference)
            scores, cased = scoring.evaluate_in(info.case, tokens, reference)
            for prefix, each in (("", scores), ("cased ", cased)):
                if each is not None:
                    yield f"{prefix}BLEU score = {each.bleu:.4f} (torchtext, tokens as in training)"
                    signature = each.sacrebleu_signature
                    yield f"{prefix}sacreBLEU = {each.sacrebleu:.4f} (tokens as in training, {signature})"
            yield from scoring.text_lines([translation.text for translation in found], self._reference)
        if len(self._models) > 1:
            systems = [
                (path, [translation.text for translation in found])
                for path, found in zip(self._models, self._found, strict=True)
            ]
            yield "paired bootstrap, each model against the first one:"
            yield from scoring.comparison_lines(systems, self._reference)


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def opened(path: str) -> Iterator[int]:
    """A file's descriptor, to read from.

    Raises:
        UserError: io, it cannot be read. The body's OSErrors do not count.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if os.path.isdir(path):
            os.close(file)
            raise IsADirectoryError(None, "a folder, not a file")
    except OSError as error:
        raise UserError("io", f"cannot read: {error.strerror}", path, "give the path of a text file") from error
    try:
        yield file
    finally:
        os.close(file)


@contextlib.contextmanager
def source(settings: Settings) -> Iterator[int]:
    """The descriptor that is translated from."""
    if settings.input is not None:
        with opened(settings.input) as file:
            yield file
    elif sys.stdin is None:
        raise UserError("usage", "standard input is closed", "the command line", "give --input FILE, or redirect one")
    else:
        yield sys.stdin.fileno()


@contextlib.contextmanager
def target(settings: Settings, file: int) -> Iterator[IO[bytes]]:
    """What the translations are written to. A file of --output takes its place when the body is done.

    Args:
        settings: name it.
        file: the input's descriptor, which it must not be.

    Raises:
        UserError: io or usage.
    """
    if settings.output is None:
        # With PYTHONUNBUFFERED, the stream's own file may write a part and say nothing.
        with telling_of_output(settings), open(sys.stdout.fileno(), "wb", closefd=False) as stdout:
            yield stdout
        return
    path = Path(os.path.realpath(settings.output))  # a link stays
    kept = [*settings.models, *([settings.reference] if settings.reference is not None else [])]
    if os.path.exists(path) and (
        os.path.samestat(os.stat(path), os.fstat(file))
        or any(os.path.exists(other) and os.path.samefile(path, other) for other in kept)
    ):
        what = "the same file is read: the input, the reference or the model"
        raise UserError("usage", what, f"--output {settings.output}", "give another file")
    with telling_of_output(settings), contextlib.ExitStack() as stack:
        out: IO[bytes]
        if os.path.exists(path) and not os.path.isfile(path):
            out = stack.enter_context(open(path, "wb"))  # a pipe or a device; a folder is refused
        else:
            lock = stack.enter_context(locked(path.with_name(f".{path.name}.lock"), None))
            lock.write(f"{os.getpid()}\n".encode())
            lock.flush()
            clear_partial(path)
            out = stack.enter_context(replacing(path))
        yield out


@contextlib.contextmanager
def telling_of_output(settings: Settings) -> Iterator[None]:
    """Turns the body's OSErrors, which are the output's, into a UserError, io. A reader that has gone is none."""
    where = "standard output" if settings.output is None else f"--output {settings.output}"
    try:
        yield
    except BrokenPipeError:
        raise
    except InUse as error:
        todo = "wait for it to end, or give another file"
        raise UserError("io", f"another translate.py writes there (pid {error})", where, todo) from error
    except OSError as error:
        if lacks_memory(error):
            raise
        todo = "make room there" if error.errno in NO_ROOM else "give a file in a folder that you may write to"
        raise UserError("io", f"cannot write: {error.strerror or error}", where, todo) from error


# ---------------------------------------------------------------- the model card


def card(info: "ModelInfo", path: str) -> Iterator[str]:
    """What a model is, a line for each kind of thing.

    Args:
        info: of the model.
        path: where it was read from.
    """
    about, values = info.about, info.flags
    case = "lower-cased" if info.case == "lower" else "with capital letters"
    completed = {True: "completed", False: "not completed: this is the best epoch so far"}
    sizes = info.sizes
    yield f"model: {path}"
    kind = "words" if info.subwords is None else "pieces"
    split = "" if info.tokenizer == "spacy" else "; the text is tokenised already, with spaces between tokens"
    yield f"translates: {info.src_lang} to {info.trg_lang}, {case}{split}"
    yield f"vocabularies: {len(info.src_words)} {kind} of {info.src_lang}, {len(info.trg_words)} of {info.trg_lang}"
    if sizes:
        yield "sizes: " + ", ".join(f"{name} {size}" for name, size in sorted(sizes.items()))
    if "parameters" in about:
        yield f"parameters: {about['parameters']:,}"
    if "completed" in about:
        yield f"run: {completed[bool(about['completed'])]}"
    if "export" in about:
        yield f"export: ONNX, {about['export']}"
    named = ["recipe", "seed", "epochs", "batch_size", "lr"]
    named += ["subword", "bpe_dropout"] if values.get("subword") else ["min_freq"]
    named += [name for name in ("max_vocab",) if values.get(name)]  # 0: there was no limit
    yield "training: " + ", ".join(f"{name} {values[name]}" for name in named if name in values)
    yield "validation: " + ", ".join(
        f"{name} {value + 1}" if name == "epoch" else f"{name} {value:.4f}"  # people count epochs from 1
        for name, value in info.scores.items()
    )
    yield "decoding: " + ", ".join(
        f"{name} {values[name]}"
        for name in ("beam_size", "length_penalty", "max_length")
        if values.get(name) is not None
    )
    yield f"data: sha256 {about.get('data', 'unknown')}"
    if "vocabularies" in about:
        yield f"vocabularies' fingerprint: sha256 {about['vocabularies']}"
    told = {"src_lang", "trg_lang", "data", "vocabularies", "completed", "parameters", "export"}
    told |= {"run", "merit", "world_size"}  # of use to a run alone
    versions = {name: value for name, value in about.items() if name not in told}
    yield "written with: " + (", ".join(f"{name} {value}" for name, value in sorted(versions.items())) or "unknown")


if __name__ == "__main__":
    end_imports_at_sigterm()
    sys.exit(run_main(main, sys.argv[1:]))
