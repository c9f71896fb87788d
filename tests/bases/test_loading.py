"""Where bases are looked for, and the one line that says what was found instead."""

import errno
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from sfumato.trainers import lora

from sfumato.errors import BaseModelError, ConfigError, SfumatoError
from sfumato.models import folder as hub
from sfumato.models import loading
from sfumato.models.family import family_from_keys, family_of_config
from sfumato.models.folder import files_to_fetch, load_tokenizer, weight_files
from sfumato.models.loading import find_vae, load_base
from sfumato.models.weights import text_skeleton
from tests.tiny import CPU, hub_with, tiny_pipeline, tiny_pocket_folder, write_folder


@pytest.fixture(scope="module")
def pocket(tmp_path_factory):
    return tiny_pocket_folder(tmp_path_factory.mktemp("pocket") / "private place")


def refusal(source, **options) -> str:
    """The message with which a base is refused; it is one line."""
    with pytest.raises(SfumatoError) as caught:
        load_base(source, precision=CPU, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_pocket_is_the_folder_the_environment_names(pocket, monkeypatch):
    monkeypatch.setenv("SFUMATO_POCKET", str(pocket))
    base = load_base(precision=CPU)
    assert (base.name, base.family.name) == ("pocket", "pocket")
    assert (base.vae_factor, base.resolution, base.token_limit) == (4, 64, 75)
    assert base.encode_text(["a red cat"]).hidden.shape == (1, 77, 32)


def test_a_folder_like_pocket_is_recognised_and_named_without_its_path(pocket):
    base = load_base(pocket, precision=CPU)
    assert (base.name, base.family.name) == ("private place", "pocket")


def test_pocket_in_an_installation_without_it(monkeypatch, tmp_path):
    monkeypatch.delenv("SFUMATO_POCKET", raising=False)
    monkeypatch.setattr(loading, "POCKET_FOLDER", tmp_path)
    assert refusal("pocket") == (
        "pocket: not in this installation. Install sfumato again, or set SFUMATO_POCKET to its folder."
    )


def test_an_environment_that_names_no_base(monkeypatch, tmp_path):
    monkeypatch.setenv("SFUMATO_POCKET", str(tmp_path))
    assert "no model_index.json" in refusal("pocket")


def test_a_precision_by_its_name():
    with pytest.raises(BaseModelError, match=r"precision 'fp32': wanted what sfumato\.precision\.decide"):
        load_base("pocket", precision="fp32")


def test_a_name_that_is_nothing(tmp_path):
    assert "there is no such folder or file" in refusal(tmp_path / "nothing")
    assert "there is no such file" in refusal(tmp_path / "nothing.safetensors")
    assert "there is no such folder or file" in refusal("pockett")


def test_a_web_address():
    said = "this is a web address. Give owner/name instead; the hub's files are fetched by such names."
    assert refusal("https://huggingface.co/owner/name") == f"https://huggingface.co/owner/name: {said}"
    for address in ("https://huggingface.co/owner/name/blob/main/a.safetensors", "http://localhost/a.safetensors"):
        said = "this is a web address. Download the file first, and give its name on this machine."
        assert refusal(address) == f"{address}: {said}"


def test_a_hub_id_without_network(tmp_path, monkeypatch):
    message = refusal("nobody/nothing")
    assert "not in the hub's local cache" in message
    assert "hf download nobody/nothing" in message


class Answer:
    """A hub that answers every question with one error."""

    def __init__(self, error):
        self.error = error

    def model_info(self, _hub_id, timeout):
        raise self.error


def test_a_package_that_diffusers_cannot_load_is_no_fault_of_the_base(sd1, tmp_path, monkeypatch):
    (tmp_path / "brokenformers.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)

    def load(*_, **__):
        importlib.import_module("brokenformers")

    monkeypatch.setattr("sfumato.models.weights._check_layers", load)
    monkeypatch.setattr("sfumato.models.folder.CLIPTokenizer.from_pretrained", load)
    with pytest.raises(OSError, match="libcudart"):
        text_skeleton("CLIPTextModel", {})
    with pytest.raises(OSError, match="libcudart"):
        load_tokenizer(sd1.folder, "tokenizer", 77)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError, "owner/name: gated; its owner asks for an agreement. Accept it"),
        (RepositoryNotFoundError, "owner/name: neither a path here nor a model on the hub"),
        (ConnectionError, "the hub cannot be reached (ConnectionError). Run `hf download owner/name`"),
    ],
)
def test_the_hub_says_no(monkeypatch, error, message):
    answer = error.__new__(error)  # hub errors are made of a response, which there is none of
    monkeypatch.setattr(hub, "HfApi", lambda: Answer(answer))
    assert message in refusal("owner/name")


def test_a_hub_that_is_busy_is_asked_again(monkeypatch):
    busy = HfHubHTTPError.__new__(HfHubHTTPError)
    busy.response = SimpleNamespace(status_code=503)
    api = Answer(busy)
    api.list_repo_files = lambda _hub_id: ["unet/diffusion_pytorch_model.bin"]
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    assert "owner/name: unet has only pickled weights" in refusal("owner/name")


def test_a_name_in_a_folder_that_is_here_is_no_hub_id_unless_the_cache_has_it(tmp_path, monkeypatch, cached, pocket):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert refusal("models/sd15").startswith("models/sd15: there is no sd15 in the folder models. Check the spelling;")
    files = [file for file in pocket.rglob("*") if file.is_file()]
    snapshot = cached("models/sd15", *((file, file.relative_to(pocket)) for file in files))
    assert hub.hub_folder("models/sd15") == snapshot


def test_a_folder_without_index_names_what_it_holds(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    assert "Name pytorch_lora_weights.safetensors in it" in refusal(tmp_path)


def test_a_part_of_a_base_names_the_folder_above_it(pocket):
    assert "name the folder above it, private place." in refusal(pocket / "unet")


def test_a_file_is_no_vae_of_pockets(pocket):
    file = pocket / "vae/diffusion_pytorch_model.safetensors"
    assert "does not tell the shape of a VAE for pocket. Name its folder." in refusal(pocket, vae=file)


def test_a_name_that_the_hub_cannot_have():
    assert refusal("owner/na--me") == "owner/na--me: neither a path here nor a valid hub id. Check the spelling."


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickled_weights_are_refused_by_name(pocket, tmp_path, part):
    folder = shutil.copytree(pocket, tmp_path / "base")
    next((folder / part).glob("*.safetensors")).unlink()
    (folder / part / "pytorch_model.bin").write_bytes(b"not even looked at")
    assert "only pickled weights (pytorch_model.bin)" in refusal(folder)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.BIN"])
def test_a_pickled_checkpoint_is_refused_unopened(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    assert f"{name}: a pickle file" in refusal(tmp_path / name)


def test_a_pickle_named_safetensors_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04" + b"0" * 100)
    assert "model.safetensors: " in refusal(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], "an adapter"),
        (["unet.mid_block.attentions.0.to_q.lora_A.weight"], "an adapter"),
        (["lycoris_mid_block.hada_w1_a"], "an adapter"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (["emb_params"], "a textual inversion"),
        (["clip_l", "clip_g"], "a textual inversion"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "a transformer"),
        (["double_blocks.0.img_attn.qkv.weight"], "a transformer"),
        (["conditioner.embedders.0.model.ln_final.weight", "model.diffusion_model.out.2.bias"], "an SDXL refiner"),
        (["down_blocks.0.resnets.0.conv1.weight"], "the U-Net of a diffusers folder"),
        (["decoder.conv_in.weight"], "a VAE alone"),
        (["text_model.embeddings.token_embedding.weight"], "a text encoder alone"),
        (["model.diffusion_model.out.2.bias"], "a checkpoint without its VAE"),
        (["model.diffusion_model.out.2.bias", "first_stage_model.quant_conv.bias"], "without its text encoder"),
        (["anything"], "none of its 1 weight belongs to a known base"),
    ],
)
def test_other_files_are_called_by_their_names(names, what):
    with pytest.raises(BaseModelError, match=what):
        family_from_keys(names, "a.safetensors")


def test_a_lora_given_as_base(tmp_path):
    save_file({"lora_unet_a.lora_down.weight": torch.ones(1, 2)}, tmp_path / "a.safetensors")
    assert refusal(tmp_path / "a.safetensors") == (
        "a.safetensors: this is an adapter (a LoRA or its kin), not a base. "
        "Name the model that it was made for as the base."
    )


def test_a_unet_of_eight_channels_is_called_editing(sd1, tmp_path):
    tensors = load_file(sd1.file)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[name] = torch.cat([tensors[name]] * 2, dim=1).contiguous()
    save_file(tensors, tmp_path / "a.safetensors")
    assert "takes 8 channels (8 is an editing model), the VAE gives 4." in refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": "v"}, "--prediction-type v: unknown; wanted epsilon or v_prediction."),
        ({"family": "sd3"}, "family 'sd3': unknown; wanted pocket, sd1, sd2, sdxl."),
        ({"clip_skip": 2}, "--clip-skip 2: of 3 layers, 0 to 1 can be skipped."),
        ({"clip_skip": -1}, "--clip-skip -1: of 3 layers, 0 to 1 can be skipped."),
        ({"clip_skip": True}, "--clip-skip True: of 3 layers, 0 to 1 can be skipped."),
        ({"clip_skip": 0.5}, "--clip-skip 0.5: of 3 layers, 0 to 1 can be skipped."),
        ({"vae": 3}, "a base or VAE is named by a text, such as pocket, a folder or a hub id; got a int."),
    ],
)
def test_options_that_make_no_sense(pocket, options, message):
    assert refusal(pocket, **options) == message


@pytest.mark.parametrize("part", ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"])
def test_a_broken_config_is_named(pocket, tmp_path, part):
    folder = shutil.copytree(pocket, tmp_path / "base")
    (folder / part).write_text("{")
    assert refusal(folder) == f"base/{part}: not readable as JSON. Download it again."


def test_a_config_that_is_a_list_is_named(pocket, tmp_path):
    folder = shutil.copytree(pocket, tmp_path / "base")
    (folder / "unet/config.json").write_text("[]")
    assert refusal(folder) == "base/unet/config.json: no JSON object. Download it again."


def test_a_folder_with_a_missing_part(pocket, tmp_path):
    folder = shutil.copytree(pocket, tmp_path / "base")
    shutil.rmtree(folder / "tokenizer")
    assert refusal(folder) == "base/tokenizer: no vocabulary in it. Download the folder again."
    shutil.rmtree(folder / "vae")
    assert refusal(folder) == "vae/config.json: missing. The folder is incomplete; download it again."


def test_another_kind_of_pipeline(pocket, tmp_path):
    folder = shutil.copytree(pocket, tmp_path / "base")
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert "a FluxPipeline has no U-Net of Stable Diffusion" in refusal(folder)


def test_of_a_repository_only_one_set_of_safetensors_is_fetched():
    files = [
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model-00002-of-00002.safetensors",
        "v1-5-pruned.safetensors",
    ]
    assert files_to_fetch(files, "owner/name") == [files[0], files[4], files[5], files[6]]
    with pytest.raises(BaseModelError, match=r"owner/name: unet has only pickled weights"):
        files_to_fetch(["unet/diffusion_pytorch_model.bin"], "owner/name")
    brain = ["unet/diffusion_pytorch_model.bf16.safetensors", "unet/diffusion_pytorch_model.bin"]
    assert files_to_fetch(brain, "owner/name") == brain[:1]
    with pytest.raises(BaseModelError, match=r"of unet there is diffusion_pytorch_model\.non_ema\.safetensors alone"):
        files_to_fetch(files[3:4], "owner/name")


@pytest.mark.parametrize("place", ["", "vae/"])
def test_a_vae_of_the_hub_lies_in_a_repository_of_its_own_or_in_a_bases(place, cached, pocket):
    files = ("config.json", "diffusion_pytorch_model.safetensors")
    snapshot = cached("owner/vae", *((pocket / "vae" / name, f"{place}{name}") for name in files))
    assert find_vae("owner/vae") == (snapshot / place, "owner/vae")
    assert load_base(pocket, vae="owner/vae", precision=CPU).vae is not None
    (snapshot / place / files[1]).unlink()
    assert "not in the hub's local cache" in refusal(pocket, vae="owner/vae")


def test_a_folder_without_a_vae_is_named(pocket, tmp_path):
    (tmp_path / "pictures").mkdir()
    assert refusal(pocket, vae=tmp_path / "pictures").startswith("pictures: no VAE is in this folder. Name one with")


def test_of_a_vaes_repository_the_vae_alone_is_fetched(monkeypatch):
    asked = {}
    own = ["README.md", "config.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"]
    own += ["sdxl_vae.safetensors"]
    base = [*(f"vae/{name}" for name in own[1:4]), "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    for files, wanted in ((own, [own[1], own[3]]), (base, [base[0], base[2]])):
        monkeypatch.setattr(hub, "HfApi", lambda files=files: hub_with(*files))
        monkeypatch.setattr(hub, "_cached", lambda _: None)
        monkeypatch.setattr(hub, "snapshot_download", lambda _, allow_patterns: asked.update(w=allow_patterns) or "x")
        assert hub.hub_vae("owner/name") == Path("x")
        assert asked["w"] == wanted
    monkeypatch.setattr(hub, "HfApi", lambda: hub_with("unet/config.json"))
    with pytest.raises(BaseModelError, match="owner/name: no VAE with a config"):
        hub.hub_vae("owner/name")


@pytest.mark.parametrize("missing", ["unet/config.json", "text_encoder/model.safetensors", "tokenizer"])
def test_a_base_that_is_not_whole_in_the_cache_is_asked_for_again(missing, cached, pocket):
    files = [file for file in pocket.rglob("*") if file.is_file()]
    snapshot = cached("owner/base", *((file, file.relative_to(pocket)) for file in files))
    assert hub.hub_folder("owner/base") == snapshot
    if (snapshot / missing).is_dir():
        shutil.rmtree(snapshot / missing)
    else:
        (snapshot / missing).unlink()
    assert "not in the hub's local cache" in refusal("owner/base")


def test_a_base_in_the_cache_with_a_shard_missing_is_asked_for_again(cached, pocket, tmp_path):
    whole = pocket / "unet/diffusion_pytorch_model.safetensors"
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    files = [(file, file.relative_to(pocket)) for file in pocket.rglob("*") if file.is_file() and file != whole]
    files += [(index, f"unet/{index.name}"), (whole, "unet/one.safetensors")]
    cached("owner/base", *files)
    assert "not in the hub's local cache" in refusal("owner/base")
    snapshot = cached("owner/base", (whole, "unet/two.safetensors"))
    assert hub.hub_folder("owner/base") == snapshot


def test_whole_weights_are_read_before_those_of_half_precision(tmp_path):
    files = [tmp_path / f"{name}.safetensors" for name in ("model", "model.fp16", "model.bf16")]
    for file in files:
        file.touch()
    for file in files:
        assert weight_files(tmp_path) == [file]
        file.unlink()


@pytest.mark.parametrize(
    ("index", "zeros"),
    [
        ({"_class_name": "StableDiffusionXLPipeline"}, True),
        ({"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": False}, False),
        ({"_class_name": "StableDiffusionPipeline"}, False),
    ],
)
def test_sdxl_takes_zeros_for_no_prompt_unless_its_folder_says_otherwise(index, zeros):
    assert loading._wants_zeros(index) is zeros


@pytest.mark.parametrize("index", ["{}", "[]", "{", "[" * 5000])
def test_an_index_that_names_nothing_is_no_whole_base(index, cached, tmp_path):
    (tmp_path / "model_index.json").write_text(index)
    cached("owner/base", (tmp_path / "model_index.json", "model_index.json"))
    assert "not in the hub's local cache" in refusal("owner/base")


def test_a_disk_that_takes_no_download_is_told_from_a_hub_that_is_not_there(monkeypatch):
    error = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(hub, "HfApi", lambda: Answer(error))
    assert "owner/name: the download could not be written to " in (message := refusal("owner/name"))
    assert "(No space left on device). Make room there" in message


@pytest.mark.parametrize(
    ("file", "change", "what"),
    [
        ("model_index.json", {"unet": None}, "has no U-Net of Stable Diffusion"),
        ("model_index.json", {"text_encoder": None}, "without text_encoder"),
        ("unet/config.json", {"block_out_channels": [32]}, "the U-Net's config.json describes none"),
        ("text_encoder/config.json", {"hidden_size": "wide"}, "the text encoder's config.json describes none"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "a AutoencoderTiny, wanted an AutoencoderKL"),
        ("unet/config.json", {"cross_attention_dim": 48}, "Config and weights belong to different models"),
    ],
)
def test_a_config_that_describes_nothing_is_one_line(file, change, what, pocket, tmp_path):
    folder = shutil.copytree(pocket, tmp_path / "base")
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | change))
    assert what in refusal(folder)


def with_scheduler(folder, **changes):
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_a_scheduler_that_cannot_be_made_is_replaced_and_told(pocket, tmp_path):
    """The base is as good as any: what learns and draws takes its betas."""
    folder = shutil.copytree(pocket, tmp_path / "base")
    with_scheduler(folder, _class_name="DPMSolverMultistepScheduler", algorithm_type="dpmsolver")
    with pytest.warns(
        UserWarning, match=r"base: DPMSolverMultistepScheduler cannot be made \(.*\); DDIM stands in for"
    ):
        base = load_base(folder, precision=CPU)
    assert torch.equal(base.alpha_bar, load_base(pocket, precision=CPU).alpha_bar)
    assert type(base.scheduler).__name__ == "DDIMScheduler"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"beta_schedule": "odd"}, "odd"),
        ({"_class_name": "NoSuchScheduler"}, "diffusers has no scheduler NoSuchScheduler"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "has no betas"),
    ],
)
def test_a_schedule_that_is_none_of_ours_is_one_line(changes, said, pocket, tmp_path):
    folder = with_scheduler(shutil.copytree(pocket, tmp_path / "base"), **changes)
    assert said in (message := refusal(folder))
    assert "\n" not in message


def test_a_tokenizer_that_knows_more_than_its_text_encoder_is_refused(pocket, tmp_path):
    folder = shutil.copytree(pocket, tmp_path / "base")
    tokenizer = load_base(pocket, precision=CPU, unet=False).tokenizers[0]
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    assert "base: tokenizer has " in (message := refusal(folder))
    assert "tokens, and text_encoder rows for" in message


def test_a_text_of_another_width_is_refused(pocket, tmp_path):
    folder = shutil.copytree(pocket, tmp_path / "base")
    encoder = load_base(pocket, precision=CPU).text_encoders[0]
    encoder.config.hidden_size = 48
    type(encoder)(encoder.config).save_pretrained(folder / "text_encoder")
    assert "base: the U-Net takes text of width 32, the text encoder gives 48." in refusal(folder)


def test_a_pooled_text_of_another_width_is_refused(sdxl, tmp_path):
    folder = shutil.copytree(sdxl.folder, tmp_path / "base")
    pipe = tiny_pipeline("sdxl")
    config = pipe.text_encoder_2.config
    config.projection_dim += 8
    type(pipe.text_encoder_2)(config).save_pretrained(folder / "text_encoder_2")
    assert "base: the U-Net takes a pooled text of 96 numbers, the second text encoder gives 104." in refusal(folder)


def test_the_smallest_distilled_models_are_of_sd1():
    """BK-SDM-Tiny and segmind's tiny-sd: attention on all levels as pocket has it, and no middle."""
    levels = {"down_block_types": ["CrossAttnDownBlock2D"] * 3}
    assert family_of_config(levels | {"mid_block_type": None}).name == "sd1"
    assert family_of_config(levels | {"mid_block_type": "UNetMidBlock2DCrossAttn"}).name == "pocket"


def test_words_of_several_vectors_that_diffusers_loaded_are_read_as_its_pipeline_reads_them(sdxl, tmp_path):
    pipe = tiny_pipeline("sdxl")
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        width = encoder.config.hidden_size
        vectors = {"<cat>": torch.randn(3, width, generator=torch.Generator().manual_seed(width))}
        pipe.load_textual_inversion(vectors, token="<cat>", text_encoder=encoder, tokenizer=tokenizer)
    pipe.save_pretrained(tmp_path / "base")
    base = load_base(tmp_path / "base", precision=CPU)
    found = base.encode_text(["a <cat> x"])
    hidden, _, pooled, _ = pipe.encode_prompt("a <cat> x", device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(found.hidden, hidden)
    torch.testing.assert_close(found.pooled, pooled)


def test_importing_the_package_loads_no_torch():
    code = "import sys, sfumato.models, sfumato.models.family; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        (
            "scheduler/scheduler_config",
            {"num_train_timesteps": 300_000_000},
            "_timesteps is 300000000; wanted",
        ),
        ("scheduler/scheduler_config", {"num_train_timesteps": 0}, "num_train_timesteps is 0; wanted"),
        ("scheduler/scheduler_config", {"trained_betas": -1}, "Correct scheduler_config.json."),
        ("unet/config", {"layers_per_block": 1_000_000}, "1,000,000 for layers_per_block, wanted at most 100"),
        ("unet/config", {"transformer_layers_per_block": [1, [1, 101]]}, "101 for transformer_layers_per_block"),
        ("unet/config", {"layers_per_block": 100, "transformer_layers_per_block": 100}, "layers in all"),
        ("vae/config", {"down_block_types": ["DownEncoderBlock2D"] * 101}, "101 for down_block_types"),
        ("text_encoder/config", {"num_hidden_layers": 1_000_000}, "1,000,000 for num_hidden_layers"),
    ],
)
def test_a_base_larger_than_any_is_refused_before_it_is_made(file, change, said, pocket, tmp_path):
    assert said in refusal(changed(pocket, tmp_path, f"{file}.json", change))


def changed(pocket, tmp_path, part, change):
    """A copy of the folder, with this in one of its JSON files."""
    folder = Path(shutil.copytree(pocket, tmp_path / "base"))
    settings = json.loads((folder / part).read_text())
    (folder / part).write_text(json.dumps(settings | change))
    return folder


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_a_text_encoder_gets_no_program_from_the_hub(name):
    config = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    model = text_skeleton("CLIPTextModel", config | {name: "someone/kernel", "auto_map": {"AutoModel": "a.B"}})
    assert "someone" not in str(model.config._attn_implementation)
    assert not hasattr(model.config, "auto_map")


def test_a_text_encoder_has_no_labels_however_many_its_config_says():
    config = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    assert text_skeleton("CLIPTextModel", config | {"num_labels": 10_000}).config.num_labels == 2


@pytest.mark.parametrize("text", ["[" * 5000, "[]"])
def test_a_vocabulary_that_is_none_is_one_line(text, pocket, tmp_path):
    folder = Path(shutil.copytree(pocket, tmp_path / "base"))
    (folder / "tokenizer/tokenizer_config.json").write_text(text)
    assert "base/tokenizer: the tokenizer cannot be read" in refusal(folder)


def test_a_tokenizers_settings_of_another_kind_are_one_line(pocket, tmp_path):
    folder = changed(pocket, tmp_path, "tokenizer/tokenizer_config.json", {"added_tokens_decoder": 5})
    assert "base/tokenizer: the tokenizer cannot be read" in refusal(folder)


@pytest.mark.parametrize(
    "change", [{"num_class_embeds": 4}, {"class_embed_type": "timestep"}, {"class_embed_type": "identity"}]
)
def test_a_unet_that_takes_a_class_is_refused(change, tmp_path):
    folder = write_folder(tiny_pipeline("sd2", shallow=True), tmp_path / "base")
    unet = UNet2DConditionModel.from_config({**UNet2DConditionModel.load_config(folder / "unet"), **change})
    unet.save_pretrained(folder / "unet")
    with pytest.raises(BaseModelError, match="an image's embedding or a class beside the prompt, as unCLIP"):
        load_base(folder, precision=CPU)


def test_an_adapter_is_not_trained_on_a_unet_that_takes_the_guidance(tmp_path, pictures):
    folder = write_folder(tiny_pipeline("sd1", shallow=True), tmp_path / "base")
    config = {**UNet2DConditionModel.load_config(folder / "unet"), "time_cond_proj_dim": 8}
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    trained = lora.Config(images=pictures, output=tmp_path / "run", base=str(folder), caption="a square", device="cpu")
    with pytest.raises(ConfigError, match="distilled for few steps"):
        lora.train(trained)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["PNDMScheduler", "HeunDiscreteScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
def test_a_zero_terminal_snr_is_in_the_bases_own_scheduler(name, tmp_path):
    """It is written beside a whole model that was trained, for diffusers to draw with."""
    folder = write_folder(tiny_pipeline("sd1", shallow=True), tmp_path / "base")
    file = folder / "scheduler/scheduler_config.json"
    told = json.loads(file.read_text()) | {"_class_name": name, "prediction_type": "v_prediction"}
    file.write_text(json.dumps(told))
    base = load_base(folder, precision=CPU, zero_terminal_snr=True)
    base.scheduler.save_pretrained(tmp_path / "again")
    again = getattr(diffusers, json.loads((tmp_path / "again/scheduler_config.json").read_text())["_class_name"])
    # Euler's keeps the last one above 0, so that sigmas are finite.
    assert again.from_pretrained(tmp_path / "again").alphas_cumprod[-1] < 1e-6
    assert base.alpha_bar[-1] == 0
