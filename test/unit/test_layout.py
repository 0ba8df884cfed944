"""The layout's rules: what stands at the root, nmt/ never imports it, and only data.py knows how a corpus is kept."""

import ast
import re

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


def test_a_file_stands_at_the_root_only_for_a_reason():
    """CONTRIBUTING.md has the rule, and the exception for what the ModelZoo's tools look for there."""
    typed_or_read = ROOT_MODULES | {"README", "README.zh-CN", "CONTRIBUTING", "CHANGELOG", "LICENSE", "pyproject"}
    for_the_modelzoo = {"public_address_statement.md", "url.ini", "modelzoo_level.txt"}
    names = {path.name for path in REPOSITORY.iterdir() if path.is_file() and not path.name.startswith(".")}
    assert for_the_modelzoo <= names
    others = {name for name in names - for_the_modelzoo if name.rpartition(".")[0] not in typed_or_read | {""}}
    assert {name for name in others if not re.fullmatch(r"requirements(-\w+)?\.txt", name)} <= ({"LICENSE"})
    text = " ".join((REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8").split())
    assert all(f"`{name}`" in text for name in for_the_modelzoo)


def test_every_public_address_is_stated_and_every_statement_is_true():
    """Not those of tests, which nobody answers, and of logs, which name what a library printed."""
    patterns = ("*.md", "*.py", "*.ini", "*.toml", "docs/*.md", "nmt/**/*.py", "bench/*", "test/*.sh", "docker/*")
    statement = REPOSITORY / "public_address_statement.md"
    found = set()
    for path in (path for pattern in patterns for path in REPOSITORY.glob(pattern) if path.is_file()):
        if path != statement and path.suffix != ".pyc":
            text = path.read_text(encoding="utf-8")
            addresses = re.findall(r"https?://[a-z0-9-]+(?:\.[a-z0-9-]+)*\.[a-z]{2,}[^\s)\]\"'`>]*", text)
            name = str(path.relative_to(REPOSITORY))
            found |= {(name, address.rstrip(".,:;")) for address in addresses}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in statement.read_text("utf-8").splitlines()]
    assert {len(row) for row in rows} == {5}
    stated = [(name, address) for _, _, name, address, _ in rows[2:]]
    assert len(set(stated)) == len(stated)
    assert set(stated) == found
    assert [name for name, _ in stated if name.startswith(("nmt/", "test/", "docker/"))] == []


def test_what_was_not_run_on_an_npu_is_no_ok():
    """The values that the ModelZoo's rules know: PERFECT, OK, POK and NOK."""
    level = (REPOSITORY / "modelzoo_level.txt").read_text()
    assert re.fullmatch(r"(FuncStatus|PerfStatus|PrecisionStatus):(?:PERFECT|OK|POK|NOK)\n", level.splitlines(True)[0])
    found = dict(line.split(":") for line in level.splitlines())
    assert list(found) == ["FuncStatus", "PerfStatus", "PrecisionStatus"]
    if "Not run on hardware." in (REPOSITORY / "docs" / "npu.md").read_text(encoding="utf-8"):
        assert set(found.values()) == {"NOK"}
