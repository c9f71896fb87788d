"""A kind of adapter that changes no weight, in one class and one row of the table, through everything there is.

The kind is a small network beside every cross-attention: h + s W_up tanh(W_down x). What it computes is written out
again below, as a hook of the test's own, for the mixes to be compared with.
"""

import shutil
import subprocess
import sys
from contextlib import contextmanager
from typing import Literal

import pytest
import torch
from torch.testing import assert_close

from sfumato import cli, config
from sfumato.adapters.blocks import Blocks
from sfumato.compose import Adapter, adapter_guidance, compose
from sfumato.compose.per_image import composite, per_picture
from sfumato.compose.regions import Region, regions
from sfumato.compose.schedules import Ramp, over_steps
from sfumato.errors import AdapterError, FileError
from sfumato.files import inspect_file, read_adapter, read_header, read_tensors, write_tensors
from sfumato.files.inspect import render
from sfumato.files.keys import KIND_KEYS, Trained, module_kind, trained_kinds
from sfumato.files.kinds import ModuleAdapter
from sfumato.models import load_base
from sfumato.training.options import KindOptions
from tests.compose.conftest import fresh, weights_sha
from tests.compose.test_per_picture import predict
from tests.tiny import CPU, tiny_pipeline

pytestmark = pytest.mark.usefixtures("quick", "toy_kind")


class Toy(ModuleAdapter):
    kind = "Toy"
    hosts = r"attn2$"

    @classmethod
    def new(cls, module, rank, scale, generator):
        width, out = module.to_q.in_features, module.to_out[0].out_features
        down = torch.randn(rank, width, generator=generator) / width**0.5
        return cls({"toy_down": down, "toy_up": torch.zeros(out, rank)})

    def added(self, call, strength):
        return strength * (torch.tanh(call.input @ self.toy_down.t()) @ self.toy_up.t())

    def fits_module(self, module):
        return hasattr(module, "to_q") and module.to_q.in_features == self.toy_down.shape[1]


@pytest.fixture
def toy_kind(monkeypatch):
    about = Trained("toy", "a small network beside each attention", rate=10)
    row = module_kind(lambda: Toy, ("toy_down", "toy_up"), trained=about, rank=("toy_down", 0))
    monkeypatch.setitem(KIND_KEYS, "Toy", row)
    # A row that was there when the options were imported is among the choices, as the last test shows.
    monkeypatch.setitem(KindOptions.__annotations__, "algo", Literal[tuple(trained_kinds())])
    config._hints.cache_clear()
    yield
    config._hints.cache_clear()


@pytest.fixture
def run(pocket_folder, pictures, tmp_path):
    """Train a toy on the tiny base for some steps; returns its file."""

    def trained(name="toy", **options):
        from sfumato.trainers.lora import Config, train

        common = {"images": pictures, "output": tmp_path / name, "base": str(pocket_folder), "algo": "toy"}
        common |= {"steps": 6, "batch": 2, "rank": 2, "learning_rate": 1e-2, "caption": "{caption}"}
        common |= {"sample_every": 0, "measure_every": 0, "checkpoint_every": 0}
        return train(Config(**(common | options)))

    return trained


@pytest.fixture
def toys(tmp_path):
    """toys(name, pipe): a file of toys with random tensors for every cross-attention of the pipe's U-Net."""

    def written(name, pipe, seed=1, every=1):
        draws, tensors = torch.Generator().manual_seed(seed), {}
        paths = [(path, module) for path, module in pipe.unet.named_modules() if path.endswith("attn2")]
        for path, module in paths[::every]:
            width = module.to_q.in_features
            tensors[f"unet.{path}.toy_down"] = torch.randn(3, width, generator=draws) / width**0.5
            tensors[f"unet.{path}.toy_up"] = torch.randn(width, 3, generator=draws) * 0.3
        return write_tensors(tmp_path / f"{name}.safetensors", tensors, {"ss_base_model_version": "sd_v1"})

    return written


@pytest.fixture(scope="module")
def original():
    return tiny_pipeline("sd1", shallow=True)


@pytest.fixture
def sd1(original):
    return fresh(original)


@contextmanager
def by_hand(pipe, *weighed):
    """The kind's equation as hooks of the test's own. weighed: (file, weight)."""
    handles = []
    for file, weight in weighed:
        tensors = read_tensors(file)
        for path, module in pipe.unet.named_modules():
            if (key := f"unet.{path}.toy_down") in tensors:
                down, up = tensors[key], tensors[f"unet.{path}.toy_up"]

                def add(_, args, output, down=down, up=up, weight=weight):
                    return output + weight * torch.tanh(args[0] @ down.T) @ up.T

                handles.append(module.register_forward_hook(add))
    yield
    for handle in handles:
        handle.remove()


def test_lora_trains_it_from_nothing_and_writes_a_file_that_describes_itself(run, pocket_folder):
    file = run()
    base = load_base(pocket_folder, precision=CPU)
    sites = {path for path, _ in base.unet.named_modules() if path.endswith("attn2")}
    tensors, header = read_tensors(file), read_header(file)
    assert tensors.keys() == {f"unet.{path}.{role}" for path in sites for role in ("toy_down", "toy_up")}
    assert all(tensors[key].abs().sum() > 0 for key in tensors)
    assert header.metadata["ss_network_args"] == '{"algo":"toy"}'
    assert read_adapter(file).kinds == {"Toy": len(sites)}
    assert read_adapter(file).family == "pocket"


def test_its_rate_is_the_row_s_and_it_is_no_update_at_first(run, pocket_folder):
    from sfumato.adapters import Kind, attach

    base = load_base(pocket_folder, precision=CPU)
    text = base.encode_text(["a red square"])
    latents = torch.randn(1, base.unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = base.predict(latents, torch.tensor([500]), text)
    kind = Kind("toy")
    adapter = attach(kind.targets(base.parts(text=False), "cross-attention"), rank=2, alpha=2.0, kind=kind)
    assert torch.equal(base.predict(latents, torch.tensor([500]), text), plain)
    adapter.detach()
    assert "learning_rate = 0.006" in (run(learning_rate=None, steps=1).parent / "config.toml").read_text()


def test_a_run_goes_on_to_the_bit(run):
    whole = run(checkpoint_every=2)
    wanted = {key: value.clone() for key, value in read_tensors(whole).items()}
    shutil.rmtree(whole.parent / "checkpoints/000006")
    whole.unlink()
    found = read_tensors(run(checkpoint_every=2, resume=True))
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_a_run_starts_from_its_file(run):
    first = run("first")
    same = read_tensors(run("same", init_from=first, steps=1, learning_rate=1e-12))
    assert all(torch.allclose(value, same[key], atol=1e-6) for key, value in read_tensors(first).items())
    with pytest.raises(AdapterError, match=r"this run .*'toy_down': \(3, "):
        run("other", init_from=first, rank=3)


@pytest.mark.parametrize("option", [{"dora": True}, {"max_norm": 1.0}, {"conv": True}, {"loraplus_ratio": 4.0}])
def test_options_that_are_for_weights_are_refused(run, option):
    from sfumato.errors import ConfigError

    with pytest.raises(ConfigError, match="has no effect without"):
        run(**option)


def test_it_is_mixed_with_a_lora_at_weights_that_change_and_undone_to_the_bytes(sd1, original, toys, write):
    a, b, lora = toys("a", sd1), toys("b", sd1, seed=2, every=2), write("line", sd1)
    before, plain = weights_sha(sd1), predict(sd1, [0, 1])
    mix = compose(sd1, Adapter(a, 0.7), Adapter(lora, 0.5), Adapter(b, -0.4))

    def wanted(*weighed):
        other = fresh(original)
        with compose(other, Adapter(lora, mix.weights["line"])), by_hand(other, *weighed):
            return predict(other, [0, 1])

    assert_close(predict(sd1, [0, 1]), wanted((a, 0.7), (b, -0.4)))
    mix.set(a=1.5)
    assert_close(predict(sd1, [0, 1]), wanted((a, 1.5), (b, -0.4)))
    mix.mute("b")
    assert_close(predict(sd1, [0, 1]), wanted((a, 1.5)))
    assert "Toy" in mix.show()
    mix.remove("a")
    assert_close(predict(sd1, [0, 1]), wanted())
    mix.undo()
    assert torch.equal(predict(sd1, [0, 1]), plain)
    assert weights_sha(sd1) == before
    assert not any(module._forward_hooks for module in sd1.unet.modules())


def test_weights_by_block_and_by_step(sd1, toys):
    file = toys("a", sd1)
    with compose(sd1, Adapter(file, Blocks(1.0, {"up": 0.0}))):
        found = predict(sd1, [0])
    tensors = {key: value for key, value in read_tensors(file).items() if not key.startswith("unet.up")}
    part = write_tensors(file.with_name("part.safetensors"), tensors)
    with by_hand(sd1, (part, 1.0)):
        assert_close(found, predict(sd1, [0]))
    from diffusers import DDIMScheduler

    sd1.scheduler = DDIMScheduler()
    with compose(sd1, Adapter(file, 1.0)) as mix, over_steps(mix, a=Ramp((0, 0.0), (1, 1.0))):
        found = predict(sd1, [0], timestep=0)
        assert mix.weights["a"] == 1.0
    with by_hand(sd1, (file, 1.0)):
        assert_close(found, predict(sd1, [0], timestep=0))


def test_each_picture_of_a_batch_is_its_single_run(sd1, toys, write):
    a, b, lora = toys("a", sd1), toys("b", sd1, seed=2), write("line", sd1)
    sets = [[Adapter(a, 0.7), Adapter(lora, 0.5)], [Adapter(b, -0.4), Adapter(a, 0.2)], []]
    single = []
    for row, adapters in enumerate(sets):
        with compose(sd1, *adapters):
            single.append(predict(sd1, [row]))
    with per_picture(sd1, sets):
        assert_close(predict(sd1, [0, 1, 2, 0, 1, 2]), torch.cat([*single, *single]), atol=1e-5, rtol=1e-5)
    with composite(sd1, Adapter(a, 0.7), Adapter(b)):
        both = predict(sd1, [0])
    with compose(sd1, Adapter(a, 0.7)):
        first = predict(sd1, [0])
    with compose(sd1, Adapter(b)):
        assert_close(both, (first + predict(sd1, [0])) / 2)


def test_a_region_that_is_the_whole_picture_is_the_plain_mix_and_half_a_picture_is_not(sd1, toys, write):
    file, lora = toys("a", sd1), write("line", sd1, "to_q", "to_k")
    with compose(sd1, Adapter(file, 0.7), Adapter(lora)):
        wanted = predict(sd1, [0, 1])
    with regions(sd1, Region((0, 0, 1, 1), Adapter(file, 0.7), Adapter(lora))):
        assert_close(predict(sd1, [0, 1]), wanted, atol=1e-5, rtol=1e-5)
    left, right = Region((0, 0, 0.5, 1), Adapter(file, 0.7)), Region((0.5, 0, 1, 1), Adapter(file, 0.7))
    with regions(sd1, left):
        half = predict(sd1, [0, 1])
    with compose(sd1, Adapter(file, 0.7)):
        whole = predict(sd1, [0, 1])
    plain = predict(sd1, [0, 1])
    assert (half - plain)[..., :6].abs().sum() > 2 * (half - plain)[..., 10:].abs().sum()
    with regions(sd1, left, right):
        assert_close(predict(sd1, [0, 1]), whole, atol=1e-5, rtol=1e-5)


def test_adapter_guidance_keeps_it_to_the_prompt_s_half(sd1, toys):
    file, rows = toys("a", sd1), [0, 1]
    without = predict(sd1, [0])
    with compose(sd1, Adapter(file, 0.4)):
        wanted = predict(sd1, [1])
    with compose(sd1, Adapter(file, 0.8)) as mix, adapter_guidance(mix, 2.0, guidance=4.0):
        assert_close(predict(sd1, rows), torch.cat([without, wanted]))
        assert_close(predict(sd1, rows), torch.cat([without, wanted]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_computes_as_the_pipeline_does(sd1, toys, dtype):
    file = toys("a", sd1)
    with compose(sd1, Adapter(file)):
        wanted = predict(sd1, [0])
    with compose(sd1, Adapter(file)), torch.autocast("cpu", dtype):
        assert_close(predict(sd1, [0]).float(), wanted, atol=0.05, rtol=0.05)
    sd1.unet.to(dtype)
    with compose(sd1, Adapter(file)), torch.no_grad():
        latents, text = torch.zeros(1, 4, 16, 16, dtype=dtype), torch.zeros(1, 7, 64, dtype=dtype)
        assert sd1.unet(latents, torch.tensor(500), text, return_dict=False)[0].dtype == dtype


def test_inspect_and_verify_know_it(run, capsys, tmp_path):
    file = run()
    found = inspect_file(file)
    sites = found.modules
    assert (found.kind, found.family, found.ranks, found.unknown) == ("Toy", "pocket", {"2": sites}, [])
    squares = sum(float(value.double().square().sum()) for value in read_tensors(file).values())
    assert found.norm == pytest.approx(squares**0.5)
    assert "changes no weight" in render(found)
    assert cli.main(["verify", str(file)]) == 0
    tensors, metadata = read_tensors(file), read_header(file).metadata
    tensors = {key: value.clone() for key, value in tensors.items()}
    tensors[next(iter(tensors))] *= 1.5
    stated = {key: text for key, text in metadata.items() if "hash" not in key}
    other = write_tensors(tmp_path / "other.safetensors", tensors, stated)
    assert cli.main(["verify", str(other)]) == 1
    with pytest.raises(FileError, match="not the adapter that was written"):
        compose(tiny_pipeline("sd1", shallow=True), Adapter(other), verify=True)


def test_reading_is_strict(sd1, toys, tmp_path):
    file = toys("a", sd1)
    tensors = read_tensors(file)
    first = next(iter(tensors))
    less = {key: value for key, value in tensors.items() if key != first}
    with pytest.raises(AdapterError, match="not whole"):
        read_adapter(write_tensors(tmp_path / "less.safetensors", less))
    other = tensors | {"unet.mid_block.attentions.0.something": torch.ones(2)}
    with pytest.raises(AdapterError, match=r"1 of .* keys are not understood"):
        read_adapter(write_tensors(tmp_path / "more.safetensors", other))
    moved = {key.replace("attn2", "attn3"): value for key, value in tensors.items()}
    with pytest.raises(AdapterError, match="are not in this pipeline"):
        compose(sd1, Adapter(write_tensors(tmp_path / "moved.safetensors", moved)))
    wide = {key: torch.ones(5, 3) if key.endswith("up") else torch.ones(3, 5) for key in tensors}
    with pytest.raises(AdapterError, match="have another shape"):
        compose(sd1, Adapter(write_tensors(tmp_path / "wide.safetensors", wide)))


def test_where_weights_are_wanted_it_is_refused_in_one_line(sd1, toys, write, tmp_path, capsys, pocket_folder):
    file, out = toys("a", sd1), str(tmp_path / "out.safetensors")
    lora = write("line", sd1)
    for words in (
        ["merge", str(file), str(lora), "--output", out],
        ["merge", str(file), "--into", str(pocket_folder), "--output", str(tmp_path / "folder")],
        ["convert", str(file), "--to", "diffusers", "--output", out],
        ["convert", str(file), "--bake", "lora", "--base", str(pocket_folder), "--output", out],
        ["clash", str(file), str(lora)],
        ["resize", str(file), "--rank", "1", "--output", out],
    ):
        assert cli.main(words) != 0
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1
        assert "changes no weight" in said[0]
        assert "sfumato generate --lora" in said[0]
    with pytest.raises(AdapterError, match="changes no weight, so nothing can be baked"):
        compose(sd1, Adapter(file), way="baked")
    with compose(sd1, Adapter(file)) as mix, pytest.raises(AdapterError, match="so the mix is no LoRA"):
        mix.save(out)
    with compose(sd1, Adapter(file)), pytest.raises(AdapterError, match="are live beside"):
        sd1.unet.save_pretrained(tmp_path / "unet")


def test_it_draws_by_the_command(run, pocket_folder, tmp_path):
    file = run()
    drawn = []
    for weight in ("0", "1"):
        words = ["generate", "a red square", "--lora", f"{file}:{weight}", "--base", str(pocket_folder)]
        output = tmp_path / weight
        assert cli.main([*words, "--steps", "1", "--output", str(output)]) == 0
        (picture,) = output.glob("*.png") if output.is_dir() else [output]
        from PIL import Image

        drawn.append(Image.open(picture).tobytes())
    assert drawn[0] != drawn[1]


def test_the_option_s_help_and_choices_come_from_the_table_without_torch():
    code = (
        "import sys\n"
        "from sfumato.files import keys as kinds\n"
        "row = kinds.module_kind(lambda: None, ('toy_up',), trained=kinds.Trained('toy', 'a toy of the test'))\n"
        "kinds.KIND_KEYS['Toy'] = row\n"
        "from sfumato.cli import main\n"
        "main(['train', 'lora', '--help-all'])\n"
        "assert 'torch' not in sys.modules\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    words = " ".join(said.replace("│", " ").split())
    assert "toy: a toy of the test." in words
    assert "oft, toy]" in words
