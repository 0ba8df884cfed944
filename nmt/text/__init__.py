"""Parallel text files in, token ids on disk out. `data.py` at the root is the way in."""
