"""Several processes of one training: the main one first, and the others after it or not at all."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from sfumato.errors import PrecisionError, RunError
from sfumato.runs.processes import Processes
from sfumato.training.finish import describe_run
from sfumato.training.options import DataOptions, TrainerOptions

CPU = torch.device("cpu")


class Threads(Processes):
    """Processes that are threads of this one: they agree without torch.distributed."""

    said: list[bool]
    barrier: threading.Barrier

    @classmethod
    def several(cls, count):
        made = [cls(rank, count, CPU) for rank in range(count)]
        said, barrier = [], threading.Barrier(count)
        for one in made:
            object.__setattr__(one, "said", said)
            object.__setattr__(one, "barrier", barrier)
        return made

    def _agreement_without_limit(self):
        def agree(mine):
            self.said.append(mine)
            self.barrier.wait(20)
            return any(self.said)

        return agree


class Adding(Threads):
    """Threads that add their tensors up, as one message of so many numbers from each."""

    def sum(self, tensors):
        listed = list(tensors)
        self.said.append(torch.cat([t.reshape(-1) for t in listed]))
        self.barrier.wait(20)
        total = torch.stack(self.said).sum(0)
        self.barrier.wait(20)
        for tensor, part in zip(listed, torch.split(total, [t.numel() for t in listed]), strict=True):
            tensor.copy_(part.view_as(tensor))


def test_a_file_tells_the_batch_of_all_processes():
    base = SimpleNamespace(name="b", family=SimpleNamespace(name="sd1"), prediction_type="epsilon", vae_factor=8)
    base.levels = 2
    base.resolution, base.inpaints = 64, False
    base.adapted_fingerprint, base.alpha_bar = (lambda: ""), range(1000)
    config = TrainerOptions(
        images=Path("a"), output=Path("b"), name="c", resolution=64, batch=3, accumulate=2, wandb="p", wandb_name="n"
    )
    about = describe_run(config, base, MagicMock(), SimpleNamespace(ends=[], processes=4, prompts=[]))
    assert about.batch == 24
    assert about.config["batch"] == 3
    assert not {"wandb", "wandb_name"} & about.config.keys()  # whoever gets the file need not know the team


def run_all(processes, work):
    """What `work(process)` returned, or the error it ended with, by rank."""
    found = {}

    def one(process):
        try:
            found[process.rank] = work(process)
        except Exception as error:
            found[process.rank] = error

    threads = [threading.Thread(target=one, args=(process,)) for process in processes]
    for thread in reversed(threads):  # the main one comes last
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join(30)
    return found


def test_the_main_process_is_through_before_the_others_begin():
    events = []

    def work(process):
        with process.main_first():
            events.append((process.rank, "in"))
            time.sleep(0.05)
            events.append((process.rank, "out"))

    run_all(Threads.several(3), work)
    assert events[:2] == [(0, "in"), (0, "out")]
    assert {rank for rank, _ in events[2:]} == {1, 2}
    assert len(events) == 6


def test_where_the_main_process_fails_no_other_begins():
    entered = []

    def work(process):
        with process.main_first():
            entered.append(process.rank)
            raise ValueError("a broken picture")

    found = run_all(Threads.several(3), work)
    assert entered == [0]
    assert str(found[0]) == "a broken picture"
    assert all(isinstance(found[rank], RunError) for rank in (1, 2))


def test_a_process_alone_waits_for_nobody():
    with Processes(0, 1, CPU).main_first():
        pass
    with pytest.raises(ValueError, match="mine"), Processes(0, 1, CPU).main_first():
        raise ValueError("mine")


def test_a_gradient_that_one_process_lacks_is_the_others_and_one_that_all_lack_is_none():
    """As in one process with the whole batch: what nothing flows into is not stepped, and does not decay."""
    gradients = {0: [torch.ones(2), None, None], 1: [torch.ones(2), torch.full((3,), 2.0), None]}

    def work(process):
        trained = [torch.nn.Parameter(torch.zeros(size)) for size in (2, 3, 4)]
        for parameter, gradient in zip(trained, gradients[process.rank], strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        loss = torch.tensor(process.rank + 1.0)
        process.sum_gradients([*trained, torch.nn.Parameter(torch.zeros(9), requires_grad=False)], loss)
        return float(loss), [None if p.grad is None else p.grad.tolist() for p in trained]

    found = run_all(Adding.several(2), work)
    assert found[0] == found[1] == (3.0, [[2.0, 2.0], [2.0, 2.0, 2.0], None])


@pytest.mark.parametrize("cached", [True, False])
def test_with_a_cache_the_main_process_prepares_first(cached, monkeypatch, tmp_path):
    """Without one there is nothing to be read, and all prepare at once."""
    from sfumato import data

    order = []

    def prepare(examples, base, **options):
        order.append(threading.current_thread().name)
        return options["cache"]

    monkeypatch.setattr(data, "prepare", prepare)
    options = DataOptions(images=tmp_path, resolution=64, cache=tmp_path / "cache" if cached else None)

    def work(process):
        threading.current_thread().name = str(process.rank)
        return options.prepare((), None, processes=process)

    processes = Threads.several(2)
    found = run_all(processes, work)
    assert found == {0: options.cache, 1: options.cache}
    assert sorted(order) == ["0", "1"]
    assert order[0] == "0" or not cached
    assert len(processes[0].said) == (2 if cached else 0)


PROGRAM = """
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock
sys.path.insert(0, sys.argv[1])
from made_up import FakeBase
from sfumato.data import read_folder
from sfumato.training.options import DataOptions, TrainerOptions
from sfumato.runs.processes import Processes
processes = Processes.join("cpu")
options = DataOptions(images=Path(sys.argv[2]), cache=Path(sys.argv[3]), resolution=64, shuffle_tags=True)
base = FakeBase(deviation=1.0)
data = options.prepare(
    read_folder(options.images, caption_template="{caption}, tall"), base, will_draw=(0, 5, 4), processes=processes
)
batch = data.batch(0, 1, 4)
print(processes.rank, base.encoded, len(base.prompts), float(batch.latents.double().sum()), batch.captions, sep="|")
"""


@pytest.mark.slow
def test_of_two_real_processes_one_encodes_and_both_see_the_same(tmp_path):
    from tests.data.made_up import noise_picture

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(5):
        noise_picture(seed=number).save(pictures / f"{number}.png")
    here = str(Path(__file__).parents[1] / "data")

    def launch():
        (tmp_path / "program.py").write_text(PROGRAM)
        words = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        words += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        words += ["--main_process_port", "0", str(tmp_path / "program.py"), here, str(pictures), str(tmp_path / "c")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)

    done = launch()
    assert done.returncode == 0, done.stderr[:3000] + done.stderr[-1000:]
    main, other = sorted(line.split("|") for line in done.stdout.splitlines() if line.count("|") == 4)
    assert (main[1], other[1]) == ("5", "0")
    assert 0 < int(other[2]) < int(main[2])  # orders of tags stay out of the cache, and each embeds those by itself
    assert main[3:] == other[3:]

    (pictures / "2.png").write_bytes((pictures / "2.png").read_bytes()[:-40])
    done = launch()
    assert done.returncode != 0
    assert "2.png: " in done.stderr
    assert "the main process could not prepare the images" in done.stderr


def test_several_processes_on_one_device_are_refused(monkeypatch):
    several = SimpleNamespace(num_processes=2, process_index=1, device=torch.device("cuda:1"))
    monkeypatch.setattr("sfumato.runs.processes.PartialState", lambda **_: several)
    assert Processes.join("auto").device == torch.device("cuda:1")
    with pytest.raises(RunError, match="--device cuda:0 is one device for 2 processes; give auto, or cuda"):
        Processes.join("cuda:0")


def test_variables_that_a_launcher_left_over_are_named(monkeypatch):
    def refuse(**_):
        raise ValueError("Tried to launch on distributed with multinode,\nbut `MASTER_ADDR` env was not set")

    monkeypatch.setattr("sfumato.runs.processes.PartialState", refuse)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        RunError, match=r"cannot meet \(Tried .*\); found WORLD_SIZE, RANK in the environment. Start"
    ) as no:
        Processes.join("cpu")
    assert "\n" not in str(no.value)


class Comparing(Threads):
    """Threads that find the largest of their numbers."""

    def largest(self, number):
        self.said.append(number)
        self.barrier.wait(20)
        found = max(self.said)
        self.barrier.wait(20)
        if self.is_main:
            self.said.clear()
        self.barrier.wait(20)
        return found


@pytest.mark.parametrize(("numbers", "same"), [((2, 2, 2), True), ((2, 1, 2), False), ((0, 0, 3), False)])
def test_a_number_is_everywhere_where_none_has_another(numbers, same):
    found = run_all(Comparing.several(3), lambda process: process.is_everywhere(numbers[process.rank]))
    assert found == dict.fromkeys(range(3), same)


def test_processes_whose_devices_take_other_formats_are_refused():
    """A gradient that is scaled for fp16 and one that is not cannot be summed."""
    asked = []
    config = TrainerOptions(images=Path("a"), output=Path("b"), precision="auto", device="cpu")
    others = SimpleNamespace(count=2, device=CPU, is_everywhere=lambda number: bool(asked.append(number)))
    with pytest.raises(PrecisionError, match=r"the processes' devices take different ones, this one (fp32|bf16)\."):
        config.decide_precision(others)
    others.is_everywhere = lambda number: number == asked[0]
    assert config.decide_precision(others).device == CPU
