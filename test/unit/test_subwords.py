"""Words are spelled with pieces that join back to them, and models of pieces do all that models of words do."""

import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter

import data
import export_onnx
import train_8p
import translate
from nmt import checkpoint, errors, onnx_engine, resume
from nmt.errors import run_main
from nmt.text import subwords
from nmt.text.vocabulary import EOS, SOS, SPECIALS, UNK

import numpy as np
import pytest
from conftest import REPOSITORY, SMALL, refused, same_corpus, write_corpus
from test_resume import STEPS, Recorder, check_ranks

COUNTS = Counter({"hund": 9, "hunde": 6, "hunden": 3, "katze": 7, "katzen": 4, "und": 8, ".": 20, "läuft": 5})
LIBRARY = pytest.importorskip("sentencepiece")


@pytest.fixture(scope="module")
def pieces():
    return subwords.learn(COUNTS, 30)


# ---------------------------------------------------------------- words and their pieces


def test_pieces_join_back_to_the_words(pieces):
    letters = "hundekatzläf."
    draws = random.Random(1)
    sentence = ["".join(draws.choices(letters, k=draws.randint(1, 9))) for _ in range(500)]
    ids = pieces.encode(sentence)
    assert UNK not in ids
    assert pieces.decode([SOS, *ids, EOS, *pieces.encode(["hund"])]) == sentence
    assert pieces.spell(sentence) == [pieces.encode([word]) for word in sentence]


@pytest.mark.parametrize(
    ("word", "joined"),
    [
        ("hund hund", ["hund hund"]),  # a token with a space in it stays one
        (" ", []),
        ("\xa0\u3000", []),
        ("Ωhund", ["<unk>"]),
        ("hΩΨd", ["<unk>"]),
        ("▁", ["_"]),
        ("a▁▁b", ["a__b"]),
        ("<pad>", ["<pad>"]),
        ("</s>", ["</s>"]),
    ],
)
def test_a_word_of_any_characters_is_harmless(word, joined):
    made = Counter(f"{first}{second}" for first in COUNTS for second in COUNTS)
    pieces = subwords.learn(COUNTS + made + Counter({"a_b": 1, "</s>": 1, "<pad>": 1, "hund hund": 1}), 60)
    assert pieces.decode(pieces.encode(["und", word, "und"])) == ["und", *joined, "und"]
    assert not set(pieces.encode([word])) & {1, SOS, EOS}


def test_so_many_pieces_are_learned_as_were_asked_for_and_the_frequent_ones_come_first(pieces):
    assert pieces.itos[: len(SPECIALS)] == SPECIALS and len(pieces) == 30 + len(SPECIALS)
    uses = Counter(itertools.chain.from_iterable(pieces.encode([word]) * count for word, count in COUNTS.items()))
    counts = [uses[index] for index in range(len(SPECIALS), len(pieces))]
    assert counts == sorted(counts, reverse=True) and counts[0] == 20


def test_learning_twice_gives_the_same_bytes(pieces):
    again = subwords.learn(COUNTS, 30)
    assert (again.model, again.itos) == (pieces.model, pieces.itos)


def test_too_many_pieces_are_refused_with_the_most_that_there_are():
    message = refused("data", subwords.learn, COUNTS, 1000, "de", says=["--subword 1000, de", "give --subword "])
    most = int(message.rpartition("give --subword ")[2].split()[0])
    assert len(subwords.learn(COUNTS, most)) == most + len(SPECIALS)
    refused("data", subwords.learn, COUNTS, most + 1, says=f"no more than {most} pieces")


def test_too_few_pieces_are_refused():
    message = refused("data", subwords.learn, COUNTS, 1, "de", says=["--subword 1, de", "characters that need a piece"])
    least = int(message.rpartition("give --subword ")[2].split()[0])
    assert subwords.learn(COUNTS, least).spell(["und"])[0]


def test_of_a_script_with_many_characters_the_rarest_have_no_piece():
    """Here 40 of 80 pieces are kept for joined characters, and 60 characters stand once each in 4,000."""
    characters = [chr(0x4E00 + number) for number in range(90)]
    counts = Counter({"".join(pair): 140 for pair in itertools.pairwise(characters[:30])})
    counts += Counter(characters[30:])
    pieces = subwords.learn(counts, 80)
    assert sum(len(piece) > 1 for piece in pieces.itos[len(SPECIALS) :]) >= 35
    assert pieces.decode(pieces.encode([characters[0] + characters[1], characters[89]])) == ["一丁", "<unk>"]


def test_a_sentence_has_a_bounded_number_of_pieces(pieces):
    ids, lengths = pieces.encode_all([["ä" * 600], ["hund"]])
    assert lengths.tolist() == [subwords.MAX_PIECES, 1] and len(ids) == subwords.MAX_PIECES + 1


def test_another_vocabulary_than_the_models_is_refused(pieces):
    for words in (pieces.itos[:-1], [*pieces.itos[:-1], "x"], SPECIALS):
        with pytest.raises(ValueError, match="other pieces"):
            subwords.Pieces(words, pieces.model)
    with pytest.raises(ValueError, match="no model of sentencepiece"):
        subwords.Pieces(pieces.itos, b"hello")


def test_a_missing_package_is_one_line(monkeypatch, tmp_path, capsys):
    version = errors.importlib.metadata.version

    def lacks(package):
        if package == "sentencepiece":
            raise errors.importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(errors.importlib.metadata, "version", lacks)
    corpus = write_corpus(tmp_path / "corpus")
    flags = ["--data-dir", str(corpus), "--ckptpath", str(tmp_path / "m"), *SMALL, "--subword", "20"]
    assert run_main(train_8p.main, flags) == 2
    err = capsys.readouterr().err
    assert err.startswith("error[usage]: not installed: sentencepiece; ") and err.count("\n") == 1


# ---------------------------------------------------------------- BPE dropout


def sides(pieces, sentences):
    side = data.Side.encode(sentences, pieces)
    return side, data.Split(side, side)


def spelled(pieces, sentences, **how):
    _, split = sides(pieces, sentences)
    how = {"dropout": 0.3, "seed": 1, "epoch": 0} | how
    return data.spelled_anew(split, pieces, pieces, **how)


def test_without_a_draw_the_joins_are_those_of_the_library(pieces):
    draws = random.Random(2)
    words = ["".join(draws.choices("hundekatzläft.Ω", k=draws.randint(1, 12))) for _ in range(2000)]
    ids, lengths = subwords.Joins(pieces).draw(words, 0.0, np.random.default_rng(0))
    assert [each.tolist() for each in np.split(ids, np.cumsum(lengths)[:-1])] == pieces.spell(words)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_spellings_are_as_frequent_as_if_each_join_were_left_out_by_itself(pieces, dropout):
    """By the paper's algorithm, word by word: in each step every possible join is dropped with the probability."""
    ranks, draws, times = pieces.ranks(), random.Random(3), 4000

    def one(word):
        spelling = list("▁" + word)
        while True:
            joins = [
                (ranks[a + b], at)
                for at, (a, b) in enumerate(itertools.pairwise(spelling))
                if a + b in ranks and draws.random() >= dropout
            ]
            if not joins:
                return tuple(spelling)
            at = min(joins)[1]
            spelling[at : at + 2] = [spelling[at] + spelling[at + 1]]

    expected = Counter(one("hunden") for _ in range(times))
    ids, lengths = subwords.Joins(pieces).draw(["hunden"] * times, dropout, np.random.default_rng(4))
    found = Counter(tuple(pieces.itos[i] for i in each) for each in np.split(ids, np.cumsum(lengths)[:-1]))
    assert len(expected) > 3
    assert sum(abs(expected[each] - found[each]) for each in expected | found) / times < 0.12


def test_other_spellings_join_to_the_same_words_and_each_epoch_has_its_own(pieces):
    draws = random.Random(5)
    words = [*COUNTS, "unde", "Ω", "a b"]
    sentences = [draws.choices(words, k=draws.randint(0, 12)) for _ in range(300)]
    first, second = spelled(pieces, sentences), spelled(pieces, sentences, epoch=1)
    plain, split = sides(pieces, sentences)
    for side in (first.src, first.trg, second.src):
        decoded = [pieces.decode(side.ids[a:b].tolist()) for a, b in zip(side.offsets, side.offsets[1:], strict=False)]
        assert decoded == [pieces.decode(pieces.encode(words)) for words in sentences]
        assert len(side.ids) > 1.2 * len(plain.ids)
    assert not np.array_equal(first.src.ids, second.src.ids)
    assert not np.array_equal(first.src.ids, first.trg.ids), "both languages have draws of their own"
    assert not np.array_equal(first.src.ids, spelled(pieces, sentences, seed=2).src.ids)
    assert data.spelled_anew(split, pieces, pieces, dropout=0.0, seed=1, epoch=0) is split


def test_spellings_follow_from_seed_and_epoch_alone(pieces, monkeypatch):
    """Whatever was drawn before, in blocks of another process, and with a memory that forgets."""
    sentences = [["hunde", "und", "katzen", "."]] * 50
    pieces_of = subwords.Pieces(pieces.itos, pieces.model)
    expected = spelled(pieces_of, sentences, epoch=3).src.ids
    spelled(pieces_of, sentences, epoch=1)
    assert np.array_equal(spelled(pieces_of, sentences, epoch=3).src.ids, expected)
    monkeypatch.setattr(subwords, "STATES", 3)
    assert np.array_equal(spelled(pieces_of, sentences, epoch=3).src.ids, expected)
    side, _ = sides(pieces, sentences)
    code = (
        "import json, sys; import numpy as np; from nmt.text import subwords\n"
        "itos, model, ids, offsets = json.load(sys.stdin)\n"
        "pieces = subwords.Pieces(itos, subwords.as_model(model))\n"
        "((ids, lengths),) = pieces.spell_anew(np.array(ids, np.int32), np.array(offsets), 0.3, '1 3 src')\n"
        "print(json.dumps(ids.tolist()))"
    )
    given = json.dumps([pieces.itos, subwords.as_text(pieces.model), side.ids.tolist(), side.offsets.tolist()])
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=REPOSITORY, env=environment, input=given.encode(), capture_output=True)
    assert json.loads(found.stdout) == [index for index in expected.tolist() if index not in (SOS, EOS)]


def test_the_length_is_bounded_there_too(pieces):
    assert spelled(pieces, [["hundehunde"] * 200]).src.lengths.tolist() == [subwords.MAX_PIECES + 2]


# ---------------------------------------------------------------- the cache


def test_the_cache_has_the_pieces_of_each_sentence(tmp_path, load, monkeypatch):
    """Also in blocks of a few sentences, and from files."""
    folder = write_corpus(tmp_path / "corpus", 64, 6, 6)
    corpus = load(folder, subword=30)
    assert isinstance(corpus.src_vocab, subwords.Pieces)
    for split, name in ((corpus.train, "train"), (corpus.val, "val"), (corpus.test, "test")):
        for side, vocab, lang in ((split.src, corpus.src_vocab, "de"), (split.trg, corpus.trg_vocab, "en")):
            lines = (folder / f"{name}.{lang}").read_text().splitlines()
            expected = data.Side.encode([line.split() for line in lines], vocab)
            assert side.ids.tolist() == expected.ids.tolist()
            assert side.offsets.tolist() == expected.offsets.tolist()
    assert any(line.startswith("pieces of a de word of train: ") for line in corpus.lines())
    assert "34 de and 34 en pieces" in next(corpus.lines())
    again = load(folder, subword=30)
    monkeypatch.setattr(subwords, "SENTENCES", 5)
    blocks = load(folder, subword=30, cache_dir=tmp_path / "other")
    for other in (again, blocks):
        assert same_corpus(other, corpus)
        assert other.src_vocab.model == corpus.src_vocab.model
    assert sum("tokenising" in line for line in load.lines) == 2, "the second time from the cache"


def test_too_long_sentences_are_cut_and_told(tmp_path, load):
    long = " ".join(f"w{number:03d}" for number in range(250))
    folder = write_corpus(tmp_path / "corpus", ([long, "ein hund"] * 3, ["a dog", "the dog"] * 3), 2, 2)
    corpus = load(folder, subword=16, tokenizer="space")
    assert int(corpus.train.src.lengths.max()) == subwords.MAX_PIECES + 2
    assert "warning: 3 de sentences of train cut to 510 pieces" in corpus.notes


def test_words_of_another_script_are_warned_about(tmp_path, load):
    folder = write_corpus(tmp_path / "corpus", 64, (["Ελλάδα " * 20] * 6, ["the dog"] * 6), 4)
    corpus = load(folder, subword=30)
    assert any("100.0% of the de words of val are unknown" in line for line in corpus.lines())


# ---------------------------------------------------------------- through the command lines

LANGS = ["--src-lang", "qaa", "--trg-lang", "en"]  # spaCy knows no qaa
TEXT = ["--tokenizer", "space", "--case", "keep"]
PIECES = [*TEXT, "--subword", "40", "--bpe-dropout", "0.2"]
FLAGS = [*SMALL, *LANGS, "--epochs", "2", "-b", "16", "-p", "3", "--beam-size", "2"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Text that is tokenised already, in a language of no code."""
    folder = write_corpus(tmp_path_factory.mktemp("corpus"), 64)
    for path in folder.glob("*.de"):
        path.write_text(path.read_text().replace("hund", "Hun-d'"))
        path.rename(path.with_suffix(".qaa"))
    return folder


@pytest.fixture
def record(monkeypatch, no_launcher):
    return Recorder(monkeypatch)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """The path of a model of pieces, trained with BPE dropout."""
    path = tmp_path_factory.mktemp("trained") / "model"
    arguments = ["--data-dir", str(corpus), "--ckptpath", str(path), *FLAGS, *PIECES]
    assert run_main(train_8p.main, arguments) == 0
    return path


def scores(out):
    """What is scored."""
    return [line.partition(":")[0] for line in out.splitlines() if ": BLEU " in line and not line.startswith("note: ")]


def test_the_checkpoint_has_the_pieces(trained):
    saved = checkpoint.load(trained)
    src, trg = saved.vocabularies(trained)
    assert src.decode(src.encode(["Hun-d'", "rot"])) == ["Hun-d'", "rot"]
    assert len(src) == len(trg) == 44 and saved.sizes["input_dim"] == 44
    assert saved.flags["tokenizer"] == "space" and saved.flags["bpe_dropout"] == 0.2
    assert saved.about["sentencepiece"] and saved.shortlist.shape[0] == 44


def test_it_is_scored_on_whole_words_from_another_folder(trained, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--data-dir", str(corpus), "--device", "cpu", "--evaluate", str(trained)]
    assert run_main(train_8p.main, arguments) == 0
    out = capsys.readouterr().out
    assert "44 qaa and 44 en pieces" in out
    assert scores(out) == ["greedy", "greedy, cased"]
    assert "\nfinal scores: beam of 2\n" in out and "\ncased BLEU = " in out
    for flag, value in (("--subword", "30"), ("--tokenizer", "spacy"), ("--max-vocab", "7")):
        assert run_main(train_8p.main, [*arguments, flag, value]) == 2
        assert f"{flag} {value} contradicts the checkpoint" in capsys.readouterr().err


def test_it_translates_with_both_engines(trained, corpus, tmp_path, monkeypatch, capsys):
    """Words come out, with spaces between. A character that no piece has does no harm, and its word may be copied."""
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "in.qaa"
    source.write_text((corpus / "test.qaa").read_text() + "\nder Ω☃ Hun-d'\n   \n!\n")
    assert run_main(export_onnx.main, ["--ckptpath", str(trained), "--out", str(tmp_path / "export")]) == 0
    found = {}
    for name, flags in {
        "torch": ["--precision", "float32"],
        "shortlist": ["--precision", "float32", "--shortlist", "16"],
        "onnx": ["--backend", "onnx"],
    }.items():
        model = tmp_path / "export" if name == "onnx" else trained
        arguments = ["--ckptpath", str(model), "--input", str(source), "--output", str(tmp_path / name), *flags]
        assert run_main(translate.main, [*arguments, "--replace-unknown", "--n-best", "2", "--scores"]) == 0
        found[name] = (tmp_path / name).read_text().splitlines()
    lines = [[line.split("\t")[:1] + line.split("\t")[2:] for line in each] for each in found.values()]
    assert lines[0] == lines[1] == lines[2] and len(lines[0]) == 2 * 8
    assert not any("▁" in line for line in found["torch"])
    assert found["torch"][-1].endswith("\t!") and found["torch"][-3] == "7\t0.0000\t"
    capsys.readouterr()
    reference = tmp_path / "ref"
    reference.write_text((corpus / "test.en").read_text() + "\nthe dog\n\n!\n")
    arguments = ["--ckptpath", str(trained), "--input", str(source), "--output", str(tmp_path / "again")]
    assert run_main(translate.main, [*arguments, "--reference", str(reference)]) == 0
    assert "BLEU score = " in capsys.readouterr().out
    for model, flags in ((trained, []), (tmp_path / "export", ["--backend", "onnx"])):
        assert run_main(translate.main, ["--ckptpath", str(model), "--about", *flags]) == 0
        card = capsys.readouterr().out
        assert "translates: qaa to en, with capital letters; the text is tokenised already" in card
        assert "vocabularies: 44 pieces of qaa, 44 of en" in card and "subword 40, bpe_dropout 0.2" in card


def test_an_unknown_word_is_copied_whole():
    """The only unknown word of a source takes the place of the only `<unk>` of its translation."""
    from nmt.engine import Hypothesis, ModelInfo
    from nmt.translating import Translator

    pieces = subwords.learn(COUNTS, 30)

    class Engine:
        info = ModelInfo(
            "qaa", "en", pieces.itos, pieces.itos, "keep", {}, {"tokenizer": "space"}, {}, {}, (pieces.model,) * 2
        )

        def translate(self, sentences, **options):
            return [[Hypothesis(ids[1:-1], 0.0)] for ids in sentences]

    translator = Translator(Engine(), replace_unknown=True)
    assert translator(["der hundΩ läuft ."])[0][0].text != translator(["hund läuft ."])[0][0].text
    assert [line[0].text for line in translator(["hundeΩ läuft .", "hund  läuft."])] == [
        "hundeΩ läuft .",
        "hund läuft.",
    ]
    assert (translator.words, translator.unknown) == (12, 3)
    long = translator(["läuft" * 39 + " " + "läuft " * 252])[0][0]
    assert translator.changes["sentence(s) of more than 510 pieces: what is beyond was left out"] in (0, 1)
    assert long.tokens[0] == "läuft" * 39


@pytest.mark.parametrize("what", ["src.model", "model.json"])
def test_an_export_without_a_part_or_with_another_is_refused(trained, tmp_path, what):
    folder = tmp_path / "export"
    assert run_main(export_onnx.main, ["--ckptpath", str(trained), "--out", str(folder)]) == 0
    assert onnx_engine.load(folder).info.subwords is not None
    if what == "src.model":
        (folder / what).unlink()
        refused("checkpoint", onnx_engine.load, folder, says="it has no src.model")
    else:
        (folder / "src.model").write_bytes((folder / "trg.model").read_bytes())
        refused("checkpoint", onnx_engine.load, folder, says="src.model has sha256")


def test_a_checkpoint_whose_pieces_do_not_fit_is_refused(trained, tmp_path):
    saved = checkpoint.load(trained)
    saved.src_subwords = saved.trg_subwords
    checkpoint.save(tmp_path / "model", saved)
    wrong = checkpoint.load(tmp_path / "model")
    refused("checkpoint", wrong.vocabularies, tmp_path / "model", says="other pieces than the vocabulary")
    saved.src_subwords = None
    checkpoint.save(tmp_path / "model", saved)
    refused("checkpoint", checkpoint.load, tmp_path / "model", says="one language has pieces")


def test_a_stopped_run_goes_on_to_the_same_weights(record, trained, corpus, tmp_path, capsys):
    """In the second epoch, whose spellings are its own."""
    path = tmp_path / "model"
    assert record(corpus, path, *FLAGS, *PIECES) == 0
    hashes = record.hashes
    for stop_at in (2, 4, 6):
        assert record(corpus, path, *FLAGS, *PIECES, stop_at=stop_at) == 143
        assert record(corpus, path, "--resume", "auto") == 0
        assert record.hashes[1] == hashes[1]
    assert "not bit for bit" not in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_have_the_same_spellings_and_go_on_to_the_same_weights(tmp_path, no_launcher):
    """If the ranks had others, they would share out other batches."""
    corpus = write_corpus(tmp_path / "corpus", 8 * STEPS)
    check_ranks(2, [STEPS + 3], corpus, tmp_path, "--subword", "30", "--bpe-dropout", "0.2")


def test_a_run_goes_on_with_no_other_pieces(record, corpus, tmp_path, capsys):
    path = tmp_path / "model"
    assert record(corpus, path, *FLAGS, *PIECES, stop_at=2) == 143
    for flags in (["--bpe-dropout", "0.1"], ["--subword", "41"]):
        assert record(corpus, path, "--resume", "auto", *flags) == 2
        assert f"leave {flags[0]} out" in capsys.readouterr().err
    state = resume.load(resume.state_path(path))
    assert state.about["sentencepiece"] == checkpoint.load(path).about["sentencepiece"] if path.exists() else True


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--subword", "40", "--min-freq", "3"], "--subword 40, --min-freq"),
        (["--subword", "40", "--max-vocab", "9"], "--subword 40, --max-vocab"),
        (["--bpe-dropout", "0.1"], "give --subword too"),
        (["--bpe-dropout", "1", "--subword", "40"], "must be below 1"),
        (["--tokenizer", "moses"], "invalid choice"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(corpus, flags, says, capsys):
    assert run_main(train_8p.main, ["--data-dir", str(corpus), *SMALL, *flags]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
