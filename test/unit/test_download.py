"""The download's claims, against servers of the tests' own on the loopback interface: six checked files, or none."""

import contextlib
import gzip
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import data
from nmt import storage
from nmt.text import download

import pytest
from conftest import REPOSITORY, refused, write_corpus

TEXTS = {name: f"{name}: ein Satz\n".encode() for name in download.MULTI30K}
BODIES = {f"{there}.gz": gzip.compress(TEXTS[name], mtime=0) for name, (there, _, _) in download.MULTI30K.items()}
VICTIM = "val.en.gz"  # the file that goes wrong where only one does


class Server:
    """Serves `BODIES`. `respond[name]`, a function of the request's handler, answers for one file, or for "*"."""

    def __init__(self):
        self.respond, self.paths, self.stop = {}, [], threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                owner, name = self.server.owner, self.path.rsplit("/", 1)[-1]
                owner.paths.append(self.path)
                answer = owner.respond.get(name) or owner.respond.get("*")
                with contextlib.suppress(ConnectionError):  # the client has had enough
                    answer(self) if answer else send(self, BODIES[name])

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.owner = self
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.stop.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def start():
    servers = []

    def call(**respond):
        servers.append(Server())
        servers[-1].respond = {"*": respond["all"]} if "all" in respond else {VICTIM: respond["one"]} if respond else {}
        return servers[-1]

    yield call
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """The table of files tells the tests' own sizes and sums. No proxy of this machine's is in the way."""
    table = {
        name: (there, len(BODIES[f"{there}.gz"]), hashlib.sha256(BODIES[f"{there}.gz"]).hexdigest())
        for name, (there, _, _) in download.MULTI30K.items()
    }
    monkeypatch.setattr(download, "MULTI30K", table)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def send(handler, body, status=200, length=None, **headers):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


def not_found(handler):
    handler.send_error(404)


def html_page(handler):
    send(handler, b"<html>Please log in</html>", **{"Content-Type": "text/html"})


def short_body(handler):
    send(handler, BODIES[VICTIM][:-5], length=len(BODIES[VICTIM]))


def wrong_hash(handler):
    send(handler, BODIES[VICTIM][:-1] + b"!")


def long_body(handler):
    send(handler, BODIES[VICTIM] + b"!" * 1000)


def not_http(handler):
    handler.wfile.write(b"220 this is no web server\r\n\r\n")


def hang(handler):
    handler.server.owner.stop.wait(30)


def drip_body(handler):
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.owner.stop.wait(0.05):
        handler.wfile.write(b"x")


def drip_headers(handler):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
    while not handler.server.owner.stop.wait(0.05):
        handler.wfile.write(b"x")


def bell_and_404(handler):
    handler.send_response_only(404, "\x1b[31m\x07")
    handler.end_headers()


def redirect(url):
    return lambda handler: send(handler, b"", 302, Location=url)


def fetch(folder, base, log=lambda line: None, **flags):
    download.download_multi30k(folder, base_url=base, log=log, **flags)


def fetch_refused(folder, base, *words, **flags):
    """Asserts that the download ends with an io error that says `words`, and leaves nothing. Returns the message."""
    message = refused("io", fetch, folder, base, says=words, **flags)
    assert list(folder.iterdir()) == []
    return message


def contents(folder):
    assert [path.name for path in folder.iterdir()] == ["multi30k"], "no temporary folder, no lock"
    return {path.name: path.read_bytes() for path in (folder / "multi30k").iterdir()}


def test_six_plain_files_are_laid_out(tmp_path, start):
    fetch(tmp_path, start().url)
    assert contents(tmp_path) == TEXTS
    assert sorted(TEXTS) == ["test.de", "test.en", "train.de", "train.en", "val.de", "val.en"]


def test_folder_is_made_and_respects_the_umask(tmp_path, start):
    before = os.umask(0o027)
    try:
        fetch(tmp_path / "new" / "er", start().url)
    finally:
        os.umask(before)
    folder = tmp_path / "new" / "er" / "multi30k"
    assert folder.stat().st_mode & 0o777 == 0o750
    assert (folder / "train.de").stat().st_mode & 0o777 == 0o640


def test_pinned_address_is_https_and_stands_in_url_ini_alone():
    """Of the program's own files. Tests have their own servers."""
    assert download.ADDRESSES == REPOSITORY / "url.ini"
    assert download.address().startswith("https://")
    host = urllib.parse.urlsplit(download.address()).netloc
    programs = [path for pattern in ("*.py", "nmt/**/*.py", "test/*.sh") for path in REPOSITORY.glob(pattern)]
    assert len(programs) > 30
    assert [str(path) for path in programs if host in path.read_text(encoding="utf-8")] == []


def test_load_downloads_from_the_address_in_url_ini(tmp_path, start, monkeypatch):
    """Read at each download: whoever edits the file needs no new start. Without a section, as the ModelZoo has it."""
    (tmp_path / "url.ini").write_text(f"other_url=https://nowhere.invalid/100%25\nmulti30k_url={start().url}/\n")
    monkeypatch.setattr(download, "ADDRESSES", tmp_path / "url.ini")
    corpus = data.load(tmp_path / "data", cache_dir=tmp_path / "cache", log=lambda line: None)
    assert corpus.test.trg_tokens == [["test.en", ":", "ein", "satz"]]


@pytest.mark.parametrize("text", [None, "", "other_url=x\n", "[a", b"\xff", "multi30k_url\n"], ids=repr)
def test_missing_address_is_told_unless_there_is_a_mirror(tmp_path, start, monkeypatch, text):
    path = tmp_path / "url.ini"
    monkeypatch.setattr(download, "ADDRESSES", path)
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    says = ["no address to download Multi30k from: ", str(path), "--data-dir", "--mirror"]
    refused("io", data.load, tmp_path / "data", cache_dir=tmp_path / "cache", log=lambda line: None, says=says)
    assert not (tmp_path / "data").exists()
    download.download_multi30k(tmp_path / "data", mirror=start().url, log=lambda line: None)
    assert contents(tmp_path / "data") == TEXTS


def test_load_downloads_into_an_empty_folder_once(tmp_path, start, monkeypatch):
    server = start()
    monkeypatch.setattr(download, "address", lambda: server.url)
    flags = {"cache_dir": tmp_path / "cache", "log": lambda line: None}
    corpora = [data.load(tmp_path / "data", **flags) for _ in range(2)]
    assert [corpus.test.trg_tokens for corpus in corpora] == [[["test.en", ":", "ein", "satz"]]] * 2
    assert len(server.paths) == 6


@pytest.mark.parametrize("flags", [{"src_lang": "fr"}, {"test_name": "test2017"}, {"train_name": "corpus"}, {}])
def test_load_downloads_nothing_beside_a_users_own_data(tmp_path, start, monkeypatch, flags):
    server = start()
    monkeypatch.setattr(download, "address", lambda: server.url)
    folder = tmp_path / "data"
    folder.mkdir()
    if not flags:
        (folder / "val.de.gz").write_bytes(b"one of the six")
    refused("data", data.load, folder, cache_dir=tmp_path / "cache", log=print, **flags)
    assert server.paths == []


NAMES = ["train.fr", "Train.de", "TRAIN.EN.gz", "train.DE", "train.txt", "train.fr.gz", "train.tok.de"]


@pytest.mark.parametrize("below", [".", "multi30k"])
@pytest.mark.parametrize("name", NAMES)
def test_load_downloads_nothing_beside_a_training_file_of_any_language(tmp_path, start, monkeypatch, name, below):
    """Kind E: an error says what was found instead."""
    server = start()
    monkeypatch.setattr(download, "address", lambda: server.url)
    (tmp_path / below).mkdir(exist_ok=True)
    (tmp_path / below / name).write_bytes(gzip.compress(b"un chien\n") if name.endswith(".gz") else b"un chien\n")
    before = sorted(tmp_path.rglob("*"))
    says = [f"no train.de/en, val.de/en, test.de/en, but {name}; {tmp_path}; "]
    refused("data", data.load, tmp_path, cache_dir=tmp_path / "cache", log=print, says=says)
    assert server.paths == []
    assert sorted(tmp_path.rglob("*")) == before


def test_pair_of_which_one_language_is_wanted_is_told_whole(tmp_path, start, monkeypatch):
    """Kind E: somebody's French-English corpus, without --src-lang."""
    monkeypatch.setattr(download, "address", lambda: start().url)
    for lang in ("fr", "en"):
        (tmp_path / f"train.{lang}").write_text("a\n" * 9)
    says = [f"but train.en, train.fr; {tmp_path}; ", "--src-lang fr "]
    refused("data", data.load, tmp_path, cache_dir=tmp_path / "cache", log=print, says=says)


def test_other_training_files_beside_a_whole_corpus_are_left_alone(tmp_path):
    """Kind E."""
    write_corpus(tmp_path)
    (tmp_path / "train.fr").write_text("un chien\n" * 64)
    corpus = data.load(tmp_path, cache_dir=tmp_path / "cache", log=print)
    assert (len(corpus.train), corpus.folder) == (64, str(tmp_path))


FAULTS = {
    not_found: "HTTP Error 404",
    html_page: f"{VICTIM} has 26 bytes, expected {len(BODIES[VICTIM])}",
    short_body: f"{VICTIM} has {len(BODIES[VICTIM]) - 5} bytes, expected {len(BODIES[VICTIM])}",
    long_body: f"{VICTIM} has more than {len(BODIES[VICTIM])} bytes",
    wrong_hash: f"expected {hashlib.sha256(BODIES[VICTIM]).hexdigest()}",
    not_http: "220 this is no web server",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault_of_one_file_keeps_nothing_and_is_told(tmp_path, start, fault):
    """Rows 40 and 41."""
    server = start(one=fault)
    words = [f"no corpus in {tmp_path},", FAULTS[fault], server.url, "by hand", "--mirror", "leave --data-dir out"]
    message = fetch_refused(tmp_path, server.url, *words)
    assert len(message.splitlines()) == 1
    assert server.paths[-1] == f"/{VICTIM}"


def test_wrong_hash_is_told_with_the_actual_one(tmp_path, start):
    """Row 41."""
    fetch_refused(tmp_path, start(one=wrong_hash).url, hashlib.sha256(BODIES[VICTIM][:-1] + b"!").hexdigest())


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_mirror_is_tried_next(tmp_path, start, fault):
    """Rows 40 and 41."""
    first, second, lines = start(one=fault), start(), []
    fetch(tmp_path, first.url, mirror=f"{second.url}/some/where/", log=lines.append)
    assert contents(tmp_path) == TEXTS
    assert second.paths[0] == "/some/where/train.de.gz"
    assert lines[0] == f"no corpus in {tmp_path}: downloading Multi30k (1.3 MB) from {first.url}"
    assert any(line.startswith(f"download failed: {first.url}") for line in lines)


def test_every_failure_is_listed(tmp_path, start):
    """Row 40."""
    gone = start()
    gone.close()
    mirror = start(all=not_found).url
    message = fetch_refused(tmp_path, gone.url, f"{gone.url}: ", "refused", f"{mirror}: HTTP Error 404", mirror=mirror)
    assert "train.de.gz" in message


def test_words_of_a_server_cannot_write_to_the_terminal(tmp_path, start):
    lines = []
    refused("io", fetch, tmp_path, start(all=bell_and_404).url, log=lines.append)
    assert "\\x1b[31m\\x07" in lines[-1]
    assert lines[-1].isprintable()


@pytest.mark.parametrize("scheme", ["file", "ftp", "data", "x"])
def test_address_that_is_not_http_is_refused(tmp_path, scheme):
    (tmp_path / "served").mkdir()
    for name, body in BODIES.items():
        (tmp_path / "served" / name).write_bytes(body)
    (tmp_path / "here").mkdir()
    fetch_refused(tmp_path / "here", f"{scheme}://{tmp_path}/served", "not an http or https address")


@pytest.mark.parametrize("url", ["nonsense", "http://", "http://127.0.0.1:x", "http://[::1"])
def test_broken_address_is_refused(tmp_path, url):
    fetch_refused(tmp_path, url, f"{url.rstrip('/')}: ")


def test_endless_file_is_read_no_further_than_its_size(tmp_path, start):
    """Row 41."""
    sent = []

    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        while not handler.server.owner.stop.is_set() and len(sent) < 10_000:
            handler.wfile.write(b"x" * 65536)
            sent.append(65536)

    fetch_refused(tmp_path, start(one=endless).url, f"{VICTIM} has more than {len(BODIES[VICTIM])} bytes")
    assert len(sent) < 10_000, "the client hung up"


@pytest.mark.parametrize("fault", [hang, drip_body, drip_headers])
def test_total_deadline_ends_a_server_that_never_does(tmp_path, start, fault, monkeypatch):
    """Row 42."""
    small = {name: (there, 10**9, sha256) for name, (there, _, sha256) in download.MULTI30K.items()}
    monkeypatch.setattr(download, "MULTI30K", small)
    server = start(all=fault)
    fetch_refused(tmp_path, server.url, "by hand", timeout=1.0)
    assert len(server.paths) == 1, "it was asked, and not for a second file"


def test_fetching_itself_ends_at_the_deadline(start):
    """Row 42."""
    with pytest.raises(TimeoutError, match="by the deadline"):
        download._fetch(f"{start(all=drip_body).url}/train.de.gz", 40, time.monotonic() + 0.3)


def test_hanging_first_address_leaves_time_for_the_mirror(tmp_path, start):
    """Rows 40 and 42."""
    fetch(tmp_path, start(all=hang).url, mirror=start().url, timeout=4.0)
    assert contents(tmp_path) == TEXTS


def test_blocked_name_lookup_ends_at_the_deadline(tmp_path, monkeypatch):
    """Row 42."""
    release = threading.Event()
    monkeypatch.setattr(download, "_fetch", lambda *args: release.wait(30))
    fetch_refused(tmp_path, "http://name.invalid", "not done within 0.2 s", timeout=0.2)
    release.set()


def test_redirect_within_http_is_followed(tmp_path, start):
    """Row 43."""
    other = start()
    fetch(tmp_path, start(all=lambda handler: redirect(other.url + handler.path)(handler)).url)
    assert contents(tmp_path) == TEXTS
    assert len(other.paths) == 6


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/val.en.gz"])
def test_redirect_to_another_scheme_is_refused(tmp_path, start, url):
    """Row 43."""
    fetch_refused(tmp_path, start(one=redirect(url)).url, url)


@pytest.mark.parametrize(
    ("old", "new", "followed"),
    [
        ("https", "https", True),
        ("http", "https", True),
        ("http", "http", True),
        ("https", "http", False),
        ("https", "ftp", False),
    ],
)
def test_redirect_from_https_goes_to_https_alone(old, new, followed):
    """Row 43."""
    request = urllib.request.Request(f"{old}://a.invalid/x")
    target = f"{new}://b.invalid/x"
    follow = download._NoDowngrade().redirect_request
    if followed:
        assert follow(request, None, 302, "Found", {}, target).full_url == target
    else:
        with pytest.raises(urllib.error.HTTPError, match="refused"):
            follow(request, None, 302, "Found", {}, target)


def test_proxy_of_the_environment_is_used(tmp_path, start, monkeypatch):
    """Row 43."""
    proxy = start()
    monkeypatch.setenv("http_proxy", proxy.url)
    fetch(tmp_path, "http://mirror.invalid/raw")
    assert contents(tmp_path) == TEXTS
    assert proxy.paths[0] == "http://mirror.invalid/raw/train.de.gz"


def test_killed_download_leaves_nothing_for_the_next(tmp_path, start):
    server = start(one=hang)
    code = (
        "import json, sys; from nmt.text import download; download.MULTI30K = json.loads(sys.argv[3]);"
        "download.download_multi30k(sys.argv[1], base_url=sys.argv[2])"
    )
    arguments = [str(tmp_path), server.url, json.dumps(download.MULTI30K)]
    killed = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=REPOSITORY)
    while f"/{VICTIM}" not in server.paths:
        assert killed.poll() is None
        server.stop.wait(0.01)
    killed.kill()
    killed.wait()
    assert (tmp_path / ".multi30k.lock").exists()
    (tmp_path / ".multi30k.part").mkdir()  # as if it had been killed a moment later
    (tmp_path / ".multi30k.part" / "train.de").write_text("half")
    fetch(tmp_path, start().url)
    assert contents(tmp_path) == TEXTS


@pytest.mark.parametrize("then", ["own files", "files by hand"])
def test_what_a_killed_download_left_is_cleared_by_a_run_that_downloads_nothing(tmp_path, then):
    """The house's rule: the next start leaves no temporary file, whatever that start is. A living one keeps its own."""
    folder = write_corpus(tmp_path / ("data" if then == "own files" else "data/multi30k"))
    folder = tmp_path / "data"
    (folder / download.TEMPORARY).mkdir()
    (folder / download.TEMPORARY / "train.de").write_text("half")
    (folder / download.LOCK).touch()
    flags = {"cache_dir": tmp_path / "cache", "log": print}
    with storage.locked(folder / download.LOCK, None):
        data.load(folder, **flags)
        assert (folder / download.TEMPORARY / "train.de").exists()
        assert (folder / download.LOCK).exists()
    (folder / download.LOCK).touch()
    data.load(folder, **flags)
    assert not list(folder.glob(".multi30k*"))


def test_two_downloads_into_one_folder_fetch_once(tmp_path, start):
    waiting = threading.Event()
    server = start(one=lambda handler: waiting.wait(30) and send(handler, BODIES[VICTIM]))

    def log(line):
        if line.startswith("waiting"):
            waiting.set()

    runs = [threading.Thread(target=fetch, args=(tmp_path, server.url, log)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert contents(tmp_path) == TEXTS
    assert len(server.paths) == 6


def test_failed_download_leaves_no_folder_that_it_made(tmp_path):
    refused("io", fetch, tmp_path / "new", "http://127.0.0.1:9")
    assert not (tmp_path / "new").exists()


def test_full_disk_keeps_nothing(tmp_path, start, monkeypatch):
    written, write = [], download.write_synced

    def full(path, *parts):
        written.append(path)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        write(path, *parts)

    monkeypatch.setattr(download, "write_synced", full)
    fetch_refused(tmp_path, start().url, "cannot be stored", "No space left on device")
    assert len(written) == 4


def test_folder_that_is_a_file_is_told(tmp_path, start):
    (tmp_path / "file").write_text("")
    refused("io", fetch, tmp_path / "file", start().url, says="cannot be stored")


def test_other_files_in_the_target_are_left_alone(tmp_path, start):
    (tmp_path / "multi30k").mkdir()
    (tmp_path / "multi30k" / "notes.txt").write_text("mine")
    refused("io", fetch, tmp_path, start().url, says="has no multi30k/ of its own")
    assert contents(tmp_path) == {"notes.txt": b"mine"}
