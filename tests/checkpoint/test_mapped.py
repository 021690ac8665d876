import copy
import gc
import weakref

import torch

from nvflare_llm_components.checkpoint.mapped import share_on_deepcopy


def test_a_deep_copy_shares_the_tensor_and_not_its_container():
    tensors = {"a": torch.ones(3)}
    share_on_deepcopy(tensors)
    twin = copy.deepcopy({"data": tensors})
    assert twin["data"] is not tensors
    assert twin["data"]["a"] is tensors["a"]
    assert type(tensors["a"]) is torch.Tensor


def test_an_unmarked_tensor_is_copied():
    tensor = torch.ones(3)
    assert copy.deepcopy(tensor) is not tensor


def test_a_marked_tensor_is_freed_with_its_last_reference():
    tensors = {"a": torch.ones(3)}
    share_on_deepcopy(tensors)
    seen = weakref.ref(tensors["a"])
    gc.disable()
    try:
        tensors.clear()
        assert seen() is None
    finally:
        gc.enable()
