import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nvflare_llm_components.memory import MMAP_THRESHOLD_BYTES, give_back, keep_large_buffers_apart


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


@pytest.mark.parametrize(("given", "found"), [({}, "PASSIVE 1"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE 1")])
def test_torch_is_told_how_to_wait_and_where_to_put_tensors_unless_the_user_has(
    given: dict[str, str], found: str
):
    names = ("OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    script = f"import os, nvflare_llm_components; print(*(os.environ[name] for name in {names}))"
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, env=clean | given, check=True, capture_output=True, text=True).stdout
    assert output.strip() == found
