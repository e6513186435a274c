"""Download of one file over HTTP, resumed after interruptions by the next attempt or the next run.

An incomplete file is kept beside its target as `<name>.part`, with the server's validator (ETag or Last-Modified) in
`<name>.part.tag`. The rest is requested by range; a file that has changed on the server is fetched from the start.
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
"""Failures in a row without a new byte, after which `fetch` gives up."""
TIMEOUT = 60.0
"""Seconds without a byte, after which a connection counts as broken."""
WAIT = 2.0
"""Seconds before the second attempt; doubled with each further failure."""
CHUNK = 1 << 20
"""Bytes read at once."""

# 408 and 429 ask for another attempt, and 5xx may be temporary; any other error status is final.
TEMPORARY_STATUS = (408, 429, 500, 502, 503, 504)
TEMPORARY_ERRORS = (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError)


class _TemporaryError(DownloadError):
    """Failed attempt that is worth another one."""


def remote_size(url: str, timeout: float = TIMEOUT) -> int | None:
    """Size in bytes of the file at `url`; None if the server doesn't state it."""
    try:
        response = requests.head(
            url, headers={"Accept-Encoding": "identity"}, allow_redirects=True, timeout=(timeout, timeout)
        )
    except requests.RequestException:
        return None  # the download itself tries again and reports the error
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
    """Download the file at `url` to `path`, complete or not at all; resumes what an earlier call left.

    Args:
        size: expected size in bytes; None if it is unknown.
        on_bytes: called with the number of bytes that arrived; a negative number takes back bytes that have to be
            fetched again.
        attempts: failures in a row without a new byte, after which the download fails.
        timeout: seconds without a byte, after which a connection counts as broken.
        wait: seconds before the second attempt; doubled with each further failure.

    Raises:
        DownloadError: the server refuses, or `attempts` in a row brought no new byte.
    """
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    on_bytes(_length(part))
    failures = 0
    while True:
        before = _length(part)
        try:
            _fetch_rest(url, part, size, on_bytes, timeout)
            part.replace(path)
            _tag_file(part).unlink(missing_ok=True)
            return
        except (_TemporaryError, *TEMPORARY_ERRORS) as error:
            failures = 1 if _length(part) > before else failures + 1
            if failures >= attempts:
                raise DownloadError(
                    f"{url}: given up after {attempts} attempts: {error}; the next run resumes where this one stopped"
                ) from None
            logger.warning("%s: %s; resuming from byte %d", url, error, _length(part))
            time.sleep(wait * 2 ** (failures - 1))
        except requests.RequestException as error:
            raise DownloadError(f"{url}: {error}") from None
        except OSError as error:
            raise DownloadError(f"{path}: cannot be written: {error}") from error


def _fetch_rest(url: str, part: Path, size: int | None, on_bytes: Callable[[int], object], timeout: float) -> None:
    """Try once to append the missing bytes to `part`."""
    have, tag = _length(part), _read_tag(part)
    headers = {"Accept-Encoding": "identity"}  # ranges and sizes must be those of the uncompressed file
    if have and tag:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}
    with requests.get(url, headers=headers, stream=True, timeout=(timeout, timeout)) as response:
        if response.status_code == 416:
            if response.headers.get("Content-Range") == f"bytes */{have}":
                return  # the file was complete before the interruption
            part.unlink()
            on_bytes(-have)
            raise _TemporaryError(f"the server's file is shorter than the {have} bytes fetched before")
        start = _first_byte(response, url, have)
        if start < have:
            on_bytes(-have)
        total = _total_size(response, start)
        if size is not None and total is not None and total != size:
            raise _TemporaryError(f"the server offers {total} bytes, {size} are expected")
        _tag_file(part).write_text(_validator(response))
        with open(part, "r+b" if start else "wb") as file:
            file.seek(start)
            # Unlike iter_content, read1 returns the bytes that arrived before a connection broke.
            while chunk := response.raw.read1(CHUNK):
                file.write(chunk)
                on_bytes(len(chunk))
    total = size if total is None else total
    if total is not None and _length(part) != total:
        raise _TemporaryError(f"the connection ended after {_length(part)} of {total} bytes")


def _first_byte(response: requests.Response, url: str, have: int) -> int:
    """Position in the file of the first byte of the response's body."""
    if response.status_code == 206:
        if response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            return have
        raise DownloadError(
            f"{url}: asked from byte {have}, the server answers {response.headers.get('Content-Range')}"
        )
    if response.status_code in TEMPORARY_STATUS:
        raise _TemporaryError(f"the server answers {response.status_code} {response.reason}")
    if response.status_code != 200:
        raise DownloadError(f"{url}: the server answers {response.status_code} {response.reason}")
    return 0


def _total_size(response: requests.Response, start: int) -> int | None:
    length = response.headers.get("Content-Length", "")
    return start + int(length) if length.isdigit() else None


def _validator(response: requests.Response) -> str:
    """Return the validator for If-Range: the ETag, unless it is weak (RFC 9110), else Last-Modified."""
    tag = response.headers.get("ETag", "")
    return response.headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag


def _tag_file(part: Path) -> Path:
    return part.with_name(part.name + ".tag")


def _read_tag(part: Path) -> str:
    return _tag_file(part).read_text() if _tag_file(part).exists() else ""


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0
