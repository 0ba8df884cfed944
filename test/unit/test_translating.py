"""From lines to translated lines, with an engine that translates word by word."""

from collections import Counter

from nmt import translating
from nmt.text import detokens, sentences, tokens
from nmt.text.detokens import Detokeniser
from nmt.translating import Translator

import pytest
from conftest import MULTI30K, REPOSITORY, needs_multi30k
from echo import Echo


def translated(line: str, **options) -> str:
    case = options.pop("case", "lower")
    return Translator(Echo(case), **options)([line])[0][0].text


def test_text_becomes_text():
    assert translated("Ein Hund läuft.") == "A dog runs."
    assert translated("Ein  Hund ,läuft !") == "A dog, runs!"


def test_what_spacy_splits_is_put_together_again():
    assert translated("Ein Hund macht nicht bellen.") == "A dog doesn't bark."
    assert translated("Ein T-Hemd - Hemd.") == "A t-shirt."


def test_without_a_detokeniser_the_tokens_stay_apart():
    assert translated("Ein Hund läuft.", detokenise=False) == "a dog runs ."


def test_a_model_with_case_gets_and_gives_case():
    assert translated("Ein Hund läuft.", case="keep") == "A Dog runs."
    assert translated("ein hund läuft.", case="keep") == "a dog runs."


@pytest.mark.parametrize("line", ["", " ", "\t \u2003", "\u200b\u00ad", "\u2028"])
def test_a_line_without_a_word_gets_an_empty_translation_and_no_decoding(line):
    engine = Echo()
    found = Translator(engine, beam_size=2, n_best=2)(["Ein Hund.", line, "Ein Hund."])
    assert [one.text for one in found[1]] == ["", ""]
    assert [one.tokens_line for one in found[1]] == ["", ""]
    assert [one.text for one in found[2]] == ["A dog.", "A dog"]
    assert [count for count, _ in engine.calls] == [2]


@pytest.mark.parametrize("line", ["...", '"', "— * —", "😀 !", "(?)"])
def test_what_has_no_letter_and_no_digit_is_copied(line):
    """A model makes a sentence of it."""
    engine = Echo()
    for one in Translator(engine, beam_size=2, n_best=2)([line])[0]:
        assert (one.text, one.score) == (line, 0.0)
    assert not engine.calls
    assert translated("7 .") != "" and translated(f"Ein Hund. {line}").startswith("A dog.")


def test_each_sentence_of_a_line_is_translated_on_its_own():
    engine = Echo()
    (found,) = Translator(engine, beam_size=2, n_best=2)(["Ein Hund läuft. Ein Hund bellt! Ein Hund."])
    assert engine.calls[0][0] == 3
    assert found[0].text == "A dog runs. A dog <unk>! A dog."
    assert found[0].tokens == "a dog runs . a dog <unk> ! a dog .".split()
    assert found[1].text == "A dog runs A dog <unk> A dog"
    assert [one.score for one in found] == [0, -1]


def test_the_model_says_how_to_decode_unless_the_caller_does():
    engine = Echo(beam_size=3, length_penalty=1.2, max_length=7)
    Translator(engine)(["Ein Hund."])
    Translator(engine, beam_size=2, length_penalty=0.5, max_length=9, n_best=2)(["Ein Hund."])
    assert engine.calls == [
        (1, {"beam_size": 3, "length_penalty": 1.2, "max_length": 7, "n_best": 1}),
        (1, {"beam_size": 2, "length_penalty": 0.5, "max_length": 9, "n_best": 2}),
    ]
    plain = Echo()
    Translator(plain)(["Ein Hund."])
    assert plain.calls[0][1] == {"beam_size": 1, "length_penalty": 1.0, "max_length": 50, "n_best": 1}


def test_a_beam_is_never_wider_than_the_vocabulary():
    assert Translator(Echo(beam_size=1000)).beam_size == len(Echo().info.trg_words)


def test_how_long_a_translation_may_be_depends_on_its_own_sentence_alone():
    engine = Echo()
    found = Translator(engine)(["ein " * 50, "ein " * 51, "ein " * 254, "ein"])
    assert sorted((options["max_length"], count) for count, options in engine.calls) == [(50, 2), (100, 1), (300, 1)]
    assert [len(one[0].tokens) for one in found] == [50, 51, 254, 1]


def test_a_sentence_that_is_too_long_is_cut_and_counted():
    translator = Translator(Echo())
    found = translator(["ein " * 300, "ein", "x" * 10_000, "x" * 200])
    assert [len(one[0].tokens) for one in found] == [254, 1, 1, 1]
    assert translator.changes == Counter({translating.CUT: 1, translating.LONG_WORD: 1})


def test_a_tokenizer_does_not_keep_all_words_that_it_has_seen(monkeypatch):
    monkeypatch.setattr(translating, "WORDS_KEPT", 15_000)
    translator, sizes = Translator(Echo()), []
    for window in range(9):
        translator([f"Hund{window}x{number}" for number in range(2000)])
        sizes.append(len(tokens.tokenizer_of("de").vocab.strings))
    assert max(sizes) < 15_000 + 3 * 2000
    assert sorted(sizes) != sizes


def test_white_space_that_the_model_does_not_know_is_left_out():
    engine = Echo()
    received = []
    inner = engine.translate
    engine.translate = lambda batch, **options: received.extend(batch) or inner(batch, **options)
    Translator(engine)(["Ein\u2028Hund", "Ein  Hund", "Ein\x0bHund"])
    ein, hund, space = (engine.info.src_words.index(word) for word in ("ein", "hund", " "))
    assert [ids[1:-1] for ids in received] == [[ein, hund], [ein, space, hund], [ein, hund]]


def test_unknown_words_are_copied_with_the_sources_case_where_there_are_as_many():
    assert translated("Ein Dackel läuft, 7 Katze.") == "A <unk> runs, <unk> cat."
    assert translated("Ein Dackel läuft, 7 Katze.", replace_unknown=True) == "A Dackel runs, 7 cat."
    assert translated("Dackel läuft", replace_unknown=True) == "Dackel runs"
    # Two unknown words, and room for one of them in the translation.
    assert translated("Ein Dackel Dackel", replace_unknown=True, max_length=2) == "A <unk>"


def test_nothing_in_a_translation_ends_a_line_or_a_field():
    engine = Echo()
    engine.info.trg_words[engine.info.trg_words.index("dog")] = "d\u2028o\tg\n\u0085"
    (found,) = Translator(engine)(["Ein Hund läuft"])
    assert found[0].text == "A d o g runs"
    assert found[0].tokens_line == "a d o g runs"


# ---------------------------------------------------------------- tokens to text


TEXTS = [
    'a man says: "don\'t!"',
    "it's the boys' t-shirt, isn't it?",
    "I can't, won't and cannot: you’re right, it isn’t.",
    "5-year-olds? no: 5-6, #7 and 50%",
    "black/white (and red) cost $5.",
    "“so”, he says",
    "rock 'n' roll at 3:30 p.m.",
]


@pytest.mark.parametrize("text", TEXTS)
def test_english_comes_back_as_it_was(text):
    (words,), _ = tokens.tokenise([text], "en", "keep")
    assert len(words) > len(text.split())
    assert Detokeniser("en")([word for word in words if not word.isspace()]) == text


def test_a_sign_of_money_behind_its_number_stays_there():
    assert Detokeniser("de")("es kostet 5 € pro stück .".split()) == "es kostet 5 € pro stück."


def test_a_hyphen_is_joined_where_the_language_splits_it():
    assert [detokens.splits_hyphens(lang) for lang in ("en", "de", "fr")] == [True, False, True]
    assert Detokeniser("de")("ein Hund - nein".split()) == "ein Hund - nein"


def come_back(lines: list[str], lang: str) -> float:
    """Which part of the lines is the same after tokenising and putting together again."""
    lines = [" ".join(line.split()) for line in lines]
    detokenise = Detokeniser(lang)
    words, _ = tokens.tokenise(lines, lang, "keep")
    texts = [detokenise([token for token in sentence if not token.isspace()]) for sentence in words]
    return sum(text == line for text, line in zip(texts, lines, strict=True)) / len(lines)


def test_the_samples_lines_come_back():
    for lang in ("de", "en"):
        assert come_back((REPOSITORY / "sample" / f"train.{lang}").read_text().split("\n")[:-1], lang) == 1


@needs_multi30k
def test_multi30ks_lines_come_back():
    for lang in ("de", "en"):
        assert come_back((MULTI30K / f"train.{lang}").read_text().split("\n")[:4000], lang) > 0.997


# ---------------------------------------------------------------- sentences


def test_a_small_letter_begins_no_sentence_unless_all_are_small():
    assert sentences.split("Er ruft „Halt!“ laut. Sie geht.", "de") == ["Er ruft „Halt!“ laut.", "Sie geht."]
    assert sentences.split("er ruft laut. sie geht.", "de") == ["er ruft laut.", "sie geht."]


def test_a_line_of_any_length_is_split_into_the_same_sentences(monkeypatch):
    line = " ".join(["Ein Hund bellt laut.", "Eine Katze schläft!"] * 40)
    whole = sentences.split(line, "de")
    assert whole == ["Ein Hund bellt laut.", "Eine Katze schläft!"] * 40
    for block in (41, 100, 1000):
        monkeypatch.setattr(sentences, "BLOCK", block)
        assert sentences.split(line, "de") == whole


@needs_multi30k
def test_multi30ks_test_lines_are_single_sentences():
    """So translate.py's scores are those of train_8p.py."""
    lines = (MULTI30K / "test2016.de").read_text().split("\n")[:-1]
    assert all(sentences.split(line, "de") == [line.strip()] for line in lines)
