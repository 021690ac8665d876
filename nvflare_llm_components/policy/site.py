"""The site's own policy: a file in the kit's ``local`` folder that no job can override.

The stricter of job and policy holds. Where there is no file, the defaults below do.
"""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nvflare_llm_components.policy.schema import PolicyError, refusals
from nvflare_llm_components.tensors.text import printable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

POLICY_FILE = "nvflare_llm_policy.toml"

FOR_DIFFERENCES = ("nf4", "int2")
"""Precisions that are too coarse for whole weights."""

_Ceiling = Annotated[int, Field(ge=1)]
_Size = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Places(_Part):
    """Where data and models may come from."""

    data: list[str] = Field(
        default=["$NVFLARE_LLM_DATA"], description="Folders that train_data and eval_data may lie in."
    )
    models: list[str] = Field(
        default=["$NVFLARE_LLM_MODEL"],
        description="Folders that models may lie in, or be; or the one hub name that jobs may use.",
    )
    hub: list[str] = Field(
        default=[],
        description='Hub names that jobs may load over the network, such as "org/name" or "org/*". '
        "Empty: none but those of models above.",
    )
    job_files: bool = Field(
        default=True, description="May a job bring data and models inside its own app folder?"
    )
    names_only: bool = Field(
        default=False, description="May a job give only names below the folders above, and no absolute path?"
    )
    runs: list[str] = Field(
        default=[],
        description="Further workspaces whose earlier runs may be continued; this kit's own always may, by "
        "the one who submitted them.",
    )


class Data(_Part):
    """How much data is read. A file that is larger is refused before it is read."""

    min_rows: _Ceiling = Field(default=1, description="Least number of rows that a job may train on.")
    max_rows: _Ceiling = Field(default=10_000_000, description="Rows in one file.")
    max_bytes: _Ceiling = Field(default=16 * 2**30, description="Bytes of one file, and of the text in it.")
    max_line_bytes: _Ceiling = Field(
        default=4 * 2**20, description="Bytes of one line of JSON; a whole .json file may have 16 times that."
    )


class Training(_Part):
    """Ceilings. Where a job asks for more, it is refused."""

    max_length: _Ceiling | None = Field(default=None, description="Tokens in a row.")
    batch_size: _Ceiling | None = Field(default=None, description="Rows in a batch on the device.")
    dataloader_workers: int | None = Field(default=None, ge=0, description="Processes that load data.")
    steps: _Ceiling | None = Field(default=None, description="Optimizer steps in a round.")
    rounds: _Ceiling | None = Field(default=None, description="Rounds of a job.")
    task_seconds: _Ceiling | None = Field(
        default=None, description="Seconds that one task may train or evaluate."
    )


class Limits(_Part):
    """What a job may take of this machine."""

    processes: _Ceiling | None = Field(
        default=None,
        description='Processes that train as one (num_processes); "auto" takes no more than these.',
    )
    model_gib: _Size | None = Field(
        default=None,
        description="Gibibytes of a model's weights as they are loaded, with its adapter's; counted before "
        "that. Gradients "
        "and the optimizer come on top: in full fine-tuning with AdamW three times as much.",
    )
    free_disk_gib: _Size | None = Field(
        default=None,
        description="Gibibytes that must be free on the run directory's disk before a round is trained, or a "
        "global model saved.",
    )


class Adapters(_Part):
    """What adapters may be."""

    kinds: list[str] | None = Field(
        default=None, description='Kinds of PEFT, such as ["LORA"]; without it, all.'
    )
    max_rank: _Ceiling | None = Field(default=None, description="Rank of an adapter, in every module.")


class Leaves(_Part):
    """What may leave the site."""

    weights: Literal["all", "updates", "adapters"] = Field(
        default="all",
        description='"all"; "updates": whole models only as their change (params_type DIFF), or adapters; '
        '"adapters": nothing but adapters.',
    )
    initial_weights: Literal["never", "named", "any"] = Field(
        default="named",
        description="Which models may be sent out as they lie here, before the federation has trained them: "
        '"named": those that places.models names themselves, not those in folders below, and what a job '
        'brought; "never"; "any".',
    )
    precision: Literal["fp32", "bf16", "fp16", "int8", "nf4", "int2"] = Field(
        default="fp32",
        description="Weights are rounded to this before they leave; a job's filters may lower it more. "
        "nf4 and int2 are for changes: jobs of any other params_type than DIFF are refused.",
    )
    metrics: list[str] | None = Field(
        default=None,
        description='Metrics that are sent, such as ["eval_loss", "train_loss"]; without it, all.',
    )
    metric_digits: int | None = Field(
        default=None, ge=1, le=17, description="Significant digits of each of them."
    )
    curves: bool = Field(default=True, description="Are losses sent while a round is trained, step by step?")
    errors: Literal["reason", "kind"] = Field(
        default="reason",
        description='What the server is told of a failed task: "reason" (settings, places and row numbers, '
        'never data) or its "kind" alone.',
    )
    min_examples: _Ceiling = Field(default=1, description="An update of fewer examples is not sent.")

    def rounded(self, value: float) -> float:
        """A metric in the digits that it may have."""
        return float(value) if self.metric_digits is None else float(f"{value:.{self.metric_digits}g}")


class SitePolicy(_Part):
    """What a site accepts of jobs."""

    places: Places = Places()
    data: Data = Data()
    training: Training = Training()
    limits: Limits = Limits()
    adapters: Adapters = Adapters()
    leaves: Leaves = Leaves()


def read_policy(local: Path) -> SitePolicy:
    """The policy in a kit's ``local`` folder; the defaults where it has none.

    Raises:
        PolicyError: the file can't be read, or a key or value of it is unknown; naming each.
    """
    path = local / POLICY_FILE
    try:
        return parsed(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        return SitePolicy()
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(
            f"{path}: expected this site's policy, found it unreadable ({type(error).__name__}). "
            "No job runs until it can be read."
        ) from error


def parsed(text: str, where: str) -> SitePolicy:
    """A policy from the text of its file.

    Args:
        text: TOML.
        where: what the error calls it.

    Raises:
        PolicyError: naming each key that is unknown or out of range, and what to do.
    """
    try:
        content: dict[str, Any] = tomllib.loads(text)
        return SitePolicy.model_validate(content)
    except tomllib.TOMLDecodeError as error:
        raise PolicyError(f"{where}: expected TOML, found {printable(error, 200)}.") from error
    except ValidationError as error:
        known = [f"{name}.{key}" for name, part in sections() for key in part.model_fields]
        raise PolicyError(f"{where}: {' '.join(refusals(error, known))}") from error


def sections() -> list[tuple[str, type[BaseModel]]]:
    """The parts of a policy, in the order of the file: name and class."""
    return [(name, type(field.default)) for name, field in SitePolicy.model_fields.items()]


def beyond(argument: str, expected: str, found: object, key: str) -> PolicyError:
    """The refusal of what is beyond a site's policy.

    Args:
        argument: of the job.
        expected: what this site accepts.
        found: what the job asks for, or what there is.
        key: of the policy, which says so.
    """
    return PolicyError(
        f"{argument}: this site's policy expects {expected}, found {printable(repr(found), 60)}. Change the "
        f"job, or ask the site's administrator, who sets {key} in local/{POLICY_FILE}."
    )
