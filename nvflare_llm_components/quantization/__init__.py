"""Message precision: how weights become bytes and come back, with no NVFlare in it.

Read in this order:

- :mod:`.codec`      what a codec is, and what is asked of it
- :mod:`.cast`       ``fp16`` and ``bf16``: saturating casts
- :mod:`.int8`       blockwise absmax, one signed byte a weight
- :mod:`.nf4`        blockwise NormalFloat, half a byte a weight, for differences
- :mod:`.int2`       four levels, a quarter of a byte a weight, for differences
- :mod:`.packed`     what ``nf4`` and ``int2`` share: several codes a byte, a table of levels
- :mod:`.blocks`     what the blockwise codecs share: padding and non-finite values
- :mod:`.scales`     what the last two share: scales of one byte
- :mod:`.chunks`     chunks of a tensor, one on each core; weights that are made as they are read
- :mod:`.precision`  the table of codecs, and which parameter travels at which
- :mod:`.rounding`   what a site lets out, in the digits of a precision, without a message
- :mod:`.wire`       one tensor on the wire: its payload and its entry in the meta
- :mod:`.checks`     what both must keep to before anything is decoded
- :mod:`.message`    a whole state dict: encode, verify, decode, and what it cost
- :mod:`.lazy`       values that decode when they are asked for
- :mod:`.broadcast`  one encoding for all clients of a broadcast
- :mod:`.feedback`   what rounding left out of one update travels with the next
- :mod:`.shadow`     what all clients have decoded, so that a broadcast need only carry the difference
- :mod:`.kept`       files that a site keeps between rounds
- :mod:`.traffic`, :mod:`.ledger`   what it cost, and the line that says so

The wire format is specified in ``docs/wire-format.md``.
"""
