"""A single checkpoint is the same model as the folder it was made of."""

import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file

from sfumato.errors import BaseModelError
from sfumato.files.header import Header, TensorInfo, read_header
from sfumato.files.metadata import LABELS
from sfumato.files.module_names import clip_name, open_clip_name, unet_name, vae_name
from sfumato.models import load_base, loading
from sfumato.models.family import FAMILIES, read_requirements, resolve_prediction_type
from sfumato.models.single_file import packaged_config, text_config, unet_config, vae_config
from sfumato.models.vocabulary import clip_tokenizer
from sfumato.models.weights import text_skeleton, unet_skeleton, vae_skeleton
from sfumato.training.memory import fake_base
from tests.tiny import CPU, tiny_pipeline, write_single_file

FAMILY_NAMES = ["sd1", "sd2", "sdxl"]


def prediction(base):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    text = base.encode_text(["a red cat", "a dog"])
    added = base.added_conditions(text, [(64, 48)] * 2, [(0, 3)] * 2, [(64, 64)] * 2)
    return base.predict(latents, torch.tensor([10, 900]), text, added)


def load(path, **options):
    return load_base(path, precision=CPU, **options)


@pytest.mark.slow
def test_file_and_folder_predict_and_decode_the_same(tiny):
    base = load(tiny.file, prediction_type=tiny.base.prediction_type)
    assert base.family is tiny.base.family
    assert torch.equal(prediction(base), prediction(tiny.base))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(base.decode(latents), tiny.base.decode(latents))
    assert torch.equal(base.alpha_bar, tiny.base.alpha_bar)


def test_a_file_is_read_with_the_whole_vocabulary_of_clip(sdxl, monkeypatch):
    monkeypatch.setattr(loading, "clip_tokenizer", clip_tokenizer)
    for tokenizer, pad_token in zip(load(sdxl.file, unet=False).tokenizers, ("<|endoftext|>", "!"), strict=True):
        wanted = clip_tokenizer(pad_token=pad_token, positions=77)
        assert tokenizer.get_vocab() == wanted.get_vocab()
        assert tokenizer.pad_token == pad_token
        assert tokenizer("a red flamingo").input_ids == wanted("a red flamingo").input_ids


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_diffusers_reads_the_same_model_from_the_file(family, request):
    made = request.getfixturevalue(family)
    pipe = type(made.pipe).from_single_file(str(made.file), config=str(made.folder), local_files_only=True)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = getattr(made.pipe, name, None), getattr(pipe, name, None)
        if ours is not None:
            weights = ours.state_dict()
            for key, tensor in theirs.state_dict().items():
                assert torch.equal(tensor, weights[key]), f"{name} {key}"


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_names_of_the_published_models_are_those_diffusers_converts_from(family):
    """At full width, on the device meta: the conversion of our name must be the name we started from."""
    config = packaged_config(family, "unet/config.json")
    names = list(unet_skeleton(config).state_dict())
    converted = convert_ldm_unet_checkpoint(
        {"model.diffusion_model." + unet_name(name, config): name for name in names}, config
    )
    assert converted == {name: name for name in names}
    config = packaged_config(family, "vae/config.json")
    names = list(vae_skeleton(config).state_dict())
    sources = {"first_stage_model." + vae_name(name, config): torch.tensor(i) for i, name in enumerate(names)}
    converted = convert_ldm_vae_checkpoint(sources, config)
    assert {name: int(index) for name, index in converted.items()} == {name: i for i, name in enumerate(names)}


def published_header(family: str) -> Header:
    """The names and shapes of a published checkpoint, without its weights."""
    shapes = {}
    config = packaged_config(family, "unet/config.json")
    for name, tensor in unet_skeleton(config).state_dict().items():
        shapes["model.diffusion_model." + unet_name(name, config)] = tuple(tensor.shape)
    config = packaged_config(family, "vae/config.json")
    for name, tensor in vae_skeleton(config).state_dict().items():
        shapes["first_stage_model." + vae_name(name, config)] = tuple(tensor.shape)
    prefixes = {
        "sd1": ["cond_stage_model.transformer."],
        "sd2": ["cond_stage_model.model."],
        "sdxl": ["conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."],
    }[family]
    for encoder, prefix in zip(FAMILIES[family].encoders, prefixes, strict=True):
        skeleton = text_skeleton(encoder.class_name, packaged_config(family, f"{encoder.folder}/config.json"))
        for name, tensor in skeleton.state_dict().items():
            if prefix.endswith("transformer."):
                shapes[f"{prefix}text_model.{clip_name(name)}"] = tuple(tensor.shape)
            else:
                shapes[prefix + open_clip_name(name)[0]] = tuple(tensor.shape)
        if family == "sd2":
            shapes[f"{prefix}transformer.resblocks.23.ln_1.weight"] = (1024,)
    tensors = {name: TensorInfo("F16", shape, 0, 0) for name, shape in shapes.items()}
    return Header(Path("model.safetensors"), tensors, {}, 0, 0)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_sizes_read_from_a_published_checkpoint_are_the_published_ones(family):
    header, made = published_header(family), FAMILIES[family]
    assert unet_config(header, made) == packaged_config(family, "unet/config.json")
    assert vae_config(header, made, "first_stage_model.") == packaged_config(family, "vae/config.json")
    for index, encoder in enumerate(made.encoders):
        assert text_config(header, made, index) == packaged_config(family, f"{encoder.folder}/config.json")


def test_the_family_table_is_the_published_one():
    assert [LABELS[name].text_width for name in FAMILY_NAMES] == [
        packaged_config(name, "unet/config.json")["cross_attention_dim"] for name in FAMILY_NAMES
    ]


def test_sd2_alone_cannot_say_what_it_predicts(sd2):
    with pytest.raises(BaseModelError, match=r"--prediction-type epsilon .* or --prediction-type v_prediction"):
        load(sd2.file, unet=False)
    assert load(sd2.file, unet=False, prediction_type="epsilon").resolution == 512
    assert load(sd2.file, unet=False, prediction_type="v_prediction").resolution == 768


@pytest.mark.parametrize(("kind", "side"), [("epsilon", 512), ("v_prediction", 768)])
def test_what_is_told_of_sd2_before_it_is_loaded_is_of_its_kind(kind, side, sd2):
    for named in (str(sd2.file), "sd2"):
        assert read_requirements(named, kind).resolution == side
        assert fake_base(named, "cpu", prediction_type=kind).resolution == side
    with pytest.raises(BaseModelError, match="--prediction-type epsilon"):
        read_requirements(str(sd2.file))


@pytest.mark.parametrize(
    ("key", "spelling", "kind"),
    [
        ("prediction_type", "v", "v_prediction"),
        ("prediction_type", "epsilon", "epsilon"),
        ("predict_key", "epsilon", "epsilon"),  # as ComfyUI writes it
    ],
)
def test_modelspec_says_what_sd2_predicts(sd2, tmp_path, key, spelling, kind):
    file = write_single_file(sd2.pipe, tmp_path / "a.safetensors", metadata={f"modelspec.{key}": spelling})
    assert load(file, unet=False).prediction_type == kind


def test_what_the_user_says_goes_before_what_the_file_says(sdxl, tmp_path):
    file = write_single_file(sdxl.pipe, tmp_path / "v.safetensors", ("v_pred",))
    header = read_header(file)
    assert resolve_prediction_type(header, "sdxl", None) == "v_prediction"
    assert resolve_prediction_type(header, "sdxl", "epsilon") == "epsilon"


def test_markers_of_zero_terminal_snr_are_honoured(sdxl, tmp_path):
    file = write_single_file(sdxl.pipe, tmp_path / "a.safetensors", markers=("v_pred", "ztsnr"))
    base = load(file, unet=False)
    assert base.prediction_type == "v_prediction"
    assert base.alpha_bar[-1] == 0
    assert base.alpha_bar[-2] > 0
    assert base.pipeline().scheduler.config.timestep_spacing == "trailing"


@pytest.mark.parametrize("form", ["file", "folder"])
def test_zero_terminal_snr_may_be_said_of_a_base_that_does_not_say_it(sdxl, form):
    base = load(getattr(sdxl, form), unet=False, prediction_type="v_prediction", zero_terminal_snr=True)
    assert base.alpha_bar[-1] == 0
    assert base.pipeline().scheduler.config.timestep_spacing == "trailing"
    with pytest.raises(BaseModelError, match=r"Say --prediction-type v_prediction, or leave --zero-terminal-snr out\."):
        load(getattr(sdxl, form), unet=False, zero_terminal_snr=True)


def test_without_markers_sdxl_predicts_noise(sdxl):
    base = load(sdxl.file, unet=False)
    assert base.prediction_type == "epsilon"
    assert base.alpha_bar[-1] > 0.004


def test_sd2_as_diffusers_writes_it_has_no_unused_layer(tmp_path):
    """The published config has 23 layers; a file of 23 or of 24 is that model."""
    header = published_header("sd2")
    without = {name: info for name, info in header.tensors.items() if ".23." not in name}
    header = Header(header.path, without, {}, 0, 0)
    assert text_config(header, FAMILIES["sd2"], 0)["num_hidden_layers"] == 23


def test_without_its_unet_a_base_only_knows_the_config(sd1):
    base = load(sd1.file, unet=False)
    assert all(parameter.is_meta for parameter in base.unet.parameters())
    assert base.unet.config.cross_attention_dim == 64
    assert torch.equal(base.encode_text(["a cat"]).hidden, sd1.base.encode_text(["a cat"]).hidden)


@pytest.mark.parametrize("where", ["model.diffusion_model.", "first_stage_model.", "cond_stage_model."])
def test_a_missing_weight_is_counted(sd1, tmp_path, where):
    tensors = load_file(sd1.file)
    name = [name for name in tensors if name.startswith(where) and name.endswith("bias")][-1]
    del tensors[name]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(BaseModelError, match=r"1 of \d+ weights are missing, 0 are unknown"):
        load(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.diffusion_model.out.2.weight", "the U-Net has no first or last layer"),
        ("model.diffusion_model.input_blocks.1.0.out_layers.3.weight", "the U-Net has no input_blocks.1.0.out_layers"),
        ("first_stage_model.decoder.conv_in.weight", "the VAE has no decoder.conv_in.weight"),
        (
            "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
            "the text encoder cond_stage_model.transformer. is incomplete",
        ),
    ],
)
def test_a_file_without_a_weight_that_tells_a_size_is_one_line(name, said, sd1, tmp_path):
    tensors = load_file(sd1.file)
    del tensors[name]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(BaseModelError, match=f"a.safetensors: {said}.* Download the file again"):
        load(tmp_path / "a.safetensors")


def test_a_vae_out_of_a_folder_names_the_folder(sd1):
    with pytest.raises(BaseModelError, match=r"the VAE of a diffusers folder; .*Name the folder"):
        load(sd1.file, vae=sd1.folder / "vae/diffusion_pytorch_model.safetensors")


def test_an_unknown_weight_is_counted(sd1, tmp_path):
    tensors = load_file(sd1.file) | {"model.diffusion_model.input_blocks.1.0.gate.weight": torch.ones(2)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(
        BaseModelError, match=r"0 of \d+ weights are missing, 1 are unknown, first input_blocks.1.0.gate"
    ):
        load(tmp_path / "a.safetensors")


def test_old_names_of_the_text_encoder_are_read(sd1, tmp_path):
    tensors = {name.replace("transformer.text_model.", "transformer."): t for name, t in load_file(sd1.file).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    assert torch.equal(
        load(tmp_path / "a.safetensors", unet=False).encode_text(["a cat"]).hidden,
        sd1.base.encode_text(["a cat"]).hidden,
    )


@pytest.mark.slow
def test_a_vae_is_replaced_from_a_file_or_a_folder(sd1, tmp_path):
    other = tiny_pipeline("sd1", seed=1)
    write_single_file(other, tmp_path / "whole.safetensors")
    alone = {
        name.removeprefix("first_stage_model."): tensor
        for name, tensor in load_file(tmp_path / "whole.safetensors").items()
        if name.startswith("first_stage_model.")
    }
    save_file(alone | {"loss.logvar": torch.zeros(1)}, tmp_path / "vae.safetensors")
    other.vae.save_pretrained(tmp_path / "vae")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = other.vae.decode(latents / 0.18215).sample.clamp(-1, 1)
    digests = {sd1.base.fingerprint()}
    for source in ("whole.safetensors", "vae.safetensors", "vae"):
        base = load(sd1.folder, vae=tmp_path / source)
        torch.testing.assert_close(base.decode(latents), wanted)  # to rounding, as products are sfumato's
        assert torch.equal(prediction(base), prediction(sd1.base))
        digests.add(base.fingerprint())
        assert base.adapted_fingerprint() == sd1.base.adapted_fingerprint()
    assert len(digests) == 4


def test_a_folder_of_older_libraries_is_read(sd1, tmp_path):
    """transformers before 5.6 wrote `text_model.`, diffusers before 0.18 other names in the VAE's attention."""
    folder = shutil.copytree(sd1.folder, tmp_path / "old")
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name}": tensor for name, tensor in load_file(weights).items()}
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, weights)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    renamed = {}
    for name, tensor in load_file(weights).items():
        if ".attentions." in name:
            for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
                name = name.replace(new, old)
        renamed[name] = tensor
    assert "encoder.mid_block.attentions.0.query.weight" in renamed
    save_file(renamed, weights)
    base = load(folder)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(prediction(base), prediction(sd1.base))
    assert torch.equal(base.decode(latents), sd1.base.decode(latents))


def test_a_folder_of_shards_or_of_half_precision_is_read(sd1, tmp_path):
    sharded, half = (shutil.copytree(sd1.folder, tmp_path / name) for name in ("sharded", "half"))
    shutil.rmtree(sharded / "unet")
    unet = diffusers.UNet2DConditionModel.from_pretrained(sd1.folder / "unet")
    unet.save_pretrained(sharded / "unet", max_shard_size="1MB")
    assert len(list((sharded / "unet").glob("*.safetensors"))) > 1
    assert torch.equal(prediction(load(sharded)), prediction(sd1.base))
    weights = half / "unet" / "diffusion_pytorch_model.safetensors"
    halves = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_file(halves, weights)
    weights.rename(half / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    found = load(half).unet.state_dict()
    assert found.keys() == halves.keys()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in halves.items())


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_base_without_its_vae_takes_another(sd1, form, tmp_path):
    sd1.pipe.vae.save_pretrained(tmp_path / "vae")
    if form == "file":
        lacking = tmp_path / "novae.safetensors"
        weights = {name: value for name, value in load_file(sd1.file).items() if "first_stage_model" not in name}
        save_file(weights, lacking)
        with pytest.raises(BaseModelError, match=r"without its VAE\. Give one with --vae, or name a whole checkpoint"):
            load(lacking)
    else:
        lacking = shutil.copytree(sd1.folder, tmp_path / "novae")
        shutil.rmtree(lacking / "vae")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(load(lacking, vae=tmp_path / "vae").decode(latents), sd1.base.decode(latents))


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_vae_of_other_latents_is_refused(sd1, form, tmp_path):
    base = getattr(sd1, form)
    other = tiny_pipeline("sd1", seed=1).vae
    other.register_to_config(scaling_factor=0.13025)
    other.save_pretrained(tmp_path / "xl")
    with pytest.raises(BaseModelError, match=r"whose scaling factor is 0\.13025, and this base's is 0\.18215"):
        load(base, vae=tmp_path / "xl")
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    config = dict(sd1.pipe.vae.config) | levels | {"block_out_channels": (32, 32)}
    diffusers.AutoencoderKL.from_config(config).save_pretrained(tmp_path / "small")
    with pytest.raises(BaseModelError, match="number of pixels for one of latents is 2, and this base's is 8"):
        load(base, vae=tmp_path / "small")


def test_names_are_those_of_published_files():
    """Literal ones: a file that these functions name is read back by them whatever they say."""
    sd1 = {"layers_per_block": 2, "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)}
    assert unet_name("up_blocks.0.upsamplers.0.conv.weight", sd1) == "output_blocks.2.1.conv.weight"
    assert unet_name("up_blocks.1.upsamplers.0.conv.weight", sd1) == "output_blocks.5.2.conv.weight"
    for place in (1, 2):
        name = open_clip_name(f"encoder.layers.3.layer_norm{place}.weight")[0]
        assert name == f"transformer.resblocks.3.ln_{place}.weight"
