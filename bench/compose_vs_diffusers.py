"""Composing beside diffusers and peft in one process: full-size U-Nets with random weights, rank-16 adapters in fp16.

    python bench/compose_vs_diffusers.py [--cases sd1-attention ...] [--counts 1 8] [--rounds 3] [--threads 1]

Prints JSON. For each case and number of files, CPU seconds of this process (the least of the rounds, all sides in
turns), until every touched weight is final: to load, weigh and merge the files; to give them new weights; to take them
out again. "sfumato" has its originals in the base's file, "sfumato copy" has no such file and copies them. "cold" is
the first mix of a process, each in one of its own, also over the floor of reading each file and adding each product
once. Then what is left in the base after removal, the error of a merged weight over that of rounding the exact sum
once, and the anonymous memory that a mix adds. Apart from the cases: what is left in fp16, dispatched operations and
CPU seconds of a call of the U-Net with eight live adapters over those of one without, and the import of the composition
path over that of torch.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato.compose import Adapter, compose
from sfumato.files import read_lora, read_tensors, write_lora, write_tensors
from sfumato.files.kinds import LoraModule

RANK = 16
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MLP = ("ff.net.0.proj", "ff.net.2")
CHECKED = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@dataclass(frozen=True)
class Case:
    """A family, the layers that the adapters change, how their files spell them, and the base's dtype."""

    family: str
    endings: tuple[str, ...]
    spelling: str
    dtype: torch.dtype = torch.bfloat16


CASES = {
    "sd1-attention": Case("sd1", ATTENTION, "kohya"),
    "sd1-attention-diffusers-keys": Case("sd1", ATTENTION, "diffusers"),
    "sd1-attention-fp16-base": Case("sd1", ATTENTION, "kohya", torch.float16),
    "sd1-attention-mlp": Case("sd1", ATTENTION + MLP, "kohya"),
    "sd1-attention-mlp-diffusers-keys": Case("sd1", ATTENTION + MLP, "diffusers"),
    "sdxl-attention": Case("sdxl", ATTENTION, "kohya"),
    "sdxl-attention-diffusers-keys": Case("sdxl", ATTENTION, "diffusers"),
    "sdxl-attention-fp16-base": Case("sdxl", ATTENTION, "kohya", torch.float16),
}


def build(family: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A pipeline-like object around the published U-Net (859.5 M or 2567 M weights), std 1/sqrt(fan in)."""
    import diffusers
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

    from sfumato.models.single_file import packaged_config

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(packaged_config(family, "unet/config.json"))
    unet = unet.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    # One draw for all: the values do not matter, and drawing 2.6 billion takes minutes.
    noise = torch.randn(1 << 24, generator=generator).to(dtype)
    for weight in unet.parameters():
        fan_in = weight[0].numel() if weight.ndim > 1 else 1
        flat = weight.view(-1)
        for start in range(0, len(flat), len(noise)):
            piece = flat[start : start + len(noise)]
            torch.mul(noise[: len(piece)], fan_in**-0.5, out=piece)
    mixin: Any = StableDiffusionXLLoraLoaderMixin if family == "sdxl" else StableDiffusionLoraLoaderMixin

    class Pipe(mixin):
        hf_device_map = None
        components = property(lambda self: {"unet": self.unet, "text_encoder": None, "text_encoder_2": None})
        text_encoder = text_encoder_2 = None

    pipe = Pipe()
    pipe.unet = unet
    return pipe


def touched(unet: Any, case: Case) -> dict[str, Any]:
    return {path: module for path, module in unet.named_modules() if path.endswith(case.endings)}


def write_base(unet: Any, case: Case, folder: Path) -> Path:
    """The touched weights in a file as a diffusers folder has it; the others are never asked for."""
    (folder / "unet").mkdir()
    tensors = {f"{path}.weight": module.weight for path, module in touched(unet, case).items()}
    return write_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors", tensors)


def write_adapters(unet: Any, case: Case, folder: Path, count: int) -> list[Path]:
    """fp16 files, |change| about 8 % of |weight|."""
    files = []
    for index in range(count):
        generator = torch.Generator().manual_seed(100 + index)
        modules = {}
        for path, layer in touched(unet, case).items():
            out, inner = layer.weight.shape
            down = torch.randn(RANK, inner, generator=generator) / inner**0.5
            up = torch.randn(out, RANK, generator=generator) * 0.08 / RANK**0.5
            modules["unet", path] = LoraModule(down, up, float(RANK))
        file = folder / f"file{index}.safetensors"
        if case.spelling == "kohya":
            write_lora(file, modules, family=case.family, dtype=torch.float16)
        else:
            halves = {f"unet.{p}.lora_A.weight": m.down.half() for (_, p), m in modules.items()}
            write_tensors(file, halves | {f"unet.{p}.lora_B.weight": m.up.half() for (_, p), m in modules.items()})
        files.append(file)
    return files


class Clock:
    """The least CPU and wall seconds of each thing done."""

    def __init__(self) -> None:
        self.least: dict[str, tuple[float, float]] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.process_time(), time.perf_counter()
        result = work()
        spent = time.process_time() - start[0], time.perf_counter() - start[1]
        before = self.least.get(name, spent)
        self.least[name] = min(spent[0], before[0]), min(spent[1], before[1])
        return result

    def cpu(self, step: str) -> float:
        return self.least[step][0]


@contextmanager
def quiet() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield


def ours(unet: Any, files: list[Path], clock: Clock, base_files: tuple[Path, ...]) -> Any:
    """Load and merge, new weights, undo; returns a merged weight."""
    target = SimpleNamespace(unet=unet, files=base_files)
    adapters = [Adapter(file, 0.6, name=file.stem) for file in files]
    with quiet():
        mix = clock("load + merge", lambda: compose(target, *adapters))
    merged = unet.get_submodule(CHECKED).weight.clone()
    clock("new weights", lambda: mix.set_weights({file.stem: 0.5 - 0.01 * i for i, file in enumerate(files)}))
    clock("remove", mix.undo)
    return merged


def diffusers_way(pipe: Any, files: list[Path], clock: Clock) -> Any:
    """The same through load_lora_weights, set_adapters, fuse_lora and back."""
    names = [file.stem for file in files]

    def load() -> None:
        for file in files:
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=file.stem)
        pipe.set_adapters(names, [0.6] * len(files))
        pipe.fuse_lora(components=["unet"])

    def change() -> None:
        pipe.unfuse_lora(components=["unet"])
        pipe.set_adapters(names, [0.5 - 0.01 * i for i in range(len(files))])
        pipe.fuse_lora(components=["unet"])

    def remove() -> None:
        pipe.unfuse_lora(components=["unet"])
        pipe.unload_lora_weights()

    clock("load + merge", load)
    merged = pipe.unet.get_submodule(CHECKED).base_layer.weight.clone()
    clock("new weights", change)
    clock("remove", remove)
    return merged


def errors(base: torch.Tensor, files: list[Path], merged: dict[str, torch.Tensor]) -> dict[str, float]:
    """Each way's distance from the exact sum, over the distance of that sum rounded once."""
    exact = base.double()
    for file in files:
        module = read_lora(file).modules["unet", CHECKED]
        exact = exact + 0.6 * module.scale * module.up.double() @ module.down.double()
    best = (exact.to(base.dtype).double() - exact).norm()
    return {name: round(float((weight.double() - exact).norm() / best), 3) for name, weight in merged.items()}


def residue(unet: Any, base_file: Path) -> float:
    """The share of touched weights that differ from the base, which is put back."""
    changed = total = 0
    for name, tensor in read_tensors(base_file, allow_nonfinite=True).items():
        weight = unet.get_submodule(name.removesuffix(".weight")).weight
        changed += int((weight != tensor).sum())
        total += weight.numel()
        weight.copy_(tensor)
    return changed / total


def anonymous_mib() -> float:
    return resident_mib("RssAnon")


def resident_mib(kind: str) -> float:
    """Of this process. kind: RssAnon, or RssFile, the pages of files that are mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1]) / 1024


def added_memory(unet: Any, files: list[Path], base_files: tuple[Path, ...]) -> dict[str, float]:
    """MiB of anonymous memory above that before, at the highest and while the mix stays."""
    target = SimpleNamespace(unet=unet, files=base_files)
    before, seen, stop = anonymous_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            seen.append(anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with quiet():
        mix = compose(target, *(Adapter(file, 0.6, name=file.stem) for file in files))
    stop.set()
    watcher.join()
    stays = anonymous_mib()
    mix.undo()
    return {"peak": round(max(seen) - before, 1), "stays": round(stays - before, 1)}


COLD = ("sfumato", "sfumato copy", "diffusers", "diffusers, loading alone", "floor")


def cold(unet: Any, base: Path, files: list[Path], rounds: int) -> dict[str, Any]:
    """The least CPU and wall seconds of loading and merging in a fresh process, by way, the ways in turns."""
    asked: dict[str, Any] = {"config": dict(unet.config), "dtype": str(unet.dtype).removeprefix("torch.")}
    asked |= {"base": str(base), "files": [str(file) for file in files], "threads": torch.get_num_threads()}
    least: dict[str, tuple[float, float]] = {}
    for _ in range(rounds):
        for way in COLD:
            command = [
                sys.executable,
                str(Path(__file__).with_name("compose_cold.py")),
                json.dumps(asked | {"way": way}),
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
            cpu, wall = json.loads(done.stdout.splitlines()[-1])
            before = least.get(way, (cpu, wall))
            least[way] = min(cpu, before[0]), min(wall, before[1])
    return {
        "cpu_seconds": {way: round(seconds[0], 3) for way, seconds in least.items()},
        "wall_seconds": {way: round(seconds[1], 3) for way, seconds in least.items()},
        "cpu_over_floor": {way: round(seconds[0] / least["floor"][0], 2) for way, seconds in least.items()},
    }


def measure(case: Case, counts: list[int], rounds: int) -> dict[str, Any]:
    pipe = build(case.family, case.dtype)
    report: dict[str, Any] = {
        "modules": len(touched(pipe.unet, case)),
        "spelling": case.spelling,
        "base": str(case.dtype).removeprefix("torch."),
        "files": {},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = write_base(pipe.unet, case, folder)
        files = write_adapters(pipe.unet, case, folder, max(counts))
        pristine = pipe.unet.get_submodule(CHECKED).weight.clone()
        ways: dict[str, Callable[[list[Path], Clock], Any]] = {
            "sfumato": lambda files, clock: ours(pipe.unet, files, clock, (base,)),
            "sfumato copy": lambda files, clock: ours(pipe.unet, files, clock, ()),
            "diffusers": lambda files, clock: diffusers_way(pipe, files, clock),
        }
        for count in counts:
            clocks, merged, left = {way: Clock() for way in ways}, {}, {}
            for _ in range(rounds):
                for way, work in ways.items():
                    merged[way] = work(files[:count], clocks[way])
                    left[way] = residue(pipe.unet, base)
            report["files"][count] = {
                "cold": cold(pipe.unet, base, files[:count], rounds),
                "cpu_seconds": {w: {s: round(t[0], 3) for s, t in c.least.items()} for w, c in clocks.items()},
                "wall_seconds": {w: {s: round(t[1], 3) for s, t in c.least.items()} for w, c in clocks.items()},
                "diffusers_over": {
                    way: {
                        s: round(clocks["diffusers"].cpu(s) / clocks[way].cpu(s), 1) for s in clocks["diffusers"].least
                    }
                    for way in ("sfumato", "sfumato copy")
                },
                "weights_changed_after_removal": left,
                "error_over_one_rounding": errors(pristine, files[:count], merged),
                "added_anonymous_mib": {
                    "sfumato": added_memory(pipe.unet, files[:count], (base,)),
                    "sfumato copy": added_memory(pipe.unet, files[:count], ()),
                },
            }
    return report


def half_precision(cycles: int = 3) -> dict[str, float]:
    """The share of fp16 weights changed after some cycles of adding, weighing and removing eight files."""
    case, pipe, left = CASES["sd1-attention"], build("sd1", torch.float16), {}
    with tempfile.TemporaryDirectory() as name:
        base = write_base(pipe.unet, case, Path(name))
        files = write_adapters(pipe.unet, case, Path(name), 8)
        for way in ("sfumato", "sfumato copy", "diffusers"):
            for _ in range(cycles):
                if way == "diffusers":
                    diffusers_way(pipe, files, Clock())
                else:
                    ours(pipe.unet, files, Clock(), (base,) if way == "sfumato" else ())
            left[way] = residue(pipe.unet, base)
    return left


class Operations(TorchDispatchMode):
    """Counts the dispatched operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        infos = [argument.alias_info for argument in function._schema.arguments]
        is_view = any(info is not None and not info.is_write for info in infos)
        self.count += not is_view and function is not torch.ops.aten._unsafe_view.default
        return function(*arguments, **(options or {}))


def operations() -> dict[str, Any]:
    """Dispatched operations and CPU seconds of a call of SD 1.5's U-Net, 32 x 32 latents, with eight adapters live."""
    case, pipe, report = CASES["sd1-attention"], build("sd1"), {}
    x, text = torch.randn(1, 4, 32, 32).bfloat16(), torch.randn(1, 77, 768).bfloat16()

    def call(name: str) -> None:
        pipe.unet(x, 500, encoder_hidden_states=text)
        with Operations() as counted:
            pipe.unet(x, 500, encoder_hidden_states=text)
        clock = Clock()
        for _ in range(3):
            clock("call", lambda: pipe.unet(x, 500, encoder_hidden_states=text))
        report[name] = {"operations": counted.count, "cpu_seconds": round(clock.cpu("call"), 3)}

    call("none")
    with tempfile.TemporaryDirectory() as name:
        files = write_adapters(pipe.unet, case, Path(name), 8)
        with quiet():
            mix = compose(pipe, *(Adapter(file, 0.1, name=file.stem) for file in files), way="live")
        call("sfumato live")
        clock = Clock()
        for weight in (0.2, 0.3):
            clock("set", partial(mix.set_weights, {file.stem: weight for file in files}))
        report["sfumato live"]["new_weights_cpu_seconds"] = round(clock.cpu("set"), 3)
        mix.undo()
        for file in files:
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=file.stem)
        pipe.set_adapters([file.stem for file in files], [0.1] * 8)
        call("peft")
        pipe.unload_lora_weights()
    for way in ("sfumato live", "peft"):
        report[way]["over_none"] = round(report[way]["operations"] / report["none"]["operations"], 2)
        report[way]["cpu_over_none"] = round(report[way]["cpu_seconds"] / report["none"]["cpu_seconds"], 2)
    return report


def imports(rounds: int = 5) -> dict[str, float]:
    """CPU seconds of a fresh process, the least of the rounds in turns."""
    lines = {
        "torch": "import torch",
        "composition path": "from sfumato.compose import Adapter, Mix, compose",
        "diffusers' pipeline": "from diffusers import StableDiffusionPipeline",
    }
    code = "import time; {}; print(time.process_time())"
    least: dict[str, float] = {}
    for _ in range(rounds):
        for name, line in lines.items():
            done = subprocess.run([sys.executable, "-c", code.format(line)], capture_output=True, text=True, check=True)
            least[name] = min(float(done.stdout), least.get(name, float("inf")))
    return {name: round(seconds, 2) for name, seconds in least.items()} | {
        "over_torch": round(least["composition path"] / least["torch"], 3)
    }


EXTRAS = {"half precision": half_precision, "operations": operations, "imports": imports}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=[*CASES, *EXTRAS], choices=[*CASES, *EXTRAS])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if min(*options.counts, options.rounds, options.threads) < 1:
        parser.error("--counts, --rounds and --threads are at least 1")
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    report: dict[str, Any] = {"torch": torch.__version__, "threads": options.threads, "rank": RANK}
    for name in options.cases:
        report[name] = EXTRAS[name]() if name in EXTRAS else measure(CASES[name], options.counts, options.rounds)
        print(name, json.dumps(report[name]), file=sys.stderr, flush=True)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
