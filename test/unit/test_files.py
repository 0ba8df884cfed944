"""The text files' claims: which files are found, what is read of them, and what is refused with which words."""

import contextlib
import gzip
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from nmt.errors import UserError
from nmt.text import files

import pytest
from conftest import DE, EN, REPOSITORY, refused, same_corpus, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

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
    assert files.find_files(tmp_path, ("de", "en"), files.SPLITS) is None


def test_two_corpora_in_one_folder_are_refused(tmp_path, load):
    """Kind E: both folders are named, and what to do."""
    write_corpus(tmp_path, train=(DE, EN))
    load(tmp_path)
    write_corpus(tmp_path / "multi30k")
    message = refused("data", load, tmp_path, says=[f"one in {tmp_path}/multi30k and one in {tmp_path};", "--data-dir"])
    assert f"name {tmp_path}/multi30k with --data-dir" in message
    assert load(tmp_path / "multi30k").folder == f"{tmp_path}/multi30k"
    (tmp_path / "multi30k").rename(tmp_path / "away")
    assert load(tmp_path).folder == str(tmp_path)


def test_corpora_of_other_languages_or_names_in_both_folders_do_not_meet(tmp_path, load):
    """Kind E: only where both have the wanted files it is open which are meant."""
    write_corpus(tmp_path / "multi30k")
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.fr").write_text("un chien\n")
        (tmp_path / f"{name}.de").write_text("ein Hund\n")
    corpus = load(tmp_path, src_lang="fr", trg_lang="de", min_freq=1)
    assert (corpus.folder, len(corpus.train)) == (str(tmp_path), 1)


def test_one_corpus_under_two_names_is_no_two(tmp_path, load):
    """Kind E: a link to the folder itself, or to another one's files."""
    folder = write_corpus(tmp_path / "corpus")
    (folder / "multi30k").symlink_to(folder)
    assert len(load(folder).train) == 64


@pytest.mark.parametrize("gone", ["val.en", "train.de"])
def test_folder_that_was_read_is_told_by_the_corpus_also_from_a_warm_cache(tmp_path, load, gone):
    """Kind E: own files beside multi30k/, which are not all there."""
    write_corpus(tmp_path, train=(DE, EN))
    write_corpus(tmp_path / "multi30k")
    (tmp_path / gone).unlink()
    for _ in range(2):
        corpus = load(tmp_path)
        assert len(corpus.train) == 64
        assert corpus.folder == f"{tmp_path}/multi30k"
        assert next(corpus.lines()).endswith(f" types; in {tmp_path}/multi30k")


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


def test_missing_file_is_refused_with_what_is_there_instead(folder, load):
    """Row 27. Which guesses follow is tested with `missing`."""
    (folder / "test.en").unlink()
    message = refused("data", load, folder)
    found = "test.de, train.de, train.en, val.de, ..."
    assert message == f"error[data]: no test.de/en, but {found}; {folder}; put test.en beside test.de"


# ---------------------------------------------------------------- reading them


def test_file_is_read_in_chunks_of_whole_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", 40)
    folder = write_corpus(tmp_path, train=(DE, EN))
    paths = folder / "train.de", folder / "train.en"
    found = list(files.pair_chunks(paths, [files.content_sha256(path) for path in paths]))
    assert [chunk.first for chunk in found] == [1, 3]
    assert [text.decode().splitlines() for chunk in found for text in chunk.texts] == [DE[:2], EN[:2], DE[2:], EN[2:]]


LINE = st.text(st.characters(exclude_characters="\n\0", exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(LINE, LINE), max_size=12), chunk_bytes=st.integers(1, 60), last_ends=st.booleans())
def test_chunks_are_the_files_line_by_line_whatever_is_in_them(tmp_path_factory, pairs, chunk_bytes, last_ends):
    """Rows 19 and 20. Lines may be longer than a chunk, and the last one may lack its end."""
    sides = [[pair[side] for pair in pairs] for side in (0, 1)]
    paths = tuple(tmp_path_factory.getbasetemp() / f"chunks.{lang}" for lang in ("de", "en"))
    for path, lines in zip(paths, sides, strict=True):
        whole = last_ends or not lines or not lines[-1]  # an empty last line without an end is none
        path.write_bytes("".join(f"{line}\n" for line in lines).encode()[: None if whole else -1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK_BYTES", chunk_bytes)
        patch.setattr(files._Lines, "check_first_line", lambda side: None)  # it refuses one line with a CR inside
        chunks = list(files.pair_chunks(paths, [files.content_sha256(path) for path in paths]))
    assert [b"".join(texts) for texts in zip(*(chunk.texts for chunk in chunks), strict=True)] == [
        path.read_bytes() for path in paths if pairs
    ]
    first = 1
    read = [[], []]
    for chunk in chunks:
        assert chunk.first == first
        split = [files.split_lines(text, "a file", first) for text in chunk.texts]
        first += len(split[0])
        for lines, more in zip(read, split, strict=True):
            lines += more
    assert read == [list(map(files.stripped, lines)) for lines in sides]


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
    """Row 20."""
    corpus = load(write_corpus(tmp_path / "odd", train=([f"Ein Hund{mark}bellt.", *DE[1:]], EN)))
    assert len(corpus.train) == 4


@pytest.mark.parametrize("change", ["bom", "crlf", "no last newline", "spaces around"])
def test_bom_and_crlf_give_the_same_batches(folder, load, tmp_path, change):
    """Row 22."""
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


def test_byte_order_marks_of_files_that_were_put_together_are_no_words(tmp_path, load, monkeypatch):
    """Row 22 and kind M: at the start of the file, of a chunk and of any other line."""
    plain = load(write_corpus(tmp_path / "plain", train=(DE, EN)))
    monkeypatch.setattr(files, "CHUNK_BYTES", 20)
    corpus = load(write_corpus(tmp_path / "marks", train=([f"\ufeff{line}" for line in DE], EN)))
    assert same_corpus(corpus, plain)
    assert corpus.fingerprint != plain.fingerprint, "it is that of the files"


# ---------------------------------------------------------------- bad input (rows 18 to 28)


@pytest.mark.parametrize("keep", [0, 1, 12, -9, -1])
def test_truncated_or_empty_gz_is_refused(folder, load, keep):
    """Row 18."""
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
    """Row 18."""
    (folder / "val.en").unlink()
    (folder / "val.en.gz").write_bytes(packed)
    refused("data", load, folder, says=["not a whole gzip file", "val.en.gz"])


def test_different_line_counts_are_refused_with_both_counts(folder, load):
    """Row 19."""
    (folder / "train.en").write_text("\n".join(EN[:3]) + "\n")
    refused("data", load, folder, says=["4 lines and 3 lines", "train.de", "train.en"])


def test_invalid_utf8_is_refused_with_file_line_and_byte(folder, load):
    """Row 21."""
    (folder / "train.en").write_bytes("Größe\nA \xff\n".encode()[:-3] + b"\xff\xfe\nc\nd\n")
    message = refused("data", load, folder, says=["byte 3 of line 2, 0xff, is not UTF-8", "train.en:2"])
    assert "exit" not in message
    assert UserError("data", "", "", "").exit_code == 3


@pytest.mark.parametrize("name", ["train.de", "train.en"])
def test_utf16_is_refused_as_no_utf8_and_not_for_its_count_of_lines(folder, load, name):
    """Row 21."""
    (folder / name).write_text((folder / name).read_text(), encoding="utf-16")  # a last line that does not end
    refused("data", load, folder, says=["not UTF-8", f"{name}:1", "convert the file"])


@pytest.mark.parametrize("fault", ["UTF-8", "NUL", "more lines", "fewer lines"])
def test_fault_far_behind_the_first_chunk_is_told_with_its_place(tmp_path, load, monkeypatch, fault):
    """Rows 19, 21 and 23."""
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
    """Row 23."""
    (folder / "train.en").write_bytes(b"a\nb\nc\0d\ne\n")
    refused("data", load, folder, says=["byte 2 of line 3, 0x00, is a NUL", "train.en:3"])


def test_file_that_changes_while_it_is_read_is_refused(folder, load, monkeypatch):
    pair_chunks = files.pair_chunks

    def changed(paths, digests):
        paths[1].write_text(paths[1].read_text().replace("A", "B"))
        return pair_chunks(paths, digests)

    monkeypatch.setattr(files, "pair_chunks", changed)
    refused("data", load, folder, says=["the file changed while it was read", "train.en"])


def test_unreadable_file_is_an_io_error(open_folder, load, as_nobody):
    """Row 28."""
    (open_folder / "val.de").chmod(0)
    with as_nobody():
        refused("io", load, open_folder, says=["cannot read: Permission denied", f"{open_folder}/val.de"])


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


def test_read_only_data_folder_works_and_is_cached_elsewhere(open_folder, load, as_nobody):
    """Row 28: for a user who may write neither there nor into the cache folder that is wanted."""
    whole = load(open_folder)
    before = sorted(open_folder.iterdir())
    open_folder.chmod(0o555)
    with as_nobody():
        with pytest.raises(PermissionError):
            (open_folder / "new").touch()
        assert same_corpus(load(open_folder, cache_dir=open_folder / "cache"), whole)
    open_folder.chmod(0o755)
    assert any("cache folder cannot be used" in line for line in load.lines)
    assert len(list(Path(tempfile.gettempdir()).glob("gru-for-pytorch-*/*/index.json"))) == 1
    assert sorted(open_folder.iterdir()) == before


# ---------------------------------------------------------------- line ends that are none (kind R)


@pytest.mark.parametrize("last", [b"\r", b"", b"\r\n", b"\n"])
@pytest.mark.parametrize("lines", [4, 20_000])
def test_file_whose_lines_end_in_cr_alone_is_refused(folder, load, lines, last):
    """Kind R: in one file or both, short, or longer than a chunk."""
    content = b"\r".join([b"Ein Hund bellt laut."] * lines) + last
    assert (len(content) > files.LINE_BYTES) == (lines > 4)
    (folder / "train.en").write_bytes(content)
    refused("data", load, folder, says=["carriage returns (CR)", f"{folder}/train.en", "tr '"])
    (folder / "train.de").write_bytes(content)
    refused("data", load, folder, says=["carriage returns (CR)", f"{folder}/train.de", "tr '"])


def test_cr_within_some_lines_is_text_and_counted(tmp_path, load):
    """Kind R and row 20: but CR LF is a line end, even twice the CR."""
    corpus = load(write_corpus(tmp_path / "a", train=([f"{DE[0]}\r{DE[1]}", DE[1], DE[2] + "\r", DE[3] + "\r\r"], EN)))
    assert len(corpus.train) == 4
    assert corpus.train.src.lengths.tolist()[1:] == [6, 6, 6]
    assert corpus.notes == ["warning: 1 lines have a carriage return (CR) inside, in train.de or train.en"]


# ---------------------------------------------------------------- long lines (row 26)


def test_line_is_cut_where_a_character_ends(tmp_path, monkeypatch):
    """Row 26: and what is cut off is counted into the checksum."""
    monkeypatch.setattr(files, "CHUNK_BYTES", 7)
    for size in range(8, 24):
        monkeypatch.setattr(files, "LINE_BYTES", size)
        for letters in ("a", "ä", "€", "\U0001f600", "aä€\U0001f600"):
            line = (letters * 30)[:30]
            paths = (tmp_path / "a.de", tmp_path / "a.en")
            for path in paths:
                path.write_text(f"{line}\nb\n{line}", encoding="utf-8")
            chunks = list(files.pair_chunks(paths, [files.content_sha256(path) for path in paths]))
            read = [line for chunk in chunks for line in files.split_lines(chunk.texts[0], "a.de", chunk.first)]
            assert read[1] == "b" and len(read) == 3
            for cut in (read[0], read[2]):
                assert line.startswith(cut) and size - 4 <= len(cut.encode()) < size + 7


@pytest.mark.parametrize(
    ("fault", "says"), [(b"\xff", "0xff, is not UTF-8"), (b"\0", "0x00, is a NUL"), (b"\xe2\x82", "0xe2, is not UTF-8")]
)
@pytest.mark.parametrize("place", [0, 262_139, 262_143, 262_144, 600_000, 999_996])
@pytest.mark.parametrize("letter", ["a", "€"])
def test_fault_within_a_long_line_is_told_with_its_place(folder, load, fault, says, place, letter):
    """Rows 21, 23 and 26: also in the part of the line that is cut off."""
    line = (letter * 999_999).encode()[:999_999]
    place -= place % len(letter.encode())
    line = line[:place] + fault + line[place:]
    (folder / "train.en").write_bytes(b"a\nb\n%b\nd\n" % line)
    refused("data", load, folder, says=[f"byte {place + 1} of line 3, {says}", "train.en:3"])


BOUNDED = """
import resource, sys
import data
from nmt.text import tokens
for lang in ("de", "en"):
    tokens.tokenise(["Ein Hund bellt."], lang)
import torchtext.vocab
in_use = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (in_use + int(sys.argv[2]), -1))
corpus = data.load(sys.argv[1], cache_dir=sys.argv[3], workers=1, log=print)
print(len(corpus.train), max(corpus.train.trg.lengths.tolist()), *corpus.notes, sep="|")
"""


def load_within(folder, megabytes):
    """What a process says that loads a corpus with so much memory beside that of its imports."""
    command = [sys.executable, "-c", BOUNDED, str(folder), str(megabytes << 20), str(folder / "cache")]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def write_long_lines(folder, lines, letters):
    """A corpus with short sources and so many targets of 1 MB each, compressed."""
    write_corpus(folder, train=(["Ein Hund."] * lines, []))
    (folder / "train.en").unlink()
    line = (letters * 1_000_000)[:1_000_000].encode() + b"\n"
    with gzip.open(folder / "train.en.gz", "wb", compresslevel=1) as file:
        for _ in range(lines):
            file.write(line)
    return folder


@pytest.mark.parametrize("letters", ["dog ", "dog"])
def test_memory_for_long_lines_is_bounded(tmp_path, letters):
    """Row 26: 150 lines of 1 MB beside short ones take no 80 MB. With and without spaces."""
    said = load_within(write_long_lines(tmp_path / "long", 150, letters), 80)
    words = 256 if " " in letters else 3
    assert said == f"150|{words}|warning: 150 sentences of train.en.gz cut to 254 words"


@pytest.mark.slow
@pytest.mark.parametrize("letters", ["dog ", "dog", "/"])
def test_memory_for_a_thousand_long_lines_is_bounded(tmp_path, letters):
    """Row 26."""
    said = load_within(write_long_lines(tmp_path / "long", 1000, letters), 80)
    assert said.startswith("1000|") and "warning: 1000 sentences of train.en.gz cut" in said
