"""Instruction data: preparation, partition over sites, and the demo's generated sets and model.

Read in this order:

- :mod:`.records`      Rows of a data file as plain dictionaries, whatever of the three usual formats it has
- :mod:`.prepare`      Turns published instruction sets into rows of ``{"input", "output"}``, split and seeded
- :mod:`.own_rows`     A person's own rows: columns named or recognised, as prompt and answer or as chat
                       messages
- :mod:`.partition`    Splits data over sites: evenly at random, or skewed by a column with one Dirichlet draw
                       for all splits
- :mod:`.demo_sets`    Three generated instruction sets in the published formats; each teaches what the other
                       two don't
- :mod:`.demo_model`   A small Llama-architecture model with its own tokenizer, made and briefly trained from
                       text alone
- :mod:`.smollm2`      SmolLM2-135M-Instruct without a hub: a really pretrained model for the demo, from the
                       package index
"""
