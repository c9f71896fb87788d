"""A family that is no Stable Diffusion, a flow-matching transformer of two blocks: one file, here, and its rows.

It is trained by `lora`, its file read again, and mixed; nothing of the library knows it.
"""

import dataclasses
import json
import shutil

import pytest
import torch
from diffusers import ConfigMixin, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from sfumato import cli
from sfumato.adapters.blocks import Blocks
from sfumato.compose import Adapter, compose
from sfumato.errors import AdapterError
from sfumato.files import inspect_file, read_adapter, read_header, read_tensors
from sfumato.files.metadata import LABELS, FamilyLabels
from sfumato.models import diffusion, load_base
from sfumato.models import folder as folders
from sfumato.models.base import Base
from sfumato.models.family import FAMILIES, Defaults, Encoder, Family, read_config
from sfumato.models.loading import BaseParts
from tests.logged import log_beside
from tests.tiny import CPU

pytestmark = pytest.mark.usefixtures("quick", "toy_family")

# The family's one file


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, seen):
        return self.to_out(scaled_dot_product_attention(self.to_q(x), self.to_k(seen), self.to_v(seen)))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.ff = Attention(width), nn.Linear(width, width)

    def forward(self, x, text):
        x = x + self.attn(self.norm1(x), torch.cat([x, text], dim=1))
        return x + torch.tanh(self.ff(self.norm2(x)))


class ToyTransformer(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, in_channels=4, out_channels=4, width=32, sample_size=16):
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(in_channels, width), nn.Linear(width, out_channels)
        self.time = nn.Linear(1, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, latents, time, text):
        x = self.proj_in(latents.flatten(2).transpose(1, 2)) + self.time(time[:, None, None].to(latents.dtype))
        for block in self.blocks:
            x = block(x, text)
        return self.proj_out(x).transpose(1, 2).view(len(latents), -1, *latents.shape[2:])


class ToyBase(Base):
    def denoise(self, seen, timesteps, text, added):
        return self.denoiser(seen, (timesteps + 1) / len(self.alpha_bar), text.hidden.to(seen.dtype))


CLIP = Encoder("text_encoder", "tokenizer", "CLIPTextModel")


def load(folder, precision):
    config = read_config(folder, "transformer/config.json")
    with torch.device("meta"):
        model = ToyTransformer.from_config(config)
    text = folders.load_text_encoder(folder, CLIP, precision.dtype("text"))
    return BaseParts(
        family=FAMILIES["toy"],
        denoiser=folders.load_part(model, folder, "transformer", precision.dtype("unet")),
        vae=folders.load_vae(folder / "vae", precision.dtype("vae")),
        text_encoders=[text],
        tokenizers=[folders.load_tokenizer(folder, "tokenizer", text.model.config.max_position_embeddings)],
        scheduler=read_config(folder, "scheduler/scheduler_config.json"),
        zeros_for_empty_prompt=False,
    )


# Its rows in the tables

ROW = Family(
    name="toy",
    defaults=Defaults(
        resolution=64, batch=4, learning_rate=1e-2, steps=40, rank=4,
        guidance=2.0, sampling_steps=4, sampler="euler", min_snr=0.0,
    ),
    encoders=(CLIP,),
    denoiser="transformer",
    denoiser_class="ToyTransformer",
    noise="flow",
    targets={"cross-attention": r"\.attn\.to_(q|k|v|out)$", "everything": r"^blocks\.|^proj_"},
    load=load,
    base=lambda: ToyBase,
)  # fmt: skip


@pytest.fixture
def toy_family(quick, monkeypatch):
    from sfumato.models import family, loading

    monkeypatch.setitem(LABELS, "toy", FamilyLabels("Toy flow", "toy-flow", "toy_flow", None, keys="diffusers"))
    for module in (family, loading):
        monkeypatch.setitem(module.FAMILIES, "toy", ROW)
    monkeypatch.setitem(FAMILIES, "toy", ROW)


# What it is good for


@pytest.fixture(scope="module")
def toy_folder(pocket_folder, tmp_path_factory):
    """A base of the family: pocket's VAE and text encoder, and a transformer with random weights."""
    folder = tmp_path_factory.mktemp("toy") / "toy"
    shutil.copytree(pocket_folder, folder, ignore=shutil.ignore_patterns("unet", "scheduler"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ToyTransformer().save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=100).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    del index["unet"]
    index |= {"_class_name": "ToyPipeline", "transformer": ["toy", "ToyTransformer"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def base(toy_folder):
    return load_base(toy_folder, precision=CPU)


@pytest.fixture
def train(toy_folder, pictures, tmp_path):
    def run(*options, name="run"):
        words = {
            "--targets": "cross-attention",
            "--images": str(pictures),
            "--output": str(tmp_path / name),
            "--base": str(toy_folder),
        }
        words |= {"--caption": "{caption}", "--sample-every": "0", "--checkpoint-every": "0", "--precision": "fp32"}
        words |= dict(zip(options[::2], options[1::2], strict=True))
        assert cli.main(["train", "lora", *(word for pair in words.items() for word in pair)]) == 0
        return tmp_path / name / f"{name}.safetensors"

    return run


def predict(base):
    draws = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=draws)
    return base.predict(latents, torch.tensor([20, 70]), base.encode_text(["a red square", "a cat"])).detach()


def test_the_base_says_what_it_is(base):
    assert (type(base), base.family.name, base.prediction_type, base.resolution) == (
        ToyBase,
        "toy",
        "flow_prediction",
        64,
    )
    assert base.parts(text=True).keys() == {"transformer", "text_encoder"}
    assert (len(base.alpha_bar), base.levels, base.latent_channels, base.inpaints) == (100, 1, 4, False)
    with pytest.raises(AttributeError, match="has no U-Net"):
        _ = base.unet


def test_the_process_is_the_flow_s_straight_line(base):
    draws = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=draws)
    timesteps = torch.tensor([0, 49, 99])
    s = ((timesteps + 1) / 100).view(-1, 1, 1, 1)
    a, kind = base.alpha_bar[timesteps], base.prediction_type
    noisy = diffusion.add_noise(latents, noise, a, kind)
    assert_close(noisy, (1 - s) * latents + s * noise)
    velocity = diffusion.prediction_target(kind, latents, noise, a)
    assert_close(velocity, noise - latents)
    back = diffusion.split_prediction(kind, noisy, velocity, a)
    assert_close(back[0], latents, atol=1e-5, rtol=1e-5)
    assert_close(back[1], noise, atol=1e-5, rtol=1e-5)
    snr = ((1 - s) / s).square().flatten()
    assert_close(diffusion.snr_weight(kind, a, 5.0), snr.clamp(max=5) * s.flatten().square(), atol=1e-5, rtol=1e-4)


def test_lora_trains_it_and_the_loss_falls(train):
    file = train("--steps", "60", "--targets", "everything")
    losses = [row["loss"] for row in log_beside(file) if "loss" in row]
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


def test_its_file_has_the_model_s_own_names_and_says_the_family(train, base):
    file = train("--steps", "2")
    sites = {f"transformer.blocks.{n}.attn.to_{name}" for n in (0, 1) for name in ("q", "k", "v", "out")}
    assert {key.split(".lora_")[0].removesuffix(".alpha") for key in read_tensors(file)} == sites
    assert read_header(file).metadata["ss_base_model_version"] == "toy_flow"
    read = read_adapter(file)
    assert (read.family, read.kinds) == ("toy", {"LoRA": 8})
    found = inspect_file(file)
    assert (found.family, found.modules, found.ranks, found.unknown) == ("toy", 8, {"4": 8}, [])
    assert cli.main(["verify", str(file)]) == 0


@pytest.mark.parametrize("way", ["baked", "live"])
def test_compose_mixes_it_and_undoes_it_to_the_bytes(train, base, way):
    a = train("--steps", "4", name="a")
    b = train("--steps", "4", "--seed", "5", "--algo", "lokr", name="b")
    before = {key: value.clone() for key, value in base.denoiser.state_dict().items()}
    plain = predict(base)
    mix = compose(base, Adapter(a, 0.8), Adapter(b, -0.5), way=way)
    assert mix.family == "toy"
    mixed = predict(base)
    mix.set(a=0.3)
    wanted = loaded_again(before)
    for file, weight in ((a, 0.3), (b, -0.5)):
        for (part, path), change in read_adapter(file).changes.items():
            assert part == "transformer"
            layer = wanted.get_submodule(path)
            layer.weight.data += weight * change.delta(before[f"{path}.weight"])
    changed = dataclasses.replace(base, denoiser=wanted)
    assert_close(predict(base), predict(changed), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(predict(base), mixed)
    mix.undo()
    assert torch.equal(predict(base), plain)
    assert all(torch.equal(value, before[key]) for key, value in base.denoiser.state_dict().items())


def loaded_again(weights):
    model = ToyTransformer()
    model.load_state_dict(weights)
    return model.requires_grad_(False).eval()


def test_weights_by_block_count_by_its_paths(train, base):
    file = train("--steps", "4")
    with compose(base, Adapter(file, Blocks(1.0, {"blocks.0": 0.0}))):
        some = {name for name, value in base.denoiser.state_dict().items() if "attn.to_q.weight" in name}
        assert some == {"blocks.0.attn.to_q.weight", "blocks.1.attn.to_q.weight"}
        now = base.denoiser.state_dict()
        now = {name: value.clone() for name, value in now.items()}
    then = base.denoiser.state_dict()
    assert torch.equal(now["blocks.0.attn.to_q.weight"], then["blocks.0.attn.to_q.weight"])
    assert not torch.equal(now["blocks.1.attn.to_q.weight"], then["blocks.1.attn.to_q.weight"])


def test_an_adapter_of_another_family_is_refused(train, pocket_folder):
    file = train("--steps", "2")
    with pytest.raises(AdapterError, match="trained for Toy flow, this pipeline is pocket"):
        compose(load_base(pocket_folder, precision=CPU), Adapter(file))
