"""What one chooses of a job: one field a choice, with default and sentence, for CLI, TOML and docs."""

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

WORKFLOWS = ("fedavg", "scatter-and-gather", "fedopt", "cyclic", "swarm")
AVERAGES = {
    "mean": "",
    "ordered": "OrderedAverage",
    "trimmed-mean": "TrimmedMean",
    "median": "CoordinateMedian",
    "norm-clipped": "NormClippedMean",
}
"""FLARE's own weighted mean, and the classes of :mod:`nvflare_llm_components.aggregators`."""
SHOWN_MODELS = ("none", "server", "cross-site")
LORA = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
}
NF4_BASE = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
"""QLoRA's base at the sites, as bitsandbytes' configuration; the server never sees it."""
PER_SITE = ("model", "data", "batch_size", "lr", "local_epochs", "local_steps", "max_length")


def _choice(default: Any, sentence: str) -> Any:
    return field(default=default, metadata={"help": sentence})


def _settings(sentence: str) -> Any:
    return field(default_factory=dict, metadata={"help": sentence})


@dataclass(frozen=True, kw_only=True)
class JobChoices:
    """All that can be chosen of a job. Each field is an option of ``nvflare-llm job`` and a key of its TOML.

    The sentence of each stands in its ``metadata["help"]``.
    """

    model: str = _choice("{$NVFLARE_LLM_MODEL}", "Hugging Face folder or hub name, on server and sites")
    data: str = _choice("{$NVFLARE_LLM_DATA}", "folder with <site>/training.jsonl and validation.jsonl")
    sites: str = _choice("3", "how many sites train in a round, or their names by commas")
    rounds: int = _choice(3, "rounds of the job")
    workflow: str = _choice("fedavg", f"one of {', '.join(WORKFLOWS)}")
    quorum: int | None = _choice(None, "fedavg: results without which there is no average; default: all")
    grace_s: float = _choice(600, "fedavg: seconds that the other sites get when the quorum is there")
    fedprox_mu: float | None = _choice(None, "fedavg: FedProx's coefficient")
    average: str = _choice("mean", f"fedavg: what averages: {', '.join(AVERAGES)}")
    average_settings: Mapping[str, Any] = _settings("of the average: 'num_trimmed=2', 'max_norm=1.0'")
    server_lr: float = _choice(1.0, "fedopt: learning rate of the server's SGD")
    server_momentum: float = _choice(0.6, "fedopt: momentum of the server's SGD")
    weights_from: str = _choice("server", "who has the first weights: server, or sites")
    precision: str = _choice("fp32", "of the messages: fp32, fp16, bf16, int8, nf4, int2")
    overrides: Mapping[str, Any] = _settings("precision by a pattern of parameter names: 'norm=fp32'")
    send_changes: bool = _choice(
        False, "sites send the change of the weights; below fp32 and with fedopt they always do"
    )
    lora: Mapping[str, Any] = _settings("LoRA with these settings: 'r=16'; see peft.LoraConfig")
    peft: Mapping[str, Any] = _settings("another adapter of PEFT: 'peft_type=IA3'")
    lr: float = _choice(5e-4, "learning rate; take 2e-5 for all weights of a model beyond a billion")
    local_epochs: float = _choice(1, "passes over a site's rows in a round; may be a fraction")
    local_steps: int | None = _choice(None, "optimizer steps in a round, instead of epochs")
    batch_size: int = _choice(4, "rows a step on a device")
    max_length: int = _choice(512, "tokens a row; longer ones are cut")
    sft: Mapping[str, Any] = _settings("further settings of trl.SFTConfig: 'warmup_steps=10'")
    model_kwargs: Mapping[str, Any] = _settings("for from_pretrained: 'dtype=bfloat16'")
    executor: Mapping[str, Any] = _settings("further arguments of HFSFTExecutor: 'num_processes=2'")
    validation: bool = _choice(True, "sites have validation rows, and evaluate each global model")
    evaluate_final: bool = _choice(True, "sites evaluate the last model, too, so that it can be the best")
    evaluate_models: str = _choice("none", f"a table of models by site at the end: {', '.join(SHOWN_MODELS)}")
    keep_every: int | None = _choice(None, "keep the global model of every N-th round")
    per_site: Mapping[str, Any] = _settings(f"one site's own: 'site-3.batch_size=2'; {', '.join(PER_SITE)}")

    @property
    def site_names(self) -> list[str]:
        """The sites by name: those given, or site-1, site-2, ..."""
        names = [name.strip() for name in self.sites.split(",") if name.strip()]
        if len(names) == 1 and names[0].isdecimal():
            return [f"site-{number}" for number in range(1, int(names[0]) + 1)]
        return names

    @property
    def peft_config(self) -> dict[str, Any] | None:
        """Settings of the adapter; None where all weights are trained."""
        return {**LORA, **self.lora} if self.lora else dict(self.peft) or None

    @property
    def precisions(self) -> set[str]:
        """All that tensors of a message travel in."""
        return {self.precision, *self.overrides.values()}

    @property
    def params_type(self) -> str | None:
        """``DIFF`` where sites send changes; None where they send weights.

        Rounded weights lose a change of less than half a step of the rounding; a change has steps of its own.
        """
        if self.workflow == "swarm":
            return None  # it ends with the last aggregate in the place of the model
        is_needed = self.precisions != {"fp32"} or self.workflow == "fedopt"
        return "DIFF" if self.send_changes or is_needed else None

    @property
    def evaluates_final(self) -> bool:
        """Whether the last model is evaluated: not where there is nothing to evaluate on, or no server."""
        return self.evaluate_final and self.validation and self.workflow != "swarm"


def changed(choices: JobChoices) -> dict[str, Any]:
    """The choices that are not the default."""
    plain = JobChoices()
    values = {each.name: getattr(choices, each.name) for each in fields(choices)}
    return {name: value for name, value in values.items() if value != getattr(plain, name)}


def kind_of(choice: "Field[Any]") -> type:
    """The type of a choice's values: ``bool``, ``int``, ``float``, ``str``, or ``dict`` for settings."""
    plain = (bool, int, float, str)
    return next((kind for kind in plain if choice.type in (kind, kind | None)), dict)
