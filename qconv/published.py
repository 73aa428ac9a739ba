"""Files as their publishers made them: in the user's folder or downloaded once, checksums verified."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple


class Published(NamedTuple):
    """A published file: its folder below the data folder, its name, its address without the name, its SHA-256."""

    folder: str
    file: str
    url: str
    sha256: str


def data_folder(data_dir: str | os.PathLike[str] | None, holds: str) -> Path | None:
    """The user's folder of data: data_dir, or else what the environment variable QCONV_DATA names, or none.

    Args:
        data_dir: the folder, if given.
        holds: what is expected in it, for the error.

    Raises:
        ValueError: it is no folder.
    """
    named = os.environ.get("QCONV_DATA") if data_dir is None else data_dir
    if not named:
        return None
    folder = Path(named)
    if not folder.is_dir():
        origin = "QCONV_DATA names" if data_dir is None else "data_dir is"
        raise ValueError(f"{origin} {folder}, which is no folder: name the folder that holds {holds}/")
    return folder


def published_file(source: Published, data_dir: str | os.PathLike[str] | None) -> Path:
    """Find a file in the user's folder, or else in the cache, downloading it there; its checksum is right.

    Args:
        source: the file.
        data_dir: as for `data_folder`.

    Raises:
        ValueError: for a missing folder, a file that is not the published one, or a failed download.
    """
    folder = data_folder(data_dir, source.folder)
    if folder is None:
        return _download(source, "no data_dir or QCONV_DATA given")
    path = folder / source.folder / source.file
    if not path.exists():
        # Two near misses that a download would only hide.
        if (folder / source.file).exists():
            raise ValueError(f"{source.file} lies in {folder} itself: name the folder that holds {source.folder}/")
        if path.suffix == ".gz" and path.with_suffix("").exists():
            raise ValueError(f"{path.parent} holds {path.stem} uncompressed: qconv reads {path.name} (gzip it)")
        return _download(source, f"not in {path.parent}")
    try:
        with path.open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if actual != source.sha256:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) has SHA-256 {actual}, but the published file has "
            f"{source.sha256}: it is truncated or changed, so delete it and fetch it again"
        )
    return path


def _download(source: Published, looked: str) -> Path:
    import pooch  # slow to import

    cache, url = Path(pooch.os_cache("qconv")) / source.folder, source.url + source.file
    try:
        # Pooch writes to a temporary file beside the target and renames it once the checksum is right.
        return Path(pooch.retrieve(url, f"sha256:{source.sha256}", fname=source.file, path=cache))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source.folder}/{source.file}: {looked}, and {url} could not be fetched to {cache} ({_reason(error)}): "
            f"put the file into DIR/{source.folder}/ and name DIR as data_dir or in QCONV_DATA"
        ) from error


def _reason(error: OSError | ValueError) -> str:
    # A wrong checksum or an answer of the server speaks for itself; failed connections print half a page.
    if isinstance(error, ValueError) or getattr(error, "response", None) is not None:
        return str(error).rstrip(".")
    return error.strerror or type(error).__name__
