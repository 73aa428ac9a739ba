"""Files that keep compiled code for later processes: QCONV_CACHE, or the user's folder for such files."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import platformdirs

_OLD = 30 * 24 * 3600  # seconds until code that no process read is removed


def _path(key: str | None, symbol: str) -> Path | None:
    """Where code is, or None where nothing can be kept."""
    chosen = os.environ.get("QCONV_CACHE")
    if key is None:
        return None
    try:
        folder = Path(chosen) if chosen else platformdirs.user_cache_path("qconv")
    except RuntimeError:  # a user without a home
        return None
    return folder / "loops" / f"{symbol}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def _checksum(key: str | None, symbol: str, code: bytes) -> bytes:
    # With the names: a file in another one's place is as wrong as a damaged one.
    return hashlib.sha256(f"{key} {symbol} {len(code)} ".encode() + code).digest()


def read(key: str | None, symbol: str) -> bytes | None:
    """What write left, or None if there is nothing or it is damaged.

    Args:
        key: What the code is for, see Machine; None if that is not known.
        symbol: Its name.
    """
    path = _path(key, symbol)
    try:
        content = b"" if path is None else path.read_bytes()
    except OSError:
        return None
    checksum, code = content[:32], content[32:]
    if not code or _checksum(key, symbol, code) != checksum:
        return None
    with suppress(OSError):
        if path is not None:
            path.touch()
    return code


def write(key: str | None, symbol: str, code: bytes) -> None:
    """Keep code. Where that cannot be done, it is compiled anew in each process; for arguments see read."""
    path = _path(key, symbol)
    if path is None:
        return
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix="part-", delete=False) as file:
            part = Path(file.name)
            try:
                file.write(_checksum(key, symbol, code) + code)
                file.close()
                part.replace(path)
            except BaseException:
                file.close()
                part.unlink(missing_ok=True)
                raise
        _remove_old(path.parent)


def _remove_old(folder: Path) -> None:
    # Code of older versions, and what a killed process was writing.
    for path in folder.iterdir():
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _OLD:
                path.unlink()
