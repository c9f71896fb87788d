"""Every key of every file is either a module's, a token's or reported: whatever a file's names are, nothing is lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.files.keys import (
    EmbeddingKey,
    describe_foreign,
    embedding_key,
    kind_of,
    rank_of,
    read_layout,
    roles,
    weight_shape,
)
from sfumato.files.module_names import kohya_name, kohya_target

PIECES = """
lora_unet oft_unet lycoris lora_te lora_te1 lora_te2 unet text_encoder text_encoder_2 clip_l clip_g bundle_emb
base_model model text_model encoder layers down_blocks up_blocks mid_block input_blocks middle_block output_blocks
attentions resnets transformer_blocks attn1 attn2 to_q to_out processor self_attn q_proj mlp fc1 ff net proj conv1 norm1
0 1 2 11 99999999999999999999 weight bias default lora_A lora_B lora down up to_q_lora
"""
WORDS = st.sampled_from(PIECES.split() + list(roles()))
NAMES = st.one_of(
    st.lists(st.tuples(WORDS, st.sampled_from("._")), min_size=1, max_size=12).map(
        lambda parts: "".join(word + joint for word, joint in parts)[:-1]
    ),
    st.text(min_size=1, max_size=60),
)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.lists(NAMES, unique=True, max_size=12))
def test_no_key_is_lost_and_none_crashes(names):
    layout = read_layout(names)
    told = [name for keys in layout.modules.values() for name in keys.names.values()]
    told += [*layout.unknown, *layout.repeated, *layout.embeddings]
    assert set(told) == set(names)
    for (part, path), keys in layout.modules.items():
        assert part in ("unet", "text_encoder", "text_encoder_2")
        assert path
        assert keys.kind == kind_of(keys.names)


@settings(max_examples=300, deadline=None)
@given(NAMES)
def test_a_name_is_a_modules_only_with_a_suffix_of_the_table(name):
    layout = read_layout([name])
    if layout.modules:
        assert (
            name.endswith(tuple(roles()))
            or "_lora." in name
            or "lora_A" in name
            or "lora_B" in name
            or "magnitude" in name
        )
    assert embedding_key(name, bundled=True) is None or name in layout.embeddings or layout.modules


PATH = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@given(st.text(alphabet="_abcdefghijklmnopqrstuvwxyz0123456789", max_size=40))
def test_a_module_that_no_base_has_is_never_accepted(tail):
    """Only names that the grammar itself would write are read."""
    target = kohya_target(f"lora_unet_{tail}")
    if target is not None:
        written = {kohya_name(family, *target) for family in ("sd1", "sdxl")}
        assert f"lora_unet_{tail}" in written or tail.startswith(
            ("input_", "middle_", "output_", "time_embed", "label_", "out_")
        )


@pytest.mark.parametrize("tail", ["x", "to_q_extra", "attn3.to_q", "attn1.to_q.weight", "0", "\N{KELVIN SIGN}"])
def test_names_beside_the_grammar_are_unknown(tail):
    stem = PATH.rsplit(".", 2)[0]
    names = [f"lora_unet_{stem}.{tail}".replace(".", "_") + ".lora_up.weight", f"unet.{stem}.{tail}.lora_B.weight"]
    assert read_layout(names).unknown == tuple(names)


def test_a_checkpoints_own_weights_are_never_an_adapters():
    """`weight` after a dotted path is a U-Net's own tensor; after kohya's flat name it is IA3's."""
    assert not read_layout([f"unet.{PATH}.weight", f"{PATH}.bias", f"model.diffusion_model.{PATH}.weight"]).modules
    assert read_layout([f"lora_unet_{PATH.replace('.', '_')}.weight"]).kinds == {"IA3": 1}


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["model.diffusion_model.x"], "a full checkpoint"),
        (["cond_stage_model.x", "a.b"], "a full checkpoint"),
        (["conditioner.embedders.0"], "a full checkpoint"),
        (["transformer.x.y"], "an adapter for a transformer model (Flux, SD 3 and the like)"),
        (["lora_unet_joint_blocks_0"], "an adapter for a transformer model (Flux, SD 3 and the like)"),
        (["lora_te3_x"], "an adapter for a transformer model (Flux, SD 3 and the like)"),
        (["diffusion_model.layers.0.x"], "an adapter for a transformer model (Flux, SD 3 and the like)"),
        (["conv_in.weight", "time_embedding.linear_1.weight"], "a whole U-Net"),
        (["conv_in.weight", "a.b"], None),
        (["decoder.conv_in.weight", "a.b"], "a VAE"),
        (["text_model.embeddings.token_embedding.weight"], "a whole text encoder"),
        (["clip_l", "clip_g"], "a textual inversion"),
        (["emb_params"], "a textual inversion"),
        (["a", "b", "c", "<d.e>"], "a textual inversion"),
        (["a", "b", "c", "d", "e"], None),
        (["a.b.c"], None),
    ],
)
def test_what_is_no_adapter_is_named(names, what):
    assert describe_foreign(names) == what


@pytest.mark.parametrize(
    ("name", "bundled", "key"),
    [
        ("clip_g", False, ("", "text_encoder_2")),
        ("clip_l", True, ("", "text_encoder")),
        ("string_to_token.*", False, ("", None)),
        ("string_to_token.*", True, None),
        ("<cat>", False, ("<cat>", "")),
        ("<cat>", True, None),
        ("easynegative-v1.1", False, ("easynegative-v1.1", "")),
        ("a.b.c", False, None),
        ("<a.b.c>", False, ("<a.b.c>", "")),
        ("a.weight", False, None),
        ("clip_l_out", False, None),
        ("bundle_emb.cat", True, ("cat", "")),
        ("bundle_emb.cat.clip_g", True, ("cat", "text_encoder_2")),
        ("bundle_emb.cat.string_to_param.*", True, ("cat", "text_encoder")),
        ("bundle_emb.cat.string_to_token.*", True, ("cat", None)),
        ("bundle_emb.", True, None),
        ("bundle_emb..clip_g", True, None),
        ("bundle_emb.cat.other", True, None),
    ],
)
def test_whose_vectors_a_name_says_they_are(name, bundled, key):
    assert embedding_key(name, bundled=bundled) == (None if key is None else EmbeddingKey(*key))


@given(
    st.dictionaries(
        st.sampled_from(sorted(set(roles().values()))), st.lists(st.integers(1, 9), max_size=5).map(tuple), max_size=8
    )
)
def test_shapes_of_any_kind_never_crash(roles):
    out, inner = weight_shape(roles)
    assert out is None or out >= 1
    assert inner is None or inner >= 1
    assert rank_of(roles) is None or rank_of(roles) >= 1
