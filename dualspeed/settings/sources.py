"""Downloads of a configuration: each source is a folder that is filled from a Hub repository or from plain URLs.

Imports nothing heavy, so that configurations load at once; the work is in dualspeed.data.download.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from dualspeed.errors import ConfigError
from dualspeed.settings.fields import check_fields, choice, number

KINDS = ("hub", "url")
REPO_TYPES = ("dataset", "model")


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of a source, or for the Hub all files that match a pattern."""

    path: str | None = None
    """Hub: path or pattern in the repository. URL: what to save it as; null: the last part of the URL."""
    url: str | None = None
    """Address of a file of kind `url`: http(s), or a path on this machine, which is used in place."""
    unpack: str | None = None
    """An archive's content goes to this folder inside the source's; null: it stays as it is."""
    sha256: str | None = None
    """Checksum, where its publisher states one; null: the first download records it in data.lock."""
    size: int | None = number(minimum=0, default=None)
    """Bytes, likewise."""

    def __post_init__(self) -> None:
        check_fields(self)
        digits = set((self.sha256 or "").lower())
        if self.sha256 is not None and (len(self.sha256) != 64 or not digits <= set("0123456789abcdef")):
            raise ConfigError(f"sha256: {self.sha256!r} is no checksum; valid: 64 hexadecimal digits, or null")
        for key in ("path", "unpack"):
            check_inside(key, getattr(self, key) or ".")

    @property
    def name(self) -> str:
        """Name of the file inside the source's folder."""
        return self.path or PurePosixPath(unquote(urlsplit(self.address).path)).name

    @property
    def address(self) -> str:
        """`url`; empty for the Hub."""
        return self.url or ""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One entry of `downloads`: where its files come from and where they go."""

    kind: str = choice(KINDS)
    """hub or url."""
    folder: str
    """Folder that holds the files afterwards; recipes and benchmarks point into it."""
    existing: str | None = None
    """A folder that holds them already, in the same layout: nothing is downloaded, `folder` becomes a link to it."""
    repo: str | None = None
    """Hub: name of the repository."""
    repo_type: str = choice(REPO_TYPES, default="dataset")
    """Hub: dataset or model."""
    revision: str | None = None
    """Hub: commit, tag or branch; null: what data.lock holds, or else the newest commit."""
    files: tuple[SourceFile, ...] = ()
    """Files of the source; for the Hub, none means all of the repository."""

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.kind == "hub") != (self.repo is not None):
            raise ConfigError(f"repo: {self.repo!r}; valid: a repository's name for kind hub, null for kind url")
        if self.kind == "url" and not self.files:
            raise ConfigError("files: empty; valid: one or more files with their url")
        for index, file in enumerate(self.files):
            if self.kind == "url" and not (file.url and file.name):
                raise ConfigError(f"files[{index}].url: {file.url!r}; valid: a URL whose last part names a file")
            if self.kind == "hub" and (file.url is not None or file.path is None):
                raise ConfigError(f"files[{index}]: valid for kind hub: a `path` in the repository, and no `url`")
        names = [file.name for file in self.files]
        if len(set(names)) < len(names):
            raise ConfigError(f"files: {', '.join(names)}: a name comes twice; valid: another `path` for one of them")


def check_inside(key: str, path: str) -> None:
    """Raise ConfigError for a path that leads out of the folder that it starts from."""
    parts = PurePosixPath(path).parts
    if PurePosixPath(path).is_absolute() or ".." in parts:
        raise ConfigError(f"{key}: {path!r} leads out of the source's folder; valid: a relative path without '..'")


def check_folders(sources: dict[str, Source]) -> None:
    """Raise ConfigError if two sources share a folder, or one lies inside another: who owns a file must be clear."""
    folders = {name: Path(source.folder).absolute() for name, source in sources.items()}
    for name, folder in folders.items():
        for other, around in folders.items():
            if name != other and (folder == around or around in folder.parents):
                raise ConfigError(
                    f"downloads.{name}.folder: {sources[name].folder!r} lies in that of downloads.{other}; "
                    "valid: a folder of its own"
                )


def sources_of(path: str | Path, sources: dict[str, Source]) -> list[str]:
    """Names of the sources that what lies at `path` comes from: those around it, or for a root folder those inside."""
    path = Path(path).absolute()
    return [
        name
        for name, source in sources.items()
        if (folder := Path(source.folder).absolute()) == path or folder in path.parents or path in folder.parents
    ]
