"""The ledger of a site: one JSON line for each application of a filter."""

import json
from pathlib import Path
from typing import Any

from nvflare_llm_components.quantization.traffic import Traffic

LEDGER_NAME = "traffic.jsonl"


def record_of(traffic: Traffic, context: dict[str, Any], cached: bool = False) -> dict[str, Any]:
    """A ledger line.

    Args:
        traffic: what the application did.
        context: who, when and where: time, site, task, round, direction, operation, precision.
        cached: whether an earlier application's bytes were reused, for another client of the broadcast.
    """
    encoded = {("fp32" if name == "raw" else name): size for name, size in traffic.bytes_by_precision.items()}
    return {
        **context,
        "num_params": traffic.num_params,
        "num_encoded": traffic.num_encoded,
        "bytes_before": traffic.bytes_before,
        "bytes_after": traffic.bytes_after,
        "relative_error": traffic.relative_error if context["operation"] == "quantize" else None,
        "num_saturated": traffic.num_saturated,
        "num_nonfinite": traffic.num_nonfinite,
        "seconds": 0.0 if cached else round(traffic.seconds, 6),
        "bytes_by_precision": encoded,
        "cached": cached,
    }


def append_record(run_dir: Path, record: dict[str, Any]) -> None:
    """Append one line to the ledger of a run directory; a line is one write, so threads don't mix."""
    line = json.dumps(record) + "\n"
    with (run_dir / LEDGER_NAME).open("a", encoding="utf-8") as ledger:
        ledger.write(line)


def read_records(ledger: Path) -> list[dict[str, Any]]:
    """The lines of a ledger; one that a full disk or a kill left torn is passed over."""
    records = []
    for line in ledger.read_text(encoding="utf-8").splitlines() if ledger.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def total_wire_bytes(run_dir: Path, direction: str) -> int:
    """Bytes on the wire that a ledger counts in one direction."""
    records = [r for r in read_records(run_dir / LEDGER_NAME) if r["direction"] == direction]
    return sum(wire_bytes_of(record) for record in records)


def wire_bytes_of_round(run_dir: Path, round_number: int) -> tuple[int, int]:
    """Bytes on the wire that a ledger counts for one round: out and in; zeros where there is no ledger."""
    total = {"out": 0, "in": 0}
    for record in read_records(run_dir / LEDGER_NAME):
        if record["round"] == round_number:
            total[record["direction"]] += wire_bytes_of(record)
    return total["out"], total["in"]


def wire_bytes_of(record: dict[str, Any]) -> int:
    """Bytes on the wire of one ledger line."""
    size: int = record["bytes_after" if record["operation"] == "quantize" else "bytes_before"]
    return size


def sentence_of(record: dict[str, Any]) -> str:
    """The log line of a ledger record."""
    before, after = record["bytes_before"], record["bytes_after"]
    ratio = after / before if before else 1.0
    verb = "Quantized" if record["operation"] == "quantize" else "Dequantized"
    error = record["relative_error"]
    return (
        f"{verb} {record['num_encoded']}/{record['num_params']} parameters ({record['precision']}): "
        f"{before:,} bytes before, {after:,} after, ratio {ratio:.4f}"
        + ("" if error is None else f", relative error {error:.2e}")
        + (", reused from this broadcast" if record["cached"] else f", {record['seconds']:.3f} s")
        + (f", {record['num_saturated']} saturated" if record["num_saturated"] else "")
        + (f", {record['num_nonfinite']} not finite" if record["num_nonfinite"] else "")
    )
