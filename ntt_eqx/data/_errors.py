"""The error that every dataset problem is reported with."""


class DatasetError(ValueError):
    """A dataset that is unknown, absent, incomplete or broken; the message names the file."""
