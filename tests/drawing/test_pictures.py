"""Pictures: each its seed's own, on the base's own schedule, and never a broken one."""

import logging
import subprocess
import sys
from importlib.util import find_spec
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    TCDScheduler,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from torch.testing import assert_close
from transformers import CLIPConfig, CLIPImageProcessor

from sfumato.data.images import open_image
from sfumato.errors import BaseModelError, ConfigError, DataError
from sfumato.generation.decoding import decode_batch_size, to_pil
from sfumato.generation.draw import Start, check_steps, draw, draw_each, drawn_at_once
from sfumato.generation.image_options import round_side, size_like
from sfumato.generation.pipeline_call import PipelineCall
from sfumato.models import load_base
from sfumato.precision import decide
from sfumato.utils import schedulers
from tests.pixels import difference
from tests.tiny import CPU, tiny_pipeline


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline("sd1", shallow=True)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_plain_diffusers_with_the_same_seed_draws_the_same_picture(family):
    pipe = tiny_pipeline(family, shallow=True)
    theirs = pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(7)).images[0]
    assert difference(draw(pipe, "a cat", 7, steps=2)[0], theirs) <= 1


def test_a_base_draws_what_its_pipeline_draws(pocket):
    defaults = pocket.defaults
    options = {"num_inference_steps": defaults.sampling_steps, "guidance_scale": defaults.guidance}
    theirs = pocket.pipeline()("a cat", generator=torch.Generator().manual_seed(7), **options).images[0]
    ours = draw(pocket, "a cat", 7)[0]
    assert ours.size == (64, 64)
    assert difference(ours, theirs) <= 1


def test_a_picture_does_not_depend_on_its_place_in_the_batch(pocket):
    together = draw(pocket, ["a cat", "a red cat", "a cat"], [1, 2, 3], steps=3)
    assert difference(together[2], draw(pocket, "a cat", 3, steps=3)[0]) <= 1
    assert difference(together[1], draw(pocket, ["a cat", "a red cat"], [9, 2], steps=3, batch=1)[1]) <= 1
    assert difference(together[0], together[2]) > 1


def test_fewer_are_drawn_at_once_where_memory_does_not_hold_them(pocket, monkeypatch):
    """A batch of seven, of which memory holds two."""
    seeds = [1, 2, 3, 4, 5, 6, 7]
    together, draw_call, sizes = draw(pocket, "a cat", seeds, steps=2), PipelineCall.draw, []

    def limited(call, texts, noises, starts):
        sizes.append(len(texts))
        if len(texts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return draw_call(call, texts, noises, starts)

    monkeypatch.setattr(PipelineCall, "draw", limited)
    found = draw(pocket, "a cat", seeds, steps=2)
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert [difference(*pair) <= 1 for pair in zip(found, together, strict=True)] == [True] * 7


@pytest.mark.parametrize(
    ("error", "count"), [(torch.OutOfMemoryError("CUDA out of memory."), 1), (RuntimeError("shapes differ"), 4)]
)
def test_one_that_does_not_fit_and_other_errors_end(pocket, monkeypatch, error, count):
    calls = []

    def broken(call, texts, noises, starts):
        calls.append(len(texts))
        raise error

    monkeypatch.setattr(PipelineCall, "draw", broken)
    with pytest.raises(type(error)):
        draw(pocket, "a cat", [*range(count)], steps=2)
    assert calls == [count]


def test_a_picture_does_not_depend_on_how_long_the_prompts_beside_it_are(pocket):
    pytest.importorskip("compel")
    prompts = ["a cat", "red cat, " * 40, "a red cat"]
    together = draw(pocket, prompts, [1, 2, 3], steps=3, syntax="a1111")
    alone = [draw(pocket, prompts[i], i + 1, steps=3, syntax="a1111")[0] for i in range(3)]
    assert [difference(*pair) <= 1 for pair in zip(together, alone, strict=True)] == [True] * 3


def test_ancestral_noise_too_is_the_pictures_own(pocket):
    together = draw(pocket, "a cat", [1, 2, 3], steps=3, sampler="euler a")
    assert difference(together[2], draw(pocket, "a cat", 3, steps=3, sampler="euler a")[0]) <= 1


def test_the_same_call_twice_gives_equal_bytes(pocket):
    first, second = (draw(pocket, ["a cat", "red"], [1, 2], steps=2, negative="re") for _ in range(2))
    assert [picture.tobytes() for picture in first] == [picture.tobytes() for picture in second]


def test_width_and_height_are_not_mixed_up(pocket):
    assert draw(pocket, "a cat", 1, steps=1, width=32, height=64)[0].size == (32, 64)


@pytest.mark.slow
def test_every_sampler_keeps_the_bases_schedule_and_leaves_the_pipelines_alone(pocket):
    """2 steps of each draw a picture; the betas and what is predicted are the base's."""
    schedule = pocket.scheduler.config
    pipe = pocket.pipeline()
    own = pipe.scheduler
    for name, sampler in schedulers.SAMPLERS.items():
        if sampler.needs and find_spec(sampler.needs) is None:
            with pytest.raises(ConfigError, match=f"--sampler {name}: needs {sampler.needs}, which is not installed"):
                schedulers.make_scheduler(name, schedule)
            continue
        made = schedulers.make_scheduler(name, schedule)
        assert made.config.prediction_type == "v_prediction"
        assert (made.config.beta_start, made.config.beta_end) == (0.00085, 0.012)
        if sampler.schedule != "SGM Uniform":  # which the base's own spacing is already
            assert schedulers.scheduler_label(made) == (sampler.label, sampler.schedule)
        else:
            assert made.config.timestep_spacing == "trailing"
        assert len(draw(pipe, "a cat", 1, steps=2, sampler=name, width=32, height=32, guidance=1.0)) == 1
        assert pipe.scheduler is own


def test_a_sampler_is_spaced_as_diffusers_spaces_it_on_a_base_that_says_nothing_of_it():
    """As SD 1.5 and 2.1 are published: PNDM's own spacing is none of DPM++'s."""
    config = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1).config
    for name, kind in (("dpm++ 2m", DPMSolverMultistepScheduler), ("euler", EulerDiscreteScheduler)):
        ours, theirs = schedulers.make_scheduler(name, config), kind.from_config(config)
        ours.set_timesteps(8)
        theirs.set_timesteps(8)
        assert_close(ours.timesteps, theirs.timesteps)
    few = schedulers.make_scheduler("euler sgm_uniform", config | {"timestep_spacing": "leading"})
    few.set_timesteps(4)
    assert few.timesteps.tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize("name", ["DPM++ 2M Karras", "dpmpp_2m_karras", "dpm++-2m-karras"])
def test_a_sampler_goes_by_any_spelling_of_its_name(name):
    assert schedulers.find_sampler(name) is schedulers.SAMPLERS["dpm++ 2m karras"]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ("dpm_2 k_dpm_2", "dpm2"),
        ("dpm_2_ancestral k_dpm_2_a", "dpm2 a"),
        ("k_euler_a euler_ancestral eulera", "euler a"),
        ("uni_pc", "unipc"),
        ("dpmpp_2m_sde_gpu", "dpm++ 2m sde"),
        ("dpmsolver++ dpm++2m", "dpm++ 2m"),
        ("LCM lcm_sgm_uniform", "lcm"),
    ],
)
def test_a_sampler_goes_by_its_name_in_other_programs(names, wanted):
    assert all(schedulers.find_sampler(name) is schedulers.SAMPLERS[wanted] for name in names.split())


@pytest.mark.parametrize(
    "name", ["dpmpp_sde", "DPM++ 2S a Karras", "dpmpp_3m_sde", "Euler a Karras", "lcm karras", "ipndm"]
)
def test_another_sampler_is_not_suggested_for_one_that_there_is_not(name):
    with pytest.raises(ConfigError, match="unknown; wanted one of ddim, ddpm, "):
        schedulers.find_sampler(name)


def test_an_editor_and_a_type_checker_know_the_settings_of_draw():
    parameters = [
        {name: (each.kind, each.default, each.annotation) for name, each in signature(function).parameters.items()}
        for function in (draw, draw_each)
    ]
    assert parameters[0] == parameters[1]


@pytest.mark.parametrize(("name", "kind", "options"), [("lcm", LCMScheduler, {}), ("tcd", TCDScheduler, {"eta": 0.3})])
def test_samplers_of_few_steps_draw_what_diffusers_draws_with_them(name, kind, options, pocket):
    """Each image with its own noise between the steps, whatever is drawn beside it."""
    together = draw(pocket, "a cat", [1, 2, 3], steps=4, sampler=name, guidance=1.0)
    pipe = pocket.pipeline()
    pipe.scheduler = kind.from_config(pocket.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "guidance_scale": 1.0, "width": 64, "height": 64, **options}
    wanted = pipe("a cat", generator=torch.Generator().manual_seed(3), **settings).images[0]
    assert difference(together[2], wanted) <= 1
    assert difference(together[2], together[1]) > 10
    with pytest.raises(ConfigError, match="51 steps; this sampler takes at most 50, and 4 to 8 are usual"):
        draw(pocket, "a cat", 1, steps=51, sampler=name)


def test_a_sampler_that_cannot_begin_in_pure_noise_is_refused_on_such_a_base(pocket):
    schedule = {**pocket.scheduler.config, "rescale_betas_zero_snr": True}
    with pytest.raises(ConfigError, match="zero terminal SNR"):
        schedulers.make_scheduler("pndm", schedule)
    for name in ("DPM++ 2M Karras", "euler_karras", "unipc karras"):
        with pytest.raises(ConfigError, match=r"zero terminal SNR\. Take (DPM\+\+ 2M|euler|unipc)\.$"):
            schedulers.make_scheduler(name, schedule)
    assert schedulers.make_scheduler("euler", schedule).config.timestep_spacing == "trailing"


def test_a_picture_to_begin_from_is_no_reason_to_warn_of_casts(family_folder, caplog, monkeypatch):
    """diffusers tells of modules of SDXL's VAE that should stay in fp32, of which there are none."""
    base = load_base(family_folder("sdxl"), precision=CPU)
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    draw(base, "a cat", 1, steps=2, width=64, height=64, start=Start(Image.new("RGB", (64, 64)), strength=0.5))
    assert [record.getMessage() for record in caplog.records if record.name.startswith("diffusers")] == []


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_picture_to_begin_from_is_encoded_in_the_vaes_own_dtype_and_leaves_it_as_it_was(family_folder, family):
    base = load_base(family_folder(family), precision=decide("bf16", device="cpu", adapting=True))
    before = {name: tensor.clone() for name, tensor in base.vae.state_dict().items()}
    assert {tensor.dtype for tensor in before.values()} == {torch.float32}
    seen = []
    hook = base.vae.encoder.conv_in.register_forward_hook(lambda _, pixels, out: seen.append((pixels[0], out)))
    draw(base, "a cat", 1, steps=2, width=64, height=64, start=Start(Image.new("RGB", (64, 64)), strength=0.5))
    hook.remove()
    assert [{pixels.dtype, out.dtype} for pixels, out in seen] == [{torch.float32}]
    assert "encode" not in vars(base.vae)
    for name, tensor in base.vae.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("mask", [None, Image.new("L", (64, 64), 255)])
def test_a_pipeline_in_half_precision_whose_vae_is_not_begins_with_a_picture(mask):
    pipe = tiny_pipeline("sd1", shallow=True)
    pipe.unet.bfloat16()
    pipe.text_encoder.bfloat16()
    pipe.set_progress_bar_config(disable=True)
    start = Start(Image.new("RGB", (64, 64), "red"), strength=0.6, mask=mask)
    [picture] = draw(pipe, "a cat", 1, steps=2, width=64, height=64, start=start)
    assert picture.size == (64, 64)
    assert pipe.vae.dtype == torch.float32


def test_an_unknown_sampler_gets_a_suggestion_without_torch():
    code = (
        "import sys\nfrom sfumato import schedulers\n"
        "try:\n    schedulers.find_sampler('dmp++ 2m')\nexcept Exception as e:\n    print(e)\n"
        "print('torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert said == "--sampler dmp++ 2m: unknown; did you mean 'dpm++ 2m'?\nFalse\n"


def test_latents_that_are_not_finite_are_no_picture(pipe, monkeypatch):
    bias = pipe.unet.conv_out.bias
    before = bias.detach().clone()
    with torch.no_grad():
        bias.fill_(float("nan"))
    try:
        with pytest.raises(BaseModelError, match=r"2 of 2 images \(seed 5\) came out not finite.*the base is broken"):
            draw(pipe, "a cat", [5, 6], steps=1)
        monkeypatch.setattr(type(pipe.unet), "is_quantized", True, raising=False)
        monkeypatch.setattr(type(pipe.unet), "dtype", torch.bfloat16)
        with pytest.raises(BaseModelError, match=r"came out not finite\. "):  # which cannot be tried in fp32
            draw(pipe, "a cat", 5, steps=1)
        monkeypatch.undo()
        like_an_adapter = pipe.unet.register_forward_hook(lambda *_: None)
        with like_an_adapter, pytest.raises(BaseModelError, match="Draw without adapters"):
            draw(pipe, "a cat", 5, steps=1)
    finally:
        with torch.no_grad():
            bias.copy_(before)


@pytest.mark.parametrize(("side", "count"), [(128, 1), (64, 1), (32, 4)])
def test_a_gpu_decodes_a_large_picture_by_itself_and_small_ones_together(side, count):
    assert decode_batch_size(torch.zeros(9, 4, side, side)) == count


def test_a_pipeline_is_afterwards_as_it_was(pipe, monkeypatch):
    own, logger = pipe.scheduler, logging.getLogger("diffusers.models.modeling_utils")
    monkeypatch.setattr(pipe, "_progress_bar_config", {"desc": "mine"}, raising=False)
    filters = [*logger.filters]
    draw(pipe, "a cat", 5, steps=1, sampler="euler")
    assert pipe.scheduler is own
    assert pipe._progress_bar_config == {"desc": "mine"}
    assert logger.filters == filters


def test_a_picture_larger_than_any_batch_is_drawn_by_itself(pipe):
    assert [drawn_at_once(latents) for latents in (16 * 16, 64 * 64, 128 * 128, 256 * 256)] == [64, 4, 1, 1]
    with pytest.raises(ConfigError, match="batch 0: wanted at least 1 image at once"):
        draw(pipe, "a cat", 5, batch=0)


def test_every_colour_comes_out_as_the_nearest_that_there_is():
    colours = torch.arange(256.0).view(1, 16, 16).expand(3, 16, 16)
    for off in (-0.4, 0.0, 0.4):
        picture = to_pil((colours + off) / 127.5 - 1)
        assert np.array_equal(np.asarray(picture), colours.permute(1, 2, 0).numpy())


def test_no_more_steps_than_the_base_has_timesteps():
    scheduler = DDIMScheduler(num_train_timesteps=50)
    check_steps(50, scheduler)
    check_steps(None, scheduler)
    for steps in (0, 51):
        with pytest.raises(ConfigError, match=f"{steps} steps; wanted 1 to 50"):
            check_steps(steps, scheduler)


def test_sides_are_the_nearest_multiples_of_8_and_keep_the_proportions():
    assert [round_side(px) for px in (1, 3, 12.1, 60)] == [8, 8, 16, 64]
    assert size_like((768, 512), 64) == (80, 56)
    assert size_like((512, 768), 64) == (56, 80)


def test_a_black_picture_is_no_picture(pocket):
    weight, bias = pocket.vae.decoder.conv_out.weight, pocket.vae.decoder.conv_out.bias
    before = weight.clone(), bias.clone()
    weight.zero_()
    bias.fill_(-1.0)
    try:
        with pytest.raises(BaseModelError, match=r"seed 5.*black.*--vae"):
            draw(pocket, "a cat", 5, steps=1)
    finally:
        weight.copy_(before[0])
        bias.copy_(before[1])


def test_a_picture_that_the_pipelines_own_checker_flags_is_no_picture(pipe, monkeypatch):
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {**small, "image_size": 32, "patch_size": 16}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=small, vision_config=vision, projection_dim=8)).eval()
    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    monkeypatch.setattr(pipe, "safety_checker", checker)
    monkeypatch.setattr(pipe, "feature_extractor", CLIPImageProcessor(**sides))
    for thresholds in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        thresholds.data.fill_(2.0)  # above any cosine
    assert len(draw(pipe, "a cat", [5, 6], steps=1)) == 2
    checker.concept_embeds_weights.data.fill_(-2.0)
    with pytest.raises(BaseModelError, match=r"2 of 2 images \(seed 5\) came out flagged by the pipeline's safety"):
        draw(pipe, "a cat", [5, 6], steps=1)


def test_a_unet_that_overflows_in_half_precision_is_drawn_with_in_fp32():
    pipe = tiny_pipeline("sd1", shallow=True)
    wanted = draw(pipe, "a cat", 5, steps=1)[0]
    pipe.unet.to(torch.bfloat16)
    pipe.text_encoder.to(torch.bfloat16)
    pipe.unet.conv_out.register_forward_hook(
        lambda _, __, output: output if output.dtype == torch.float32 else output * torch.inf
    )
    assert difference(draw(pipe, "a cat", 5, steps=1)[0], wanted) < 10  # weights were rounded to bf16
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.bfloat16


def test_what_is_black_in_the_mask_stays_to_the_very_pixel(pocket):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (16, 0, 32, 32))
    start = Start(picture, strength=0.5, mask=mask)
    drawn = draw(pocket, "a cat", 1, steps=2, width=32, height=32, start=start)[0]
    assert difference(drawn.crop((0, 0, 16, 32)), picture.crop((0, 0, 16, 32))) == 0
    assert difference(drawn.crop((16, 0, 32, 32)), picture.crop((16, 0, 32, 32))) > 20


def test_an_overflow_in_half_precision_is_drawn_again_in_fp32():
    """A VAE that gives Inf in fp16: `draw` gives the fp32 picture, and the VAE is fp16 again."""
    pipe = tiny_pipeline("sd1", shallow=True)
    pipe.vae.to(torch.float16)
    real, dtypes = pipe.vae.decode, []

    def overflows(latents, **options):
        dtypes.append(latents.dtype)
        pixels = real(latents, **options)[0]
        return (pixels * float("inf") if latents.dtype == torch.float16 else pixels,)

    pipe.vae.decode = overflows
    drawn = draw(pipe, "a cat", 1, steps=1)[0]
    assert dtypes == [torch.float16, torch.float32]
    assert pipe.vae.dtype == torch.float16
    pipe.vae.float()
    assert difference(drawn, draw(pipe, "a cat", 1, steps=1)[0]) == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"prompts": ["a", "b"], "seeds": [1, 2, 3]}, "2 prompts and 3 seeds"),
        ({"prompts": "a", "seeds": 1, "width": 60}, "width 60"),
        # And 0 steps, so that a draw without this check would not begin to fill the memory.
        ({"prompts": "a", "seeds": 1, "width": 80_000_000, "steps": 0}, "80000000x64 pixels: wanted at most"),
        ({"prompts": "a", "seeds": 1, "height": 0}, "height 0"),
        ({"prompts": "a", "seeds": 1, "steps": 0}, "0 steps"),
        ({"prompts": "a", "seeds": 1, "batch": -1}, "batch -1"),
        ({"prompts": "a", "seeds": 1, "syntax": "a111"}, "'a111': wanted one of plain, a1111, compel"),
        ({"prompts": ["a", "b"], "seeds": 1, "negative": ["c", "d"]}, "one text for all images"),
        ({"prompts": "a", "seeds": 1, "guidance": float("nan")}, "guidance nan"),
        ({"prompts": "a", "seeds": 2**64}, "64 bits"),
        ({"prompts": [], "seeds": []}, "0 prompts"),
        ({"prompts": 5, "seeds": 1}, "a prompt that is a int"),
        ({"prompts": "a", "seeds": 1.5}, "seed 1.5: wanted a whole number"),
        ({"prompts": "a", "seeds": [1, "2"]}, "seed '2': wanted a whole number"),
        ({"prompts": "a", "seeds": 1, "steps": 2.5}, "steps 2.5: wanted a whole number"),
        ({"prompts": "a", "seeds": 1, "width": "64"}, "width '64': wanted a whole number"),
        ({"prompts": "a", "seeds": 1, "guidance": "3"}, "guidance '3': wanted a number"),
        ({"prompts": "a", "seeds": 1, "sampler": DDIMScheduler}, "a sampler that is a DDIMScheduler; wanted a name"),
        ({"prompts": "a", "seeds": 1, "sampler": DDIMScheduler()}, "a sampler that is a DDIMScheduler; wanted a name"),
        (
            {"prompts": "a", "seeds": 1, "start": "x.png"},
            "a start that is a str; wanted sfumato.generation.draw.Start",
        ),
    ],
)
def test_a_call_that_makes_no_sense_is_one_line(pocket, call, words):
    with pytest.raises(ConfigError) as caught:
        draw(pocket, **call)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("x.png",), "a start's picture that is a str; wanted a PIL image"),
        ((None,), "a start's picture that is a NoneType"),
        ((Image.new("L", (8, 8)), 0.5, "mask.png"), "a start's mask that is a str"),
        ((Image.new("L", (8, 8)), "0.5"), "strength '0.5': wanted above 0"),
    ],
)
def test_a_start_is_of_pictures(given, said):
    with pytest.raises(ConfigError, match=said):
        Start(*given)


def test_a_pipeline_that_wants_a_picture_says_so(pipe):
    with pytest.raises(ConfigError, match=r"StableDiffusionImg2ImgPipeline draws from an image; give start="):
        draw(AutoPipelineForImage2Image.from_pipe(pipe), "a cat", 1, steps=1)


def test_a_pipeline_that_follows_another_picture_is_refused(pipe):
    control = ControlNetModel.from_unet(pipe.unet)
    led = StableDiffusionControlNetPipeline(**pipe.components, controlnet=control, requires_safety_checker=False)
    with pytest.raises(ConfigError, match="StableDiffusionControlNetPipeline follows an image"):
        draw(led, "a cat", 1, steps=1, start=Start(Image.new("RGB", (64, 64))))


def test_a_start_on_a_pipeline_that_diffusers_has_no_other_of_is_one_line(pipe):
    class Own(StableDiffusionPipeline):
        pass

    own = Own(**pipe.components, requires_safety_checker=False)
    with pytest.raises(ConfigError, match="no Image2Image pipeline for a Own"):
        draw(own, "a cat", 1, steps=2, start=Start(Image.new("RGB", (64, 64))))


def test_a_sampler_for_a_schedule_without_betas_is_refused(pipe):
    own = pipe.scheduler
    pipe.scheduler = EDMEulerScheduler()
    try:
        with pytest.raises(ConfigError, match="--sampler ddim: this base's schedule has no betas"):
            draw(pipe, "a cat", 1, steps=1, sampler="ddim")
    finally:
        pipe.scheduler = own


def test_black_of_a_mask_stays_black_beside_an_edge():
    mask = Image.new("L", (100, 50), 0)
    mask.paste(255, (0, 0, 50, 50))
    resized = np.asarray(Start(mask, mask=mask).sized(64, 64).mask)
    assert (resized[:, 34:] == 0).all()
    assert (resized[:, :30] == 255).all()


@pytest.mark.parametrize("seeds", [np.int64(3), np.array([3]), np.array(3), torch.tensor([3]), torch.tensor(3)])
def test_seeds_may_be_numbers_of_numpy_and_torch(pocket, seeds):
    assert draw(pocket, "a cat", seeds, steps=1)[0].tobytes() == draw(pocket, "a cat", 3, steps=1)[0].tobytes()


@pytest.mark.parametrize("source", ["pocket", torch.nn.Linear(1, 1)])
def test_what_is_no_pipeline_is_one_line(source):
    with pytest.raises(
        ConfigError, match=r"draw wants a Base or a diffusers pipeline with a U-Net, got a (str|Linear)"
    ):
        draw(source, "a cat", 1)


@pytest.mark.parametrize("begins", [False, True])
def test_an_encode_of_the_users_own_stays(begins, pocket_folder):
    base = load_base(str(pocket_folder), precision=CPU)
    base.vae.encode = own = base.vae.encode
    start = Start(Image.new("RGB", (64, 64)), strength=0.5) if begins else None
    draw(base, "a crab", 1, steps=2, start=start)
    assert base.vae.__dict__["encode"] is own


@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
def test_a_picture_to_begin_from_is_of_three_channels(mode):
    assert Start(Image.new(mode, (16, 16))).sized(8, 24).picture.mode == "RGB"


def test_a_picture_to_begin_from_is_read_as_its_file_is(tmp_path):
    """Pillow itself clips 16 bits to white, and shows what is hidden beneath transparent pixels."""
    grey, hidden, turned = (tmp_path / name for name in ("grey.png", "hidden.png", "turned.png"))
    Image.fromarray(np.full((16, 16), 0x8080, np.uint16)).save(grey)
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(hidden)
    upright = Image.new("RGB", (16, 16), "blue")
    upright.paste((255, 255, 255), (0, 0, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    upright.rotate(180).save(turned, exif=exif)
    wanted = {
        grey: Image.new("RGB", (16, 16), (128,) * 3),
        hidden: Image.new("RGB", (16, 16), "white"),
        turned: upright,
    }
    for path, picture in wanted.items():
        with Image.open(path) as opened:
            assert np.array_equal(Start(opened).sized(16, 16).picture, picture)
        assert np.array_equal(Start(open_image(path)).sized(16, 16).picture, picture)
    with pytest.raises(DataError, match="an image: floating-point pixels, whose white is unknown"):
        Start(Image.new("F", (16, 16))).sized(16, 16)
