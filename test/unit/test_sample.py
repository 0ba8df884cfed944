"""The sample corpus is what its generator writes, is fit for scoring, and is German."""

import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from torchtext.data.metrics import bleu_score

SAMPLE = Path(__file__).resolve().parents[2] / "sample"
SIZES = {"train": 4000, "val": 200, "test": 200}


def _load_generator():
    spec = importlib.util.spec_from_file_location("sample_generate", SAMPLE / "generate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


generate = _load_generator()


def _read(name):
    return (SAMPLE / name).read_text(encoding="utf-8").splitlines()


def _tokens(sentence):
    return re.findall(r"\w+|[^\w\s]", sentence.lower())


@pytest.fixture(scope="module")
def corpus():
    return {(split, lang): _read(f"{split}.{lang}") for split in SIZES for lang in ("de", "en")}


@pytest.fixture(scope="module")
def test_references(corpus):
    return [[_tokens(line)] for line in corpus["test", "en"]]


# ------------------------------------------------------------------------------------------------------------ the files


def test_the_generator_writes_the_committed_files_byte_for_byte(tmp_path):
    generate.main(["--out", str(tmp_path)])
    for name in (f"{split}.{lang}" for split in SIZES for lang in ("de", "en")):
        assert (tmp_path / name).read_bytes() == (SAMPLE / name).read_bytes(), name


def test_another_seed_writes_other_sentences_and_a_longer_corpus_keeps_the_held_out_ones(tmp_path):
    generate.main(["--pairs", "50", "--held-out", "20", "--seed", "7", "--out", str(tmp_path / "a")])
    generate.main(["--pairs", "90", "--held-out", "20", "--seed", "7", "--out", str(tmp_path / "b")])
    assert (tmp_path / "a/test.de").read_bytes() == (tmp_path / "b/test.de").read_bytes()
    assert (tmp_path / "b/train.en").read_text(encoding="utf-8").count("\n") == 90
    assert not set((tmp_path / "a/train.de").read_text(encoding="utf-8").splitlines()[:20]) & set(
        _read("train.de")[:20]
    )


@pytest.mark.parametrize("bad", [["--pairs", "0"], ["--held-out", "0"], ["--pair", "5"]])
def test_arguments_that_make_no_corpus_are_refused(bad, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        generate.main([*bad, "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert not list(tmp_path.iterdir())


def test_the_files_have_multi30k_layout(corpus):
    for (split, lang), lines in corpus.items():
        data = (SAMPLE / f"{split}.{lang}").read_bytes()
        assert len(lines) == SIZES[split]
        assert data.endswith(b".\n") and b"\r" not in data and b"  " not in data
        assert all(line[0].isupper() and line.endswith(".") and line == line.strip() for line in lines)


def test_no_held_out_sentence_is_in_train_or_twice(corpus):
    for lang in ("de", "en"):
        held_out = corpus["val", lang] + corpus["test", lang]
        assert len(set(held_out)) == len(held_out)
        assert not set(held_out) & set(corpus["train", lang])


def test_sentences_are_short_and_the_words_few_enough_to_learn(corpus):
    for lines in corpus.values():
        assert all(3 <= len(line.split()) <= generate.MAX_WORDS for line in lines)
    for lang, least, most in (("de", 400, 700), ("en", 300, 500)):
        seen = Counter(token for line in corpus["train", lang] for token in _tokens(line))
        assert least <= len(seen) <= most
        held_out = {token for split in ("val", "test") for line in corpus[split, lang] for token in _tokens(line)}
        assert sum(seen[token] < 2 for token in held_out) <= 10  # <unk> is rare, but it is there to be met


def test_sentences_begin_in_many_ways(corpus):
    openings = Counter(tuple(line.split()[:2]) for line in corpus["train", "de"])
    assert max(openings.values()) < 0.05 * SIZES["train"]


def test_the_source_is_no_translation(corpus, test_references):
    assert 100 * bleu_score([_tokens(line) for line in corpus["test", "de"]], test_references) < 5


def test_no_single_sentence_translates_everything(corpus, test_references):
    pairs = Counter(
        pair for line in corpus["train", "en"] for pair in zip(_tokens(line), _tokens(line)[1:], strict=False)
    )
    common = sorted(  # the sentences made of the commonest pairs of words, long enough for no brevity penalty
        {line for line in corpus["train", "en"] if 7 <= len(_tokens(line)) <= 11},
        key=lambda line: -sum(pairs[pair] for pair in zip(_tokens(line), _tokens(line)[1:], strict=False)),
    )[:12]
    best = max(100 * bleu_score([_tokens(line)] * SIZES["test"], test_references) for line in common)
    assert best < 15


# ---------------------------------------------------------------------------------------------------------- the grammar

MAN, WOMAN, CHILD = (generate.NOUNS[word] for word in ("Mann", "Frau", "Kind"))


@pytest.mark.parametrize(
    ("determiner", "case", "phrases"),
    [
        ("der", "nom", ["der alte Mann", "die alte Frau", "das alte Kind", "die alten Kinder"]),
        ("der", "acc", ["den alten Mann", "die alte Frau", "das alte Kind", "die alten Kinder"]),
        ("der", "dat", ["dem alten Mann", "der alten Frau", "dem alten Kind", "den alten Kindern"]),
        ("der", "gen", ["des alten Mannes", "der alten Frau", "des alten Kindes", "der alten Kinder"]),
        ("ein", "nom", ["ein alter Mann", "eine alte Frau", "ein altes Kind"]),
        ("ein", "acc", ["einen alten Mann", "eine alte Frau", "ein altes Kind"]),
        ("ein", "dat", ["einem alten Mann", "einer alten Frau", "einem alten Kind"]),
        ("ein", "gen", ["eines alten Mannes", "einer alten Frau", "eines alten Kindes"]),
        ("kein", "acc", ["keinen alten Mann", "keine alte Frau", "kein altes Kind", "keine alten Kinder"]),
        ("ihr", "dat", ["ihrem alten Mann", "ihrer alten Frau", "ihrem alten Kind", "ihren alten Kindern"]),
        ("", "nom", ["alter Mann", "alte Frau", "altes Kind", "alte Kinder"]),
        ("", "acc", ["alten Mann", "alte Frau", "altes Kind", "alte Kinder"]),
        ("", "dat", ["altem Mann", "alter Frau", "altem Kind", "alten Kindern"]),
    ],
)
def test_adjectives_end_as_gender_case_and_article_ask(determiner, case, phrases):
    nouns = [(MAN, False), (WOMAN, False), (CHILD, False), (CHILD, True)]
    for phrase, (noun, plural) in zip(phrases, nouns, strict=False):
        assert generate.german_phrase(determiner, "alt", noun, plural, case) == phrase


def test_counted_things_take_the_strong_endings_and_dative_plurals_an_n():
    dog = generate.NOUNS["Hund"]
    assert generate.german_phrase("zwei", "müde", dog, True, "nom") == "zwei müde Hunde"
    assert generate.german_phrase("viele", "müde", dog, True, "dat") == "vielen müden Hunden"
    assert generate.german_phrase("der", "", generate.NOUNS["Auto"], True, "dat") == "den Autos"
    assert generate.german_phrase("der", "", WOMAN, True, "dat") == "den Frauen"


def test_weak_masculines_change_in_every_case_but_the_nominative():
    boy = generate.NOUNS["Junge"]
    forms = [generate.german_phrase("der", "", boy, False, case) for case in ("nom", "acc", "dat", "gen")]
    assert forms == ["der Junge", "den Jungen", "dem Jungen", "des Jungen"]


def test_the_english_article_hears_the_next_word():
    apple = generate.NOUNS["Apfel"]
    assert generate.english_phrase("a", "", apple, False) == "an apple"
    assert generate.english_phrase("a", "red", apple, False) == "a red apple"
    assert generate.english_phrase("a", "old", WOMAN, False) == "an old woman"


@pytest.fixture
def opening():
    return generate.Clause(
        generate.Phrase("die Frau", "the woman", "f"),
        generate.VERBS["aufmachen"],
        accusative=generate.Phrase("das Fenster", "the window"),
        time=("heute", "today"),
    )


def test_a_prefix_stands_last_in_a_main_clause_and_joins_its_verb_in_a_subordinate_one(opening):
    assert generate.german_main(opening) == "die Frau macht heute das Fenster auf"
    assert generate.german_subordinate("weil", opening) == "weil die Frau heute das Fenster aufmacht"
    assert generate.german_purpose(opening) == "um heute das Fenster aufzumachen"


def test_the_verb_is_second_whatever_stands_first(opening):
    assert generate.german_main(opening, "time") == "heute macht die Frau das Fenster auf"
    assert generate.german_main(opening, "clause") == "macht die Frau heute das Fenster auf"


def test_participle_and_infinitive_are_last_and_the_finite_verb_after_them_in_a_subordinate_clause(opening):
    past, modal = opening._replace(tense="past", time=None), opening._replace(tense="want", time=None)
    assert generate.german_main(past) == "die Frau hat das Fenster aufgemacht"
    assert generate.german_subordinate("dass", past) == "dass die Frau das Fenster aufgemacht hat"
    assert generate.german_main(modal) == "die Frau will das Fenster aufmachen"
    assert generate.german_subordinate("weil", modal) == "weil die Frau das Fenster aufmachen will"


def test_english_tells_now_from_every_day_and_from_yesterday(opening):
    assert generate.english_clause(opening) == "the woman is opening the window today"
    assert generate.english_clause(opening, "time") == "today the woman is opening the window"
    assert generate.english_clause(opening._replace(tense="past", time=None)) == "the woman opened the window"
    often = opening._replace(tense="habit", time=("oft", "often"))
    assert generate.english_clause(often) == "the woman often opens the window"
    many = often._replace(subject=generate.Phrase("die Frauen", "the women", "p"))
    assert generate.english_clause(many) == "the women often open the window"
    assert generate.german_main(many) == "die Frauen machen oft das Fenster auf"


def test_a_new_object_follows_the_place_and_a_known_one_precedes_it():
    reading = generate.Clause(
        generate.Phrase("der Mann", "the man", "m"),
        generate.VERBS["lesen"],
        place=generate.Phrase("im Park", "in the park"),
        accusative=generate.Phrase("ein Buch", "a book", definite=False),
    )
    known = reading._replace(accusative=generate.Phrase("das Buch", "the book"))
    assert generate.german_main(reading) == "der Mann liest im Park ein Buch"
    assert generate.german_main(known) == "der Mann liest das Buch im Park"
    assert generate.english_clause(reading) == "the man is reading a book in the park"


@pytest.mark.parametrize(
    ("noun", "preposition", "place", "goal"),
    [
        ("Park", "in", "im Park", "in den Park"),
        ("Haus", "in", "im Haus", "ins Haus"),
        ("Stadt", "in", "in der Stadt", "in die Stadt"),
        ("Tisch", "auf", "auf dem Tisch", "auf den Tisch"),
        ("Bett", "neben", "neben dem Bett", "neben das Bett"),
        ("Strand", "an", "am Strand", "an den Strand"),
        ("Bahnhof", "an", "am Bahnhof", "zum Bahnhof"),
    ],
)
def test_a_place_is_dative_and_a_goal_accusative(noun, preposition, place, goal):
    places = {entry for group in generate.PLACES.values() for entry in group}
    entry = next(entry for entry in places if entry.noun.de == noun and entry.at == preposition)
    assert generate._place_phrase(entry, False, "der", ("", "")).de == place
    assert generate._place_phrase(entry, True, "der", ("", "")).de == goal


def test_owners_are_genitive():
    dog = generate.Phrase("der Hund", "the dog", "m")
    assert generate.possession(dog, generate.NOUNS["Lehrer"])[:2] == ("der Hund des Lehrers", "the teacher's dog")
    assert generate.possession(dog, generate.NOUNS["Student"])[:2] == ("der Hund des Studenten", "the student's dog")


def test_mit_is_followed_by_the_dative_throughout(corpus):
    after = Counter(re.findall(r"\bmit (\w+)", "\n".join(corpus["train", "de"])))
    datives = "dem der den einem einer zwei drei vielen einigen seinem seiner ihrem ihrer"
    assert sum(after.values()) > 100
    assert set(after) <= set(datives.split())


def test_subordinate_clauses_end_in_their_finite_verb_throughout(corpus):
    finite = {"hat", "haben", "ist", "sind"}
    for verb in generate.VERBS.values():
        finite |= {verb.prefix + verb.singular, verb.prefix + verb.infinitive}
    clauses = re.findall(r"\b(?:weil|obwohl|während|dass|wenn) ([^,.]+)[,.]", "\n".join(corpus["train", "de"]).lower())
    assert len(clauses) > 500
    assert {clause.split()[-1] for clause in clauses} <= finite


def test_relative_pronouns_agree_with_their_noun_and_take_their_own_case(corpus):
    text = "\n".join(corpus["train", "de"])
    for example in (r"Das Buch, das ", r"Der \w+, den ", r"Die \w+, denen ", r"Der \w+, dem "):
        assert re.search(example, text), example
    agreeing = {"m": {"der", "den", "dem"}, "f": {"die", "der"}, "n": {"das", "dem"}}
    singular = re.findall(r"\b(?:Der|Das|Ein|Eine) (\w+), (d\w+) ", text)  # Die may begin a plural
    assert len(singular) > 100
    for noun, pronoun in singular:
        assert pronoun in agreeing[generate.NOUNS[noun].gender[0]], (noun, pronoun)


def test_every_verb_with_a_prefix_is_split_somewhere_and_joined_somewhere(corpus):
    text = "\n".join(corpus["train", "de"])
    prefixed = [verb for verb in generate.VERBS.values() if verb.prefix]
    assert len(prefixed) >= 10
    for verb in prefixed:
        split = rf"\b({verb.singular}|{verb.infinitive})\b[^,.]* {verb.prefix}\b"
        joined = rf"\b{verb.prefix}(zu)?({verb.singular}|{verb.infinitive}|{verb.participle})\b"
        assert re.search(split, text) and re.search(joined, text), verb


def test_a_million_pairs_would_be_written_as_they_are_drawn():
    stream = generate.train_pairs(1, 10**9, [])
    assert len({next(stream) for _ in range(2000)}) > 1800


def test_a_held_out_sentence_is_passed_over():
    first = next(generate.train_pairs(1, 1, []))
    assert first not in list(generate.train_pairs(1, 300, [first]))
