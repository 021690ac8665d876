"""What the executor says of a round: to the server as a DXO, to the site's log as a sentence."""

from collections.abc import Mapping
from typing import Any

from nvflare.apis.dxo import DXO, DataKind, MetaKey
from nvflare.apis.shareable import Shareable

from nvflare_llm_components.flare.tasks import finite
from nvflare_llm_components.policy.job import AcceptedTraining
from nvflare_llm_components.quantization.rounding import rounded
from nvflare_llm_components.tensors.convert import tensor_of
from nvflare_llm_components.training import weights
from nvflare_llm_components.training.rounds import RoundReport

_QUANTIZE = "nvflare_llm_components.filters.PrecisionQuantizeFilter"


def result_of(
    gate: AcceptedTraining,
    new: weights.Readable,
    received: Mapping[str, Any] | None,
    report: RoundReport,
    metrics: Mapping[str, float],
    first_filter: str,
) -> Shareable:
    """A round's result, no finer than the site lets out.

    Args:
        gate: what may leave.
        new: the weights that the round ended with.
        received: those that it began with, to send the change since; None to send whole weights.
        report: of the round.
        metrics: of the model that it began with.
        first_filter: class path of the filter that it goes to first. Ours reads one value after the other,
            and the model is never there twice; any other gets tensors, to look at and to change.
    """
    sent = dict(new) if received is None else weights.difference(new, received)
    if first_filter != _QUANTIZE:
        sent = {name: tensor_of(value) for name, value in sent.items()}
    told = gate.told_metrics(finite({**metrics, "train_loss": report.train_loss}))
    return DXO(
        DataKind.WEIGHTS if received is None else DataKind.WEIGHT_DIFF,
        data=rounded(sent, gate.policy.leaves.precision),
        meta={MetaKey.NUM_STEPS_CURRENT_ROUND: report.num_examples, MetaKey.INITIAL_METRICS: told},
    ).to_shareable()


def sentence_of(report: RoundReport, metrics: Mapping[str, float]) -> str:
    """A round in a line of the log."""
    seen = f", global model's eval_loss {metrics['eval_loss']:.4f}" if metrics else ""
    return (
        f"Round {report.round}: {report.num_steps} steps, {report.num_examples} examples, "
        f"{report.num_tokens} tokens, train_loss {report.train_loss:.4f}{seen}, "
        f"{report.train_seconds:.1f} s of training"
    )
