"""The shipped jobs as choices: what each folder of ``job_configs`` is made of."""

from nvflare_llm_components.jobs.choices import LORA, NF4_BASE, JobChoices

SHIPPED = {
    "sft": JobChoices(),
    "sft_fp16": JobChoices(precision="fp16"),
    "sft_bf16": JobChoices(precision="bf16"),
    "sft_int8": JobChoices(precision="int8"),
    "sft_nf4": JobChoices(precision="nf4"),
    "peft_lora": JobChoices(lora=LORA),
    "peft_lora_int8": JobChoices(lora=LORA, precision="int8"),
    "peft_lora_nf4": JobChoices(lora=LORA, precision="nf4"),
    "peft_qlora": JobChoices(lora=LORA, model_kwargs={"dtype": "bfloat16", "quantization_config": NF4_BASE}),
    "sft_diff": JobChoices(send_changes=True),
    "sft_exact": JobChoices(average="ordered"),
    "sft_fedprox": JobChoices(fedprox_mu=0.1),
    "sft_scatter_and_gather": JobChoices(workflow="scatter-and-gather"),
    "sft_initialize_weights": JobChoices(workflow="scatter-and-gather", weights_from="sites"),
    "sft_fedopt": JobChoices(workflow="fedopt"),
    "sft_cyclic": JobChoices(workflow="cyclic"),
    "sft_swarm": JobChoices(workflow="swarm"),
    "sft_best_model": JobChoices(evaluate_models="server", evaluate_final=False),
    "sft_cross_site_eval": JobChoices(evaluate_models="cross-site", evaluate_final=False),
}
