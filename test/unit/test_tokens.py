"""The tokens' claims: they are spaCy's, from any number of processes, and no process outlives its parent."""

import contextlib
import multiprocessing.connection
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import unicodedata
from pathlib import Path

from nmt.text import files, tokens
from nmt.text.vocabulary import EOS

import pytest
import spacy
from conftest import DE, EN, MULTI30K, REPOSITORY, TEST_PATHS, needs_multi30k, refused, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st


def chunks(lines, size=3):
    """Chunks of `size` lines, which are on both sides."""
    texts = [
        "".join(f"{line}\n" for line in lines[first : first + size]).encode() for first in range(0, len(lines), size)
    ]
    paths = Path("train.de"), Path("train.en")
    return [files.Chunk(paths, 1 + size * index, (text, text)) for index, text in enumerate(texts)]


def plain(result):
    """A `TokenChunk` as lists."""
    return result.src.sentences(), result.src.cut, result.trg.sentences(), result.trg.cut, result.dropped


# ---------------------------------------------------------------- the tokens of a line


def test_tokens_are_those_of_spacy_line_by_line():
    """However many lines it is given together, white space and special cases at their ends and all."""
    generator = random.Random(3)
    for lang in ("de", "en", "zh", "xx"):
        tokenizer = spacy.blank(lang).tokenizer
        special = list(getattr(tokenizer, "rules", [])) or ["a"]
        letters = "aäßA.,'’-–:)(!?&/%$ \u00a0\u2028\t\x0b\r…019zB\"„“\U0001f600@"
        lines = []
        for _ in range(500):
            words = [
                generator.choice(special) if generator.random() < 0.5 else "".join(generator.choices(letters, k=5))
                for _ in range(generator.randint(0, 8))
            ]
            lines.append(generator.choice(["", " "]).join(words).replace("\n", "").strip())
        assert "" in lines
        expected = [[token.lower_ for token in tokenizer(line)] for line in lines]
        assert tokens.tokenise(lines, lang) == (expected, 0)
        as_they_are = [[token.text for token in tokenizer(line)] for line in lines]
        assert tokens.tokenise(lines, lang, "keep") == (as_they_are, 0)
        assert lang == "zh" or as_they_are != expected


def test_lines_that_are_not_stripped_keep_their_words_to_themselves():
    expected = [["zwei", "."], ["ein", "hund", "."], ["a", "b"], []]
    assert tokens.tokenise(["Zwei.", " Ein Hund. \n", "a\nb", "\n"], "de") == (expected, 0)


def test_text_that_is_tokenised_already_is_split_at_white_space_alone():
    lines = ["Ein Hund , z.B.  ein\u2003Dackel .", "", "don 't", "Gro\u0308\xdfe ta\xadge", "a" * 300 + " b"]
    expected = [
        ["Ein", "Hund", ",", "z.B.", "ein", "Dackel", "."],
        [],
        ["don", "'t"],
        ["Größe", "tage"],
        ["a" * tokens.MAX_WORD, "b"],
    ]
    found = tokens.tokenise_lines(lines, "no language", "keep", "space")
    assert found.sentences() == expected
    assert (found.cut, found.long_words) == (0, 1)
    lower = [[word.lower() for word in words] for words in expected]
    assert tokens.tokenise(lines, "no language", "lower", "space") == (lower, 0)
    long = tokens.tokenise_lines(["x " * 300, "y" * 100 + " z" * 10_000], "", tokenizer="space")
    assert long.lengths.tolist() == [tokens.MAX_WORDS, tokens.MAX_WORDS] and long.cut == 2
    with pytest.raises(ValueError, match="tokenizer is 'moses'"):
        tokens.tokenise(["a"], "de", tokenizer="moses")


def test_a_corpus_that_is_tokenised_already_needs_no_code_of_spacy(tmp_path, load, load_test):
    folder = write_corpus(tmp_path / "corpus", (DE, EN), (DE, EN), (["Ein Hund bellt ."], ["A dog barks ."]))
    for path in folder.glob("*.de"):
        path.rename(path.with_suffix(".zz-made-up"))
    flags = {"src_lang": "zz-made-up", "tokenizer": "space"}
    corpus = load(folder, min_freq=1, **flags)
    assert "bellt." in corpus.src_vocab.itos and corpus.test.src_tokens == [["ein", "hund", "bellt", "."]]
    assert load_test(folder, **flags).src_tokens == corpus.test.src_tokens
    refused("usage", load, folder, src_lang="zz-made-up", says=["no tokenizer for 'zz-made-up'", "--tokenizer space"])


def test_case_of_another_name_is_no_case():
    with pytest.raises(ValueError, match="case is 'upper', expected one of lower, keep"):
        tokens.tokenise(["Ein Hund."], "de", "upper")


def test_long_line_is_cut_before_it_is_tokenised(tmp_path, load, monkeypatch):
    """Row 26."""
    seen = []

    class Spy:
        def __init__(self, tokenizer):
            self._tokenizer, self.vocab = tokenizer, tokenizer.vocab

        def __call__(self, text):
            seen.append(len(text))
            return self._tokenizer(text)

    tokenizer = tokens._tokenizer
    monkeypatch.setattr(tokens, "_tokenizer", lambda lang: Spy(tokenizer(lang)))
    lines = ["Hund " * 200_000, "a" * 20_000, "a" * (tokens.MAX_CHARACTERS - 2) + "  b", DE[3]]
    corpus = load(write_corpus(tmp_path / "long", train=(lines, EN)))
    assert max(seen) <= tokens.MAX_CHARACTERS
    assert corpus.train.src.lengths.tolist() == [256, 3, 3, 6]
    assert corpus.train.src.ids[corpus.train.src.offsets[1:] - 1].tolist() == [EOS] * 4
    assert corpus.notes == ["warning: 3 sentences of train.de cut to 254 words"]


# What spaCy splits character by character, and some that it does not.
PUNCTUATION = ["/", "(", "%", '"', "'", "…", ".", "-", "*", "&", "😀", ":)", "a/", "$1,", "@a.", "–", "„", "z.B."]


@pytest.mark.parametrize("lang", ["de", "en", "xx"])
def test_time_for_a_line_without_spaces_does_not_grow_with_its_square(lang, monkeypatch):
    """Kind G: what spaCy gets between two spaces is bounded. 18 lines took 90 s, and take 0.2 s."""
    longest = []
    tokenizer = tokens._tokenizer(lang)
    monkeypatch.setattr(tokens, "LINES_PER_DOC", 1)
    tokens.tokenise(["Ein Hund bellt."], lang)
    start = time.process_time()
    for text in PUNCTUATION:
        line = (text * 10_000)[:10_000]
        ((words,), cut) = tokens.tokenise([line], lang)
        longest.append(max(map(len, words)))
        kept = [token.lower_ for token in tokenizer(line[: tokens.MAX_WORD])]
        assert (words, cut) == (kept, 0)
    assert time.process_time() - start < 9
    assert max(longest) <= tokens.MAX_WORD


def test_words_are_cut_one_by_one_and_their_lines_are_counted_once(tmp_path, load):
    """Kind G. A word of 200 characters is whole, and so is what stands after a longer one."""
    a, b = "a" * 200, "b" * 201
    lines = [f"Ein {b} bellt {b}{a}.", f"Ein {a} bellt.", "/" * 10_000, DE[3]]
    corpus = load(write_corpus(tmp_path / "long", train=(lines, EN), val=(lines[:2], EN[:2])), min_freq=1)
    assert corpus.val.src_tokens == [["ein", "b" * 200, "bellt", "b" * 200], ["ein", a, "bellt", "."]]
    assert corpus.train.src.lengths.tolist() == [6, 6, 202, 6]
    note = "sentences of {}.de with words cut to 200 characters"
    assert corpus.notes == [f"warning: 2 {note.format('train')}", f"warning: 1 {note.format('val')}"]


def test_language_without_spaces_has_lines_and_no_words_to_cut():
    """Kind G: the Chinese tokenizer takes its time for each character, not for their square."""
    assert tokens.tokenise(["狗叫" * 125], "zh") == ([["狗", "叫"] * 125], 0)


# ---------------------------------------------------------------- one spelling


LETTERS = "aäöüßéÅﬁ가힣क़" + "\u0308\u0301\u0323\u212b\u200c\u200d" + files.UNSEEN + " \u00a0.,-"


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from(LETTERS), max_size=30), st.sampled_from(["NFC", "NFD"]), st.sampled_from(files.UNSEEN))
def test_text_that_looks_the_same_has_the_same_tokens(text, form, unseen):
    """Kind M: composed or not, and with any character that nobody sees between any two."""
    base = unicodedata.normalize("NFC", "".join(letter for letter in text if letter not in files.UNSEEN))
    expected = tokens.tokenise([base], "de")
    for other in (text, unicodedata.normalize(form, base), unseen.join(unicodedata.normalize(form, base))):
        assert tokens.tokenise([other], "de") == expected
    assert tokens.normalised(tokens.normalised(text)) == tokens.normalised(text)


def test_joiners_that_make_words_stay():
    """Kind M: U+200C and U+200D have a meaning in Persian, in Hindi and in pictures."""
    assert tokens.normalised("می\u200cخواهم 👩\u200d💻") == "می\u200cخواهم 👩\u200d💻"


def test_line_of_unseen_characters_is_empty(tmp_path, load):
    """Kind M and row 25."""
    corpus = load(write_corpus(tmp_path / "a", train=([*DE, f" {files.UNSEEN}\u00a0\u200b"], [*EN, "A cat."])))
    assert corpus.notes == ["1 pairs dropped: empty in train.de or train.en"]


def test_marks_upon_marks_are_normalised_in_bounded_time():
    """Kinds G and M: sorting them takes the square of their number."""
    line = "a" + "\u0301\u0323" * 100_000
    start = time.process_time()
    assert tokens.tokenise([line], "de")[1] == 1
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "folder",
    [pytest.param(MULTI30K, marks=needs_multi30k, id="multi30k"), pytest.param(REPOSITORY / "sample", id="sample")],
)
def test_usual_text_is_not_changed(folder):
    """Kinds G and M: no line of these corpora is normalised to another or has a word that is cut."""
    paths = [path for path in folder.iterdir() if path.suffix in (".de", ".en")]
    assert len(paths) == 6
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert tokens.normalised(text) == text
        assert max(map(len, text.split())) <= tokens.MAX_WORD
        assert [line.strip() for line in text.split("\n")] == list(map(files.stripped, text.split("\n")))


@pytest.mark.parametrize("lang", ["qq", "ja", "punctuation", ""])
def test_language_without_a_tokenizer_is_a_usage_error(lang):
    if lang == "ja":
        pytest.importorskip("spacy")
        if any(Path(path, "sudachipy").exists() for path in sys.path):
            pytest.skip("this machine has the Japanese tokenizer")
    refused("usage", tokens.tokenise, ["a"], lang, says=[f"no tokenizer for '{lang}'", "--src-lang"])


def test_tokenizer_that_has_seen_too_many_words_starts_anew(monkeypatch):
    lines = ["Ein Hund bellt.", "Geht's?"]
    expected = tokens.tokenise(lines, "de")
    first = tokens._tokenizer("de")
    assert tokens.tokenise(lines, "de") == expected
    assert tokens._tokenizer("de") is first
    monkeypatch.setattr(tokens, "WORDS_KEPT", 10)
    assert tokens.tokenise(lines, "de") == expected
    assert tokens._tokenizer("de") is not first


# ---------------------------------------------------------------- processes


def test_tokens_do_not_depend_on_the_number_of_processes(monkeypatch):
    lines = [f"{word} {index} Hunde bellen." if index != 3 else "" for index in range(11) for word in DE]
    with tokens.tokenising(("de", "en"), 1) as results:
        alone = list(map(plain, results(chunks(lines))))
    assert sum(result[-1] for result in alone) == 4
    with tokens.tokenising(("de", "en"), 1, "keep") as results:
        cased = list(map(plain, results(chunks(lines))))
    assert cased != alone
    monkeypatch.setattr(tokens, "tokenise_chunk", None)  # in this process, the others have their own
    with tokens.tokenising(("de", "en"), 2) as results:
        assert list(map(plain, results(chunks(lines)))) == alone
        assert list(map(plain, results(chunks(lines[:4])))) == alone[:1] + list(map(plain, results(chunks(lines[3:4]))))
    with tokens.tokenising(("de", "en"), 2, "keep") as results:
        assert list(map(plain, results(chunks(lines)))) == cased


def watch_server(monkeypatch):
    """A list of the process that is started, once it is: the one that becomes those that tokenise."""
    started, start = [], subprocess.Popen

    def watched(*args, **options):
        started.append(start(*args, **options))
        return started[-1]

    monkeypatch.setattr(tokens.subprocess, "Popen", watched)
    return started


def processes(*, parent=None, group=None):
    """The processes that have this parent, or are of this group. One that has ended unwaited for is none."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            stat = path.read_text()
            state, its_parent, its_group = stat.rpartition(")")[2].split()[:3]
            if state != "Z" and (int(its_parent) == parent or int(its_group) == group):
                found.append(int(stat.split()[0]))
    return found


def children(pid, count=2):
    """The process's children, when there are so many."""
    deadline = time.monotonic() + 60
    while len(found := processes(parent=pid)) < count and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(found) == count
    return found


def assert_group_is_gone(server):
    """The server has been waited for, and none of its group is left. A killed child may need a moment to go."""
    assert server.poll() is not None
    deadline = time.monotonic() + 20
    while processes(group=server.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes(group=server.pid) == []


def test_killed_tokenising_process_is_an_error_and_leaves_none(monkeypatch):
    server = watch_server(monkeypatch)
    with (
        pytest.raises(RuntimeError, match="tokenising process ended early"),
        tokens.tokenising(("de", "en"), 2) as results,
    ):
        for index, _ in enumerate(results(chunks(DE * 1000))):
            if index == 0:
                os.kill(children(server[0].pid)[-1], signal.SIGKILL)
    assert_group_is_gone(server[0])


def test_error_in_a_tokenising_process_reaches_the_caller(monkeypatch):
    server = watch_server(monkeypatch)
    with tokens.tokenising(("de", "qq"), 2) as results:
        refused("usage", list, results(chunks(DE)), says="no tokenizer for 'qq'")
    assert_group_is_gone(server[0])


def test_chunk_that_takes_long_keeps_its_turn_and_does_not_hold_up_the_others():
    pipes, far_ends = zip(*(multiprocessing.Pipe() for _ in range(2)), strict=True)
    got, count = [], 4 * tokens.AHEAD
    thread = threading.Thread(target=lambda: got.extend(tokens._in_turn(pipes, range(count))), daemon=True)
    thread.start()
    slow = far_ends[0].recv()
    quick = []
    while far_ends[1].poll(1):
        quick.append(far_ends[1].recv())
        far_ends[1].send(-quick[-1])
    assert slow == 0 and 2 * tokens.AHEAD <= len(quick) <= 3 * tokens.AHEAD, "but not without end"
    far_ends[0].send(0)
    while len(got) < count and thread.is_alive():
        for end in multiprocessing.connection.wait(far_ends, 1):
            end.send(-end.recv())
    thread.join()
    assert got == [-number for number in range(count)]


def test_message_that_breaks_off_is_the_end_of_a_process():
    ours, theirs = multiprocessing.Pipe()
    os.write(theirs.fileno(), struct.pack("!i", 1000) + b"half")
    theirs.close()
    with pytest.raises(RuntimeError, match="tokenising process ended early"):
        tokens._receive(ours)


def test_tokenising_processes_that_have_stopped_are_ended_too(monkeypatch):
    monkeypatch.setattr(tokens, "SECONDS_TO_END", 0.2)
    server = watch_server(monkeypatch)
    with tokens.tokenising(("de", "en"), 2):
        os.kill(children(server[0].pid)[1], signal.SIGSTOP)
    assert_group_is_gone(server[0])


def test_tokenising_process_imports_no_torch(monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    with tokens.tokenising(("de", "en"), 2) as results:
        assert len(list(results(chunks(DE)))) == 2
    modules = {line.rpartition("|")[2].strip() for line in capfd.readouterr().err.splitlines()}
    assert "spacy" in modules
    assert not any(module.startswith("torch.") for module in modules)


def test_tokenising_processes_end_with_a_killed_parent():
    code = (
        "import os, struct, subprocess, time; from nmt.text import tokens; start = subprocess.Popen;"
        "subprocess.Popen = lambda *args, **options: print((p := start(*args, **options)).pid, flush=True) or p;"
        "stack = tokens.tokenising(('de', 'en'), 2); pipes = stack.__enter__().args[0];"
        "os.write(pipes[0].fileno(), struct.pack('!i', 1000) + b'half a message'); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    server = int(parent.stdout.readline())
    assert all("nmt.text" in Path(f"/proc/{pid}/cmdline").read_text() for pid in children(server))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while processes(group=server) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes(group=server) == []


INTERRUPTED = """
import os, signal, time
from nmt.text import tokens
from test_tokens import DE, chunks
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may inherit that it is ignored
with tokens.tokenising(("de", "en"), 2) as results:
    for index, _ in enumerate(results(chunks(DE * 20))):
        if index == 3:
            try:
                os.kill(0, signal.SIGINT)
                time.sleep(10)
            except KeyboardInterrupt:
                print("interrupted")
print(index + 1 == len(chunks(DE * 20)))
"""


def test_interrupt_is_left_to_the_parent():
    """Ctrl-C goes to all processes of the terminal's foreground group, here to those of a program of its own."""
    paths = os.pathsep.join(map(str, (REPOSITORY, *TEST_PATHS)))
    options = {"env": os.environ | {"PYTHONPATH": paths}, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], start_new_session=True, **options)
    assert done.stdout.split() == ["interrupted", "True"], done.stderr
