"""The errors that this package raises for what it was given."""


class ReportableError(ValueError):
    """An error whose text may leave a site: it names settings, places, rows and counts, and holds no data."""


class CheckpointError(ReportableError):
    """A checkpoint that can't be read, or a state dict that must not be saved; names the file or tensors."""
