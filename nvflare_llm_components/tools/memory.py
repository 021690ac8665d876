"""Whether a model can be trained on a device: what one process of a site needs, by sharding."""

from itertools import product

from rich.console import Console
from rich.table import Table

from nvflare_llm_components.checkpoint.global_models import DTYPES
from nvflare_llm_components.tensors.names import meta_model
from nvflare_llm_components.tools.sizes import adapted
from nvflare_llm_components.training.step_memory import OPTIMIZERS, StepMemory, step_memory

_HEADS = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "optim",
    "activations": "activ",
    "gathered": "units",
}
_LEGEND = (
    "checkpoints: the job's gradient_checkpointing. units: layers that full sharding gathers. These are "
    "tensors alone: add half a GiB for libraries or CUDA's context; a CPU's allocator keeps more."
)


def show_memory(
    model: str,
    peft: str | None = None,
    batch_size: int = 8,
    length: int = 1024,
    num_processes: int = 1,
    *,
    dtype: str = "float32",
    optim: str = "adamw_torch",
    console: Console | None = None,
) -> None:
    """Print a table: memory of one process at the peak of a training step, by sharding and checkpointing.

    Args:
        model: Hugging Face folder or hub name; only its config is read.
        peft: settings of an adapter as JSON text or the path of a JSON file.
        batch_size: rows of a step, the job's ``per_device_train_batch_size``.
        length: tokens of a row, the job's ``max_length``.
        num_processes: of a site.
        dtype: of the weights, the job's ``model_kwargs.dtype``.
        optim: the job's ``optim``.
        console: where to print.

    Raises:
        ValueError: for a dtype or an optimizer of which nothing is known.
    """
    if dtype not in DTYPES or optim not in OPTIMIZERS:
        raise ValueError(
            f"expected a dtype of {list(DTYPES)} and an optimizer of {list(OPTIMIZERS)}, "
            f"found {dtype!r} and {optim!r}."
        )
    each = f"each of {num_processes} processes" if num_processes > 1 else "one process"
    table = Table(title=f"GiB of {each}, {batch_size} rows of {length} tokens, {dtype}, {optim}")
    table.add_column("sharding")
    table.add_column("checkpoints")
    for head in (*_HEADS.values(), "total"):
        table.add_column(head, justify="right")
    shardings = ("none", "full") if num_processes > 1 else ("none",)
    for sharding, checkpointing in product(shardings, (False, True)):
        memory = step_memory(
            adapted(meta_model(model).to(DTYPES[dtype]), peft),
            batch_size,
            length,
            num_processes=num_processes,
            sharding=sharding,
            gradient_checkpointing=checkpointing,
            optim=optim,
        )
        table.add_row(sharding, "yes" if checkpointing else "no", *_gib(memory))
    console = console or Console()
    console.print(table)
    console.print(_LEGEND, soft_wrap=True)


def _gib(memory: StepMemory) -> list[str]:
    return [f"{getattr(memory, name) / 2**30:.2f}" for name in (*_HEADS, "total")]
