"""Downloads Multi30k: six files, whole and checked, or none."""

import concurrent.futures
import configparser
import contextlib
import functools
import gzip
import http.client
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from nmt.errors import UserError, printable
from nmt.storage import Log, clear_unless_in_use, locked, new_folder, sha256, write_synced

ADDRESSES = Path(__file__).resolve().parents[2] / "url.ini"  # NAME=URL lines, as the ModelZoo's folders have them
MULTI30K = {  # name here: name there, bytes and sha256 of the .gz
    "train.de": ("train.de", 637044, "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6"),
    "train.en": ("train.en", 568929, "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f"),
    "val.de": ("val.de", 24681, "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a"),
    "val.en": ("val.en", 21650, "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28"),
    "test.de": ("test_2016_flickr.de", 22890, "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8"),
    "test.en": ("test_2016_flickr.en", 21077, "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9"),
}
SOCKET_TIMEOUT = 10.0  # seconds of silence
TEMPORARY, LOCK = ".multi30k.part", ".multi30k.lock"  # beside multi30k/, while it is downloaded


def address(name: str = "multi30k_url") -> str:
    """An address of `ADDRESSES`, the only place where they stand.

    Raises:
        UserError: io, the file cannot be read, or does not have it.
    """
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string("[url]\n" + ADDRESSES.read_text(encoding="utf-8"))
        return parser["url"][name]
    except (OSError, UnicodeDecodeError, configparser.Error, KeyError) as error:
        why = (isinstance(error, OSError) and error.strerror) or f"no readable line {name}=URL"
        todo = "take the repository's file, or name a corpus's folder with --data-dir, or an address with --mirror"
        raise UserError("io", f"there is no address to download Multi30k from: {why}", str(ADDRESSES), todo) from error


def download_multi30k(
    directory: Path, *, mirror: str | None = None, base_url: str | None = None, timeout: float = 300.0, log: Log = print
) -> None:
    """Downloads Multi30k into `directory`/multi30k: the six files, whole and checked, or none.

    Args:
        directory: is made if it is not there.
        mirror: the address to try second. Both addresses have `train.de.gz` and so on directly below them.
        base_url: the address to try first, by default that of `address`.
        timeout: seconds for everything. Each address gets an equal share of the time that is left.
        log: takes a line for each address, and one for each failure.

    Raises:
        UserError: io, with the failure of each address, or as from `address`.
    """
    directory = Path(directory)
    target, temporary = directory / "multi30k", directory / TEMPORARY
    with contextlib.suppress(*[UserError] if mirror else []):  # a mirror is enough
        base_url = base_url or address()
    sources = [url.rstrip("/") for url in (base_url, mirror) if url]
    made = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory / LOCK, log):
            shutil.rmtree(temporary, ignore_errors=True)  # a killed download left it: we hold the lock
            if not (target / "train.de").exists():  # or another process was quicker
                bodies = _download(sources, timeout, target, log)
                with new_folder(target, temporary):
                    for name, body in bodies.items():
                        write_synced(temporary / name, gzip.decompress(body))
    except OSError as error:
        todo = "name a folder with --data-dir that can be written and has no multi30k/ of its own"
        raise UserError("io", f"Multi30k cannot be stored: {error}", str(directory), todo) from error
    finally:
        if made:
            with contextlib.suppress(OSError):  # it is not empty, because the download is in it
                directory.rmdir()


def clear_strays(directory: Path) -> None:
    """Removes what a killed download left in `directory`. What belongs to a living one stays: it holds the lock."""
    if any((directory / name).exists() for name in (TEMPORARY, LOCK)):
        clear = functools.partial(shutil.rmtree, directory / TEMPORARY, ignore_errors=True)
        clear_unless_in_use(directory / LOCK, clear)


def _download(sources: list[str], timeout: float, target: Path, log: Log) -> dict[str, bytes]:
    """The compressed content of each file by name, from the first source that has all files."""
    deadline = time.monotonic() + timeout
    failures = []
    for left, source in zip(range(len(sources), 0, -1), sources, strict=True):
        log(f"no corpus in {target.parent}: downloading Multi30k (1.3 MB) from {source}")
        until = time.monotonic() + (deadline - time.monotonic()) / left
        try:
            return _before(until, _fetch_all, source, until)
        except (OSError, http.client.HTTPException, ValueError) as error:
            failures.append(printable(f"{source}: {error}"))  # a server's own words
            log(f"download failed: {failures[-1]}")
    raise UserError(
        "io",
        f"there is no corpus in {target.parent}, and Multi30k cannot be downloaded: {', '.join(failures)}",
        str(target),
        "name a corpus's folder with --data-dir, or another address with --mirror, or leave --data-dir out to train on "
        f"the sample, or put {', '.join(f'{there}.gz' for there, _, _ in MULTI30K.values())} there by hand",
    )


def _before(deadline: float, function: Callable, *args):
    """Calls `function(*args)`, and raises TimeoutError at the deadline whatever the function waits for.

    A socket's timeout alone is not enough. It limits neither the look-up of a name nor headers that come in drips.
    """
    future: concurrent.futures.Future = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)

    seconds = max(0.0, deadline - time.monotonic())
    threading.Thread(target=work, daemon=True).start()
    try:
        return future.result(seconds)
    except concurrent.futures.TimeoutError as error:
        raise TimeoutError(str(error) or f"not done within {seconds:.1f} s") from error


def _fetch_all(source: str, deadline: float) -> dict[str, bytes]:
    bodies = {}
    for name, (there, size, digest) in MULTI30K.items():
        body = _fetch(f"{source}/{there}.gz", size + 1, deadline)
        if len(body) != size:
            more = "more than " if len(body) > size else ""
            raise ValueError(f"{there}.gz has {more}{min(len(body), size)} bytes, expected {size}")
        if sha256(body) != digest:
            raise ValueError(f"{there}.gz has sha256 {sha256(body)}, expected {digest}")
        bodies[name] = body
    return bodies


def _fetch(url: str, limit: int, deadline: float) -> bytes:
    """The first `limit` bytes at `url`, through the proxies that the environment names."""
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ValueError("not an http or https address")
    opener = urllib.request.build_opener(_NoDowngrade)
    body = bytearray()
    with opener.open(url, timeout=max(0.1, min(SOCKET_TIMEOUT, deadline - time.monotonic()))) as response:
        while chunk := response.read1(min(65536, limit - len(body))):
            body += chunk
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(body)} bytes of {url} by the deadline")
    return bytes(body)


class _NoDowngrade(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https, and from http to http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        schemes = [urllib.parse.urlsplit(url).scheme for url in (req.full_url, newurl)]
        if schemes[1] != "https" and schemes != ["http", "http"]:
            raise urllib.error.HTTPError(req.full_url, code, f"redirect to {newurl} refused", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)
