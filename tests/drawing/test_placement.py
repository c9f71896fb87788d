"""At which steps adapters count, of what was said and of what their files ask for."""

from sfumato.adapters.weights import Span
from sfumato.compose.schedules import Ramp
from sfumato.generation.placement import AdapterPlacement


def test_files_are_heard_where_nothing_was_said_of_their_adapters():
    said = AdapterPlacement(by_step={"line": Span(0, 0.5)}, switch_labels=("otter",), switch_every=2)
    asked = {"line": (0.1, 0.2), "otter": (0.3, 0.4), "crab": (0.5, 0.6)}
    found = said.with_requested(asked)
    assert found.by_step == {"crab": Span(0.5, 0.6), "line": Span(0, 0.5)}
    assert (found.switch_labels, found.switch_every) == (("otter",), 2)


def test_a_ramp_says_the_weight_of_every_step_and_a_span_does_not():
    assert AdapterPlacement(by_step={"line": Span(0, 0.5), "otter": Ramp((0, 1), (1, 0))}).ramps == {"otter"}
