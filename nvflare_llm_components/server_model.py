"""The server's model as a ``torch.nn.Module``, for workflows that optimize it: FedOpt."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext

from nvflare_llm_components.checkpoint.initial_model import InitialModel
from nvflare_llm_components.flare.peers import inside_only
from nvflare_llm_components.persistors.start import Start
from nvflare_llm_components.policy.schema import PolicyError
from nvflare_llm_components.tensors.errors import ReportableError


class SafetensorsModule(torch.nn.Module, FLComponent):
    """Parameters of a checkpoint under its own names, without the model's code and without a forward pass.

    FLARE's FedOpt steps an optimizer over the ``named_parameters()`` of such a component, and takes the new
    global model from its ``state_dict()``. Values are read when they are first asked for, since FLARE builds
    components before a job is admitted.
    """

    def __init__(
        self,
        *,
        model_name_or_path: str,
        peft_config: dict[str, Any] | None = None,
        seed: int = 0,
        resume_from: str | None = None,
        trainable: list[str] | None = None,
    ) -> None:
        """Store the settings; give the same ones to the job's `SafetensorsModelPersistor`.

        Args:
            model_name_or_path: folder or hub name of a model, or folder of an adapter to go on with.
            peft_config: settings of a fresh adapter for `peft.get_peft_config`, with its `peft_type`.
            seed: of a fresh adapter's values.
            resume_from: the server's run directory of an earlier job, whose last model is started from.
            trainable: the executors' patterns of names that train; None trains all.
        """
        torch.nn.Module.__init__(self)
        FLComponent.__init__(self)
        self.model_name_or_path = model_name_or_path
        self.peft_config = peft_config
        self.seed = seed
        self.resume_from = resume_from
        self.trainable = trainable
        self._accepted: Callable[[], InitialModel] | ReportableError = PolicyError(
            "SafetensorsModule: expected a job that has started, found none: the policy is not known."
        )

    @inside_only
    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Hold the settings against the server's policy. FLARE swallows what a handler raises: it is kept."""
        if event_type != EventType.START_RUN:
            return
        try:
            self._accepted = Start.of(self).accepted(fl_ctx)
        except ReportableError as error:
            self._accepted = error

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """As ``torch.nn.Module`` does; float32 masters by checkpoint name.

        Raises:
            CheckpointError: if the model can't be read, or doesn't fit its configuration.
            PolicyError: if the server's policy lets no job use it, or it is larger than this machine takes.
        """
        self._read()
        return super().named_parameters(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "SafetensorsModule":
        """What ``to()`` calls: the values have to be there to be moved."""
        self._read()
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    def _read(self) -> None:
        if self._modules or self._parameters:
            return
        if isinstance(self._accepted, ReportableError):
            raise self._accepted
        for name, value in self._accepted().weights.items():
            self._place(name, value)

    def _place(self, name: str, value: torch.Tensor) -> None:
        *path, leaf = name.split(".")
        module: torch.nn.Module = self
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        if value.is_floating_point():
            # A copy: the optimizer steps in place, and the file's own pages are the persistor's.
            module.register_parameter(leaf, torch.nn.Parameter(value.to(torch.float32, copy=True)))
        else:
            module.register_buffer(leaf, value.clone())
