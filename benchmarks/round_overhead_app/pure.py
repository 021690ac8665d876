"""Pure training: prints the seconds of one train() call of all steps, and nothing of what is around it."""

import time

from benchmarks.round_overhead_app.common import arguments, build_trainer

if __name__ == "__main__":
    settings_file, output_dir, num_steps = arguments()
    trainer = build_trainer(settings_file, output_dir, max_steps=num_steps, save_strategy="no")
    begin = time.monotonic()
    trainer.train()
    print(f"seconds: {time.monotonic() - begin}")
