"""Checksums of whole files."""

import hashlib
from pathlib import Path

from ._errors import DatasetError


def check_digest(path: Path, digest: str | None) -> None:
    """Compare the checksum of a file with the published one.

    **Arguments:**

    - `path`: the file.
    - `digest`: hexadecimal SHA-256, or `md5:` and a hexadecimal MD5; `None` checks nothing.

    **Raises:**

    `DatasetError` that names the file when they differ or it cannot be read.
    """
    if digest is None:
        return
    algorithm, expected = ("md5", digest[4:]) if digest.startswith("md5:") else ("sha256", digest)
    try:
        with path.open("rb") as file:
            # against damage, not against forgery: allowed where MD5 is barred for security
            found = hashlib.file_digest(
                file, lambda: hashlib.new(algorithm, usedforsecurity=False)
            ).hexdigest()
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error}).") from error
    if found != expected:
        raise DatasetError(
            f"{path}: wrong checksum; its {algorithm.upper()} is {found}, expected {expected}."
        )
