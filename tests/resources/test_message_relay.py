"""The messages of a stage in Dagster's event log: thinned metrics with both ends, progress at intervals, and images."""

from types import SimpleNamespace

import dagster as dg
import pytest
from PIL import Image

from resources.message_relay import IMAGE_BYTES, MessageRelay, PointThinner


class Context:
    """Records log lines and observations."""

    asset_key = dg.AssetKey(["demo", "lora"])

    def __init__(self):
        self.lines = []
        self.observations = []
        self.log = SimpleNamespace(info=self.lines.append)

    def log_event(self, event):
        self.observations.append({name: value.value for name, value in event.metadata.items()})


@pytest.fixture
def context():
    return Context()


def make_relay(context, metric_points=100, clock=lambda: 0.0):
    return MessageRelay(context, progress_seconds=10.0, metric_points=metric_points, clock=clock)


def progress(done, total, task="train"):
    return {"type": "progress", "task": task, "done": done, "total": total, "unit": "steps"}


def metric(step, **values):
    return {"type": "metric", "step": step, "values": values}


def test_relay_long_curve_is_thinned_to_metric_points_with_both_ends(context):
    relay = make_relay(context)
    messages = [progress(0, 9_999)]
    for step in range(1, 10_000):
        messages.append(metric(step, loss=1 / step))
        if step % 500 == 0:
            relay.relay(messages)
    relay.relay(messages)
    relay.finish()
    steps = [observation["step"] for observation in context.observations]
    assert steps == [*range(1, 9_999, 100), 9_999]
    assert context.observations[3] == {"step": 301, "loss": 1 / 301}


def test_relay_unknown_total_intervals_grow_with_the_step(context):
    relay = make_relay(context)
    relay.relay([metric(step, loss=1.0) for step in range(1, 100_001)])
    relay.finish()
    steps = [observation["step"] for observation in context.observations]
    assert 80 < len(steps) < 130
    assert steps[:5] == [1, 2, 3, 4, 5]
    assert steps[-1] == 100_000


def test_relay_rare_metrics_are_thinned_separately(context):
    relay = make_relay(context, metric_points=10)
    relay.relay(
        [progress(0, 1000), *(metric(step, loss=1.0) for step in range(500)), metric(500, eval_loss=0.5)]
    )
    assert {"step": 500, "eval_loss": 0.5} in context.observations


def test_relay_resumed_curve_is_thinned_by_the_total_length(context):
    relay = make_relay(context, metric_points=10)
    relay.relay([progress(600, 1000), *(metric(step, loss=1.0) for step in range(601, 1001))])
    relay.finish()
    assert [observation["step"] for observation in context.observations] == [601, 701, 801, 901, 1000]


def test_relay_non_finite_value_is_its_name(context):
    make_relay(context).relay([metric(1, loss="nan")])
    assert context.observations == [{"step": 1, "loss": "nan"}]


def test_relay_progress_is_logged_first_at_intervals_and_last(context):
    now = [0.0]
    relay = make_relay(context, clock=lambda: now[0])
    messages = []
    for done in range(1, 26):
        messages.append(progress(done, 25))
        relay.relay(messages)
        now[0] += 1.0
    assert [line.split(" steps")[0] for line in context.lines] == [
        "train: 1 of 25",
        "train: 11 of 25",
        "train: 21 of 25",
        "train: 25 of 25",
    ]


def test_relay_unknown_message_raises(context):
    with pytest.raises(ValueError, match="unknown message"):
        make_relay(context).relay([{"type": "smoke signal"}])


def test_point_thinner_short_curve_selects_every_point():
    thinner = PointThinner(limit=100)
    assert all(thinner.select(step, total=50) for step in range(50))


def test_relay_image_is_an_observation_at_intervals(context, tmp_path):
    path = tmp_path / "star.png"
    Image.effect_noise((1024, 1024), 90).save(path)
    now = [0.0]
    relay = make_relay(context, clock=lambda: now[0])
    messages = []
    for second in range(12):
        now[0] = float(second)
        message = {
            "type": "image",
            "name": "star, forming",
            "path": str(path),
            "caption": "a star",
            "step": 4,
        }
        messages.append(message)
        relay.relay(messages)
    observations = context.observations
    assert [(image["name"], image["step"]) for image in observations] == [
        ("star, forming", 4)
    ] * 3  # at 0, 5 and 10 s
    assert observations[0]["image"].startswith("![star, forming](data:image/jpeg;base64,")
    assert 1_000 < len(observations[0]["image"]) < 1.4 * IMAGE_BYTES
    assert len(context.lines) == 3
    relay.relay([*messages, {**messages[0], "name": "star", "path": str(tmp_path / "gone.png")}])
    assert len(context.observations) == 3  # a missing file is not an error
    assert len(context.lines) == 4
