"""Parallel text files to a corpus of token ids on disk. `data.py` at the root is the way in."""
