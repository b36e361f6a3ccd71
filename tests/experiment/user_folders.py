"""Folders that were a user's before a command was given them, and what may not change there."""


def snapshot(folder):
    """Every file below `folder`: content, time of change, and place on the disk."""
    found = {}
    for path in sorted([folder, *folder.rglob("*")]):
        about = path.lstat()
        content = path.read_bytes() if path.is_file() else None
        found[path] = (content, about.st_mtime_ns, about.st_ino)
    return found
