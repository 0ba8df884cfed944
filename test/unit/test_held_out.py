"""The split's claims: which pairs are taken out of train, no source stays on both sides, and memory is bounded."""

import random
import tracemalloc

from nmt.text import files, held_out

import pytest
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st

SPLITS = ("train", "val", "test")


def write(folder, pairs):
    paths = (folder / "train.de", folder / "train.en")
    for path, lines in zip(paths, zip(*pairs, strict=True), strict=True):
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return paths


def choose(paths, pairs, splits=("val", "test")):
    return held_out.choose(paths, [files.content_sha256(path) for path in paths], pairs, splits)


def parts(taken):
    """The pairs of each split, in order."""
    return {
        split: [
            pair
            for chunk in taken.part(split)
            for pair in zip(*(text.decode().split("\n")[:-1] for text in chunk.texts), strict=True)
        ]
        for split in SPLITS
    }


def plain(source):
    return " ".join(source.casefold().split())


def numbered(pairs):
    return [(f"Satz {number}", f"sentence {number}") for number in range(pairs)]


SOURCE = st.sampled_from([f"{word} {number}" for number in range(12) for word in ("Hund", "HUND", "hund ", "Größe")])


@settings(max_examples=150, deadline=None)
@given(
    pairs=st.lists(st.tuples(SOURCE | st.just(" "), st.sampled_from(["dog", "size", ""])), min_size=1, max_size=60),
    count=st.integers(1, 4),
    splits=st.sampled_from([("val", "test"), ("val",), ("test",)]),
    chunk_bytes=st.sampled_from([20, 1 << 18]),
)
def test_no_source_is_on_two_sides_and_no_pair_is_lost(tmp_path_factory, pairs, count, splits, chunk_bytes):
    paths = write(tmp_path_factory.getbasetemp(), pairs)
    usable = [pair for pair in pairs if pair[0].strip() and pair[1]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK_BYTES", chunk_bytes)
        try:
            taken = choose(paths, count, splits)
        except held_out.UserError as error:
            assert len(usable) < 4 * count or len({plain(src) for src, _ in usable}) < 5 * count * len(splits), error
            return
        found = parts(taken)
    sources = {split: [plain(src) for src, trg in found[split] if src.strip() and trg] for split in SPLITS}
    for split in ("val", "test"):
        assert len(found[split]) == len(set(sources[split])) == (count if split in splits else 0)
    assert not set(sources["train"]) & set(sources["val"] + sources["test"])
    assert not set(sources["val"]) & set(sources["test"])
    assert len(sources["train"]) >= count * len(splits)
    left_out = len(pairs) - sum(map(len, found.values()))
    assert left_out == taken.repeats == len(usable) - sum(map(len, sources.values()))
    rest = iter(pairs)
    assert all(pair in rest for pair in found["train"]), "in the order of the files, each with its own target"


def test_the_text_alone_decides_on_every_machine(tmp_path):
    """If this fails, raise RULE: users' test pairs have changed."""
    pairs = numbered(40)
    taken = {}
    for seed in range(3):
        random.Random(seed).shuffle(pairs)
        found = parts(choose(write(tmp_path, pairs), 3))
        taken[seed] = {split: sorted(found[split]) for split in SPLITS}
    assert taken[0] == taken[1] == taken[2]
    assert held_out.RULE == 1
    assert [src for src, _ in taken[0]["test"]] == ["Satz 24", "Satz 28", "Satz 9"]
    assert [src for src, _ in taken[0]["val"]] == ["Satz 11", "Satz 23", "Satz 8"]


def test_the_test_pairs_do_not_depend_on_what_becomes_of_val(tmp_path):
    paths = write(tmp_path, numbered(40))
    assert parts(choose(paths, 5))["test"] == parts(choose(paths, 5, ["test"]))["test"]


def test_the_text_stays_as_it_is(tmp_path):
    """The white space at the ends of lines, the carriage returns, and a last line without an end."""
    pairs = [(f"  Satz {number}\t", f"a\u2028sentence {number} \r") for number in range(20)]
    paths = write(tmp_path, pairs)
    paths[0].write_bytes(paths[0].read_bytes()[:-1])
    found = parts(choose(paths, 4))
    assert sorted(pair for split in SPLITS for pair in found[split]) == sorted(pairs)


def test_repeats_are_counted_and_told(tmp_path):
    pairs = [*numbered(30), *((src.upper(), trg) for src, trg in numbered(30))]
    taken = choose(write(tmp_path, pairs), 5)
    assert taken.repeats == 10
    assert taken.note() == (
        "--val-split: 5 validation and 5 test pairs were taken out of train.de and train.en; 10 more have the same "
        "sources and were left out"
    )
    alone = choose(write(tmp_path, numbered(30)), 5, ["test"])
    assert alone.note() == "--val-split: 5 test pairs were taken out of train.de and train.en"


@pytest.mark.parametrize("splits", [("val", "test"), ("test",)])
@pytest.mark.parametrize("repeats", [1, 3])
def test_the_largest_part_that_is_told_works_and_a_larger_one_does_not(tmp_path, splits, repeats):
    paths = write(tmp_path, numbered(30) * repeats)
    message = refused("data", choose, paths, 1000, splits, says=[f"out of {30 * repeats},", "train.de and train.en"])
    most = int(message.rpartition("--val-split ")[2].split()[0])
    assert len(parts(choose(paths, most, splits))["test"]) == most
    refused("data", choose, paths, most + 1, splits)


@pytest.mark.parametrize("pairs", [numbered(1), numbered(3), [("Satz", "a")] * 50])
def test_too_few_sources_are_refused(tmp_path, pairs):
    refused("data", choose, write(tmp_path, pairs), 1, says="add pairs")


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(files, "LINE_BYTES", 1 << 12)
    paths = write(tmp_path, numbered(8000))
    digests = [files.content_sha256(path) for path in paths]
    assert paths[1].stat().st_size > 100_000
    tracemalloc.start()
    for split in ("train", "test"):
        for _ in held_out.choose(paths, digests, 10, ["val", "test"]).part(split):
            pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 300_000, "the keys alone of all sources would take more"
