import re
from pathlib import Path

import pytest

from nvflare_llm_components.flare.memory import MMAP_THRESHOLD_BYTES, give_back, keep_large_buffers_apart


def anonymous_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found.group(1)) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_freed_buffers_go_back_to_the_system():
    keep_large_buffers_apart()
    give_back()
    before = anonymous_bytes()
    size = MMAP_THRESHOLD_BYTES
    buffers = [bytearray(b"x" * size) for _ in range(20)] + [bytearray(b"x" * 10_000) for _ in range(5000)]
    assert anonymous_bytes() > before + 20 * size
    del buffers
    give_back()
    assert anonymous_bytes() < before + 5 * size
