"""The errors that this column raises for what it was given."""


class CheckpointError(ValueError):
    """A checkpoint that can't be read, or a state dict that must not be saved; names the file or tensors."""


class NonFiniteError(CheckpointError):
    """A state dict with NaN or Inf in it, which is right in all else."""
