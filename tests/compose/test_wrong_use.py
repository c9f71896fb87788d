"""What is given in place of adapters, places, weights and numbers is one line that says what was wanted."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from sfumato.adapters.blocks import Blocks
from sfumato.compose import Adapter, adapter_guidance, compose
from sfumato.compose.by_method import by_method
from sfumato.compose.per_image import composite, per_picture
from sfumato.compose.regions import Region, regions
from sfumato.compose.schedules import Ramp, Switch, over_asked_steps, over_steps
from sfumato.errors import AdapterError, FileError
from tests.compose.conftest import weights_sha

WHOLE = (0, 0, 1, 1)

WRONG: dict[str, tuple[Any, str]] = {
    "images with an adapter each": (lambda pipe, a, mix: per_picture(pipe, [a, a]), "[[Adapter(file)], []]"),
    "images of one adapter": (lambda pipe, a, mix: per_picture(pipe, a), "[[Adapter(file)], []]"),
    "an image with a name": (lambda pipe, a, mix: per_picture(pipe, [[a], ["line"]]), "'line' in place of adapters"),
    "a composite of names": (lambda pipe, a, mix: composite(pipe, "line"), "as Adapter(file, weight), got 'line'"),
    "a composite of a list": (lambda pipe, a, mix: composite(pipe, [a]), "as Adapter(file, weight), got [Adapter("),
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
    "steps of a pipeline": (lambda pipe, a, mix: over_steps(pipe), "over_steps wants the mix that compose gave"),
    "steps of what was undone": (lambda pipe, a, mix: mix.undo() or over_steps(mix, a=Ramp((0, 1))), "undone"),
    "asked steps of a pipeline": (lambda pipe, a, mix: over_asked_steps(pipe), "over_asked_steps wants the mix that"),
    "asked steps of what was undone": (lambda pipe, a, mix: mix.undo() or over_asked_steps(mix), "undone"),
    "a ramp without a label": (lambda pipe, a, mix: over_steps(mix, Ramp((0, 1))), "wanted ways by label, such as"),
    "a switch of one text": (lambda pipe, a, mix: Switch("a"), "its labels as ('line', 'otter'), got 'a'"),
    "a ramp of two numbers": (lambda pipe, a, mix: Ramp(0, 1), "a ramp is points (progress, weight)"),
    "a ramp of a list": (lambda pipe, a, mix: Ramp([(0, 1), (1, 0)]), "a ramp is points (progress, weight)"),
    "a half of a step": (lambda pipe, a, mix: Switch(("a",), 2.5), "a whole number"),
    "steps of a region": (
        lambda pipe, a, mix: regions(pipe, Region(WHOLE, a), over_steps={"b": 0.5}),
        "over_steps {'b': 0.5}: wanted (from, to)",
    ),
    "a region's prompt": (lambda pipe, a, mix: Region(WHOLE, a, prompt=3), "a region's prompt is a text, got 3"),
    "a region of an array": (lambda pipe, a, mix: Region(torch.ones(8, 8), a), "a region at tensor([[1., 1., 1., 1.,"),
    "labels in a list": (lambda pipe, a, mix: mix.mute(["a"]), "several are given one by one, got ['a']"),
    "labels unmuted in a list": (lambda pipe, a, mix: mix.unmute(["a"]), "several are given one by one, got ['a']"),
    "an adapter for its label": (lambda pipe, a, mix: mix.remove(a), "a label is a text"),
    "nothing to remove": (lambda pipe, a, mix: mix.remove(), "undo() the mix to take out all"),
    "weights in a list": (lambda pipe, a, mix: mix.set_weights([0.5]), "wanted a dictionary by label"),
    "weights for a name": (lambda pipe, a, mix: mix.set_weights("a"), "wanted a dictionary by label"),
    "blocks in a text": (lambda pipe, a, mix: Blocks(1.0, "down:0"), "Blocks.parse reads texts"),
    "merged in a list": (lambda pipe, a, mix: mix.undo() or by_method(pipe, [a], method="ties"), "as Adapter(file"),
    "merged by unknown blocks": (
        lambda pipe, a, mix: mix.undo() or by_method(pipe, Adapter(a.path, Blocks(1.0, {"dwn": 0.0})), method="ties"),
        "blocks dwn: no module of this pipeline is called that",
    ),
    "a title of a number": (lambda pipe, a, mix: mix.save("a.safetensors", title=3), "a title is a text, got 3"),
    "a guidance in words": (lambda pipe, a, mix: adapter_guidance(mix, 2, guidance="3"), "guidance '3': wanted"),
}


@pytest.mark.parametrize(("use", "said"), WRONG.values(), ids=WRONG.keys())
def test_wrong_use_is_one_line(sd1, write, use, said):
    a = Adapter(write("a", sd1, "to_q"))
    with compose(sd1, a) as mix:
        given = weights_sha(sd1)
        with pytest.raises(AdapterError) as caught, use(sd1, Adapter(a.path, 0.5, "b"), mix):
            pass
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        assert mix._undone or (weights_sha(sd1) == given and mix.weights == {"a": 1.0} and not mix.muted)


@pytest.mark.parametrize("name", ["", "mix", "mix.txt"])
def test_a_mix_is_saved_under_the_ending_that_is_read_again(sd1, write, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with compose(sd1, Adapter(write("a", sd1, "to_q"))) as mix:
        before = set(tmp_path.iterdir())
        with pytest.raises(AdapterError, match=r"a mix is saved as a \.safetensors file, got '.*'; give a name"):
            mix.save(name)
        with pytest.raises(FileError, match="a file is named by its path, a text, got a NoneType"):
            mix.save(None)
        assert set(tmp_path.iterdir()) == before


def test_too_long_a_name_is_one_line(sd1):
    """pathlib raises an OSError there, as it does in a folder that may not be entered."""
    for use in (compose, lambda *given: by_method(*given, method="ties").__enter__()):
        with pytest.raises(FileError, match=r"the file cannot be read .*too long"):
            use(sd1, Adapter("x" * 5000))


def test_projections_that_were_fused_since_are_refused_until_they_are_unfused(sd1, write):
    """They are copies of the weights: new numbers would not reach the pictures."""
    mix = compose(sd1, Adapter(write("a", sd1, "to_q")))
    sd1.unet.fuse_qkv_projections()
    for change in (lambda: mix.set(a=0.5), mix.undo):
        with pytest.raises(AdapterError, match="unfuse_qkv_projections"):
            change()
    sd1.unet.unfuse_qkv_projections()
    mix.undo()


def test_layers_that_were_replaced_since_are_refused_until_they_are_back(sd1, write):
    """As quantising replaces them: the first ones would be weighed and restored, and the pictures stay the mix's."""
    before = weights_sha(sd1)
    mix = compose(sd1, Adapter(write("a", sd1, "ff.net.2", "conv1")))
    network = sd1.unet.mid_block.attentions[0].transformer_blocks[0].ff.net
    layer, network[2] = network[2], copy.deepcopy(network[2])
    for change in (lambda: mix.set(a=0.5), mix.undo):
        with pytest.raises(AdapterError, match=r"the unet has another mid_block\S+ff\.net\.2 than .* load the base"):
            change()
    assert mix.weights == {"a": 1.0}
    network[2] = nn.Sequential(layer)  # within another it still computes
    mix.undo()
    network[2] = layer
    assert weights_sha(sd1) == before
