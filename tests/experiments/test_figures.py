"""The figure of a run: what is in `metrics.csv` is seen in it."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments.figures import plot_hyperparameters, plot_losses

NAN = float("nan")


@pytest.fixture
def axes():
    figure, axes = plt.subplots()
    yield axes
    figure.draw_without_rendering()
    plt.close(figure)


def history(train_losses, rates):
    rows = zip(train_losses, rates, strict=True)
    return [
        {"step": t, "train_loss": loss, "validation_loss": 1.0, "lr": lr, "weight_decay": 0.1}
        for t, (loss, lr) in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("losses", "marker"), [([NAN, 0.5], "o"), ([NAN, 0.5, 0.4], "None")], ids=["one", "more"]
)
def test_a_lone_loss_is_seen(axes, losses, marker):
    plot_losses(axes, history(losses, [0.1] * len(losses)), best_step=1)
    train, validation, _ = axes.lines
    assert (train.get_marker(), validation.get_marker()) == (marker, "None")


@pytest.mark.parametrize(
    ("rates", "marker"), [([0.1, 0.05, 0.0], "None"), ([0.1, 0.0], "o")], ids=["more", "one"]
)
def test_a_schedule_that_ends_at_zero_draws_no_bar(axes, rates, marker):
    plot_hyperparameters(axes, history([1.0] * len(rates), rates))
    rate, decay = axes.lines
    np.testing.assert_array_equal(rate.get_ydata(), [*rates[:-1], NAN])
    assert (rate.get_marker(), decay.get_marker()) == (marker, "None")
    assert axes.get_yscale() == "log"
