"""Tokens in, text as people write it out: by sacremoses, after a few rules for what spaCy splits and Moses does not."""

import re

LETTER = r"[^\W\d_]"
# What spaCy splits within a word, and sacremoses leaves apart. Each is found in the tokens joined by spaces.
# Numbers: "# 5", "5 - 6". Alternatives: "and / or". English quotation marks, of which sacremoses knows one alone.
_ALWAYS = re.compile(
    rf"(?<=#) (?=\d)|(?<=\d) (?=-\ \d)|(?<=\d -) (?=\d)|(?<={LETTER}) (?=/ {LETTER})|(?<={LETTER} /) (?={LETTER})"
)
_HYPHENS = re.compile(rf"(?<=[^\W_]) (?=- {LETTER})|(?<=[^\W_] -) (?={LETTER})")
_CURLED = re.compile(r"(?<=[“‘]) | (?=”)")
# "do n't", "it ’s", "can not", "gon na".
_ENGLISH = re.compile(
    rf"(?<={LETTER}) (?=n['’]t\b|’(?:s|m|d|re|ve|ll)\b)|(?<=\bcan) (?=not\b)|(?<=\bgon) (?=na\b)|(?<=\bgot) (?=ta\b)",
    re.IGNORECASE,
)
_SUM_OF_MONEY = re.compile(rf"(?<=\d )([^\w\s])(?={LETTER})")  # sacremoses puts each sign before the next word


class Detokeniser:
    """Joins the tokens of spaCy's rules to text.

    Args:
        lang: spaCy's code of the language.

    >>> Detokeniser("en")("a man says : \\" it 's a t - shirt , is n't it ? \\"".split())
    'a man says: "it\\'s a t-shirt, isn\\'t it?"'
    """

    def __init__(self, lang: str):
        from sacremoses import MosesDetokenizer  # takes a third of a second

        self._moses = MosesDetokenizer(lang=lang)
        self._rules = [_ALWAYS, _CURLED] if lang != "de" else [_ALWAYS]
        if splits_hyphens(lang):
            self._rules.append(_HYPHENS)
        if lang == "en":
            self._rules.append(_ENGLISH)

    def __call__(self, tokens: list[str]) -> str:
        """The text of one sentence, in one line."""
        text = " ".join(tokens)
        for rule in self._rules:
            text = rule.sub("", text)
        text = self._moses.detokenize(text.split(), unescape=False)
        return _SUM_OF_MONEY.sub(r"\1 ", text)


def splits_hyphens(lang: str) -> bool:
    """Whether spaCy's rules make three tokens of a word with a hyphen, as in English and not in German."""
    from spacy.util import compile_infix_regex, get_lang_class

    infixes = get_lang_class(lang).Defaults.infixes or []
    return bool(infixes) and bool(compile_infix_regex(list(infixes)).search("a-b"))
