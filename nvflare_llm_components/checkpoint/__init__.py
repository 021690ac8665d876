"""Safetensors folders that ``from_pretrained`` opens. Pure: knows nothing of NVFlare."""
