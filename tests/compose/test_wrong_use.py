"""What is given in place of adapters, places, weights and numbers is one line that says what was wanted."""

from typing import Any

import pytest

from sfumato.compose import Adapter, adapter_guidance, compose
from sfumato.compose.per_picture import composite, per_picture
from sfumato.compose.regions import Region, regions
from sfumato.compose.steps import over_steps
from sfumato.errors import AdapterError

WHOLE = (0, 0, 1, 1)

WRONG: dict[str, tuple[Any, str]] = {
    "pictures with an adapter each": (lambda pipe, a, mix: per_picture(pipe, [a, a]), "[[Adapter(file)], []]"),
    "pictures of one adapter": (lambda pipe, a, mix: per_picture(pipe, a), "[[Adapter(file)], []]"),
    "a picture with a name": (lambda pipe, a, mix: per_picture(pipe, [[a], ["line"]]), "'line' in place of adapters"),
    "a composite of names": (lambda pipe, a, mix: composite(pipe, "line"), "'line' in place of adapters"),
    "one weight over the steps": (lambda pipe, a, mix: over_steps(mix, a=0.5), "a: 0.5 is no way over the steps"),
    "a region of a name": (lambda pipe, a, mix: regions(pipe, Region(WHOLE, "line")), "got 'line'"),
    "a region in a word": (lambda pipe, a, mix: regions(pipe, Region("left", a)), "a region at 'left'"),
    "a region of three sides": (lambda pipe, a, mix: regions(pipe, Region((0, 0, 1), a)), "a region at (0, 0, 1)"),
    "a box of words": (lambda pipe, a, mix: regions(pipe, Region((0, 0, 1, "1"), a)), "a region at"),
    "a box for a region": (lambda pipe, a, mix: regions(pipe, WHOLE), "as Region(where, Adapter(file)), got (0, 0"),
    "a strength in words": (lambda pipe, a, mix: adapter_guidance(mix, "2", guidance=3), "guidance '2': wanted"),
    "a label's in words": (lambda pipe, a, mix: adapter_guidance(mix, {"a": "2"}, guidance=3), "adapter guidance '2'"),
    "guidance of a pipeline": (lambda pipe, a, mix: adapter_guidance(pipe, 2, guidance=3), "the mix that compose gave"),
    "guidance of what was undone": (lambda pipe, a, mix: mix.undo() or adapter_guidance(mix, 2, guidance=3), "undone"),
    "a mix that was undone": (lambda pipe, a, mix: mix.undo() or mix, "undone"),
    "a guidance in words": (lambda pipe, a, mix: adapter_guidance(mix, 2, guidance="3"), "guidance '3': wanted"),
}


@pytest.mark.parametrize(("use", "said"), WRONG.values(), ids=WRONG.keys())
def test_wrong_use_is_one_line(sd1, write, use, said):
    a = Adapter(write("a", sd1, "to_q"))
    with compose(sd1, a) as mix:
        with pytest.raises(AdapterError) as caught, use(sd1, Adapter(a.path, 0.5, "b"), mix):
            pass
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "mix", "mix.txt"])
def test_a_mix_is_saved_under_the_ending_that_is_read_again(sd1, write, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with compose(sd1, Adapter(write("a", sd1, "to_q"))) as mix:
        before = set(tmp_path.iterdir())
        with pytest.raises(AdapterError, match=r"a mix is saved as a \.safetensors file, got '.*'; give a name"):
            mix.save(name)
        assert set(tmp_path.iterdir()) == before
