"""The text files' claims: which files are found, what is read of them, and what is refused with which words."""

import contextlib
import gzip
import io
import os

from nmt.errors import UserError
from nmt.text import files

import pytest
from conftest import DE, EN, refused, same_corpus, write_corpus

# ---------------------------------------------------------------- finding the six files


@pytest.mark.parametrize("test_name", ["test", "test2016", "test_2016_flickr"])
@pytest.mark.parametrize("below", ["multi30k", "."])
def test_files_are_found_under_each_name_and_in_both_folders(tmp_path, test_name, below):
    write_corpus(tmp_path / below, test_name=test_name)
    found = files.find_files(tmp_path, ("de", "en"), files.SPLITS)
    assert {path.parent for pair in found for path in pair} == {tmp_path / below}
    assert [path.name for path in found[2]] == [f"{test_name}.de", f"{test_name}.en"]


def test_files_are_all_of_one_folder(tmp_path):
    write_corpus(tmp_path)
    write_corpus(tmp_path / "multi30k")
    (tmp_path / "multi30k" / "val.en").unlink()
    found = files.find_files(tmp_path, ("de", "en"), files.SPLITS)
    assert {path.parent for pair in found for path in pair} == {tmp_path}
    (tmp_path / "train.de").unlink()
    refused("data", files.find_files, tmp_path, ("de", "en"), files.SPLITS, says=["multi30k/val.en", "train.de"])


def test_plain_file_goes_before_a_compressed_one(tmp_path):
    write_corpus(tmp_path)
    (tmp_path / "val.de.gz").write_bytes(b"stale")
    assert files.find_files(tmp_path, ("de", "en"), files.SPLITS)[1] == (tmp_path / "val.de", tmp_path / "val.en")


def test_both_sides_of_a_split_have_one_stem(tmp_path):
    write_corpus(tmp_path, test_name="test2016")
    (tmp_path / "test.de").write_text("stray\n")
    assert [path.name for path in files.find_files(tmp_path, ("de", "en"), files.SPLITS)[2]] == [
        "test2016.de",
        "test2016.en",
    ]


def test_other_languages_and_names_are_read(tmp_path, load):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.fr").write_text("un chien\nun chat\n")
        (tmp_path / f"{name}.it").write_text("un cane\nun gatto\n")
    corpus = load(tmp_path, src_lang="fr", trg_lang="it", train_name="a", val_name="b", test_name="c")
    assert corpus.test.trg_tokens == [["un", "cane"], ["un", "gatto"]]


def test_missing_file_is_refused_with_the_paths_tried(folder, load):
    (folder / "test.en").unlink()
    message = refused("data", load, folder, says=f"{folder}/test.en")
    assert f"{folder}/test2016.en" in message
    assert "train" not in message.partition(";")[0], "those are there"
    assert f"{folder}/test.en.gz" in message
    assert f"{folder}/test.de," not in message, "that one is there"


# ---------------------------------------------------------------- reading them


def test_file_is_read_in_chunks_of_whole_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", 40)
    folder = write_corpus(tmp_path, train=(DE, EN))
    paths = folder / "train.de", folder / "train.en"
    found = list(files.pair_chunks(paths, [files.content_sha256(path) for path in paths]))
    assert [chunk.first for chunk in found] == [1, 4]
    assert [text.decode().splitlines() for chunk in found for text in chunk.texts] == [DE[:3], EN[:3], DE[3:], EN[3:]]


def test_gz_is_as_plain(folder, load, tmp_path):
    plain = load(folder)
    for path in list(folder.iterdir()):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    packed = load(folder, cache_dir=tmp_path / "other")
    assert same_corpus(packed, plain)
    assert packed.fingerprint == plain.fingerprint


@pytest.mark.parametrize("mark", ["\u2028", "\x0b", "\x85", "\x1c", "\x0c", "\r"])
def test_only_newline_ends_a_line(tmp_path, load, mark):
    corpus = load(write_corpus(tmp_path / "odd", train=([f"Ein Hund{mark}bellt.", *DE[1:]], EN)))
    assert len(corpus.train) == 4


@pytest.mark.parametrize("change", ["bom", "crlf", "no last newline", "spaces around"])
def test_bom_and_crlf_give_the_same_batches(folder, load, tmp_path, change):
    plain = load(folder)
    for path in folder.iterdir():
        content = path.read_bytes()
        changed = {
            "bom": b"\xef\xbb\xbf" + content,
            "crlf": content.replace(b"\n", b"\r\n"),
            "no last newline": content[:-1],
            "spaces around": b"  " + content.replace(b"\n", b" \t\n"),
        }[change]
        path.write_bytes(changed)
    assert same_corpus(load(folder, cache_dir=tmp_path / "other"), plain)


def test_byte_order_mark_is_one_at_the_files_start_alone(tmp_path, load, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", 20)
    mark = "\ufeff"
    corpus = load(write_corpus(tmp_path / "marks", train=([mark + line for line in DE], EN)), min_freq=1)
    assert [word for word in corpus.src_vocab.itos if mark in word] == [f"{mark}der", f"{mark}ein", f"{mark}eine"]
    assert corpus.train.src.lengths.tolist() == [6, 6, 6, 6]


# ---------------------------------------------------------------- bad input (FAULTS 18 to 28)


@pytest.mark.parametrize("keep", [0, 1, 12, -9, -1])
def test_truncated_or_empty_gz_is_refused(folder, load, keep):
    packed = gzip.compress((folder / "train.de").read_bytes())
    (folder / "train.de").unlink()
    (folder / "train.de.gz").write_bytes(packed[:keep])
    refused("data", load, folder, says=["not a whole gzip file", "train.de.gz"])


@pytest.mark.parametrize(
    "packed",
    [
        b"a text\n",
        gzip.compress(b"a")[:-8] + bytes(8),  # a wrong checksum
        gzip.compress(b"a")[:10] + b"\xff" * 20,  # no deflate stream
        gzip.compress(b"a") + b"tail",
    ],
)
def test_corrupt_gz_is_refused(folder, load, packed):
    (folder / "val.en").unlink()
    (folder / "val.en.gz").write_bytes(packed)
    refused("data", load, folder, says=["not a whole gzip file", "val.en.gz"])


def test_different_line_counts_are_refused_with_both_counts(folder, load):
    (folder / "train.en").write_text("\n".join(EN[:3]) + "\n")
    refused("data", load, folder, says=["4 lines and 3 lines", "train.de", "train.en"])


def test_invalid_utf8_is_refused_with_file_line_and_byte(folder, load):
    (folder / "train.en").write_bytes("Größe\nA \xff\n".encode()[:-3] + b"\xff\xfe\nc\nd\n")
    message = refused("data", load, folder, says=["byte 3 of line 2, 0xff, is not UTF-8", "train.en:2"])
    assert "exit" not in message
    assert UserError("data", "", "", "").exit_code == 3


@pytest.mark.parametrize("name", ["train.de", "train.en"])
def test_utf16_is_refused_as_no_utf8_and_not_for_its_count_of_lines(folder, load, name):
    (folder / name).write_text((folder / name).read_text(), encoding="utf-16")  # a last line that does not end
    refused("data", load, folder, says=["not UTF-8", f"{name}:1", "convert the file"])


@pytest.mark.parametrize("fault", ["UTF-8", "NUL", "more lines", "fewer lines"])
def test_fault_far_behind_the_first_chunk_is_told_with_its_place(tmp_path, load, monkeypatch, fault):
    monkeypatch.setattr(files, "CHUNK_BYTES", 50)
    folder = write_corpus(tmp_path / "corpus", train=(DE * 10, EN * 10))
    lines = (folder / "train.en").read_bytes().splitlines(keepends=True)
    if fault == "more lines":
        lines += lines[:3]
    elif fault == "fewer lines":
        lines = lines[:-3]
    else:
        lines[29] = b"A \xff\n" if fault == "UTF-8" else b"A \0\n"
    (folder / "train.en").write_bytes(b"".join(lines))
    place = {"UTF-8": "byte 3 of line 30, 0xff", "NUL": "byte 3 of line 30, 0x00"}
    words = place.get(fault) or f"40 lines and {len(lines)} lines"
    refused("data", load, folder, says=[words, "train.en"])
    assert list((tmp_path / "cache").iterdir()) == [], "no half of a cache"


def test_nul_byte_is_refused_with_its_line(folder, load):
    (folder / "train.en").write_bytes(b"a\nb\nc\0d\ne\n")
    refused("data", load, folder, says=["byte 2 of line 3, 0x00, is a NUL", "train.en:3"])


def test_file_that_changes_while_it_is_read_is_refused(folder, load, monkeypatch):
    pair_chunks = files.pair_chunks

    def changed(paths, digests):
        paths[1].write_text(paths[1].read_text().replace("A", "B"))
        return pair_chunks(paths, digests)

    monkeypatch.setattr(files, "pair_chunks", changed)
    refused("data", load, folder, says=["the file changed while it was read", "train.en"])


def test_unreadable_file_is_an_io_error(folder, load):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (folder / "val.de").chmod(0)
    refused("io", load, folder, says=["cannot read", "val.de"])


def test_read_error_names_the_file_that_it_is_of(folder, monkeypatch):
    paths = folder / "train.de", folder / "train.en"

    class Failing(io.BytesIO):
        def read(self, size=-1):
            raise OSError(5, "Input/output error")

    real = files._opened

    @contextlib.contextmanager
    def opened(path):
        with real(path) as file:
            yield Failing() if path == paths[0] else file

    monkeypatch.setattr(files, "_opened", opened)
    refused("io", list, files.pair_chunks(paths, ("", "")), says=["Input/output error", "train.de"])
