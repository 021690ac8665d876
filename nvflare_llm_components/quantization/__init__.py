"""Message precision: codecs, the wire format and error feedback. Pure: knows nothing of NVFlare."""
