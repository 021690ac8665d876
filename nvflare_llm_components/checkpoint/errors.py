"""The one error that this column raises for what it was given."""


class CheckpointError(ValueError):
    """A checkpoint that can't be read, or a state dict that must not be saved; names the file or tensors."""
