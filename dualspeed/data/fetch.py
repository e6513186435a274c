"""One file over HTTP: what has come stays, and the next attempt goes on from there, in this run or a later one.

A half file lies beside its goal as `<name>.part`, with the server's validator (ETag or Last-Modified) in
`<name>.part.tag`: the rest is asked for by range, and a file that has changed meanwhile is fetched anew.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import requests
import urllib3

from dualspeed.errors import DownloadError

logger = logging.getLogger(__name__)

ATTEMPTS = 5
"""Failures in a row, without a new byte, after which a file is given up."""
TIMEOUT = 60.0
"""Seconds without a byte after which a connection counts as broken."""
WAIT = 2.0
"""Seconds before the second attempt; each further one waits twice as long."""
CHUNK = 1 << 20

# 408 and 429 ask for another attempt, 5xx may pass; every other refusal stays one.
PASSING_STATUS = (408, 429, 500, 502, 503, 504)
PASSING_ERRORS = (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError)


class _InterruptedError(Exception):
    """An attempt failed in a way that another one may not."""


def remote_size(url: str, timeout: float = TIMEOUT) -> int | None:
    """Bytes of the file at `url`, as the server states them, or None if it doesn't."""
    try:
        response = requests.head(
            url, headers={"Accept-Encoding": "identity"}, allow_redirects=True, timeout=(timeout, timeout)
        )
    except requests.RequestException:
        return None  # the download itself tries again and says what is wrong
    length = response.headers.get("Content-Length", "")
    return int(length) if response.ok and length.isdigit() else None


def fetch(
    url: str,
    path: Path,
    size: int | None = None,
    on_bytes: Callable[[int], object] = lambda count: None,
    attempts: int = ATTEMPTS,
    timeout: float = TIMEOUT,
    wait: float = WAIT,
) -> None:
    """Put the file at `url` to `path`, which appears whole; goes on with what an earlier call has left.

    Args:
        size: bytes that it must have, where they are known.
        on_bytes: told of every piece that arrives; a negative count takes back what has to be fetched anew.

    Raises:
        DownloadError: the server refuses, or `attempts` in a row brought nothing new.
    """
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    on_bytes(_length(part))
    failures = 0
    while True:
        before = _length(part)
        try:
            _continue(url, part, size, on_bytes, timeout)
            part.replace(path)
            _tag_file(part).unlink(missing_ok=True)
            return
        except (_InterruptedError, *PASSING_ERRORS) as error:
            failures = 1 if _length(part) > before else failures + 1
            if failures >= attempts:
                raise DownloadError(
                    f"{url}: given up after {attempts} attempts: {error}; the next run goes on where this one stopped"
                ) from None
            logger.warning("%s: %s; going on from byte %d", url, error, _length(part))
            time.sleep(wait * 2 ** (failures - 1))
        except requests.RequestException as error:
            raise DownloadError(f"{url}: {error}") from None
        except OSError as error:
            raise DownloadError(f"{path}: cannot be written: {error}") from error


def _continue(url: str, part: Path, size: int | None, on_bytes: Callable[[int], object], timeout: float) -> None:
    """One attempt at what `part` lacks."""
    have, tag = _length(part), _read_tag(part)
    headers = {"Accept-Encoding": "identity"}  # else ranges and sizes are those of the compressed form
    if have and tag:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}
    with requests.get(url, headers=headers, stream=True, timeout=(timeout, timeout)) as response:
        if response.status_code == 416:
            if response.headers.get("Content-Range") == f"bytes */{have}":
                return  # all of it had come before the interruption
            part.unlink()
            on_bytes(-have)
            raise _InterruptedError(f"the file there is shorter than the {have} bytes that are here")
        start = _start_of(response, url, have)
        if start < have:
            on_bytes(-have)
        total = _total_of(response, start)
        if size is not None and total is not None and total != size:
            raise _InterruptedError(f"the server offers {total} bytes, {size} are expected")
        _tag_file(part).write_text(_validator(response))
        with open(part, "r+b" if start else "wb") as file:
            file.seek(start)
            # Unlike iter_content, read1 hands over what came before a break.
            while chunk := response.raw.read1(CHUNK):
                file.write(chunk)
                on_bytes(len(chunk))
    total = size if total is None else total
    if total is not None and _length(part) != total:
        raise _InterruptedError(f"the connection ended after {_length(part)} of {total} bytes")


def _start_of(response: requests.Response, url: str, have: int) -> int:
    """The byte that the answer's body starts with."""
    if response.status_code == 206:
        if response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            return have
        raise DownloadError(
            f"{url}: asked from byte {have}, the server answers {response.headers.get('Content-Range')}"
        )
    if response.status_code in PASSING_STATUS:
        raise _InterruptedError(f"the server answers {response.status_code} {response.reason}")
    if response.status_code != 200:
        raise DownloadError(f"{url}: the server answers {response.status_code} {response.reason}")
    return 0


def _total_of(response: requests.Response, start: int) -> int | None:
    length = response.headers.get("Content-Length", "")
    return start + int(length) if length.isdigit() else None


def _validator(response: requests.Response) -> str:
    """What says later whether the file is still the same; a weak ETag is not good enough for ranges (RFC 9110)."""
    tag = response.headers.get("ETag", "")
    return response.headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag


def _tag_file(part: Path) -> Path:
    return part.with_name(part.name + ".tag")


def _read_tag(part: Path) -> str:
    return _tag_file(part).read_text() if _tag_file(part).exists() else ""


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0
