"""One live TRL ``SFTTrainer``, held across federated rounds. Pure: knows nothing of NVFlare."""
