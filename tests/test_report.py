"""report.py: what a run says, and when, and its plot."""

import json
from collections import Counter

import pytest

import train
from support.report import PATIENCE, draw_run, warnings_for


@pytest.mark.parametrize("stats, told", [
    ({"reward": 0.0, "zero_variance_groups": 1.0, "truncated": 1.0}, "--max-completion-length"),
    ({"reward": 1.0, "zero_variance_groups": 1.0, "truncated": 0.0}, "nothing left to teach"),
    ({"reward": 0.0, "zero_variance_groups": 1.0, "truncated": 0.2}, "--examples"),
    ({"reward": 0.5, "zero_variance_groups": 0.95, "truncated": 0.2}, "--num-generations"),
    ({"reward": 0.5, "zero_variance_groups": 0.2, "truncated": 0.2, "sinkhorn_converged": 0.5}, "--ot-eps"),
])
def test_what_goes_on_for_some_steps_is_said_once(stats, told, flags):
    config, streaks = train.parse(flags), Counter()
    good = {"reward": 0.5, "zero_variance_groups": 0.5, "truncated": 0.2, "sinkhorn_converged": 1.0}
    for each in [stats] * (PATIENCE - 1) + [good] + [stats] * (PATIENCE - 1):
        assert not warnings_for(each, streaks, config), "not in a row"
    (told_line,) = warnings_for(stats, streaks, config)
    assert told in told_line
    for each in [stats] * 20 + [good] + [stats] * 20 + [{"pair_margin": 0.1}] * 20:
        assert not warnings_for(each, streaks, config), "said twice"


def test_a_term_that_a_resumed_run_goes_on_without_is_drawn_as_far_as_it_goes(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    lines = [{"step": n, "reward": 0.5, **({"loss_ot": 0.1} if n < 3 else {"entropy": 1.0})} for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "eval.json").write_text(json.dumps({"start": {}, "steps": {}, "end": {}}))
    figure = draw_run(pyplot, tmp_path)
    drawn = {axis.get_title(): [len(line.get_xdata()) for line in axis.lines] for axis in figure.axes}
    assert drawn["drift (Sinkhorn)"] == [2] and drawn["entropy, nats per token"] == [1] and drawn["format"] == [3]
    pyplot.close(figure)
