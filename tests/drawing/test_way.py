"""Whether a drawing's mix is in the weights or beside the layers."""

from types import SimpleNamespace

import pytest

from sfumato.adapters.weights import Adapter
from sfumato.generation.prompt_adapters import choose_apply_mode


@pytest.mark.parametrize("follows_steps", [False, True])
@pytest.mark.parametrize("offload", [None, object()])
def test_a_mix_is_beside_the_layers_where_steps_or_offloading_want_it_unless_it_holds_a_whole_model(
    follows_steps, offload, tmp_path
):
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "model_index.json").write_text("{}")
    base = SimpleNamespace(precision=SimpleNamespace(offload=offload))
    line, whole = Adapter(tmp_path / "line.safetensors"), Adapter(tmp_path / "whole")
    is_beside = follows_steps or offload is not None
    assert choose_apply_mode(base, [line], follows_steps=follows_steps) == ("live" if is_beside else "auto")
    assert choose_apply_mode(base, [line, whole], follows_steps=follows_steps) == "auto"
