"""What a loaded base computes equals what its diffusers pipeline computes."""

import copy
import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sfumato.adapters.embeddings import embedding
from sfumato.errors import BaseModelError, ConfigError, FileError
from sfumato.files.header import read_header
from sfumato.models import load_base
from sfumato.models.base import public_config
from sfumato.models.diffusion import alphas_cumprod
from sfumato.models.family import FAMILIES, family_of_config
from sfumato.models.single_file import packaged_config
from sfumato.models.vocabulary import byte_pair_tokenizer, clip_merges
from sfumato.models.weights import LazyModel, LazyWeights, StoredWeight
from tests.tiny import CPU, MERGES, few_words, tiny_pipeline, write_folder

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def test_alpha_bar_is_the_schedulers(tiny):
    assert torch.equal(tiny.base.alpha_bar, tiny.pipe.scheduler.alphas_cumprod)
    assert tiny.base.alpha_bar.shape == (1000,)


def test_a_base_is_one_line_in_a_notebook(tiny):
    base = tiny.base
    assert repr(base) == f"<Base {base.name}: {base.family.name}, {base.prediction_type}, fp32 on cpu>"


def test_prediction_types_are_those_of_the_published_schedulers(sd1, sd2, sdxl):
    kinds = [made.base.prediction_type for made in (sd1, sd2, sdxl)]
    assert kinds == ["epsilon", "v_prediction", "epsilon"]


def test_zero_terminal_snr_ends_in_zero_as_ddim_has_it():
    config = BETAS | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    values = alphas_cumprod(config, "base")
    assert torch.equal(values, diffusers.DDIMScheduler(**config).alphas_cumprod)
    assert values[-1] == 0
    assert torch.allclose(values[:1], alphas_cumprod(BETAS, "base")[:1])


def test_betas_that_a_schedule_lists_are_its_own():
    values = alphas_cumprod({"num_train_timesteps": 3, "trained_betas": [0.1, 0.2, 0.5]}, "base")
    assert torch.allclose(values, torch.tensor([0.9, 0.72, 0.36]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BETAS | {"rescale_betas_zero_snr": True}, "zero terminal SNR"),
        (BETAS | {"prediction_type": "sample"}, "predicts 'sample'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}, "has no betas"),
        ({"_class_name": "EDMEulerScheduler", "num_train_timesteps": 1000, "sigma_data": 0.5}, "has no betas"),
    ],
)
def test_schedules_that_cannot_be_trained_are_refused(config, message):
    with pytest.raises(BaseModelError, match=message):
        alphas_cumprod(config, "base")


def test_the_users_prediction_type_wins(sd1):
    base = load_base(sd1.folder, precision=CPU, prediction_type="v_prediction", unet=False)
    assert base.prediction_type == "v_prediction"
    assert base.pipeline().scheduler.config.prediction_type == "v_prediction"


def test_time_ids_and_pooled_text_are_the_pipelines(sdxl):
    text = sdxl.base.encode_text(["a cat", "a dog"])
    added = sdxl.base.added_conditions(text, [(640, 480), (64, 64)], [(0, 12), (3, 0)], [(64, 48), (64, 64)])
    reference = sdxl.pipe._get_add_time_ids(
        (640, 480), (0, 12), (64, 48), torch.float32, text_encoder_projection_dim=96
    )
    assert torch.equal(added["time_ids"][:1], reference)
    assert added["time_ids"].tolist() == [[640, 480, 0, 12, 64, 48], [64, 64, 3, 0, 64, 64]]
    assert torch.equal(added["text_embeds"], text.pooled)


def test_sdxl_asks_for_a_pooled_text(sdxl):
    text = dataclasses.replace(sdxl.base.encode_text(["a cat"]), pooled=None)
    with pytest.raises(BaseModelError, match="SDXL wants a pooled text embedding, this text has none"):
        sdxl.base.added_conditions(text, [(64, 64)], [(0, 0)], [(64, 64)])


def test_only_sdxl_takes_added_conditions(sd1):
    text = sd1.base.encode_text(["a cat"])
    assert sd1.base.added_conditions(text, [(64, 64)], [(0, 0)], [(64, 64)]) is None


def test_the_prediction_is_the_unets(sdxl):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = sdxl.base.encode_text(["a cat"])
    added = sdxl.base.added_conditions(text, [(64, 64)], [(0, 0)], [(64, 64)])
    with torch.no_grad():
        wanted = sdxl.pipe.unet(latents, 500, text.hidden, added_cond_kwargs=added).sample
    # To rounding: the base's products are another library's on some CPUs (sfumato.precision.cpu_matmul).
    torch.testing.assert_close(sdxl.base.predict(latents, torch.tensor([500]), text, added), wanted)


def test_encoding_is_the_vaes_scaled(sd1):
    pixels = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        encoded = sd1.pipe.vae.encode(pixels).latent_dist
    mean, deviation = sd1.base.encode_pixels(pixels)
    assert mean.shape == (1, 4, 8, 6)
    torch.testing.assert_close(mean, encoded.mean * 0.18215)
    torch.testing.assert_close(deviation, encoded.std * 0.18215)


def test_a_shift_is_subtracted_from_the_mean_and_added_before_decoding(sd1):
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain, deviation = sd1.base.encode_pixels(pixels)
    decoded = sd1.base.decode(plain)
    sd1.base.vae.register_to_config(shift_factor=0.5)
    try:
        mean, same = sd1.base.encode_pixels(pixels)
        torch.testing.assert_close(mean, plain - 0.5 * 0.18215)
        assert torch.equal(same, deviation)
        torch.testing.assert_close(sd1.base.decode(mean), decoded, atol=5e-5, rtol=1e-4)  # threads round otherwise
    finally:
        sd1.base.vae.register_to_config(shift_factor=None)


class Overflowing(nn.Module):
    """A VAE whose decoding has no finite value below fp32."""

    def __init__(self, config, finite_in):
        super().__init__()
        self.config, self.finite_in, self.weight = config, finite_in, nn.Parameter(torch.ones(1))

    @property
    def dtype(self):
        return self.weight.dtype

    def decode(self, latents):
        value = 0.25 if self.dtype == self.finite_in else float("nan")
        return diffusers.models.autoencoders.vae.DecoderOutput(sample=torch.full((1, 3, 8, 8), value, dtype=self.dtype))


def test_an_overflowing_vae_decodes_again_in_fp32_and_stays_as_it_was(sd1):
    base = dataclasses.replace(sd1.base, vae=Overflowing(sd1.base.vae.config, torch.float32).bfloat16())
    with pytest.warns(UserWarning, match="overflowed"):
        pixels = base.decode(torch.zeros(1, 4, 1, 1))
    assert pixels.unique().tolist() == [0.25]
    assert base.vae.dtype == torch.bfloat16


def test_a_vae_that_finds_no_memory_in_fp32_stays_as_it_was(sd1, monkeypatch):
    base = dataclasses.replace(sd1.base, vae=Overflowing(sd1.base.vae.config, torch.float32).bfloat16())
    decode = base.vae.decode

    def small(latents):
        if base.vae.dtype == torch.float32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(latents)

    monkeypatch.setattr(base.vae, "decode", small)
    with pytest.warns(UserWarning, match="overflowed"), pytest.raises(torch.OutOfMemoryError):
        base.decode(torch.zeros(1, 4, 1, 1))
    assert base.vae.dtype == torch.bfloat16


def test_a_picture_that_is_never_finite_is_an_error(sd1):
    base = dataclasses.replace(sd1.base, vae=Overflowing(sd1.base.vae.config, None))
    with pytest.raises(BaseModelError, match="not finite"):
        base.decode(torch.zeros(1, 4, 1, 1))


def test_the_pipeline_shares_the_modules_and_draws_what_the_base_decodes(tiny):
    pipe = tiny.base.pipeline("ddim")
    assert pipe.unet is tiny.base.unet
    assert pipe.vae is tiny.base.vae
    pipe.set_progress_bar_config(disable=True)
    settings = {"prompt": "a cat", "num_inference_steps": 2, "height": 64, "width": 64}

    def draw(kind):
        return pipe(**settings, generator=torch.Generator().manual_seed(0), output_type=kind).images

    assert torch.equal(tiny.base.decode(draw("latent")) / 2 + 0.5, draw("pt"))


@pytest.mark.parametrize("zeros", [False, True])
def test_the_pipeline_takes_zeros_for_no_negative_prompt_as_the_base_does(zeros, sdxl):
    pipe = dataclasses.replace(sdxl.base, zeros_for_empty_prompt=zeros).pipeline()
    assert pipe.config.force_zeros_for_empty_prompt is zeros


def test_an_unknown_sampler_is_an_error(sd1):
    with pytest.raises(ConfigError, match="--sampler nothing: unknown; wanted one of ddim, "):
        sd1.base.pipeline("nothing")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_familys_own_sampler_exists(sd1, family):
    sampler = FAMILIES[family].defaults.sampler
    assert torch.equal(sd1.base.pipeline(sampler).scheduler.alphas_cumprod, sd1.base.alpha_bar)


def test_the_fingerprint_follows_the_weights_not_the_place(sd1, tmp_path):
    folder = write_folder(sd1.pipe, tmp_path / "elsewhere")
    moved = load_base(folder, precision=CPU)
    assert moved.fingerprint() == sd1.base.fingerprint()
    assert moved.adapted_fingerprint() == sd1.base.adapted_fingerprint()
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"][0] += 1
    save_file(tensors, weights)
    other = load_base(folder, precision=CPU)
    assert other.fingerprint() != sd1.base.fingerprint()
    assert other.adapted_fingerprint() != sd1.base.adapted_fingerprint()


@pytest.mark.parametrize(
    ("name", "about", "told"),
    [
        ("pocket", {"ss_sd_model_name": "pocket", "sfumato.base_fingerprint": "another"}, True),
        ("pocket", {"ss_sd_model_name": "pocket", "sfumato.base_fingerprint": "its own"}, False),
        ("pocket", {"ss_sd_model_name": "pocket"}, False),
        ("pocket", {"ss_sd_model_name": "my pocket", "sfumato.base_fingerprint": "another"}, False),
        ("sd1", {"ss_sd_model_name": "sd1", "sfumato.base_fingerprint": "another"}, False),
    ],
)
def test_only_another_release_of_pocket_is_told_of(sd1, name, about, told):
    base = dataclasses.replace(sd1.base, name=name)
    about = {key: base.adapted_fingerprint() if text == "its own" else text for key, text in about.items()}
    assert base.is_another_release(about) is told


def test_an_adapter_is_of_the_same_base_in_another_dtype(sd1, tmp_path):
    """Half precision saved anew in fp32; what fp16 rounds is another base. What earlier versions wrote stays valid."""

    def stored(*dtypes):
        tensor, file = torch.arange(1.0, 3001.0).reshape(3, 1000) / 2999, tmp_path / f"{dtypes}.safetensors"
        for dtype in dtypes:
            tensor = tensor.to(dtype)
        save_file({"weight": tensor}, file)
        places = {"weight": StoredWeight(read_header(file), "weight")}
        shell = LazyModel(nn.Linear(1000, 3, bias=False, device="meta"), places, torch.float32, "pocket")
        lazy_weights = LazyWeights({"unet": [shell]}, lambda *_: None)
        before = hashlib.sha256(b"weight" + tensor.view(torch.uint8).numpy().tobytes()[:4096]).hexdigest()
        return dataclasses.replace(sd1.base, name="pocket", lazy_weights=lazy_weights), before

    def told(fingerprint):
        return {"ss_sd_model_name": "pocket", "sfumato.base_fingerprint": fingerprint}

    (fp32, first), (fp16, second), (bf16, third) = map(stored, (torch.float32, torch.float16, torch.bfloat16))
    assert [each.adapted_fingerprint() for each in (fp32, fp16, bf16)] == [first, second, third]
    assert fp32.is_another_release(told(second))
    for narrow, fingerprint in ((torch.float16, second), (torch.bfloat16, third)):
        wide, before = stored(narrow, torch.float32)
        assert wide.adapted_fingerprint() == fingerprint != before
        assert not wide.is_another_release(told(before))


def test_the_fingerprint_follows_the_prediction_type(sd1):
    other = load_base(sd1.folder, precision=CPU, prediction_type="v_prediction", unet=False)
    assert other.fingerprint() != sd1.base.fingerprint()


def test_both_fingerprints_follow_tokenizer_schedule_and_empty_prompt(sd1):
    def prints(base):
        return base.fingerprint(), base.quick_fingerprint()

    def changed(**parts):
        return prints(dataclasses.replace(sd1.base, **parts))

    same = few_words(pad_token="<|endoftext|>", positions=77)
    same(["a call", "of two"], padding=True, truncation=True, max_length=5)
    spoken = dataclasses.replace(sd1.base, tokenizers=(same,))
    with embedding.new_words(spoken, ["<otter>"], vectors=2):
        assert prints(spoken) == changed() == prints(sd1.base)
    schedule = sd1.base.scheduler
    others = [
        changed(tokenizers=(few_words(pad_token="!", positions=77),)),
        changed(tokenizers=(byte_pair_tokenizer(clip_merges()[: MERGES - 1], positions=77),)),
        changed(zeros_for_empty_prompt=True),
        changed(scheduler=type(schedule).from_config({**schedule.config, "rescale_betas_zero_snr": True})),
    ]
    for kind in zip(*others, changed(), strict=True):
        assert len({*kind}) == 5


@pytest.mark.parametrize("name", ["conv_in.bias", "mid_block.resnets.0.conv1.weight"])
def test_both_fingerprints_notice_one_layer_that_learned_on(name, sd1, tmp_path):
    folder = shutil.copytree(sd1.folder, tmp_path / sd1.folder.name)
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name] + 1}, file)
    other = load_base(folder, precision=CPU)
    assert other.quick_fingerprint() != sd1.base.quick_fingerprint()
    assert other.fingerprint() != sd1.base.fingerprint()


@pytest.mark.parametrize(("part", "is_adapted"), [("unet", True), ("text_encoder", True), ("vae", False)])
def test_what_adapters_are_of_has_any_vae_and_a_base_one(part, is_adapted, sd1, tmp_path):
    folder = shutil.copytree(sd1.folder, tmp_path / sd1.folder.name)
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = min(tensors)
    save_file(tensors | {name: tensors[name] + 1}, file)
    other = load_base(folder, precision=CPU, unet=False)
    assert (other.adapted_fingerprint() != sd1.base.adapted_fingerprint()) is is_adapted
    assert other.fingerprint() != sd1.base.fingerprint()
    assert other.quick_fingerprint() != sd1.base.quick_fingerprint()


@pytest.mark.parametrize("part", ["denoiser", "vae", "text_encoders"])
def test_without_files_a_base_is_known_by_the_weights_of_all_its_parts(part, sd1):
    def loose(**parts):
        return dataclasses.replace(sd1.base, files=(), **parts).fingerprint()

    found = copy.deepcopy(getattr(sd1.base, part))
    assert loose(**{part: found}) == loose()
    next((found[0] if part == "text_encoders" else found).parameters()).data.add_(1)
    assert loose(**{part: found}) != loose()


def test_a_config_is_the_same_whoever_wrote_it():
    told = {"width": 8, "_name_or_path": "/home/someone/sd", "transformers_version": "5.1"}
    one, other = (SimpleNamespace(config=config) for config in (told, {"width": 8}))
    assert public_config(one) == public_config(other) != public_config(SimpleNamespace(config={"width": 9}))


def test_a_file_that_was_replaced_has_no_fingerprint(sd1, tmp_path):
    """It would be of another base than the one in memory."""
    folder = shutil.copytree(sd1.folder, tmp_path / "replaced")
    base = load_base(folder, precision=CPU, unet=False)
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(FileError, match="was replaced or written over while it was in use"):
        base.fingerprint()


def test_everything_is_frozen(tiny):
    modules = (tiny.base.unet, tiny.base.vae, *tiny.base.text_encoders)
    assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())
    assert not any(module.training for module in modules)


@pytest.mark.parametrize("prompts", ["a cat", []])
def test_a_text_in_place_of_texts_is_refused(sd1, prompts):
    """Its letters would be encoded, each as a prompt."""
    with pytest.raises(ConfigError, match=r"wanted a list of one or more, such as \['a crab'\]"):
        load_base(sd1.folder, precision=CPU).encode_text(prompts)


def test_text_carries_gradients_only_where_asked(sd1):
    bias = sd1.base.text_encoders[0].final_layer_norm.bias.requires_grad_(True)
    try:
        assert not sd1.base.encode_text(["a cat"]).hidden.requires_grad
        assert sd1.base.encode_text(["a cat"], grad=True).hidden.requires_grad
    finally:
        bias.requires_grad_(False)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_published_unets_are_recognised(family):
    assert family_of_config(packaged_config(family, "unet/config.json")).name == family


def test_sizes_are_read_from_the_model(sd1):
    assert (sd1.base.resolution, sd1.base.vae_factor) == (64, 8)
    assert sd1.base.defaults.resolution == 64
    assert sd1.base.defaults.steps == FAMILIES["sd1"].defaults.steps


def test_nonfinite_weights_are_refused(tmp_path):
    pipe = tiny_pipeline("sd1")
    with torch.no_grad():
        pipe.unet.conv_in.bias[0] = float("nan")
    with pytest.raises(FileError, match=r"NaN or Inf, first conv_in\.bias"):
        load_base(write_folder(pipe, tmp_path / "base"), precision=CPU)


def test_latents_with_a_mean_for_each_channel_are_scaled_as_sdxls_pipeline_scales_them(sdxl):
    base = load_base(sdxl.folder, precision=CPU)
    before = (
        base.encode_pixels(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64))[0] / base.vae.config.scaling_factor
    )
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, deviation = [0.5, -1.0, 0.0, 2.0], [0.5, 2.0, 4.0, 1.0]
    base.vae.register_to_config(latents_mean=mean, latents_std=deviation)
    means, deviations = (torch.tensor(each).view(1, 4, 1, 1) for each in (mean, deviation))
    after = base.encode_pixels(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64))[0]
    torch.testing.assert_close(after, (before - means) * base.vae.config.scaling_factor / deviations)
    with torch.no_grad():
        wanted = base.vae.decode(latents * deviations / base.vae.config.scaling_factor + means).sample
    torch.testing.assert_close(base.decode(latents), wanted.clamp(-1, 1))


def test_a_pipeline_in_python_brings_no_warnings_of_parts_that_are_not_used(pocket_folder):
    code = f"import sfumato\nprint(type(sfumato.load_base({str(pocket_folder)!r}).pipeline()).__name__)"
    quiet = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=quiet)
    assert done.stdout.strip() == "StableDiffusionPipeline", done.stderr
    assert "torchvision" not in done.stderr
