"""Weights over the steps of a picture: what each call of the U-Net sees."""

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, PNDMScheduler

from sfumato.compose import Adapter, compose
from sfumato.compose.schedules import Ramp, Switch, over_steps, progress_of
from sfumato.errors import AdapterError, ConfigError
from sfumato.files.kinds import LoraModule
from sfumato.files.writing.kohya import write_lora
from sfumato.generation.draw import draw
from sfumato.models import load_base
from sfumato.models.calls import StepClock
from sfumato.utils.schedulers import make_scheduler
from tests.tiny import CPU


def test_a_ramp_is_straight_between_points_and_level_beyond():
    ramp = Ramp((0.25, 1.0), (0.75, 0.0))
    assert [ramp(progress) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert Ramp.parse("0:1,1:0")(0.25) == 0.75
    assert Ramp((0.5, 1.0), (0.5, 0.2))(0.6) == 0.2


@pytest.mark.parametrize("text", ["", "1", "0:1,x:2", "2:1", "0:1,1:99", "0:nan"])
def test_a_ramp_that_is_none_is_refused(text):
    with pytest.raises(AdapterError, match="ramp"):
        Ramp.parse(text)


def test_a_switch_takes_turns():
    switch = Switch(("a", "b"), every=2)
    assert [switch.on(step) for step in range(6)] == ["a", "a", "b", "b", "a", "a"]


@pytest.fixture(scope="module")
def base(pocket_folder):
    return load_base(str(pocket_folder), precision=CPU)


@pytest.fixture(scope="module")
def loras(base, tmp_path_factory):
    """a and b: two strong adapters of the base's first cross-attention."""
    paths, folder = [], tmp_path_factory.mktemp("loras")
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        path, layer = next((p, m) for p, m in base.unet.named_modules() if p.endswith("attn2.to_v"))
        out, inner = layer.weight.shape
        module = LoraModule(torch.randn(2, inner, generator=generator), torch.randn(out, 2, generator=generator), 8.0)
        paths.append(write_lora(folder / f"{name}.safetensors", {("unet", path): module}, family="pocket"))
    return paths


def weights_seen(base, mix):
    """The mix's weight of "a" at each call of the U-Net."""
    seen = []
    handle = base.unet.register_forward_hook(lambda *_: seen.append(mix.weights["a"]))
    return seen, handle


@pytest.mark.parametrize("way", ["baked", "live"])
def test_each_step_has_its_weight_and_the_next_picture_begins_again(base, loras, way):
    """4 DDIM steps of 1000 in trailing spacing ask for 999, 749, 499, 249 and each weighs 1 - its progress."""
    with compose(base, Adapter(loras[0], 1.0), way=way) as mix, over_steps(mix, a=Ramp((0, 1), (1, 0))):
        seen, handle = weights_seen(base, mix)
        draw(base, "red square", 0, steps=4, sampler="ddim")
        draw(base, "red square", 0, steps=4, sampler="ddim")
        handle.remove()
    numbers = [weight[0] if isinstance(weight, tuple) else weight for weight in seen]
    assert numbers[:4] == pytest.approx([timestep / 999 for timestep in (999, 749, 499, 249)])
    assert numbers[:4] == numbers[4:]
    assert all(weight[1] == 1.0 for weight in seen if isinstance(weight, tuple))


def test_a_constant_ramp_is_the_plain_mix_and_the_weights_come_back(base, loras):
    with compose(base, Adapter(loras[0], 0.5)) as mix:
        plain = draw(base, "red square", 0, steps=3)[0]
        with over_steps(mix, a=lambda progress: 0.5):
            ramped = draw(base, "red square", 0, steps=3)[0]
        with over_steps(mix, a=lambda progress: 2.0):
            other = draw(base, "red square", 0, steps=3)[0]
        assert mix.weights["a"] == 0.5
    assert plain.tobytes() == ramped.tobytes() != other.tobytes()


def test_switching_shows_one_adapter_at_a_time(base, loras):
    with compose(base, Adapter(loras[0], 1.0), Adapter(loras[1], 0.7)) as mix:
        with over_steps(mix, Switch(("a", "b"), every=1)):
            seen, handle = weights_seen(base, mix)
            draw(base, "red square", 0, steps=4)
            handle.remove()
        assert seen == [1.0, (0.0, 1.0), 1.0, (0.0, 1.0)]
        assert dict(mix.weights) == {"a": 1.0, "b": 0.7}


SIX_STEPS_IN_TURNS = {
    "ddim": "aabbaa",
    "euler": "aabbaa",
    "unipc": "aabbaa",
    "pndm": "aaabbaa",  # it asks for the second timestep twice
    "heun": "aaaabbbbaaa",
    "dpm2": "aaaabbbbaaa",
    "dpm2 a": "aaaabbbbaaa",
    "dpm2 a karras": "aaaabbbbaaa",
}


@pytest.mark.parametrize(
    ("by", "sampler"),
    [
        *(("base", sampler) for sampler in SIX_STEPS_IN_TURNS),
        *(
            pytest.param(by, sampler, marks=() if sampler in ("euler", "dpm2") else pytest.mark.slow)
            for by in ("pipeline", "a pipeline of its own")
            for sampler in SIX_STEPS_IN_TURNS
        ),
    ],
)
def test_a_step_is_a_step_whatever_the_sampler_asks_between(base, loras, sampler, by):
    """Six steps in turns of two, at each call of the U-Net, whichever way the sampler is chosen. Then once more."""
    source = base if by == "base" else base.pipeline(sampler if by == "a pipeline of its own" else None)
    chosen = None if by == "a pipeline of its own" else sampler
    with compose(source, Adapter(loras[0], 1.0), Adapter(loras[1], 1.0)) as mix:
        seen, handle = weights_seen(base, mix)
        with over_steps(mix, Switch(("a", "b"), every=2)):
            for _ in range(2):
                draw(source, "red square", 0, steps=6, sampler=chosen, guidance=1.0, width=8, height=8)
        handle.remove()
    on = "".join("a" if weight == 1.0 else "b" for weight in seen)
    assert on == SIX_STEPS_IN_TURNS[sampler] * 2


def test_turns_go_by_the_scheduler_that_draws_and_are_refused_where_none_is_known(base, loras):
    """A pipeline of the Base that is called by itself has one; a loop of one's own does not tell."""
    pipe = base.pipeline("dpm2")
    with compose(base, Adapter(loras[0]), Adapter(loras[1])) as mix, over_steps(mix, Switch(("a", "b"), every=2)):
        seen, handle = weights_seen(base, mix)
        pipe("red square", num_inference_steps=6, guidance_scale=1.0, output_type="latent")
        handle.remove()
        with pytest.raises(AdapterError, match="which a Base does not know"):
            base.unet(torch.zeros(1, 4, 8, 8), torch.tensor(1), base.encode_text(["red square"]).hidden)
    assert "".join("a" if weight == 1.0 else "b" for weight in seen) == SIX_STEPS_IN_TURNS["dpm2"]


def test_turns_of_runge_kutta_steps_and_progress_without_timesteps_are_refused(base, loras):
    pipe = base.pipeline()
    schedule = base.scheduler.config
    with compose(pipe, Adapter(loras[0]), Adapter(loras[1])) as mix:
        pipe.scheduler = PNDMScheduler.from_config(schedule, skip_prk_steps=False)
        with over_steps(mix, Switch(("a", "b"))), pytest.raises(ConfigError, match="skip_prk_steps"):
            draw(pipe, "red square", 0, steps=6)
        with over_steps(mix, a=Ramp((0, 1), (1, 0))):
            seen, handle = weights_seen(base, mix)
            draw(pipe, "red square", 0, steps=6)
            handle.remove()
        numbers = [weight if isinstance(weight, float) else weight[0] for weight in seen]
        assert numbers == sorted(numbers, reverse=True)
        pipe.scheduler = EDMEulerScheduler(prediction_type="epsilon")
        with over_steps(mix, a=Ramp((0, 1), (1, 0))), pytest.raises(AdapterError, match="EDMEulerScheduler tells"):
            draw(pipe, "red square", 0, steps=6)


def test_a_picture_after_one_that_was_stopped_begins_again():
    """A picture from another, which begins later, asks for a timestep that the stopped one has not reached."""
    clock, scheduler = StepClock(), DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(4)
    assert [clock.step(timestep, scheduler) for timestep in scheduler.timesteps[:2]] == [0, 1]
    scheduler.set_timesteps(4)
    assert [clock.step(timestep, scheduler) for timestep in scheduler.timesteps[2:]] == [0, 1]


@pytest.mark.parametrize("sampler", ["ddim", "euler a", "dpm++ 2m karras", "dpm++ 2m sde karras", "unipc karras"])
def test_each_step_is_counted_once(sampler):
    """Karras' sigmas lie so close at their end that two steps may have one timestep."""
    chosen = make_scheduler(
        sampler, DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).config
    )
    clock, latents, counted = StepClock(), torch.zeros(1, 4, 2, 2), []
    for _ in range(2):
        chosen.set_timesteps(50)
        for timestep in chosen.timesteps:
            latents = chosen.scale_model_input(latents, timestep)
            counted.append(clock.step(timestep, chosen))
            latents = chosen.step(torch.zeros_like(latents), timestep, latents).prev_sample
    assert counted == [*range(50)] * 2


@pytest.mark.parametrize("span", [(0.8, 0.0), (0.5, 0.5), (-0.1, 0.5), (0.5, 1.1)])
def test_a_span_goes_forwards(span):
    with pytest.raises(AdapterError, match=r"wanted progress from 0 to 1, such as \(0, 0.5\)"):
        Ramp.within(*span, 1.0)


def test_nothing_to_follow_is_refused(base, loras):
    with compose(base, Adapter(loras[0])) as mix, pytest.raises(AdapterError, match="nothing to follow"):  # noqa: SIM117
        with over_steps(mix):
            pass


def test_a_label_that_is_not_in_the_mix_is_refused(base, loras):
    with compose(base, Adapter(loras[0])) as mix, pytest.raises(AdapterError, match="'c'"):  # noqa: SIM117
        with over_steps(mix, c=Ramp((0, 1))):
            pass


def test_a_ramp_takes_its_points_in_any_order_and_progress_is_linear_in_timesteps():
    assert Ramp((1, 0), (0, 1))(0.25) == 0.75
    assert Ramp.within(0, 0.5, 2.0)(0.0) == 2.0
    assert [progress_of(t, DDIMScheduler()) for t in (999, 251, 0)] == pytest.approx([0, 748 / 999, 1])
