"""Message precision: how weights become bytes and come back, with no NVFlare in it.

Read in this order:

- :mod:`.codec`      what a codec is, and the four names a user may write besides ``fp32``
- :mod:`.cast`       ``fp16`` and ``bf16``: saturating casts
- :mod:`.int8`       blockwise absmax, one signed byte a weight
- :mod:`.nf4`        blockwise NormalFloat, half a byte a weight, scales quantized in turn
- :mod:`.blocks`     what both blockwise codecs share: padding and non-finite values
- :mod:`.chunks`     cache-sized chunks
- :mod:`.policy`     which parameter travels at which precision
- :mod:`.wire`       one tensor on the wire: its payload, its entry in the meta, its checks
- :mod:`.message`    a whole state dict: encode, verify, decode, and what it cost
- :mod:`.lazy`       values that decode when they are asked for
- :mod:`.broadcast`  one encoding for all clients of a broadcast
- :mod:`.feedback`   what rounding left out of one update travels with the next
- :mod:`.shadow`     what all clients have decoded, so that a broadcast need only carry the difference
- :mod:`.traffic`, :mod:`.ledger`   what it cost, and the line that says so

The wire format is specified in ``docs/wire-format.md``.
"""
