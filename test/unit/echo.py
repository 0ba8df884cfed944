"""An engine that translates word by word and needs no PyTorch. As a program it is translate.py with that engine.

python test/unit/echo.py [translate.py's flags]
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))

from nmt.engine import Hypothesis, ModelInfo
from nmt.text.vocabulary import EOS, SOS, SPECIALS

PAIRS = {
    "ein": "a",
    "hund": "dog",
    "katze": "cat",
    "läuft": "runs",
    "nicht": "n't",
    "macht": "does",
    "bellen": "bark",
    "hemd": "shirt",
    "t-hemd": "t",
    ".": ".",
    ",": ",",
    "!": "!",
    "-": "-",
    " ": " ",
}


class Echo:
    """See `nmt.engine.Engine`. The hypothesis of rank k lacks the last k words and has the score -k.

    Attributes:
        calls: the number of sentences, and the options, of each call.
    """

    def __init__(self, case: str = "lower", **flags):
        keep = [word.title() for word in PAIRS if case == "keep" and word.title() != word]
        source = SPECIALS + list(PAIRS) + keep
        target = SPECIALS + list(PAIRS.values()) + [PAIRS[word.lower()].title() for word in keep]
        target = [word if target.index(word) == place else f"{word}{place}" for place, word in enumerate(target)]
        sizes = {"input_dim": len(source), "output_dim": len(target), "emb_dim": 1, "hid_dim": 1}
        self.info = ModelInfo("de", "en", source, target, case, sizes, flags=flags)
        self.calls: list[tuple[int, dict]] = []

    def translate(self, sentences, *, beam_size, length_penalty, max_length, n_best=1):
        options = {"beam_size": beam_size, "length_penalty": length_penalty, "max_length": max_length}
        self.calls.append((len(sentences), options | {"n_best": n_best}))
        for ids in sentences:
            assert ids[0] == SOS and ids[-1] == EOS and len(ids) > 2
        return [
            [Hypothesis(ids[1 : len(ids) - 1 - rank][:max_length], 0.0 - rank) for rank in range(n_best)]
            for ids in sentences
        ]


if __name__ == "__main__":
    import translate
    from nmt.errors import run_main

    translate.engine_of = lambda settings, path: Echo(beam_size=2)
    sys.exit(run_main(translate.main, sys.argv[1:]))
