"""A state as tensors and JSON: what either holds, and what is said of a state that neither can hold."""

import torch

from sfumato.runs.checkpoints import flatten_state, unflatten_state
from tests.runs.said import problem


def test_tensors_are_named_by_their_path_and_all_else_is_json():
    tensors, rest = flatten_state({"a": [torch.ones(1), (torch.zeros(2), 5)], 1: torch.ones(3), "1": torch.ones(4)})
    assert {name: len(tensor) for name, tensor in tensors.items()} == {"/a/0": 1, "/a/1/0": 2, "/1": 3, "/1'": 4}
    inner = {"tuple": [{"tensor": "/a/1/0"}, 5]}
    listed = {"list": [{"tensor": "/a/0"}, inner]}
    assert rest == {"dict": [["a", listed], [1, {"tensor": "/1"}], ["1", {"tensor": "/1'"}]]}
    assert flatten_state(torch.empty(0, 3, dtype=torch.float16)) == ({}, {"empty": [[0, 3], "float16"]})
    empty = unflatten_state({}, {"empty": [[0, 3], "float16"]})
    assert (empty.shape, empty.dtype) == ((0, 3), torch.float16)


def test_a_state_that_is_none_is_named():
    assert problem(lambda: flatten_state({1})) == "the state is a set, which a checkpoint cannot hold."
    assert problem(lambda: flatten_state({"a": {1}})) == "/a is a set, which a checkpoint cannot hold."
    assert (
        problem(lambda: flatten_state({frozenset(): 1})) == "the state is a frozenset, which a checkpoint cannot hold."
    )
