import re

import pytest

from nvflare_llm_components.jobs.choices import JobChoices
from nvflare_llm_components.jobs.validate import checked
from nvflare_llm_components.quantization.precision import PRECISIONS


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        ({"workflow": "fedsgd"}, "workflow: expected one of fedavg"),
        ({"precision": "int4"}, "precision: expected one of fp32"),
        ({"weights_from": "hub"}, "weights_from: expected one of server, sites"),
        ({"evaluate_models": "all"}, "evaluate_models: expected one of none"),
        ({"sites": "0"}, "sites: expected a number from 1 on"),
        ({"sites": "a,a"}, "sites: expected a number from 1 on, or different names"),
        ({"sites": "a,../b"}, "sites: expected a number"),
        ({"rounds": 0}, "rounds: expected 1 or more"),
        ({"quorum": 4}, "quorum: expected 1 to 3"),
        ({"quorum": 0}, "quorum: expected 1 to 3"),
        ({"grace_s": -1}, "grace_s: expected seconds"),
        ({"grace_s": float("nan")}, "grace_s: expected seconds"),
        ({"per_site": {"x": {"lr": 1e-4}}}, "per_site: expected one of the sites site-1"),
        ({"per_site": {"site-1": {"seed": 1}}}, "per_site.site-1: expected settings among model"),
        ({"per_site": {"site-1": {"batch_size": 0}}}, "per_device_train_batch_size"),
        ({"quorum": 2, "workflow": "cyclic"}, "quorum: expected workflow fedavg"),
        ({"average": "ordered", "workflow": "fedopt"}, "average: expected workflow fedavg"),
        ({"average": "mode"}, "average: expected one of mean, ordered"),
        ({"average": "median", "average_settings": {"num_trimmed": 1}}, "average_settings: "),
        ({"average_settings": {"num_trimmed": 1}}, "average_settings: expected an --average"),
        ({"executor": {"train_data": "/etc/passwd"}}, "executor.train_data: expected one of checkpoint"),
        ({"lora": {"r": 8}, "peft": {"peft_type": "IA3"}}, "lora and peft: expected one of them"),
        ({"precision": "nf4", "workflow": "swarm"}, "Choose int8"),
        ({"overrides": {"mlp": "int2"}, "workflow": "cyclic"}, "int2 needs a server"),
        ({"send_changes": True, "workflow": "swarm"}, "send_changes: swarm passes weights"),
        ({"weights_from": "sites"}, "weights_from: sites needs workflow scatter-and-gather"),
        ({"evaluate_models": "server", "validation": False}, "expected a server and validation rows"),
        ({"sft": {"learning_rate": 1}}, "it is the choice lr"),
        ({"sft": {"output_dir": "/x"}}, "output_dir: a job may not set it"),
        ({"lora": {"rank": 8}}, "peft_config.rank"),
        ({"lr": float("inf")}, "learning_rate"),
        ({"local_steps": 0}, "local_steps"),
        ({"overrides": {"(": "fp32"}}, "should be a regular expression"),
    ],
)
def test_choices_that_give_no_job_are_refused_with_the_choice_named(choices, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        checked(JobChoices(**choices))


def test_the_sentence_of_precision_names_all_precisions():
    sentence = JobChoices.__dataclass_fields__["precision"].metadata["help"]
    assert all(name in sentence for name in PRECISIONS)
