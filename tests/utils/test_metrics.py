"""Metrics and the names of their scalars."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relvit_d2.utils.metrics import FORMATS, Metric, as_scalars, from_scalars, less_is_better

names = st.from_regex(r"([a-z_]{1,8}/)?[a-z]{1,6}(_[a-z]{1,4})?", fullmatch=True)
metrics = st.builds(Metric, st.floats(0, 1), st.none() | st.floats(0, 1), st.sampled_from([*FORMATS]))


@given(st.dictionaries(names.map(lambda name: name.rpartition("/")[2]), metrics), st.sampled_from(["", "held_out/"]))
def test_from_scalars_inverts_as_scalars(written: dict[str, Metric[float]], head: str) -> None:
    scalars = as_scalars({**written, "total_loss": 1.0, "feature_std": 0.5})
    assert scalars.items() >= {"total_loss": 1.0, "feature_std": 0.5}.items()
    under = {head + name: value for name, value in scalars.items()}
    assert from_scalars(under) == {head + name: metric for name, metric in written.items()}


def test_names_of_scalars() -> None:
    outputs = {"relation": Metric(0.3, 0.2), "distance": Metric(0.25, None, "error"), "loss_relation": 2.0}
    scalars = {"accuracy_relation": 0.3, "chance_relation": 0.2, "error_distance": 0.25, "loss_relation": 2.0}
    assert as_scalars(outputs) == scalars
    assert str(outputs["relation"]) == "30.0% (chance 20.0%)" and str(outputs["distance"]) == "0.250"


@pytest.mark.parametrize(
    ("name", "less"),
    [("bbox/AP", False), ("held_out/loss_cls", True), ("held_out/error_angle", True), ("held_out/accuracy_x", False)],
)
def test_losses_and_errors_are_better_if_lower(name: str, less: bool) -> None:
    assert less_is_better(name) == less
