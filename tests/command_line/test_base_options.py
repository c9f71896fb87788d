"""The base that a command line names, and how it is computed."""

from sfumato import models, precision
from sfumato.generation.arguments.base import DrawingBaseOptions

CHANGES = {"prediction_type": "v_prediction", "zero_terminal_snr": True, "max_tokens": 150}
MORE = {"precision": "bf16", "quantize": "int8"}


def test_every_option_reaches_the_base_or_its_precision(monkeypatch):
    for module, name in ((precision, "decide"), (models, "load_base")):
        monkeypatch.setattr(module, name, lambda *given, **options: (given, options))
    computed = {"device": "cuda:1", "attention": "xformers", "offload": True}
    loaded = {"clip_skip": 1, "vae": "some/vae", **CHANGES}
    given, options = DrawingBaseOptions(
        base="some/base", precision="fp16", quantize="int8", **computed, **loaded
    ).load_base()
    assert given == ("some/base",)
    assert options == {"precision": (("fp16",), {**computed, "quantized": "int8"}), **loaded}


def test_what_changes_the_picture_is_told_where_it_was_asked_for():
    assert DrawingBaseOptions(offload=True, device="cpu").drawn_with() == {}
    assert DrawingBaseOptions(**CHANGES, **MORE).drawn_with() == {**CHANGES, **MORE}
