"""One live TRL ``SFTTrainer``, held across federated rounds. Pure: knows nothing of NVFlare.

Read in this order:

- :mod:`.settings`      The executor's arguments as one object, and the ``SFTConfig`` made of them; ranges:
                        the gate
- :mod:`.row_files`     A site's file of rows: its formats, and limits beyond which it is refused before it
                        takes memory
- :mod:`.rows`          Instruction rows from a site's file, in the two shapes that TRL understands
- :mod:`.model`         Model and tokenizer from a Hugging Face folder or hub name
- :mod:`.quantized`     A base of 4 or 8 bits, over which an adapter trains: what it needs, said before the
                        model is loaded
- :mod:`.sizes`         What a model takes, told by its configuration before anything of it is loaded
- :mod:`.step_memory`   What a training step holds in memory, from a model's configuration alone
- :mod:`.build`         Puts model, tokenizer, data and settings together into one trainer
- :mod:`.trainer`       TRL's trainer with a place to stop at each round boundary
- :mod:`.worker`        A thread that lives inside one ``trainer.train()`` call and serves requests wherever
                        it is parked
- :mod:`.engine`        One process's training: built once, loaded and evaluated where it is parked, trained
                        round by round
- :mod:`.session`       One site's training over a whole job: built once, fed a global model each round
- :mod:`.plan`          Where each round ends, and where the learning rate's schedule stands in it
- :mod:`.budget`        How many optimizer steps a round has, so that rounds add up to one centralized
                        training
- :mod:`.rounds`        A site's rounds: what it did in each, how many it trained, and how many of the
                        federation's it missed
- :mod:`.weights`       Weights in and out of the live model, under the names of the Hugging Face checkpoint
- :mod:`.conversion`    Checkpoint values into models that store them otherwise, such as stacked experts
- :mod:`.kept`          What of a training outlives its process: the round that was trained last, and how to
                        go on from it
- :mod:`.state`         Training state on disk: one complete copy, replaced atomically, for a process that is
                        lost
- :mod:`.randomness`    Random state, so that what happens between two rounds cannot change the training
- :mod:`.metrics`       A site's curves: one JSON line an event, TensorBoard, and whoever else listens
- :mod:`.best`          A site's own best model: one file, replaced atomically
- :mod:`.evaluate`      Loss of a saved model on a file of rows, computed as the executor computes it
- :mod:`.centralized`   Centralized training with the same data, budget and records as a federation, to
                        compare with
- :mod:`.ranks`         Several processes that train one site's model together, as one engine, and what they
                        are asked
- :mod:`.group`         The ranks of a site, started: on this machine, and where it has too few devices on the
                        site's nodes
- :mod:`.process`       One rank's process on this machine: its place in the group, its start, and how it
                        ended
- :mod:`.rank`          One of the processes that train a site's model together: ``python -m ...rank
                        DESCRIPTOR``
- :mod:`.channel`       Named requests and their answers as JSON, between a site's front end and its ranks.
                        Nothing is pickled
- :mod:`.image`         A state dict in memory that other processes of this user can map: a safetensors file
                        without a name
- :mod:`.sharded`       Tensors of which each of several processes holds a part (FSDP2)
- :mod:`.nodes`         Further machines of a site, as its front end sees them: the site's environment names
                        them, no job can
- :mod:`.node`          One of a site's further machines: starts ranks for the site's front end, and for
                        nobody else
- :mod:`.secret`        A secret that the machines of one site share: kept in a file, proved over a socket,
                        and never sent
- :mod:`.broadcast`     One process's tensors in all of them, over the process group: where not all are on one
                        machine
"""
