"""The layout's two rules: nmt/ never imports the root, and only data.py knows how a corpus is built and kept."""

import ast

from conftest import REPOSITORY

ROOT_MODULES = {path.stem for path in REPOSITORY.glob("*.py")}
NMT = sorted(REPOSITORY.glob("nmt/**/*.py"))
BEHIND_DATA = {f"nmt.text.{name}" for name in ("build", "cache", "download")}


def imported(path):
    """The names of the modules that a file imports anywhere in it, also those that it imports from."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import, which this test does not follow"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_no_module_of_nmt_imports_the_root():
    assert {"gru", "data", "scoring", "train_8p"} <= ROOT_MODULES
    assert len(NMT) > 15
    for path in NMT:
        roots = {name.partition(".")[0] for name in imported(path)}
        assert not roots & ROOT_MODULES, path


def test_only_data_knows_how_a_corpus_is_built_and_kept():
    for path in [*REPOSITORY.glob("*.py"), *NMT, *REPOSITORY.glob("bench/*.py")]:
        known = imported(path) & BEHIND_DATA
        if path.name == "data.py":
            assert known == BEHIND_DATA
        else:
            assert known <= ({"nmt.text.cache"} if path.parts[-2:] == ("text", "build.py") else set()), path
