"""Centralized training with the same data, budget and records as a federation, to compare with."""

import time
from pathlib import Path

from nvflare_llm_components.training.session import SFTSession
from nvflare_llm_components.training.settings import TrainingSettings

MODES = ("one-call", "iterative", "iterative-fixed")


def run_baseline(*, mode: str, folder: Path, num_rounds: int, settings: TrainingSettings) -> Path:
    """Train on one machine as a site would in ``num_rounds`` rounds.

    Args:
        mode: ``one-call`` trains without touching the weights between rounds; ``iterative`` takes them out
            and puts them in again, as a federation of one site does; ``iterative-fixed`` puts the first
            weights in each time, so that the loss must jump back, which shows that weights are really loaded.
        folder: Receives ``metrics.jsonl``, ``tb_events`` and the final ``model``.
        num_rounds: Rounds of the local budget in ``settings``.
        settings: The executor's arguments.

    Returns:
        The final model's folder, as ``from_pretrained`` opens it (an adapter's, if ``peft_config`` is set).

    Raises:
        FileNotFoundError: A data file is missing.
        ValueError: An argument, the data or the model cannot be used.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, found {mode!r}.")
    if num_rounds < 1:
        raise ValueError(f"num_rounds: expected at least 1, found {num_rounds}.")
    session = SFTSession(settings, folder)
    try:
        _train(session, mode, num_rounds)
        return session.save_model(folder / "model")
    finally:
        session.close()


def _train(session: SFTSession, mode: str, num_rounds: int) -> None:
    carried = None if mode == "one-call" else session.snapshot()
    for number in range(num_rounds):
        started = time.monotonic()
        session.begin_round(number, num_rounds, bool)
        if carried is not None:
            session.load(carried)
        if session.has_eval_data:
            session.evaluate()
        report = session.train_round()
        if mode == "iterative":
            carried = session.snapshot()
        session.record(report, time.monotonic() - started)
    if session.has_eval_data:
        session.evaluate(round_number=num_rounds)
