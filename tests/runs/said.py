"""What the tests of exact sentences share: a state, a run without a trainer, what it says and how it ends."""

import re

import pytest
import torch

from sfumato.errors import RunError
from sfumato.runs.run import Run
from sfumato.training.options import RunOptions

ONE = {"a": torch.ones(3)}
"""A state of which a checkpoint is soon made."""


def start(tmp_path, processes=None, **options):
    return Run.start(RunOptions(output=tmp_path / "run", **options), program="test", processes=processes)


def problem(work):
    """The line that the work ends with."""
    with pytest.raises(RunError) as ended:
        work()
    return str(ended.value)


def lines(capsys):
    """What was said, without the bar."""
    return [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line.strip() and "step/s" not in line]


class Processes:
    """Two of them, of which this one is the main one or not; the numbers that were compared are kept."""

    count = 2

    def __init__(self, *, main, others=0):
        self.is_main, self.others, self.asked = main, others, []

    def wait(self):
        pass

    def largest(self, number):
        self.asked.append(number)
        return max(number, self.others)
