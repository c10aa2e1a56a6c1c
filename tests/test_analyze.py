"""
Tests of analyze.py: every measure on a planted signal or model whose answer is known, and on noise,
where its null must say no; brute force over Z_p as reference; the command line on what isn't there.
"""
import builtins
import csv
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import analyze as a  # noqa: E402
import grok_icl as g  # noqa: E402

torch.set_num_threads(1)


def config(**changes):
    return g.Config(**{**dict(p=7, tasks=12, examples=6, depth=2, heads=2, embd=16, init_std=0.3, lr=0.01, wd=0.1,
                              batch=16, steps=4, warmup=1, eval_every=2, device="cpu", amp="off"), **changes})


def planted_lab(model=None, **changes):
    """What open_lab returns, with an untrained or a planted model."""
    cfg = config(**changes)
    torch.manual_seed(0)
    lab = SimpleNamespace(folder="", model=model or g.GPT(cfg), cfg=cfg, split=g.make_split(cfg), device="cpu",
                          p=cfg.p, k=cfg.examples, nulls=20)

    def sequences(kind):
        sets = g.eval_sequences(lab.split, kind, 32, lab.k, lab.p, a.SEED)
        return torch.cat([sets[f"{kind}_train"], sets[f"{kind}_test"]])
    lab.sequences = sequences
    return lab


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def log(x, p):
    """Discrete logarithm by trial; 0 for 0."""
    base = a.generator_of(p)
    return torch.tensor([next((k for k in range(p - 1) if pow(base, k, p) == v), 0) for v in x.flatten().tolist()]
                        ).view(x.shape)


def angle(p, group, k, l):
    """Angle of the character (k, l) at every (x, y), (p, p); at zeros it means nothing if multiplicative."""
    x, y = g.grid(p).T.view(2, p, p)
    m = p if group == "additive" else p - 1
    u, v = (x, y) if group == "additive" else (log(x, p), log(y, p))
    return 2 * math.pi * (k * u + l * v) / m + 0.7

# -------------------------------------------------------------------------------------------------
# Probes and nulls
# -------------------------------------------------------------------------------------------------

def test_the_grid_asks_every_query_after_the_same_context():
    lab = planted_lab()
    (task, *_), (inputs, *_) = a.contexts(lab, "test_ood", 3, 5)
    tokens = a.query_grid(task, inputs, 7)
    assert tokens.shape == (49, 18) and (tokens[:, :15] == tokens[0, :15]).all()
    for n, (x, y, z) in enumerate(tokens[:, 15:].tolist()):
        assert (x, y) == divmod(n, 7) and z == (task[0] * x + task[1] * y) % 7


def test_activations_rebuild_the_logits():
    lab = planted_lab()
    task, inputs = (t[0] for t in a.contexts(lab, "test_ood", 1, 5))
    seen = a.activations(lab, task, inputs)
    tokens, model = a.query_grid(task, inputs, 7), lab.model
    logits = model.norm(seen["residual 1"]) @ model.embedding.weight.T
    torch.testing.assert_close(logits[:, :, 1].flatten(0, 1), model(tokens[:, :-1])[:, -1])
    x = model.embedding(tokens[:, -3:]).unflatten(0, (7, 7))                  # and from heads and neurons
    for i, block in enumerate(model.blocks):
        x = x + a.head_outputs(lab, i, seen[f"heads {i}"]).sum(-2) + seen[f"neurons {i}"] @ block.mlp.down.weight.T
        torch.testing.assert_close(x, seen[f"residual {i}"])


def test_interception_changes_what_is_read_and_ends():
    lab = planted_lab()
    tokens = lab.sequences("test_ood")
    before = lab.model(tokens[:, :-1])
    with a.intercept({lab.model.norm: lambda x: 0 * x}):
        assert (lab.model(tokens[:, :-1]) - lab.model.norm.bias @ lab.model.embedding.weight.T).abs().max() < 1e-6
    assert torch.equal(lab.model(tokens[:, :-1]), before)


@pytest.mark.parametrize("p", [7, 11, 13, 29])
def test_orders(p):
    order = a.orders("multiplicative", p, 5)
    assert order.shape == (6, p - 1) and all(sorted(row) == list(range(1, p)) for row in order.tolist())
    assert all(order[0, (i + 1) % (p - 1)] == order[0, i] * order[0, 1] % p for i in range(p - 1))
    assert a.orders("additive", p, 5)[0].tolist() == list(range(p))
    assert a.generator_of(29) == 27


def test_against_null():
    scores = torch.tensor([5.0, *range(10)])                                  # 5 of 10 reach it
    assert a.against_null(scores)["p"] == pytest.approx(6 / 11)
    assert a.against_null(scores)["null"] == pytest.approx(np.quantile(range(10), 0.95))

# -------------------------------------------------------------------------------------------------
# Shots, skills, attention
# -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("best_fit", [False, True])
def test_memory_scores_against_loops(best_fit):
    p, gen = 5, torch.Generator().manual_seed(0)
    tasks = g.grid(p)[torch.randperm(25, generator=gen)[:6]]
    inputs = torch.randint(p, (40, 4, 2), generator=gen)
    tokens = g.to_tokens(g.grid(p)[torch.randint(25, (40,), generator=gen)], inputs, p)
    scores = a.memory_scores(tokens, tasks, p, best_fit)
    for row, sequence in zip(scores.tolist(), tokens.unflatten(1, (4, 3)).tolist()):
        for t, (x, y, z) in enumerate(sequence):
            fits = [sum((c * u + d * v) % p == w for u, v, w in sequence[:t]) for c, d in tasks.tolist()]
            best = max(fits) if best_fit else t
            said = [(c * x + d * y) % p for (c, d), f in zip(tasks.tolist(), fits) if f == best] or list(range(p))
            top = max(map(said.count, said))
            winners = {s for s in said if said.count(s) == top}
            assert row[t] == pytest.approx((z in winners) / len(winners))


def test_skills_of_a_ratio_matcher_and_of_a_constant():
    lab = planted_lab(exact("ratio"), examples=5)
    found = a.measure_skills(lab)
    assert found["accuracy"][:, :2].min() == 1                                # copies and ratio queries
    assert abs(np.nanmean(found["accuracy"][:, 2]) - 1 / 7) < 0.05            # else it says 0: by chance
    assert np.nanmin(found["zeros"][:, 1]) == 1 and found["right"].shape == (4, 7, 7)
    assert np.nanmax(found["error"][:, 1]) == 0


def test_attention_planted_on_the_line():
    """One head spreads evenly over earlier examples, one looks only at the z of those on the query's line."""
    p, k = 7, 8
    tokens = planted_lab(examples=k).sequences("test_ood")
    weights = torch.zeros(len(tokens), 2, k, 3 * k)
    multiple = []
    for b, sequence in enumerate(tokens.unflatten(1, (k, 3)).tolist()):
        for t, (x, y, _) in enumerate(sequence):
            same = [i for i, (u, v, _) in enumerate(sequence[:t])
                    if (u, v) != (0, 0) and (x, y) != (0, 0) and (x * v - y * u) % p == 0]
            weights[b, 0, t, :3 * t] = 1 / max(1, 3 * t)
            for i in same:
                weights[b, 1, t, 3 * i + 2] = 1 / len(same)
            if same and len(same) < t and (x, y) not in [(u, v) for u, v, _ in sequence[:t]]:
                multiple.append(len(same) / t)
    found = a.attention_to(weights, tokens, p)
    assert found["line"][0].item() == pytest.approx(1, abs=1e-5)
    assert found["line"][1].item() == pytest.approx(1 / np.mean(multiple), abs=1e-4)
    assert found["earlier z"][1].item() == pytest.approx(1) and found["own x"].abs().max() == 0

# -------------------------------------------------------------------------------------------------
# Circles, characters, similarity
# -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("group, other", [a.GROUPS, a.GROUPS[::-1]])
def test_a_planted_circle_is_found_in_its_group_alone(group, other):
    p = 13
    z = torch.polar(torch.ones(p, p, dtype=torch.double), angle(p, group, 3, 0).double())
    for plane, expected in ((z, (1, 1)), (z + 0.5 * torch.polar(torch.ones(p, p), angle(p, group, 0, 5)), (0.8, 1))):
        one, two, frequency = a.circles(plane, a.orders(group, p), a.orders(group, p, seed=1))
        assert (one[0].item(), two[0].item()) == pytest.approx(expected, abs=1e-6) and frequency == (3, 0)
        assert a.against_null(one)["p"] < 0.01
        wrong = a.circles(plane, a.orders(other, p), a.orders(other, p, seed=1))[0]
        assert a.against_null(wrong)["p"] > 0.05 and wrong[0] < 0.6


def test_a_line_is_no_circle_and_noise_has_none():
    p, order = 13, (a.orders("multiplicative", 13), a.orders("multiplicative", 13, seed=1))
    line = angle(p, "multiplicative", 6, 0).cos().to(torch.cfloat)            # frequency 6 of 12: to and fro
    assert a.circles(line, *order)[0][0] < 1e-6
    one = a.circles(torch.complex(noise(p, p), noise(p, p, seed=1)), *order)[0]
    assert a.against_null(one)["p"] > 0.05


def test_the_plane_holds_the_planted_variance():
    points = noise(500, 6) * torch.tensor([5.0, 4, 1, 1, 1, 1])
    plane, share = a.plane_of(points)
    assert plane.shape == (500,) and share == pytest.approx(41 / 45, abs=0.02)


@pytest.mark.parametrize("group", a.GROUPS)
def test_the_spectrum_of_planted_waves(group):
    p = 11
    waves = torch.stack([angle(p, group, 2, 3).cos(), angle(p, group, 4, -4).cos(),
                         3 * angle(p, group, 1, 0).cos() + angle(p, group, 0, 1).cos()], -1)
    order = a.orders(group, p, 0)[0]
    shares, m = a.spectrum(waves, order, order), len(order)
    assert shares[2, 3, 0].item() == pytest.approx(1) == shares[-2, -3, 0].item()
    assert shares[1, 0, 2].item() == pytest.approx(0.9, abs=1e-5) and shares[0, 0].abs().max() == 0
    count, ratio, _ = a.one_frequency([waves, waves], order, order)
    assert count == 3 and ratio == pytest.approx(1 / 3, abs=1e-5)             # the second one alone
    if m % 2 == 0:                                                            # and a real character
        half = angle(p, group, m // 2, m // 2).cos()[..., None]
        assert a.one_frequency([half], order, order)[1] == pytest.approx(1, abs=1e-5)


def test_similarity_by_ratio_is_found_and_nothing_in_noise():
    p = 11
    line = g.line_of(g.grid(p), p)
    similarity = (line[:, None] == line).float() * 0.6 + 0.1
    assert a.ratio_gap(similarity, p) == pytest.approx(0.6, abs=1e-5)
    renamed = torch.cat((torch.zeros(1, dtype=torch.long), torch.randperm(10, generator=torch.Generator().manual_seed(0)) + 1))
    assert abs(a.ratio_gap(similarity, p, renamed)) < 0.2
    assert abs(a.ratio_gap(noise(p * p, p * p), p)) < 0.1


def test_characters_are_kept_and_removed():
    p = 11
    one, two = angle(p, "multiplicative", 2, 3).cos(), angle(p, "multiplicative", 1, 0).cos()
    order = a.orders("multiplicative", p, 0)[0]
    mask = torch.zeros(10, 10, 1, dtype=torch.bool)
    mask[2, 3] = mask[-2, -3] = True
    kept = a.keep_characters((one + two + 5)[..., None], order, mask)[..., 0]
    torch.testing.assert_close(kept[1:, 1:], one[1:, 1:] + 5)
    torch.testing.assert_close(kept[0], (one + two + 5)[0])                   # zeros stay as they are

# -------------------------------------------------------------------------------------------------
# Interventions: planted models
# -------------------------------------------------------------------------------------------------

def exact(algorithm, p=7):
    """A model that does Ratio Matching, or Modular Regression by the last two examples; 0 where it can't."""
    def answer(sequence, x, y):
        for u, v, w in sequence if algorithm == "ratio" else []:
            for c in range(p):
                if (c * u % p, c * v % p) == (x, y):
                    return c * w % p
        for (u, v, w), (r, s, t) in itertools.combinations(sequence[::-1], 2) if algorithm == "regression" else []:
            for c, d in itertools.product(range(p), repeat=2):
                if (u * s - v * r) % p and ((c * u + d * r) % p, (c * v + d * s) % p) == (x, y):
                    return (c * w + d * t) % p
        return 0

    def model(tokens, everywhere=True):
        logits = torch.zeros(*tokens.shape, p)
        for b, row in enumerate(tokens.tolist()):
            for t in range(1, len(row), 3):
                sequence = [row[i:i + 3] for i in range(0, t - 1, 3)]
                logits[b, t, answer(sequence, row[t - 1], row[t])] = 1
        return logits
    return model


def test_changed_labels_tell_the_two_algorithms_apart(monkeypatch):
    monkeypatch.setattr(a, "SEQUENCES", 60)
    ratio, regression = (a.measure_labels(planted_lab(exact(name), examples=5)) for name in ("ratio", "regression"))
    assert ratio["on"] == [1, 1, 1] and ratio["off"][1:] == [1, 1] and ratio["regression"] == 0
    assert regression["regression"] == 1 and regression["off"][-1] < 1 and regression["on"][-1] < 0.9


def test_a_planted_head_is_found_by_patching_and_by_ablation():
    """Only head 1.1 writes to the stream: with its output from another run, the answers are that run's."""
    lab = planted_lab()
    with torch.no_grad():
        for i, block in enumerate(lab.model.blocks):
            block.mlp.down.weight.zero_()
            block.attention.out.weight[:, :8 if i else None] = 0
    ours = lab.sequences("test_ood")
    theirs = ours.clone()
    theirs[:, 2::3] = (theirs[:, 2::3] + 1) % 7                               # x and y as before
    values, before, after = a.site_values(lab, theirs), a.answers(lab, ours), a.answers(lab, theirs)
    assert (before != after).float().mean() > 0.1
    for part, at in itertools.product(a.parts_of(lab), a.POSITIONS.values()):
        patched = a.answers_with(lab, ours, values, [(part, at)])
        asked = part == "head 1.1" and at in (slice(None), slice(1, None, 3))
        assert torch.equal(patched, after if asked else before)
    means = {site: v.mean(0) for site, v in values.items()}
    held = a.answers_with(lab, ours, means, [("head 1.1", slice(None))])
    assert not torch.equal(held, before)
    assert torch.equal(a.answers_with(lab, ours, means, [("head 0.0", slice(None))]), before)


def test_all_parts_from_another_run_give_its_answers():
    """At y the tokens are the same in both; all else that reaches the prediction is patched."""
    lab = planted_lab()
    ours = lab.sequences("test_ood")
    theirs = ours.clone()
    theirs[:, 2::3] = (theirs[:, 2::3] + 1) % 7
    patched = a.answers_with(lab, ours, a.site_values(lab, theirs), [(part, slice(None)) for part in a.parts_of(lab)])
    assert torch.equal(patched, a.answers(lab, theirs)) and not torch.equal(patched, a.answers(lab, ours))


def test_division_and_lines():
    p = 7
    for x, y in itertools.product(range(p), range(1, p)):
        assert a.divide(torch.tensor([x]), torch.tensor([y]), p).item() * y % p == x
    tokens = torch.tensor([[1, 2, 0, 0, 0, 0, 3, 6, 0, 2, 3, 0, 2, 4, 0]])    # the query is (2, 4)
    assert a.on_line(tokens, p).tolist() == [[True, False, True, False]]
    assert a.subgroup_orders(29) == [1, 2, 4, 7, 14, 28]

# -------------------------------------------------------------------------------------------------
# The command line
# -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    cfg = config(out=str(out), snapshots=True)
    run = g.start(cfg)
    g.train(run, cfg)
    return out


@pytest.fixture
def quick(monkeypatch):
    for name, value in dict(NULLS=10, CONTEXTS=2, SEQUENCES=32, KEPT=(1, 4)).items():
        monkeypatch.setattr(a, name, value)
    monkeypatch.setattr(g, "REPORT_SEQUENCES", 64)


def test_everything_for_a_run(tiny_run, tmp_path, quick, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    assert matplotlib and a.main([str(tiny_run), "--out", str(tmp_path)]) is None
    numbers = json.load(open(tmp_path / "analysis.json"))
    assert list(numbers) == list(a.PARTS)
    with np.load(tmp_path / "analysis.npz") as arrays:
        assert arrays["shots/test_ood_test/model"].shape == (2, 6)
        assert arrays["progress/step"].tolist() == [2, 4]
    pictures = {f.stem for f in tmp_path.glob("*.png")}
    assert pictures == {"shots", "skills", "skill_grid", "attention", "pca", "fourier", "similarity", "ablation",
                        "progress"}


def test_without_matplotlib_the_numbers_are_there(tiny_run, tmp_path, quick, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args)
    monkeypatch.setattr(builtins, "__import__", without)
    assert a.main([str(tiny_run / "best.pt"), "ablation", "--out", str(tmp_path)]) is None
    assert "pip install matplotlib" in capsys.readouterr().out and not list(tmp_path.glob("*.png"))
    assert "held" in json.load(open(tmp_path / "analysis.json"))["ablation"]


def test_phases_of_a_sweep(tmp_path, capsys):
    for alpha, tasks, accuracy in ((0.5, 8, [1, 0, 0, 0]), (0.8, 8, [1, 1, 0, 0]), (0.8, 12, [1, 1, 1, 1])):
        cfg = config(alpha=alpha, tasks=tasks, out=str(tmp_path / f"{alpha}-{tasks}"))
        run = g.start(cfg)
        Path(cfg.out).mkdir()
        names = ("id_train", "id_test", "val_ood_train", "val_ood_test")
        run.history = [{f"{name}_novel": float(v) for name, v in zip(names, accuracy)}]
        g.save(run, cfg, "best.pt")
    assert a.main(["phases", str(tmp_path), "--out", str(tmp_path)]) is None
    lines = [row.split() for row in capsys.readouterr().out.splitlines()]
    assert ["0.8", "IG", "OG"] in lines and ["0.5", "IM", "?"] in lines
    assert len(json.load(open(tmp_path / "analysis.json"))) == 3


@pytest.mark.parametrize("argv, word", [
    (["nowhere"], "nowhere"), (["RUN", "nonsense"], "nonsense"), (["RUN", "--device", "gpu"], "--device gpu"),
    (["phases", "nowhere"], "nowhere"), (["phases"], "phases"), ([], "RUN"), (["TEXT"], "text.pt"),
    (["RUN", "--bass", "3"], "--bass"), (["RUN", "--out", "TEXT/x"], "text.pt")])
def test_bad_input_is_refused_in_one_line(argv, word, tiny_run, tmp_path, capsys):
    text = tmp_path / "text.pt"
    text.write_text("not a checkpoint")
    before = sorted(tiny_run.iterdir())
    assert a.main([w.replace("RUN", str(tiny_run)).replace("TEXT", str(text)) for w in argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and word in err and sorted(tiny_run.iterdir()) == before


def checkpoints():
    folder = ROOT / "assets"
    return [pytest.param(row, id=row["file"]) for row in json.load(open(folder / "results.json"))]


@pytest.mark.parametrize("row", checkpoints())
def test_shipped_checkpoints_are_what_their_results_say(row):
    """results.json has the closing report's figures, novel queries; here on fewer sequences."""
    checkpoint, cfg, model = g.load_checkpoint(ROOT / "assets" / row["file"])
    assert checkpoint["step"] == row["step"] and (cfg.p, cfg.seed) == (row["p"], row["seed"])
    sets = g.eval_sequences(checkpoint["split"], "test_ood", 1024, cfg.examples, cfg.p, cfg.seed + 2)
    for name in ("test_ood_train", "test_ood_test"):
        assert g.evaluate(model, sets[name])[1, -1].item() == pytest.approx(row[name], abs=0.05)
