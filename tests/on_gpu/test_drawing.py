"""`sfumato generate` on a GPU, beside the same on the CPU."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from sfumato import cli, draw, load_base
from sfumato.precision import decide
from tests.on_gpu.device import gpu, learn, skip_other_noise
from tests.tiny import tiny_pipeline

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def files(inputs, tmp_path_factory):
    """An adapter, another of text encoders and convolutions, a whole U-Net's difference and a word, by name."""
    folder = tmp_path_factory.mktemp("learned")
    fast = ("--steps", "1", "--learning-rate", "1e-2")
    learn("lora", inputs, folder / "a", *fast)
    learn("lora with text encoder", inputs, folder / "b", *fast)
    learn("dreambooth", inputs, folder / "d", *fast, "--save", "difference")
    learn("textual_inversion", inputs, folder / "w", *fast)
    return {name: folder / name / "out.safetensors" for name in "abdw"}


@pytest.fixture(scope="module")
def on_cpu():
    """What the CPU has drawn already, by way of drawing."""
    return {}


WAYS = {
    "base": ["a crab"],
    "mixed": ["a crab <sq>", "--lora", "a={a}:0.8", "--lora", "b={b}:-0.6", "--embedding", "{w}"],
    "difference": ["a crab", "--lora", "{d}:0.8"],
    "guided": ["a crab", "--lora", "{a}", "--adapter-guidance", "2"],
    "steps": ["a crab", "--lora", "a={a}", "--over-steps", "a=0:0,1:1"],
    "switch": ["a crab", "--lora", "a={a}", "--lora", "b={b}", "--switch", "1"],
    "regions": [
        "a crab",
        "--lora",
        "a={a}",
        "--lora",
        "b={b}",
        "--region",
        "a=left:a key",
        "--region",
        "b=right:a cat",
    ],
    "from an image": ["a crab", "--lora", "{a}", "--image", "{picture}", "--strength", "0.9", "--mask", "{mask}"],
    "weighted words": ["(a crab:1.3) [x:y:0.5]", "--prompt-syntax", "a1111"],
    "compel": ["(a crab)++ x", "--prompt-syntax", "compel"],
    "sweep": ["a crab", "--lora", "a={a}", "--sweep", "a=0,1"],
    "pairs": ["a crab", "--lora", "{a}", "--before-after"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "precision", "more"),
    [
        ("cuda", "fp32", ()),
        ("cuda", "bf16", ()),
        ("cuda", "fp16", ()),
        ("mps", "fp32", ()),
        ("cuda", "fp32", ("--offload",)),
        ("cuda", "fp16", ("--offload",)),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_each_way_of_drawing_draws_what_the_cpu_draws(way, kind, precision, more, inputs, files, on_cpu, tmp_path):
    """In shades of 255. Without its adapters a way is 0.4 to 30 off, which fp32 and fp16 tell; bf16 rounds by 1."""
    skip_other_noise(precision)
    base = inputs["lora"][inputs["lora"].index("--base") + 1]
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "picture.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    named = {**files, "picture": tmp_path / "picture.png", "mask": tmp_path / "mask.png"}
    words = [word.format(**named) if "{" in word else word for word in WAYS[way]]
    words += ["--base", base, "--seed", "3", "--steps", "3"]

    def draw(name, *more):
        assert cli.main(["generate", *words, "-o", str(tmp_path / name), *more]) == 0
        made = sorted(tmp_path.glob(f"{name}*.png")) or sorted((tmp_path / name).glob("*.png"))
        return np.stack([np.asarray(Image.open(file), dtype=int) for file in made])

    with gpu(kind):
        found = draw("there", "--device", kind, "--precision", precision, *more)
    if way not in on_cpu:
        on_cpu[way] = draw("here", "--device", "cpu", "--precision", "fp32")
    assert np.abs(found - on_cpu[way]).mean() <= {"fp32": 0.01, "fp16": 0.2, "bf16": 2}[precision]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_in_half_precision_a_base_draws_what_its_plain_pipeline_draws(tmp_path, precision):
    tiny_pipeline("sd1", shallow=True).save_pretrained(tmp_path)
    with gpu():
        base = load_base(tmp_path, precision=decide(precision, device="cuda"))
        [found] = draw(base, "a crab", 1, steps=2, width=64, height=64)
        pipe = base.pipeline()
        pipe.set_progress_bar_config(disable=True)
        text, empty = base.encode_text(["a crab"]), base.unconditional(1)
        wanted = pipe(
            prompt_embeds=text.hidden, negative_prompt_embeds=empty.hidden, num_inference_steps=2, width=64, height=64,
            guidance_scale=base.defaults.guidance, generator=torch.Generator().manual_seed(1), output_type="latent",
        ).images  # fmt: skip
        levels = (base.decode(wanted)[0].cpu().permute(1, 2, 0) / 2 + 0.5) * 255
        assert_close(torch.from_numpy(np.asarray(found, np.float32)), levels.float(), atol=0.51, rtol=0)
