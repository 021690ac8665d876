"""The ground floor: what every column needs of tensors, files and folders. Knows nothing of NVFlare.

- :mod:`.convert`            tensors, arrays and lazy values "as a tensor"
- :mod:`.lazy`               what is made when it is asked for, and behaves as a tensor
- :mod:`.blocks`             any of them in flat blocks that stay in the cache
- :mod:`.difference`         what a tensor has become, less what it was
- :mod:`.threads`            work on blocks side by side, each run of operations on one core
- :mod:`.names`              what a model's tensors are called and how they are tied, from its configuration
- :mod:`.trainable`          which of them train, by patterns
- :mod:`.adapters`           what a kind of PEFT adapter needs, and what its tensors are called
- :mod:`.finite`             whether a tensor's values are finite
- :mod:`.norm`               how far two states of a model lie from each other
- :mod:`.safetensors_file`   one safetensors file: mapped for reading, streamed for writing
- :mod:`.atomic`             a file or folder in its place, in one step and on disk
- :mod:`.links`              second names of files, without a second copy
- :mod:`.hub`                what transformers would fetch by itself, kept out while a model is built
- :mod:`.text`               text from outside, on one line; durations
- :mod:`.errors`             what they raise
"""
