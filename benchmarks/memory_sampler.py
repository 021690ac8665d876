"""Peak anonymous memory of a process tree, by role, from /proc."""

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

PERIOD_S = 0.05
DISCOVERY_PERIOD_S = 0.5


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process: what can't be reclaimed by reading a file again; 0 once it is gone."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found.group(1)) * 1024 if found else 0


def descendants(root: int) -> list[int]:
    """Process ids of a process and all its children's children."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    found = [root]
    for pid in found:
        found.extend(child for child, parent in parents.items() if parent == pid)
    return found


def simulator_role(pid: int) -> str:
    """Name what a process of FLARE's simulator is: the server runs inside the simulator itself."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return "gone"
    for index, word in enumerate(words):
        if word.endswith("simulator_worker"):
            return words[words.index("--client") + 1] if "--client" in words else f"client-{pid}-{index}"
    return "server"


class MemorySampler:
    """Samples a process tree in a thread, twenty times a second, until it is stopped."""

    def __init__(self, root: int, role_of: Callable[[int], str] = simulator_role):
        self.peaks: dict[str, int] = {}
        self.trace: list[tuple[float, dict[str, int]]] = []
        self.num_samples = 0
        self._root, self._role_of = root, role_of
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "MemorySampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        roles: dict[int, str] = {}
        next_discovery = next_trace = 0.0
        while not self._stopped.wait(PERIOD_S):
            now = time.time()
            if now >= next_discovery:
                # Until a client's process has been given its program, it looks like what it is a copy of.
                known = {pid: role for pid, role in roles.items() if role != "server"}
                roles = {pid: known.get(pid) or self._role_of(pid) for pid in descendants(self._root)}
                next_discovery = now + DISCOVERY_PERIOD_S
            sample: dict[str, int] = {}
            for pid, role in roles.items():
                sample[role] = max(sample.get(role, 0), anonymous_bytes(pid))
            for role, size in sample.items():
                self.peaks[role] = max(self.peaks.get(role, 0), size)
            self.num_samples += 1
            if now >= next_trace:
                self.trace.append((now, sample))
                next_trace = now + 0.25
