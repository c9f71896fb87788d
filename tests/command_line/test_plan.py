"""Which adapters count in an image: those whose weight is not 0 somewhere in it."""

import pytest

from sfumato.adapters.weights import Adapter, Span
from sfumato.compose.schedules import Ramp
from sfumato.generation.arguments.schedules import Plan
from sfumato.generation.image_options import PictureRequest
from sfumato.generation.placement import AdapterPlacement, RegionSpec

LEFT = (0.0, 0.0, 0.5, 1.0)
ROSE, FALLEN, LATE = Ramp((0, 0), (1, 0.5)), Ramp((0, 0), (1, 0)), Span(0.5, 1)


def region(weight):
    return RegionSpec((Adapter("otter.safetensors", weight),), LEFT, None)


@pytest.mark.parametrize(
    ("weight", "tags", "placement", "sweep", "counted"),
    [
        (0.5, None, {}, None, {"line"}),
        (0.0, None, {}, None, set()),
        ((0.0, 0.5), None, {}, None, {"line"}),
        (0.5, {"line": 0.0}, {}, None, set()),
        (0.0, {"line": 0.3}, {}, None, {"line"}),
        (0.0, None, {"by_step": {"line": ROSE}}, None, {"line"}),
        (0.5, None, {"by_step": {"line": FALLEN}}, None, set()),
        (0.0, None, {"by_step": {"line": LATE}}, None, set()),
        (0.5, None, {"by_step": {"line": LATE}}, None, {"line"}),
        (0.0, {"line": 0.0}, {"by_step": {"line": ROSE}, "tagged": frozenset(["line"])}, None, set()),
        (0.0, {"line": 0.4}, {"by_step": {"line": ROSE}, "tagged": frozenset(["line"])}, None, {"line"}),
        (0.5, None, {}, ("line", (0.0, 0.0)), set()),
        (0.5, None, {}, ("line", (0.0, 1.0)), {"line"}),
        (0.0, None, {"regions": (region(0.5),)}, None, {"otter"}),
        (0.5, None, {"regions": (region(0.0),)}, None, {"line"}),
    ],
)
def test_an_adapter_counts_where_a_step_a_row_or_a_region_gives_it_a_weight(weight, tags, placement, sweep, counted):
    picture = PictureRequest("a crab", 0, tags, {})
    adapters, where = (Adapter("line.safetensors", weight),), AdapterPlacement(**placement)
    plan = Plan((picture,), "", adapters, {}, (), None, None, (), sweep, where)
    assert plan.counted == plan.counted_in(picture) == counted
