"""The engine that computes with onnxruntime, and the folder that a model is exported to. Needs no PyTorch.

An export is a folder of files. `export_onnx.py` makes the first two:

    encoder.onnx   src [src len, sentences] int64, src_len [sentences] int32
                   → hidden [sentences, hid dim], context_gates [sentences, 3 * hid dim],
                     context_logits [sentences, output dim]
    decoder.onnx   prev_token [rows] int64, hidden [rows, hid dim], sentence [rows] int64, k [1] int64,
                   context_gates and context_logits as the encoder gave them
                   → next_hidden [rows, hid dim], logits [rows, output dim], log_sum [rows],
                     top_logits and top_tokens [rows, k]
    model.json     format; info: what the model says about itself; sha256 of the other files and of info

A model whose words are spelled with pieces has two more files, sentencepiece's models:

    src.model, trg.model

A row is a hypothesis, and `sentence` says which sentence it belongs to. So the number of a sentence's hypotheses may
change from step to step, and nothing of the context is copied. `log_sum` is the logarithm of the sum of the logits'
exponentials: a word's log probability is its logit less that. `k` is the number of words in the last two outputs.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from nmt.engine import Hypothesis, ModelInfo
from nmt.errors import UserError, first_line, not_installed
from nmt.storage import PARTIAL, InUse, locked, new_folder, probe, sha256, write_synced
from nmt.text.vocabulary import EOS, PAD, SOS

import numpy as np

FORMAT = 1
PIECES_FORMAT = 2  # of models that earlier versions would misread: with pieces, or with another tokenizer than spaCy's
PARTS = ("encoder.onnx", "decoder.onnx")
SUBWORDS = ("src.model", "trg.model")
DESCRIPTION = "model.json"
MEMORY = ("context_gates", "context_logits")
STEP = ("next_hidden", "log_sum", "top_logits", "top_tokens")
REQUIREMENTS = "requirements-onnx.txt"
BATCH_ROWS = 128  # hypotheses of a batch
ERRORS_ALONE = 3  # of what onnxruntime prints
EXPORT_AGAIN = "export it again, or use another copy"


# ---------------------------------------------------------------- the folder


def check_place(folder: Path) -> None:
    """Raises a UserError, io, if no export can be written to `folder`: something is there, or may not be made there."""
    where = str(folder)
    elsewhere = "give --out the name of a new folder"
    try:
        if (folder / DESCRIPTION).exists():
            raise UserError("io", "an earlier export is there", where, f"remove it, or {elsewhere}")
        if folder.exists() and not folder.is_dir():
            raise UserError("io", "a file, not a folder", where, elsewhere)
        if folder.exists() and any(folder.iterdir()):
            raise UserError("io", "a folder with other files in it, which are left alone", where, elsewhere)
        probe(folder)
    except OSError as error:
        raise UserError("io", f"cannot write there: {error.strerror or error}", where, elsewhere) from error


def write(folder: Path, info: ModelInfo, parts: Mapping[str, bytes]) -> None:
    """Writes an export. The folder appears in one step, when all of it is on the disk.

    Args:
        folder: is not there yet, or empty.
        info: of the model.
        parts: the graphs by name, `PARTS`.

    Raises:
        UserError: io.
    """
    check_place(folder)
    said = asdict(info)
    models = dict(zip(SUBWORDS, said.pop("subwords") or (), strict=False))
    parts = {**parts, **models}
    number = FORMAT if not models and info.tokenizer == "spacy" else PIECES_FORMAT
    hashes = {name: sha256(part) for name, part in parts.items()} | {"info": info_sha256(said)}
    description = {"format": number, "sha256": hashes, "info": said}
    # A flag may be a path that is no text. JSON has escapes for what UTF-8 cannot hold, written as Python's own.
    text = json.dumps(description, ensure_ascii=False, indent=1).encode(errors="backslashreplace")
    lock = folder.with_name(f".{folder.name}.lock")
    temporary = folder.with_name(f"{folder.name}{PARTIAL}export")
    try:
        with locked(lock, None) as file:
            file.truncate(0)
            file.write(f"{os.getpid()}\n".encode())
            file.flush()
            with new_folder(folder, temporary):
                for name, part in parts.items():
                    write_synced(temporary / name, part)
                write_synced(temporary / DESCRIPTION, text)
    except InUse as error:
        raise UserError("io", f"in use by pid {error}", str(folder), "wait for it to end") from error
    except OSError as error:
        what = f"cannot write the export: {error.strerror or error}"
        raise UserError("io", what, str(folder), "make room, or give --out a folder elsewhere") from error


def read(folder: str | os.PathLike) -> tuple[ModelInfo, dict[str, bytes]]:
    """Reads what `write` wrote. All bytes are checked before a model is made of them.

    Raises:
        UserError: checkpoint, there is no export, or a damaged one.
    """
    folder = Path(folder)
    where, another = str(folder), "give the folder that export_onnx.py wrote"
    if not folder.is_dir():
        what = "a file, not a folder" if folder.exists() else "no such folder"
        raise UserError("checkpoint", what, where, another)
    if not (folder / DESCRIPTION).is_file():
        raise UserError("checkpoint", f"no export: it has no {DESCRIPTION}", where, another)
    files = {}
    there = [name for name in SUBWORDS if os.path.lexists(folder / name)]
    for name in (DESCRIPTION, *PARTS, *there):
        try:
            if not (folder / name).is_file():  # opening a pipe would wait for ever
                raise damaged(f"it has no {name}", where)
            files[name] = (folder / name).read_bytes()
        except OSError as error:
            what = f"cannot be read: {error.strerror or error}"
            raise UserError("checkpoint", what, str(folder / name), "check its permissions and its disk") from error
    try:
        description = json.loads(files.pop(DESCRIPTION).decode())
    except (ValueError, RecursionError) as error:
        raise damaged(f"{DESCRIPTION} is no JSON: {first_line(error)}", where) from error
    return info_of(description, files, where), files


def info_of(description: Any, parts: Mapping[str, bytes], where: str) -> ModelInfo:
    """What a description says about the model, if it is in order and goes with the parts.

    Raises:
        UserError: checkpoint.
    """
    number = description.get("format") if isinstance(description, dict) else None
    if type(number) is not int:
        raise damaged("it does not say its format", where)
    if number not in (FORMAT, PIECES_FORMAT):
        todo = "use the version that wrote it, or export again"
        raise UserError("checkpoint", f"format {number}, expected at most {PIECES_FORMAT}", where, todo)
    hashes, info = description.get("sha256"), description.get("info")
    if not isinstance(hashes, dict) or not isinstance(info, dict):
        raise damaged(f"{DESCRIPTION} has no sha256 or no info", where)
    actual = {name: sha256(part) for name, part in parts.items()} | {"info": info_sha256(info)}
    for name, digest in actual.items():
        if hashes.get(name) != digest:
            raise damaged(f"{name} has sha256 {digest}, expected {hashes.get(name)}", where)
    if absent := [name for name in SUBWORDS if name in hashes and name not in parts]:
        raise damaged(f"it has no {absent[0]}", where)
    if info.keys() != {field.name for field in fields(ModelInfo)} - {"subwords"}:
        raise damaged(f"info has {', '.join(info)}", where)
    models = [parts[name] for name in SUBWORDS if name in parts]
    if len(models) == 1:
        raise damaged("one language has pieces, the other has words", where)
    found = ModelInfo(**info, subwords=(models[0], models[1]) if models else None)
    try:
        sizes = [len(vocab) for vocab in found.vocabularies()]
        expected = [found.sizes["input_dim"], found.sizes["output_dim"]]
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(f"its vocabularies: {first_line(error)}", where) from error
    if sizes != expected:
        raise damaged(f"its vocabularies have {sizes} words, expected {expected}", where)
    return found


def info_sha256(info: dict[str, Any]) -> str:
    """The sha256 of what a model says about itself, however its JSON is laid out."""
    return sha256(json.dumps(info, sort_keys=True).encode())


def damaged(what: str, where: str) -> UserError:
    return UserError("checkpoint", f"damaged: {what}", where, EXPORT_AGAIN)


# ---------------------------------------------------------------- the engine


def load(folder: str | os.PathLike) -> "OnnxEngine":
    """The model that `export_onnx.py` wrote into a folder, ready to translate.

    It computes with as many threads as OMP_NUM_THREADS says. Without that, onnxruntime decides.

    Raises:
        UserError: checkpoint, there is no export, a damaged one, or one that onnxruntime does not take. Or usage,
            onnxruntime is not installed.
    """
    if told := not_installed(("onnxruntime",), REQUIREMENTS):
        raise told
    import onnxruntime  # here, because it is not installed everywhere

    info, parts = read(folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = ERRORS_ALONE
    onnxruntime.set_default_logger_severity(ERRORS_ALONE)
    try:
        sessions = [
            onnxruntime.InferenceSession(parts[name], options, providers=["CPUExecutionProvider"]) for name in PARTS
        ]
    except Exception as error:  # its errors have no class in common
        what = f"onnxruntime {onnxruntime.__version__} does not take it: {first_line(error)}"
        todo = f"install the versions of {REQUIREMENTS}, or export again"
        raise UserError("checkpoint", what, str(folder), todo) from error
    return OnnxEngine(info, *sessions)


def threads() -> int:
    """How many threads an operation has, by OMP_NUM_THREADS. 0 leaves it to onnxruntime."""
    found = re.match(r"\s*([0-9]{1,4})\s*(,|$)", os.environ.get("OMP_NUM_THREADS", ""))
    return int(found[1]) if found else 0


class OnnxEngine:
    """See `nmt.engine.Engine`.

    Args:
        info: of the model.
        encoder, decoder: onnxruntime's sessions, see above.
    """

    def __init__(self, info: ModelInfo, encoder: Any, decoder: Any):
        self.info = info
        self._encoder, self._decoder = encoder, decoder

    def translate(
        self, sentences: list[list[int]], *, beam_size: int, length_penalty: float, max_length: int, n_best: int = 1
    ) -> list[list[Hypothesis]]:
        """See `nmt.engine.Engine.translate`.

        Raises:
            ValueError: the vocabulary is smaller than the beam, or the beam than what is wanted.
        """
        if not 1 <= n_best <= beam_size:
            raise ValueError(f"expected 1 <= n_best ({n_best}) <= beam_size ({beam_size})")
        if beam_size > (vocabulary := len(self.info.trg_words)):
            raise ValueError(f"expected beam_size ({beam_size}) <= vocabulary ({vocabulary})")
        order = sorted(range(len(sentences)), key=lambda place: len(sentences[place]))
        results: list[list[Hypothesis]] = [[] for _ in sentences]
        size = max(1, BATCH_ROWS // beam_size)
        for first in range(0, len(order), size):
            places = order[first : first + size]
            found = self._search([sentences[place] for place in places], beam_size, length_penalty, max_length)
            for place, hypotheses in zip(places, found, strict=True):
                results[place] = sorted(hypotheses, key=lambda hypothesis: -hypothesis.score)[:n_best]
        return results

    def _search(
        self, sentences: list[list[int]], beam_size: int, length_penalty: float, max_length: int
    ) -> list[list[Hypothesis]]:
        """Translates a batch, as `nmt.search.beam_search` does. With a beam of 1 it is greedy.

        The rows of a step are the hypotheses that have not ended, and no others. Those of a sentence stand together,
        the best one first.

        Returns:
            For each sentence `beam_size` hypotheses, in the order in which they ended.
        """
        hidden, memory = self._encode(sentences)
        results: list[list[Hypothesis]] = [[] for _ in sentences]
        # Of the sentences that are not done, [kept]:
        columns = np.arange(len(sentences))
        unended = np.full(len(sentences), beam_size)  # hypotheses that have not ended
        common = np.zeros(len(sentences), np.float32)  # the common part of the log probabilities
        # Of their hypotheses, [rows]. All begin alike, so at first one row for each sentence is enough.
        owner = np.arange(len(sentences))  # the sentence's place in `columns`
        log_probs = np.zeros(len(sentences), np.float32)  # the other part
        prev_token = np.full(len(sentences), SOS)
        ids = np.empty((len(sentences), 0), np.int64)  # [rows, step]
        for step in range(max_length):
            k = int(unended.max())  # more words of one row cannot go on
            feeds = {"prev_token": prev_token, "hidden": hidden, "sentence": columns[owner], "k": np.array([k])}
            hidden, log_sum, top_logits, top_tokens = self._decoder.run(STEP, feeds | memory)
            log_probs = log_probs - log_sum
            first_rows = np.searchsorted(owner, np.arange(len(columns)))  # [kept]
            leading = np.maximum.reduceat(log_probs, first_rows)  # [kept]
            common = common + leading
            # Each sentence's candidates in one row: [kept, most rows of a sentence, k], then [kept, ...].
            rank = np.arange(len(owner)) - first_rows[owner]
            candidates = np.full((len(columns), rank.max() + 1, k), -np.inf, np.float32)
            candidates[owner, rank] = top_logits + (log_probs - leading[owner])[:, None]
            candidates = candidates.reshape(len(columns), -1)
            choices = np.argsort(-candidates, axis=1, kind="stable")[:, :beam_size]  # the best first

            chosen = np.arange(choices.shape[1]) < unended[:, None]  # the beam is narrower by those that have ended
            owner, choices = np.nonzero(chosen)[0], choices[chosen]  # [rows], as all that follows
            log_probs = candidates[owner, choices]
            parents = first_rows[owner] + choices // k
            prev_token = top_tokens[parents, choices % k]
            ids = np.concatenate((ids[parents], prev_token[:, None]), axis=1)
            scores = (common[owner] + log_probs) / (step + 1) ** length_penalty
            ends = (prev_token == EOS) | (step == max_length - 1)
            for row in np.flatnonzero(ends):
                words = ids[row].tolist()
                words = words[:-1] if words[-1] == EOS else words
                results[columns[owner[row]]].append(Hypothesis(words, float(scores[row])))

            unended = unended - np.bincount(owner[ends], minlength=len(columns))
            kept = unended > 0
            if not kept.any():
                break
            hidden, ids, log_probs, prev_token = (part[~ends] for part in (hidden[parents], ids, log_probs, prev_token))
            owner = (np.cumsum(kept) - 1)[owner[~ends]]
            columns, unended, common = columns[kept], unended[kept], common[kept]
        return results

    def _encode(self, sentences: list[list[int]]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The first hidden states, [sentences, hid dim], and what the decoder reads of the sources, by name."""
        src_len = np.array([len(ids) for ids in sentences], np.int32)
        src = np.full((src_len.max(), len(sentences)), PAD, np.int64)
        for column, ids in enumerate(sentences):
            src[: len(ids), column] = ids
        hidden, *memory = self._encoder.run(["hidden", *MEMORY], {"src": src, "src_len": src_len})
        return hidden, dict(zip(MEMORY, memory, strict=True))
