"""Tensors in slices, through FLARE's own download service and message encoding."""

import json
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvflare.app_opt.pt import tensor_downloader as downloader
from nvflare.app_opt.pt.tensor_downloader import (
    TensorDownloadable,
    cleanup_active_disk_tensor_downloads,
    download_tensors,
)
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
from nvflare.fuel.f3.cellnet.utils import decode_payload, encode_payload
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.streaming.download_service import DownloadService
from nvflare.fuel.f3.streaming.obj_downloader import ObjectDownloader
from safetensors.torch import save

from nvflare_llm_components.flare import slices
from nvflare_llm_components.flare.arrival import ArrivingTensors
from nvflare_llm_components.flare.slices import (
    SLICE_BYTES,
    SliceConsumer,
    SlicedTensors,
    SliceError,
    fetch_tensors,
)
from nvflare_llm_components.flare.stores import InMemory, OnDisk, Store, flat_bytes

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]


class Loop:
    """FLARE's cell of a process that fetches from itself, each message encoded and decoded on its way."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def get_fqcn(self) -> str:
        return "loop"

    def register_request_cb(self, **_: Any) -> None:
        pass

    def fire_and_forget(self, *, message: Message, **_: Any) -> None:
        self._answer(message)

    def send_request(self, *, request: Message, **_: Any) -> Message:
        self.states.append(request.payload.get("state"))
        reply = self._answer(request)
        encode_payload(reply)
        decode_payload(reply)
        return reply

    def _answer(self, message: Message) -> Message:
        message.set_header(MessageHeaderKey.ORIGIN, "site-1")
        answer: Message = DownloadService._handle_download(message)
        return answer


def some_tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "T0": torch.randn(40, 30, generator=draw),
        "T1": torch.randn(30, 7, generator=draw).t(),
        "T2": torch.tensor(3),
        "T3": torch.empty(0, 4),
        "T4": torch.randn(9, generator=draw).bfloat16(),
    }


def assert_same(found: dict[str, torch.Tensor] | None, expected: dict[str, torch.Tensor]) -> None:
    assert found is not None
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert flat_bytes(found[name]).tolist() == flat_bytes(value.contiguous()).tolist()


def passed_on(sender: SlicedTensors, store: Store) -> dict[str, torch.Tensor] | None:
    consumer, state = SliceConsumer(store), {"slices": 0}
    while (reply := sender.produce(state, "site-1"))[0] == "ok":
        _, data, state = reply
        assert consumer.consume("r", state, [bytes(each) for each in data]) == state
    consumer.download_completed("r")
    return consumer.result


def tensors() -> st.SearchStrategy[dict[str, torch.Tensor]]:
    def made(dtype: torch.dtype, shape: list[int], is_transposed: bool) -> torch.Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize
        value = (torch.arange(count, dtype=torch.int64) % (2 if dtype == torch.bool else 251)).to(torch.uint8)
        tensor = value.view(dtype).view(shape)
        return tensor.transpose(0, -1) if is_transposed and shape else tensor

    one = st.builds(made, st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3), st.booleans())
    return st.lists(one, max_size=6).map(lambda values: {f"T{i}": value for i, value in enumerate(values)})


@settings(deadline=None)
@given(tensors(), st.integers(1, 200))
@pytest.mark.parametrize("make", [InMemory, lambda: OnDisk(tempfile.gettempdir())], ids=["memory", "disk"])
def test_what_is_put_together_is_what_was_cut(
    make: Callable[[], Store], values: dict[str, torch.Tensor], slice_bytes: int
):
    sender = SlicedTensors(values, 100, slice_bytes)
    assert_same(passed_on(sender, make()), values)
    for number in range(len(sender._replies)):
        _, (header, *buffers), _ = sender.produce({"slices": number}, "site-1")
        assert sum(map(len, buffers)) <= slice_bytes
        assert len(json.loads(header)) == len(buffers)


def test_a_reply_is_a_view_of_the_tensors_own_memory():
    value = torch.arange(100.0)
    _, (_, first, second), _ = SlicedTensors({"T0": value, "T1": value[50:]}, 10).produce({"slices": 0}, "")
    assert torch.frombuffer(bytearray(first), dtype=torch.float32).equal(value)
    value += 1
    assert torch.frombuffer(bytearray(second), dtype=torch.float32).equal(value[50:])


@pytest.mark.parametrize(
    ("chunk_bytes", "expected"), [(2 * 2**20, SLICE_BYTES), (2**20, 2**20), (2**25, 2**25)]
)
def test_a_size_that_an_administrator_sets_holds_for_slices(chunk_bytes: int, expected: int):
    sender = ArrivingTensors().to_downloadable({"T0": torch.zeros(2**24)}, chunk_bytes, {})
    assert len(sender.produce({"slices": 0}, "site-1")[1][1]) == expected


def test_thousands_of_small_tensors_take_several_replies():
    values = {f"T{number}": torch.tensor(number) for number in range(2500)}
    sender = SlicedTensors(values, 10)
    assert len(sender._replies) == 3
    assert_same(passed_on(sender, InMemory()), values)


@pytest.mark.parametrize("sends", ["slices", "flare"])
@pytest.mark.parametrize("fetches", ["slices", "slices to disk", "flare"])
def test_either_side_may_be_flares_own(sends: str, fetches: str, tmp_path: Path):
    cell, values = Loop(), {name: value.contiguous() for name, value in some_tensors().items()}
    waiting = SlicedTensors(values, 100, 50) if sends == "slices" else TensorDownloadable(values, 100)
    ref = ObjectDownloader(cell=cell, timeout=60, num_receivers=1).add_object(waiting)
    options = {"from_fqcn": "loop", "ref_id": ref, "per_request_timeout": 5}
    if fetches == "flare":
        error, found = download_tensors(cell=cell, **options)
    else:
        error, found = fetch_tensors(cell, str(tmp_path) if "disk" in fetches else None, **options)
    assert not error
    assert_same(found, values)
    is_sliced = sends == "slices" and fetches != "flare"
    assert ("slices" in cell.states[-1]) is is_sliced


def test_a_file_of_a_message_has_no_name_and_once_mapped_no_descriptor(tmp_path: Path):
    before = num_descriptors()
    found = passed_on(SlicedTensors(some_tensors(), 100, 50), OnDisk(str(tmp_path)))
    assert not list(tmp_path.iterdir())
    assert num_descriptors() == before
    assert found is not None
    found["T0"][0] = 7.0  # is the receiver's own
    assert found["T0"].untyped_storage().filename is not None


@pytest.mark.parametrize("sizes", [[2**20], [5000] * 100], ids=["one large", "many small"])
def test_a_full_disk_fails_the_fetch(sizes: list[int], tmp_path: Path):
    cell, (soft, hard) = Loop(), resource.getrlimit(resource.RLIMIT_FSIZE)
    values = {f"T{number}": torch.zeros(size) for number, size in enumerate(sizes)}
    sender = ObjectDownloader(cell=cell, timeout=60, num_receivers=1)
    ref = sender.add_object(SlicedTensors(values, 100, 2**20))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        error, found = fetch_tensors(cell, str(tmp_path), from_fqcn="loop", ref_id=ref, per_request_timeout=5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert found is None
    assert error is not None
    assert "File too large" in error


def test_a_file_may_be_larger_than_the_memory(tmp_path: Path):
    store, size = OnDisk(str(tmp_path)), 2**42
    store.begin("T0", torch.uint8, [size])
    store._file.truncate(size)  # in the place of what no test could write
    store.end = store._length = size
    assert store.tensors()["T0"][-1] == 0


def test_flare_cuts_short_what_is_on_its_way_into_a_folder(tmp_path: Path):
    class Cut(Loop):
        def send_request(self, *, request: Message, **options: Any) -> Message:
            if len(self.states) == 3:
                cleanup_active_disk_tensor_downloads("over", str(tmp_path))
            return super().send_request(request=request, **options)

    cell = Cut()
    sender = ObjectDownloader(cell=cell, timeout=60, num_receivers=1)
    ref = sender.add_object(SlicedTensors(some_tensors(), 100, 50))
    error, found = fetch_tensors(cell, str(tmp_path), from_fqcn="loop", ref_id=ref, per_request_timeout=5)
    assert error
    assert found is None
    assert not downloader._ACTIVE_DISK_TENSOR_CONSUMERS


@pytest.mark.parametrize("make", [InMemory, lambda: OnDisk(tempfile.gettempdir())], ids=["memory", "disk"])
def test_slices_among_whole_tensors_are_refused(make: Callable[[], Store]):
    """A tensor that waits for its rest would be left with what the memory held before it."""
    store = make()
    consumer, packed = SliceConsumer(store), save({"T1": torch.ones(3)})
    consumer.consume("r", {"slices": 1}, [json.dumps([told()]).encode(), b"x" * 4])
    with pytest.raises(SliceError, match="not in both"):
        consumer.consume("r", {"start": 0, "count": 1}, [packed])
    with pytest.raises(ValueError, match="should have"):
        consumer.consume_items([packed], None)
    store.close()


def test_what_slices_do_not_know_travels_whole(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(slices._DTYPES, "float16")
    sender = SlicedTensors({"T0": torch.ones(3, dtype=torch.float16), "T1": torch.ones(3)}, 1000)
    kind, items, state = sender.produce({"slices": 0}, "site-1")
    assert (kind, len(items), state) == ("ok", 2, {"start": 0, "count": 2})


def test_values_that_are_kept_otherwise_travel_as_they_are():
    values = {"T0": torch.tensor([1 + 2j, 3j]).conj(), "T1": torch.tensor([1 + 2j]).conj().imag}
    found = passed_on(SlicedTensors(values, 100), InMemory())
    assert found is not None
    assert all(found[name].tolist() == value.tolist() for name, value in values.items())


def test_nothing_that_is_packed_for_one_receiver_is_kept_for_others():
    cell, values = Loop(), {"T0": torch.ones(3)}
    waiting = SlicedTensors(values, 100)
    ref = ObjectDownloader(cell=cell, timeout=60, num_receivers=3).add_object(waiting)
    download_tensors(cell=cell, from_fqcn="loop", ref_id=ref, per_request_timeout=5)
    assert waiting.cache is not None
    assert all(packed is None for packed, _ in waiting.cache)


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def told(**changes: Any) -> dict[str, Any]:
    return {"name": "T0", "dtype": "float32", "shape": [3], "start": 0, **changes}


HOSTILE = {
    "no list": b"x",
    "nothing": [],
    "no header": [b""],
    "a header that is no JSON": [b"{", b"x" * 12],
    "a deep header": [b"[" * 100_000, b"x" * 12],
    "fewer buffers than told": [json.dumps([told(), told(name="T1")]).encode(), b"x" * 12],
    "more buffers than told": [json.dumps([told()]).encode(), b"x" * 12, b"x"],
    "a buffer that is text": [json.dumps([told()]).encode(), "x" * 12],
    "an empty buffer": [json.dumps([told()]).encode(), b""],
    "too long a buffer": [json.dumps([told()]).encode(), b"x" * 13],
    "a start within": [json.dumps([told(start=4)]).encode(), b"x" * 8],
    "a start below": [json.dumps([told(start=-4)]).encode(), b"x" * 12],
    "a start that is true": [json.dumps([told(start=True)]).encode(), b"x" * 12],
    "an unknown dtype": [json.dumps([told(dtype="storage")]).encode(), b"x" * 12],
    "a negative size": [json.dumps([told(shape=[-3])]).encode(), b"x" * 12],
    "a size that is a fraction": [json.dumps([told(shape=[1.5])]).encode(), b"x" * 12],
    "a huge shape": [json.dumps([told(shape=[2**62, 4])]).encode(), b"x" * 12],
    "a huge empty shape": [json.dumps([told(shape=[0, 2**62])]).encode(), b""],
    "many slices": [json.dumps([told(shape=[4000], start=i) for i in range(1001)]).encode(), *[b"x"] * 1001],
    "many dimensions": [json.dumps([told(shape=[1] * 65)]).encode(), b"x" * 4],
    "a further field": [json.dumps([told(more=1)]).encode(), b"x" * 12],
    "a name that is a number": [json.dumps([told(name=0)]).encode(), b"x" * 12],
    "the same tensor twice": [
        json.dumps([told(), told(name="T1"), told()]).encode(),
        *(b"x" * 12 for _ in range(3)),
    ],
    "a tensor that changes its shape": [
        json.dumps([told(), told(start=8, shape=[4])]).encode(),
        b"x" * 8,
        b"x" * 8,
    ],
    "a tensor that is not finished": [
        json.dumps([told(), told(name="T1")]).encode(),
        b"x" * 8,
        b"x" * 12,
    ],
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("make", [InMemory, lambda: OnDisk(tempfile.gettempdir())], ids=["memory", "disk"])
def test_what_could_not_have_been_sent_is_refused(make: Callable[[], Store], data: Any):
    store = make()
    with pytest.raises((ValueError, RecursionError)):
        SliceConsumer(store).consume("r", {"slices": 1}, data)
    store.close()


def test_a_tensor_that_ends_early_is_refused():
    consumer = SliceConsumer(InMemory())
    consumer.consume("r", {"slices": 1}, [json.dumps([told()]).encode(), b"x" * 8])
    with pytest.raises(ValueError, match="12 bytes, not 8"):
        consumer.download_completed("r")


@pytest.mark.parametrize("number", [-1, 10**9, "0", None, 1.0, [0]])
def test_a_request_that_no_receiver_makes_is_refused(number: Any):
    with pytest.raises(SliceError):
        SlicedTensors(some_tensors(), 100).produce({"slices": number}, "site-1")


def test_a_request_after_the_end_is_refused():
    sender = SlicedTensors(some_tensors(), 100)
    sender.release()
    with pytest.raises(SliceError, match="let go"):
        sender.produce({"slices": 0}, "site-1")
