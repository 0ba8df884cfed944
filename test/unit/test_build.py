"""The building's claims: which words are in the vocabularies, which pairs are left, and what a cache is named by."""

from nmt.text import build, files, tokens

import pytest
from conftest import DE, EN, MULTI30K, needs_multi30k, refused, same_corpus, sentences, write_corpus


@needs_multi30k
def test_multi30k_has_7853_german_and_5893_english_types(load):
    corpus = load(MULTI30K)
    assert (len(corpus.src_vocab), len(corpus.trg_vocab)) == (7853, 5893)
    assert (len(corpus.train), len(corpus.val), len(corpus.test)) == (29000, 1014, 1000)
    assert corpus.notes == []


def test_min_freq_bounds_the_vocabulary(folder, load):
    assert "bellt" in load(folder, min_freq=1).src_vocab.itos
    assert load(folder, min_freq=4).src_vocab.itos[4:] == ["."]


def test_sentence_of_254_words_is_whole_and_one_of_255_is_cut(tmp_path, load):
    corpus = load(write_corpus(tmp_path / "long", train=(["Hund " * 254, "Hund " * 255, *DE[2:]], EN)), min_freq=1)
    assert corpus.train.src.lengths.tolist()[:2] == [256, 256]
    assert corpus.src_vocab.decode(sentences(corpus.train.src)[2]) == ["eine", "katze", "schläft", "."]
    assert corpus.notes == ["warning: 1 sentences of train.de cut to 254 words"]


def test_pair_with_an_empty_side_is_dropped_and_counted(tmp_path, load):
    train = ([*DE, "", "Hund.", " "], [*EN, "Dog.", "\t", ""])
    corpus = load(write_corpus(tmp_path / "holes", train=train))
    assert len(corpus.train) == 4
    assert corpus.notes == ["3 pairs dropped: empty in train.de or train.en"]
    assert same_corpus(corpus, load(tmp_path / "holes")), "the notes come from the cache too"


@pytest.mark.parametrize("content", [b"", b"\n\n\n\n", b" \n\t\n\xc2\xa0\n\r\n"])
def test_nothing_usable_is_refused(folder, load, content):
    for lang in ("de", "en"):
        (folder / f"train.{lang}").write_bytes(content)
    refused("data", load, folder, says=["0 usable pairs", "train.de", "train.en"])


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
    key = build.cache_key([f"{number:064x}" for number in range(6)], ("de", "en"), 2)
    assert build.CACHE_FORMAT == 3
    assert key == "a92f3f128b9122d95fc0f3194bc65563941cdbf6d039f806971e924ab0915f04"
