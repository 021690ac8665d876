"""The peer: FLARE's own flare.patch, as its documentation shows it."""

import nvflare.client.hf as flare

from benchmarks.round_overhead_app.common import arguments, build_trainer

if __name__ == "__main__":
    settings_file, output_dir, num_steps = arguments()
    trainer = build_trainer(settings_file, output_dir)
    # The server holds the model inside a wrapper module.
    flare.patch(trainer, local_steps=num_steps, server_key_prefix="model.")
    while flare.is_running():
        trainer.train()
