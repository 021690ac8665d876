"""What a training step holds in memory, from a model's configuration alone.

The step is run on fake tensors (https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html): shapes
and lifetimes are those of a real one, no value is computed, and no weight is in memory.
"""

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import trl.trainer.utils
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_STATES = {"adamw_torch": 2.0, "adamw_8bit": 0.5, "sgd": 0.0}
"""Values of an optimizer's state for a weight, of the weight's own size."""

OPTIMIZERS = tuple(_STATES)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of tensors that one process holds at the peak of a step.

    Attributes:
        weights: the model's, of this process.
        gradients: of what trains; under DDP twice, since its buckets are copies.
        optimizer: its state.
        activations: what the forward pass keeps for the backward pass, and both passes' own buffers.
        gathered: under full sharding, the largest unit's weights and gradients, and the next one's.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int = 0

    @property
    def total(self) -> int:
        """All of it; what the libraries take, and what an allocator keeps, comes on top."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.gathered


def step_memory(
    model: Any,
    batch_size: int,
    length: int,
    *,
    num_processes: int = 1,
    sharding: str = "none",
    gradient_checkpointing: bool = False,
    optim: str = "adamw_torch",
) -> StepMemory:
    """Memory of one step of a process.

    Args:
        model: on the meta device, from :func:`~nvflare_llm_components.tensors.names.meta_model`, in the dtype
            of training; an adapter may be on it. It is used up.
        batch_size: rows of a step, without accumulation.
        length: tokens of a row.
        num_processes: of a site.
        sharding: "none" or "full".
        gradient_checkpointing: whether activations within a layer are computed twice.
        optim: one of `OPTIMIZERS`.
    """
    _use_kernels(model)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    weights = sum(p.nbytes for p in model.parameters())
    unit = _largest_unit(model)
    peak = _peak(model, batch_size, length, gradient_checkpointing)
    shards = num_processes if sharding == "full" else 1
    copies = 2 if num_processes > 1 and sharding == "none" else 1
    return StepMemory(
        weights=weights // shards,
        gradients=copies * trained // shards,
        optimizer=int(_STATES[optim] * trained) // shards,
        activations=max(peak - trained, 0),
        gathered=2 * unit if shards > 1 else 0,
    )


def _peak(model: Any, batch_size: int, length: int, gradient_checkpointing: bool) -> int:
    """Bytes at the peak of one pass forward and back, gradients included, weights not."""
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers renames checkpointing; PEFT and TRL lag
        _replace_by_fakes(model)
        model.train()
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        rows = torch.zeros((batch_size, length), dtype=torch.long)
        with LiveBytes() as live:
            _loss(model, rows).backward()
    return int(live.peak)


def _loss(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """The loss as TRL's trainer takes it: from the last layer, without the logits, where its release can."""
    inputs = {"input_ids": rows, "labels": rows, "use_cache": False}
    fuse = getattr(trl.trainer.utils, "add_fused_lm_head", None)
    if fuse is None:
        return cast(torch.Tensor, model(**inputs).loss)
    fuse(_base(model), outputs=("log_probs", "entropy", "is_top1"))
    return cast(torch.Tensor, -model(**inputs, fused_lm_head=True).log_probs.sum())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages from their making to their end.

    Attributes:
        now: bytes of those that were made while this was active, and are alive.
        peak: most of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What torch calls for each operation."""
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, torch.Tensor) and (storage := value.untyped_storage()) not in self._known:
                self._known.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return output

    def _add(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.peak = max(self.peak, self.now)


def _replace_by_fakes(model: Any) -> None:
    """Put fake tensors in the place of a model's own, tied ones once; to be called in a FakeTensorMode."""
    fakes: dict[int, torch.Tensor] = {}
    for place, name, value in list(_tensors(model)):
        if id(value) not in fakes:
            fake = torch.empty(value.shape, dtype=value.dtype, device="cpu")
            is_weight = isinstance(value, torch.nn.Parameter)
            fakes[id(value)] = torch.nn.Parameter(fake, value.requires_grad) if is_weight else fake
        place[name] = fakes[id(value)]


def _tensors(model: Any) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    for module in model.modules():
        for place in (module._parameters, module._buffers):
            yield from ((place, name, value) for name, value in place.items() if value is not None)


def _use_kernels(model: Any) -> None:
    """Attention as training has it: without a matrix of all pairs where the model knows that way."""
    base = _base(model)
    if base._supports_sdpa:
        base.set_attn_implementation("sdpa")


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _largest_unit(model: Any) -> int:
    """Bytes of the largest part that full sharding gathers at a time: a layer, or all that is in none."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    rest = sum(p.nbytes for p in model.parameters() if id(p) not in inside)
    sizes = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
    return int(max([rest, *sizes]))
