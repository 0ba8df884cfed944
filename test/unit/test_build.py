"""The building's claims: which words are in the vocabularies, which pairs are left, and what a cache is named by."""

import os
import random
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import data
from nmt.text import build, files, tokens
from nmt.text.vocabulary import EOS, PAD, SOS, SPECIALS, UNK, Vocabulary

import pytest
from conftest import DE, EN, MULTI30K, REPOSITORY, needs_multi30k, refused, same_corpus, sentences, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st


@needs_multi30k
def test_multi30k_has_7853_german_and_5893_english_types(load):
    corpus = load(MULTI30K)
    assert (len(corpus.src_vocab), len(corpus.trg_vocab)) == (7853, 5893)
    assert (len(corpus.train), len(corpus.val), len(corpus.test)) == (29000, 1014, 1000)
    assert corpus.notes == []
    assert corpus.unknown == ["unknown words: de train 3.0%, val 4.4%, test 3.8%; en train 1.0%, val 1.9%, test 1.7%"]


def test_max_vocab_bounds_the_vocabulary(folder, load):
    """The four training sentences have `.` four times, `hund` three times, and `ein` and `schläft` as often or less."""
    corpus = load(folder, max_vocab=2)
    assert corpus.src_vocab.itos[4:] == [".", "hund"]
    assert len(corpus.trg_vocab) == 6
    assert load(folder, max_vocab=2, min_freq=4).src_vocab.itos[4:] == ["."]
    assert load(folder, max_vocab=1000).src_vocab.itos == load(folder).src_vocab.itos


def test_words_that_max_vocab_leaves_out_are_expected_to_be_unknown(tmp_path, load):
    """So val, of the same kind as train, is not warned about."""
    folder = write_corpus(tmp_path / "corpus", 400, 40, 40)
    corpus = load(folder, max_vocab=2)
    assert float(corpus.unknown[0].split("val ")[1].split("%")[0]) > 40, "the fault"
    assert len(corpus.unknown) == 1


def test_min_freq_bounds_the_vocabulary(folder, load):
    assert "bellt" in load(folder, min_freq=1).src_vocab.itos
    assert load(folder, min_freq=4).src_vocab.itos[4:] == ["."]


def test_sentence_of_254_words_is_whole_and_one_of_255_is_cut(tmp_path, load):
    corpus = load(write_corpus(tmp_path / "long", train=(["Hund " * 254, "Hund " * 255, *DE[2:]], EN)), min_freq=1)
    assert corpus.train.src.lengths.tolist()[:2] == [256, 256]
    assert corpus.src_vocab.decode(sentences(corpus.train.src)[2]) == ["eine", "katze", "schläft", "."]
    assert corpus.notes == ["warning: 1 sentences of train.de cut to 254 words"]


def test_pair_with_an_empty_side_is_dropped_and_counted(tmp_path, load):
    """Row 25."""
    train = ([*DE, "", "Hund.", " "], [*EN, "Dog.", "\t", ""])
    corpus = load(write_corpus(tmp_path / "holes", train=train))
    assert len(corpus.train) == 4
    assert corpus.notes == ["3 pairs dropped: empty in train.de or train.en"]
    assert same_corpus(corpus, load(tmp_path / "holes")), "the notes come from the cache too"


@pytest.mark.parametrize("name", ["train", "val", "test"])
@pytest.mark.parametrize("content", [b"", b"\n\n\n\n", b" \n\t\n\xc2\xa0\n\r\n", b"\xef\xbb\xbf"])
def test_nothing_usable_is_refused(folder, load, content, name):
    """Row 24."""
    for lang in ("de", "en"):
        (folder / f"{name}.{lang}").write_bytes(content)
    refused("data", load, folder, says=["0 usable pairs", f"{name}.de", f"{name}.en"])


@pytest.mark.parametrize("lang", ["de", "en"])
def test_one_empty_file_is_refused(folder, load, lang):
    """Row 24."""
    (folder / f"train.{lang}").write_bytes(b"")
    counts = "0 lines and 4 lines" if lang == "de" else "4 lines and 0 lines"
    refused("data", load, folder, says=[counts, f"train.{lang}"])


def test_corpus_does_not_depend_on_the_number_of_processes(tmp_path, load, monkeypatch):
    folder = write_corpus(tmp_path / "corpus", train=([f"{line} {n}" for n in range(50) for line in DE], EN * 50))
    alone = load(folder, cache_dir=tmp_path / "other")
    monkeypatch.setattr(files, "CHUNK_BYTES", 100)
    assert same_corpus(load(folder, cache_dir=tmp_path / "chunks"), alone)
    monkeypatch.setattr(tokens, "BYTES_PER_PROCESS", 100)
    monkeypatch.setattr(tokens, "tokenise_chunk", None)  # in this process
    monkeypatch.setattr(build, "cores", lambda: 2)
    assert same_corpus(load(folder), alone)


def test_key_is_that_of_the_caches_that_users_have(monkeypatch):
    """If this fails because a cache's content has changed, raise CACHE_FORMAT and put the new key here."""
    monkeypatch.setattr(build.importlib.metadata, "version", lambda package: "1.0")
    key = build.cache_key([f"{number:064x}" for number in range(6)], ("de", "en"), build.Words())
    assert build.CACHE_FORMAT == 4
    assert key == "9215f08d7b4a6bbfd11f7e8d3c9984ba8b06c395cfb24d6da0231d7c3270c013"


def test_keys_know_how_many_pairs_are_taken_out_of_train_and_for_what():
    """Two files beside train are val's or test's. Without a split, a key stays as it was."""
    train, other = (Path("train.de"), Path("train.en")), (Path("b.de"), Path("b.en"))
    assert build.split_off([train, other, other], 5) == [] == build.split_off([other], 0)
    splits = [
        build.split_off(paths, pairs) for paths in ([train, other, None], [train, None, other]) for pairs in (5, 6)
    ]
    digests, langs = [f"{number:064x}" for number in range(4)], ("de", "en")
    for key in (
        lambda split: build.cache_key(digests, langs, build.Words(), split),
        lambda split: build.key_of_test(digests, langs, "lower", split=split),
        lambda split: build.fingerprint(digests, split),
    ):
        assert len({key(split) for split in [*splits, []]}) == 5


# ---------------------------------------------------------------- unknown words (kind M)


def test_share_of_unknown_words_is_told_for_each_split_and_language(folder, load):
    """Kind M: also from the cache. Here train has 4 of its 16 German words once, and 3 of 16 English ones."""
    for _ in range(2):
        corpus = load(folder)
        assert corpus.unknown == [
            "unknown words: de train 25.0%, val 50.0%, test 50.0%; en train 18.8%, val 50.0%, test 50.0%"
        ]
        assert list(corpus.lines())[1:] == corpus.unknown


def other_spelling(text):
    """As where no key for umlauts is at hand."""
    for letter, letters in zip("äöüß", ("ae", "oe", "ue", "ss"), strict=True):
        text = text.replace(letter, letters)
    return text


@pytest.mark.parametrize("name", ["val", "test"])
def test_split_in_another_spelling_is_warned_about(tmp_path, load, name):
    """Kind M. Both others have only known words."""
    folder = write_corpus(tmp_path / "corpus", 400, 40, 40)
    (path,) = folder.glob(f"{name}.de")
    assert len(load(folder).unknown) == 1
    path.write_text(other_spelling(path.read_text()))
    corpus = load(folder)
    assert len(corpus.unknown) == 2
    assert corpus.unknown[1].startswith("warning: ")
    assert f"of the de words of {name} are unknown, train leads to expect 0.0%" in corpus.unknown[1]


def test_small_text_is_not_warned_about():
    """Kind M: two unknown words of four say nothing."""
    shares = {"train": build.Share(0, 100), "val": build.Share(99, 99), "test": build.Share(50, 100)}
    lines = list(build._about_unknown_words({"de": shares}, {"de": build.Share(0, 100)}))
    assert [line.partition(" are unknown")[0] for line in lines[1:]] == ["warning: 50.0% of the de words of test"]


@needs_multi30k
@pytest.mark.parametrize("form", ["NFD", "soft hyphens", "zero-width spaces"])
def test_text_of_another_form_costs_no_word(tmp_path, load, form):
    """Kind M: val and test as some systems store them have the same ids, and so the same BLEU."""
    plain, other = tmp_path / "plain", tmp_path / "other"
    for folder in (plain, other):
        folder.mkdir()
        for path in MULTI30K.glob("*.[de][en]"):
            text = usual = "".join(path.read_text().splitlines(keepends=True)[:300])
            if folder == other and not path.name.startswith("train"):
                text = {
                    "NFD": unicodedata.normalize("NFD", text),
                    "soft hyphens": text.replace("en", "e\u00adn"),
                    "zero-width spaces": text.replace(" ", "\u200b "),
                }[form]
                assert text != usual or path.suffix == ".en"
            (folder / path.name).write_text(text)
    corpora = [load(folder) for folder in (plain, other)]
    assert same_corpus(*corpora)
    assert corpora[0].fingerprint != corpora[1].fingerprint, "it is that of the files"


# ---------------------------------------------------------------- words and their numbers


WORD = st.sampled_from([*SPECIALS, "<EOS>", "hund", "läuft", "."]) | st.text(min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(words=st.lists(WORD, min_size=1, max_size=60), min_freq=st.integers(1, 3), draws=st.data())
def test_vocabulary_numbers_words_whatever_they_are_and_in_whatever_order(words, min_freq, draws):
    """Words come back from their numbers, those like control words are unknown ones, and the order counts nothing."""
    vocab = Vocabulary.build(Counter(words), min_freq)
    shuffled = draws.draw(st.permutations(words))
    assert Vocabulary.build(Counter(shuffled), min_freq).itos == vocab.itos
    assert len(set(vocab.itos)) == len(vocab)
    ids = vocab.encode(words)
    assert not {PAD, SOS, EOS} & set(ids)
    known = [word not in SPECIALS and words.count(word) >= min_freq for word in words]
    assert [index != UNK for index in ids] == known
    assert vocab.decode([SOS, *ids, EOS, PAD]) == [
        word if is_known else SPECIALS[UNK] for word, is_known in zip(words, known, strict=True)
    ]


LINE = st.lists(st.sampled_from(["<eos>", "<pad>", "<unk>", "<sos>", "Hund", "läuft", ".", "7"]), min_size=1)


@settings(max_examples=50, deadline=None)
@given(pairs=st.lists(st.tuples(LINE.map(" ".join), LINE.map(" ".join)), min_size=1, max_size=8))
def test_sentences_come_back_from_the_ids(tmp_path_factory, pairs):
    """No text can end a sentence or be padding. All ids go through the files of a cache here."""
    sides = list(zip(*pairs, strict=True))
    folder = write_corpus(tmp_path_factory.mktemp("text"), sides, sides, sides)
    cache_dir = tmp_path_factory.mktemp("cache")
    corpora = [data.load(folder, min_freq=1, cache_dir=cache_dir, log=lambda line: None) for _ in range(2)]
    for corpus in corpora:
        for lang, lines in (("de", sides[0]), ("en", sides[1])):
            vocab = corpus.src_vocab if lang == "de" else corpus.trg_vocab
            expected, _ = tokens.tokenise(list(lines), lang)
            for split in (corpus.train, corpus.val, corpus.test):
                ids = sentences(split.src if lang == "de" else split.trg)
                assert all(sentence[0] == SOS and sentence[-1] == EOS for sentence in ids)
                assert [vocab.decode(sentence) for sentence in ids] == expected


def test_corpus_does_not_depend_on_the_seed_of_hashes(folder, load, tmp_path):
    """What another process with another seed has cached is what this one makes."""
    code = "import data, sys; data.load(sys.argv[1], cache_dir=sys.argv[2], log=print)"
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "theirs")]
    said = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | {"PYTHONHASHSEED": "7"}, check=True, capture_output=True, text=True
    )
    assert "tokenising" in said.stdout
    assert sys.flags.hash_randomization
    built = load(folder)
    lines = len(load.lines)
    assert same_corpus(load(folder, cache_dir=tmp_path / "theirs"), built)
    assert len(load.lines) == lines, "it was not built again"


def test_vocabulary_does_not_depend_on_the_order_of_pairs(tmp_path, load):
    pairs = list(zip(DE * 3, EN * 3, strict=True))
    corpora = []
    for seed in range(3):
        random.Random(seed).shuffle(pairs)
        corpora.append(load(write_corpus(tmp_path / str(seed), tuple(zip(*pairs, strict=True)))))
    assert len({corpus.fingerprint for corpus in corpora}) == 3
    assert all(corpus.src_vocab.itos == corpora[0].src_vocab.itos for corpus in corpora)
    assert all(corpus.trg_vocab.itos == corpora[0].trg_vocab.itos for corpus in corpora)
