"""geometry.py: every quantity against a case worked by hand, and the command on the embedded model."""

import copy
import dataclasses
import importlib.util
import json
import math

import pytest
import torch
import transformers

import geometry
import metrics
from support import tiny
from support.logits import logits_of
from support.model import load_model
from support.scoring import token_states

PRINCIPLES = str(tiny.MODEL_DIR.parent / "principles" / "reasoning.txt")


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def cloud(mean, covariance, num=50, seed=0):
    """`num` points whose mean and covariance (over n) are exactly these."""
    mean, covariance = mean.double(), covariance.double()
    z = noise(num, len(mean), seed=seed)
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / num)).T  # [n, d] of covariance 1
    return z @ torch.linalg.cholesky(covariance).T + mean


def rotation(d, seed=1):
    return torch.linalg.qr(noise(d, d, seed=seed)).Q


# ------------------------------------------------------------------------------------------------ the quantities


def test_effective_rank_of_a_spectrum_by_hand():
    assert math.isclose(metrics.effective_rank(cloud(torch.zeros(4), torch.eye(4))), 4, rel_tol=1e-9)
    spectrum = torch.tensor([0.5, 0.25, 0.25]).double()  # entropy: 0.5 log 2 + 0.5 log 4 = 1.5 log 2
    x = cloud(torch.ones(3), spectrum.diag())
    assert math.isclose(metrics.effective_rank(x), 2**1.5, rel_tol=1e-9), "singular values for variances?"
    assert math.isclose(metrics.effective_rank(7 * x @ rotation(3) + 5), 2**1.5, rel_tol=1e-9)
    line = torch.arange(6.0)[:, None] * torch.tensor([1.0, 2.0, 3.0])
    assert math.isclose(metrics.effective_rank(line), 1, abs_tol=1e-6)
    assert metrics.effective_rank(torch.ones(5, 3)).isnan()


def test_bures_wasserstein_of_gaussians_by_hand():
    a, b = torch.tensor([4.0, 1.0]).double(), torch.tensor([1.0, 9.0]).double()
    x, y = cloud(torch.zeros(2), a.diag()), cloud(torch.tensor([3.0, 4.0]), b.diag(), num=70, seed=1)
    assert math.isclose(metrics.bures_wasserstein(x, y) ** 2, 25 + 1 + 4, rel_tol=1e-9)  # 5^2 + (2-1)^2 + (1-3)^2
    turn = rotation(2)  # covariances that do not commute: the definition, with matrix roots by eigenvalues
    first, second = a.diag(), turn @ b.diag() @ turn.T

    def root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T

    square = (first + second - 2 * root(root(first) @ second @ root(first))).trace()
    z = cloud(torch.zeros(2), second, num=60, seed=2)
    assert math.isclose(metrics.bures_wasserstein(x, z) ** 2, square, rel_tol=1e-9)
    assert math.isclose(metrics.bures_wasserstein(z, x), metrics.bures_wasserstein(x, z), rel_tol=1e-9)
    assert metrics.bures_wasserstein(x, x) < 1e-6
    wide = noise(5, 20), noise(7, 20, seed=1)  # fewer points than dimensions
    spun = [c @ rotation(20) for c in wide]
    assert math.isclose(metrics.bures_wasserstein(*wide), metrics.bures_wasserstein(*spun), rel_tol=1e-9)


def test_cka_knows_orthogonal_maps_and_independence():
    x = noise(40, 6)
    assert math.isclose(metrics.linear_cka(x, -3 * x @ rotation(6) + 2), 1, rel_tol=1e-9)
    assert metrics.linear_cka(x, x @ torch.diag(torch.tensor([9.0, 1, 1, 1, 1, 1]).double())) < 0.9
    assert metrics.linear_cka(noise(4000, 6), noise(4000, 6, seed=1)) < 0.02
    ends = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]).double()
    assert math.isclose(metrics.linear_cka(ends, ends[:, :1]), 0.5**0.5, rel_tol=1e-9)  # one of two equal directions
    with pytest.raises(ValueError, match="40 and 39"):
        metrics.linear_cka(x, x[1:])


def test_fisher_rao_of_a_bernoulli_pair_is_the_angle_on_the_circle():
    def logits(p):
        return torch.tensor([p, 1 - p], dtype=torch.double).log()

    for p, q in ((0.5, 0.1), (0.2, 0.9), (1.0, 0.0)):  # p = sin^2 s: the distance is 2 |s - t|
        by_hand = 2 * abs(math.asin(p**0.5) - math.asin(q**0.5))
        assert math.isclose(metrics.fisher_rao(logits(p), logits(q)), by_hand, rel_tol=1e-6), (p, q)
    p, q = 0.3, 0.3 + 1e-9  # neighbours: the metric itself, dp / sqrt(p (1 - p))
    assert math.isclose(metrics.fisher_rao(logits(p), logits(q)), 1e-9 / (0.3 * 0.7) ** 0.5, rel_tol=1e-4)
    x, y = noise(5, 7), noise(5, 7, seed=1)
    direct = 2 * (x.softmax(-1) * y.softmax(-1)).sqrt().sum(-1).arccos()
    torch.testing.assert_close(metrics.fisher_rao(x, y), direct)
    torch.testing.assert_close(metrics.fisher_rao(x.half(), y.half()).double(), direct, rtol=0.01, atol=0.01)
    assert metrics.fisher_rao(x, x + 3).max() < 1e-7, "a constant added to logits is the same distribution"
    with pytest.raises(ValueError, match="one shape"):
        metrics.fisher_rao(x, y[:4])


def test_principle_directions_span_angle_and_variance_ratio_by_hand():
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    corners = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]).double()
    x = corners[labels] + torch.tensor([[0, 0, 0, 0.5], [0, 0, 0, -0.5]]).double().repeat(3, 1)
    torch.testing.assert_close(metrics.principle_means(x, labels, 3), corners)
    directions = corners - corners.mean(0)
    assert math.isclose(metrics.mean_angle(directions), 120, rel_tol=1e-9)  # a regular simplex of three
    assert math.isclose(metrics.mean_angle(directions * 1e-13), 120, rel_tol=1e-9)
    assert math.isnan(metrics.mean_angle(directions * 0)), "no direction, no angle"
    assert math.isclose(metrics.between_to_within(x, labels, 3), (2 / 3) / 0.25, rel_tol=1e-9)
    in_plane, out_of_plane = torch.tensor([[1.0, -1, 0, 0]]), torch.tensor([[1.0, 1, 1, 0]])
    mixed = in_plane + torch.tensor([[0, 0, 0, 2.0]])  # squared lengths 2 and 4
    for drift, share in ((in_plane, 1), (out_of_plane, 0), (mixed, 1 / 3)):
        seen, rank = metrics.share_in_span(drift, directions)
        assert rank == 2 and math.isclose(seen, share, abs_tol=1e-9), "directions that sum to 0 span K - 1"
    with pytest.raises(ValueError, match="each of 4"):
        metrics.principle_means(x, labels, 4)


def test_a_random_subspace_holds_its_share_on_average():
    drift = noise(30, 10) * torch.linspace(0.1, 3, 10)  # far from isotropic
    shares = [metrics.share_in_span(drift, noise(3, 10, seed=s))[0] for s in range(2000)]
    assert abs(sum(shares) / 2000 - 0.3) < 0.01


@pytest.mark.parametrize("function", [metrics.effective_rank, lambda x: metrics.bures_wasserstein(x, x[:, :2]),
                                      lambda x: metrics.linear_cka(x[0], x)])
def test_shapes_are_checked(function):
    with pytest.raises(ValueError, match=r"\[points, dimensions\]"):
        function(torch.zeros(3, 4) if function is not metrics.effective_rank else torch.zeros(3))


# ------------------------------------------------------------------------------------------------ samples are even


@pytest.mark.parametrize("num", [511, 512, 513, 600, 1000, 1023, 1024, 2048])
def test_the_cloud_of_the_divergence_is_an_even_sample_and_the_same_rows_of_both_models(num, monkeypatch):
    seen = []
    divergence = geometry.sinkhorn_divergence
    monkeypatch.setattr(geometry, "sinkhorn_divergence", lambda x, y, eps: seen.append((x, y)) or divergence(x, y, eps))
    base = torch.arange(float(num))[:, None] + torch.tensor([0.0, 0.5])  # the row number is in the point
    for seed in range(3):
        geometry.compare_layer(base, base + 0.25, torch.arange(num) % 2, 2, seed)
    for x, y in seen:
        rows = x[:, 0]
        assert len(rows) == min(num, 512) == len(rows.unique()) and torch.equal(y, x + 0.25)
        sigma = num / 12**0.5 / len(rows) ** 0.5  # of the mean of a random sample
        assert abs(rows.mean() - (num - 1) / 2) < 4 * sigma, "the head, the tail or a part of the rows"
        quarters = torch.histc(rows, 4, 0, num - 1)
        assert quarters.min() > 0.6 * len(rows) / 4, f"rows by quarter: {quarters.tolist()}"
    assert num <= 512 or not torch.equal(seen[0][0], seen[1][0]), "--seed must count"


def test_where_in_the_rows_the_drift_is_does_not_matter():
    x, labels = noise(1000, 8).float(), torch.arange(1000) % 2
    found = []
    for start in range(0, 1000, 250):  # a quarter of the questions has moved
        moved = x.clone()
        moved[start : start + 250] += 1
        found.append(geometry.compare_layer(x, moved, labels, 2)["sinkhorn"])
    assert max(found) < 1.5 * min(found), found
    assert geometry.compare_layer(x, x, labels, 2)["sinkhorn"] < 1e-6


@pytest.mark.parametrize("num_tokens, lengths", [(2, [5, 3, 8, 1, 2, 9]), (13, [5, 3, 8, 1, 2, 9]), (10**6, [5, 3, 8, 1, 2, 9])])
def test_every_completion_gives_as_many_tokens(num_tokens, lengths):
    config = geometry.GeometryConfig("tiny", "tiny", PRINCIPLES, num_tokens=num_tokens)
    picked, elsewhere = geometry.pick_tokens([[7] * length for length in lengths], 3, config)
    assert picked == sorted(set(picked)), "in order, none twice"
    each = max(1, num_tokens // 6)
    assert [sum(row == r for row, _ in picked) for r in range(6)] == [min(each, length) for length in lengths]
    assert all(t < lengths[row] for row, t in picked)
    assert all(r // 3 == other // 3 and r != other for r, other in enumerate(elsewhere)), "of the same question"


def test_tokens_are_picked_from_all_of_a_completion():
    config = geometry.GeometryConfig("tiny", "tiny", PRINCIPLES, num_tokens=400)
    picked, _ = geometry.pick_tokens([[7] * 50] * 100, 2, config)
    places = torch.tensor([t for _, t in picked]).float()
    assert abs(places.mean() - 24.5) < 4 * 50 / 12**0.5 / len(places) ** 0.5, "the beginnings, or the ends"


def test_an_interval_is_over_questions():
    owners = torch.tensor([0, 0, 0, 1, 2, 2])
    figures = geometry.interval_over_questions(torch.tensor([1.0, 2.0, 3.0, 6.0, 0.0, 2.0]), owners)
    assert figures["mean"] == 3 and 1 <= figures["low"] < 3 < figures["high"] <= 6


def test_every_setting_is_a_flag():
    fields = {field.name for field in dataclasses.fields(geometry.GeometryConfig)}
    hidden = {name for name in vars(geometry.GeometryConfig) if not name.startswith("_")} - fields - {"check"}
    assert not hidden, "settings that the dataclass does not know"


# ------------------------------------------------------------------------------------------------ the command


def moved_model(path, scale=0.02):
    model, tokenizer = load_model(str(tiny.MODEL_DIR), torch.device("cpu"))
    moved = copy.deepcopy(model)
    for p in moved.parameters():
        p.data += scale * noise(*p.shape).float()
    moved.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model, moved


def test_states_of_every_layer_are_those_of_the_plain_forward_and_of_training():
    model, _ = load_model(str(tiny.MODEL_DIR), torch.device("cpu"))
    prompts, completions = [[1, 20, 21, 22], [1, 30, 31]], [[40, 41, 42], [50, 51, 52, 53, 2]]
    picked = [(0, 0), (0, 2), (1, 1), (1, 4)]
    states = geometry.layer_states(model, prompts, completions, picked)  # [L + 1, 4, d]
    with torch.no_grad():
        for n, (row, t) in enumerate(picked):
            seen = torch.tensor([prompts[row] + completions[row][:t]])  # what predicts token t has read so much
            hidden = model(seen, output_hidden_states=True).hidden_states
            torch.testing.assert_close(states[:, n], torch.stack([h[0, -1] for h in hidden]), rtol=1e-4, atol=1e-4)
        tokens = torch.tensor([c + [0] * (5 - len(c)) for c in completions])[:, None]  # [2, 1, T]
        mask = torch.arange(5) < torch.tensor([[3], [5]])  # [2, T]
        trained_on, places = token_states(model, prompts, tokens, mask[:, None])  # [M, d], [M] into 2·T
    torch.testing.assert_close(states[-1, 3], trained_on[places == 5 + 4][0], rtol=1e-4, atol=1e-4)


def test_the_command_on_a_moved_model(tmp_path, capsys):
    moved_model(tmp_path / "moved")
    out = tmp_path / "g.json"
    flags = ["--num-questions", "3", "--num-tokens", "200", "--max-completion-length", "24", "--json", str(out)]
    assert geometry.main(["--base", "tiny", "--trained", str(tmp_path / "moved"), "--principles", PRINCIPLES, *flags]) == 0
    shown = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert len(result["layers"]) == 5 and "CKA" in shown and "Fisher-Rao" in shown
    assert shown.startswith("prompt: no worked examples before each question, no prefill"), "what the models are shown"
    for row in result["layers"]:
        assert row["sinkhorn"] > 0 and row["sinkhorn_error"] < 1e-3 and row["bures_wasserstein"] > 0
        assert 0 < row["linear_cka"] < 1 and 0 <= row["shift_in_span"] <= 1 and row["random_span"] == 7 / 128
        assert all(math.isfinite(value) for value in row.values())
    assert result["outputs"]["kl"]["low"] > 0 and 0 < result["outputs"]["fisher_rao"]["mean"] < math.pi
    plots = {"g.png"} if importlib.util.find_spec("matplotlib") else set()  # an optional package
    seen = {path.name for path in tmp_path.iterdir()}
    assert plots <= seen and len(seen) == 2 + len(plots), "a file aside was left"


def test_a_plot_that_fails_is_one_line_and_the_numbers_stay(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("latex could not be found")

    monkeypatch.setattr("geometry.layer_plot", broken)
    flags = ["--num-questions", "1", "--num-tokens", "60", "--max-completion-length", "8", "--json", str(tmp_path / "g.json")]
    assert geometry.main(["--base", "tiny", "--trained", "tiny", "--principles", PRINCIPLES, *flags]) == 0
    shown = capsys.readouterr()
    assert len(json.loads((tmp_path / "g.json").read_text())["layers"]) == 5 and "CKA" in shown.out
    reason = "latex could not be found" if importlib.util.find_spec("matplotlib") else "pip install matplotlib"
    assert f"no plot: {reason}\n" in shown.err


def test_a_model_compared_with_itself_has_not_moved(tmp_path):
    out = tmp_path / "g.json"
    flags = ["--num-questions", "2", "--num-tokens", "100", "--max-completion-length", "16", "--json", str(out)]
    assert geometry.main(["--base", "tiny", "--trained", "tiny", "--principles", PRINCIPLES, *flags]) == 0
    result = json.loads(out.read_text())
    for row in result["layers"]:
        assert abs(row["sinkhorn"]) < 1e-4 * row["scale"] ** 2 and row["mean_shift"] == 0
        assert row["shift_in_span"] is None, "no shift has no direction"
        assert row["linear_cka"] > 1 - 1e-9 and row["rank_before"] == row["rank_after"]
    outputs = result["outputs"]
    assert outputs["kl"]["mean"] == 0 == outputs["fisher_rao"]["mean"]
    assert outputs["principle_before"] == outputs["principle_after"] and outputs["principle_before"]["mean"] > 0
    assert outputs["principle_change"] == {"mean": 0, "low": 0, "high": 0}, "an interval of differences, not of levels"


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--trained", "{tmp}/none"], ["--trained", "none", "safetensors"]),
        (["--base", "{tmp}/none"], ["--base", "none"]),
        (["--principles", "{tmp}/none.txt"], ["none.txt", "text file"]),
        (["--dataset", "{tmp}/none.jsonl"], ["none.jsonl"]),
        (["--num-tokens", "1"], ["--num-tokens", "got 1", "2 or more"]),
        (["--max-completion-length", "600"], ["--max-completion-length", "512"]),
        (["--json", "{tmp}/none/g.json"], ["--json", "writable folder"]),
        (["--such", "1"], ["--such", "--help"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(flags, parts, tmp_path, capsys):
    defaults = {"--base": "tiny", "--trained": "tiny", "--principles": PRINCIPLES}
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    flags = flags + [part for pair in defaults.items() if pair[0] not in flags for part in pair]
    assert geometry.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, f"more than one line: {error}"
    assert all(part in error for part in parts), error


def test_a_model_of_another_shape_is_refused(tmp_path, capsys):
    config = transformers.AutoConfig.from_pretrained(tiny.MODEL_DIR, num_hidden_layers=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    assert geometry.main(["--base", "tiny", "--trained", str(tmp_path), "--principles", PRINCIPLES]) == 2
    assert "another shape" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ which is which


def test_before_is_the_base_and_after_the_trained():
    base, trained = noise(60, 5), noise(60, 5, seed=1) * torch.linspace(0.1, 3, 5)
    labels = torch.arange(60) % 4
    row, directions = geometry.compare_layer(base, trained, labels, 4), []
    for when, x in (("before", base), ("after", trained)):
        directions.append(metrics.centred(metrics.principle_means(x, labels, 4)))
        assert math.isclose(row[f"rank_{when}"], metrics.effective_rank(x), rel_tol=1e-6)
        assert math.isclose(row[f"angle_{when}"], metrics.mean_angle(directions[-1]), rel_tol=1e-6)
        assert math.isclose(row[f"between_within_{when}"], metrics.between_to_within(x, labels, 4), rel_tol=1e-6)
    assert math.isclose(row["shift_in_span"], metrics.share_in_span(trained - base, directions[0])[0], rel_tol=1e-6)


@torch.no_grad()
def test_the_kl_is_from_trained_to_base_and_a_change_is_after_less_before():
    model, _ = load_model(str(tiny.MODEL_DIR), torch.device("cpu"))
    hidden, elsewhere = ([noise(7, 128, seed=s).float() for s in seeds] for seeds in ((0, 1), (2, 3)))
    found = geometry.compare_outputs((model, model), hidden, elsewhere)
    base, trained, base_other, trained_other = (logits_of(model, h) for h in (*hidden, *elsewhere))
    p, q = trained.log_softmax(-1), base.log_softmax(-1)
    torch.testing.assert_close(found["kl"], (p.exp() * (p - q)).sum(-1))
    change = metrics.fisher_rao(trained, trained_other) - metrics.fisher_rao(base, base_other)
    torch.testing.assert_close(found["principle_change"], change)
