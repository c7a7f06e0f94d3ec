"""The exception for run folders and their files."""


class RunError(ValueError):
    """A run folder, or a file of one, that cannot be used as asked."""
