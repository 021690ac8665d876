"""The job folders of round_trip.py: ours and the stock one, at several precisions."""

import json
import shutil
from pathlib import Path
from typing import Any

OURS = "nvflare_llm_components"
STOCK = "nvflare.app_opt.pt"
FEDAVG = {"ours": f"{OURS}.workflows.QuorumFedAvg", "stock": "nvflare.app_common.workflows.fedavg.FedAvg"}
WITH_FEEDBACK = ("nf4", "int2")
TIMEOUTS = {"get_task_timeout": 3600, "submit_task_result_timeout": 3600}


def write_job(folder: Path, run: str, model: Path, num_clients: int, num_rounds: int) -> Path:
    """Write the job of a run such as "ours-int8" or "stock-fp16"."""
    side, precision = run.split("-")
    config = folder / "app" / "config"
    config.mkdir(parents=True)
    custom = folder / "app" / "custom"
    custom.mkdir()
    shutil.copy(Path(__file__).with_name("round_trip_parts.py"), custom)
    (folder / "meta.json").write_text(
        json.dumps({"name": run, "min_clients": num_clients, "deploy_map": {"app": ["@ALL"]}})
    )
    down, up = _filters(side, precision)
    server = {
        "format_version": 2,
        "server": {"task_request_interval": 0.5},
        "workflows": [
            {
                "id": "fedavg",
                "path": FEDAVG[side],
                "args": {"num_clients": num_clients, "num_rounds": num_rounds},
            }
        ],
        "components": [{"id": "persistor", **_persistor(side, precision, model)}],
        "task_data_filters": _at_train(down),
        "task_result_filters": _at_train(up),
    }
    client = {
        "format_version": 2,
        **TIMEOUTS,
        "executors": [
            {
                "tasks": ["train"],
                "executor": {
                    "path": "round_trip_parts.AddingExecutor",
                    "args": {"is_ours": side == "ours", "sends_change": sends_change(side, precision)},
                },
            }
        ],
        "components": [],
        "task_data_filters": _at_train(_client_restores(up)),
        "task_result_filters": _at_train(_with_feedback(down) if precision in WITH_FEEDBACK else down),
    }
    (config / "config_fed_server.json").write_text(json.dumps(server, indent=2))
    (config / "config_fed_client.json").write_text(json.dumps(client, indent=2))
    return folder


def sends_change(side: str, precision: str) -> bool:
    """Whether the sites send what changed, as our shipped jobs do below fp32."""
    return side == "ours" and precision != "fp32"


def _persistor(side: str, precision: str, model: Path) -> dict[str, Any]:
    if side == "ours":
        return {
            "path": f"{OURS}.persistors.SafetensorsModelPersistor",
            "args": {
                "model_name_or_path": str(model),
                "results": {"data_kind": "WEIGHT_DIFF" if sends_change(side, precision) else "WEIGHTS"},
            },
        }
    return {
        "path": f"{STOCK}.file_model_persistor.PTFileModelPersistor",
        "args": {
            "model": {"path": "round_trip_parts.StockModel", "args": {"folder": str(model)}},
            "allow_numpy_conversion": False,
        },
    }


def precision_filters(side: str, precision: str) -> tuple[list[dict[str, Any]], ...]:
    """Return a configuration's entries that lower the precision, and that restore it at server and site."""
    down, up = _filters(side, precision)
    return _at_train(down), _at_train(up), _at_train(_client_restores(up))


def _filters(side: str, precision: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the filter that lowers the precision, and the one that restores it."""
    if precision == "fp32":
        return [], []
    if side == "ours":
        return (
            [{"path": f"{OURS}.filters.PrecisionQuantizeFilter", "args": {"precision": precision}}],
            [{"path": f"{OURS}.filters.PrecisionDequantizeFilter", "args": {}}],
        )
    quantization = f"{STOCK}.quantization"
    return (
        [{"path": f"{quantization}.quantizer.ModelQuantizer", "args": {"quantization_type": "float16"}}],
        [{"path": f"{quantization}.dequantizer.ModelDequantizer", "args": {}}],
    )


def _with_feedback(filters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**f, "args": {**f["args"], "error_feedback": True}} for f in filters]


def _client_restores(filters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours can decode one value at a time as the executor loads it."""
    lazy = {"lazy": True}
    return [{**f, "args": lazy} if f["path"].startswith(OURS) else f for f in filters]


def _at_train(filters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"tasks": ["train"], "filters": filters}] if filters else []
