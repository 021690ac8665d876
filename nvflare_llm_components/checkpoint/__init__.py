"""Safetensors folders that ``from_pretrained`` opens. Pure: knows nothing of NVFlare.

Read in this order:

- :mod:`.locate`          From what a job calls its model to a folder on disk
- :mod:`.initial_model`   What a job starts from: a whole model, a fresh adapter, or an adapter made earlier
- :mod:`.initial_adapter` The initial tensors of a PEFT adapter, made by PEFT from the base model's
                          configuration where it can
- :mod:`.mapped`          Tensors that a deep copy shares instead of duplicating
- :mod:`.validate`        What a state dict must be before it may replace a good one
- :mod:`.global_models`   The models that a job keeps on disk: last, best, every so many rounds
- :mod:`.model_folder`    A saved global model: weights, what `from_pretrained` needs beside them, and a
                          record of their origin
- :mod:`.weight_files`    A folder with weights in Hugging Face's layout: one safetensors file, or shards with
                          an index
- :mod:`.manifest`        federation.json: where a saved model comes from, and what its files must hash to
- :mod:`.provenance`      Where a model comes from: its base, and each round since, in one record that a
                          person can read
- :mod:`.model_card`      A saved model's README.md, with the metadata that the Hugging Face hub reads
- :mod:`.key_metric`      By what number models are compared: the job's key metric, in which more or less is
                          better
"""
