"""The smallest trainer there is, with everything that a run must bring back: for the tests of `sfumato.runs`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sfumato.config import parse
from sfumato.files import write_tensors
from sfumato.runs.run import Run, Step
from sfumato.training.optim.ema import Ema
from sfumato.training.optim.optimizers import LearningRateSchedule, build_optimizer, clip_grad_norm
from sfumato.training.options import RunOptions
from sfumato.utils import randomness


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """Learn a random linear map."""

    steps: int = 10
    """Optimizer steps."""
    seed: int = 0
    """Where all numbers come from."""
    width: int = 8
    """Side of the map."""
    data: str = "numbers"
    """What it is told the data are called."""
    pause_s: float = 0.0
    """Seconds that a step takes longer."""


Hook = Callable[[Step, nn.Module], None]


def train(
    config: Config,
    *,
    before: Hook | None = None,
    after: Hook | None = None,
    loss_of: Callable[[int], float] | None = None,
) -> Path:
    """before, after: called in each step before the optimizer and after it. loss_of: a factor of step n's loss."""
    import time

    run = Run.start(config, program="small")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = nn.Sequential(nn.Linear(config.width, config.width), nn.Dropout(0.2))
    parameters = list(model.parameters())
    optimizer = build_optimizer("adamw", [{"params": parameters, "lr": 1e-2}], weight_decay=0.01)
    schedule = LearningRateSchedule(optimizer, "cosine", config.steps, 2)
    average = Ema(parameters, 0.9)
    run.keep(model=model, optimizer=optimizer, average=average)
    run.identify(data=config.data)
    run.every(config.measure_every, lambda step: run.log(step=step, weight=parameters[0].detach().norm()))
    for step in run.steps(config.steps):
        schedule.set(step.number, step.rate_factor)
        x = randomness.normal((4, config.width), config.seed, "x", step.number)
        with randomness.seeded(torch.device("cpu"), config.seed, "dropout", step.number):
            loss = (model(x) - x.flip(1)).square().mean()
        if loss_of is not None:
            loss = loss * loss_of(step.number)
        loss.backward()
        if before is not None:
            before(step, model)
        norm = clip_grad_norm(parameters, 1.0)
        if step.healthy(loss=loss, gradient_norm=norm):
            optimizer.step()
            average.update()
        optimizer.zero_grad()
        if after is not None:
            after(step, model)
        step.done(loss=loss, rate=schedule.rate, gradient_norm=norm)
        time.sleep(config.pause_s)
    average.swap()
    path = config.output / f"{config.name or config.output.name}.safetensors"
    write_tensors(path, {name: tensor.detach() for name, tensor in model.state_dict().items()})
    run.close()
    return path


def main(argv: Sequence[str]) -> int:
    train(parse(Config, argv, program="train small"))
    return 0
