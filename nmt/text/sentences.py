"""Finds the sentences of a line, by the rules of spaCy's sentencizer."""

import re
from functools import cache

from nmt.text import tokens

# Characters of a line that are looked at together. spaCy's memory for them is a hundred times as large.
BLOCK = 20_000


def split(line: str, lang: str) -> list[str]:
    """The sentences of a line, stripped. None is empty.

    A sentence ends at a token such as `.`, `!` or `?`, and at the quotation marks and brackets behind it. The dots of
    the abbreviations that spaCy knows end none. Where a line has capital letters, a small one begins no sentence.

    Args:
        line: text without line ends. No word in it is longer than spaCy can split in time, see `tokens.MAX_WORD`.
        lang: spaCy's code of its language.

    >>> split("Ein Hund bellt. Dr. Meier (z.B.) hört ihn! Er ruft: „Aus!“", "de")
    ['Ein Hund bellt.', 'Dr. Meier (z.B.) hört ihn!', 'Er ruft: „Aus!“']
    >>> split("Er hält das Schild „Halt!“ in der Hand.", "de")
    ['Er hält das Schild „Halt!“ in der Hand.']
    """
    if not _may_hold_several().search(line):
        return [line.strip()] if line.strip() else []
    has_capitals = line != line.lower()
    found: list[str] = []
    rest = ""
    for start in range(0, len(line), BLOCK):
        sentences = _split_block(rest + line[start : start + BLOCK], lang)
        # The last one may go on in the next block.
        rest = sentences.pop() if start + BLOCK < len(line) and len(sentences[-1]) < BLOCK else ""
        for sentence in filter(None, map(str.strip, sentences)):
            if found and has_capitals and sentence[0].islower():
                found[-1] += f" {sentence}"
            else:
                found.append(sentence)
    return found


def _split_block(text: str, lang: str) -> list[str]:
    """The sentences of a text that is not empty, each with the white space behind it."""
    from spacy.pipeline import Sentencizer

    doc = Sentencizer()(tokens.tokenizer_of(lang)(text))
    return [span.text_with_ws for span in doc.sents]


@cache
def _may_hold_several() -> re.Pattern[str]:
    """What every line has that holds several sentences. Most lines do not."""
    tokens.import_spacy()
    from spacy.pipeline import Sentencizer

    return re.compile(f"[{re.escape(''.join(Sentencizer.default_punct_chars))}].*\\w", re.DOTALL)
