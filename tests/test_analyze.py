"""
Tests of analyze.py: every measure on a planted signal or model whose answer is known, and on noise,
where its null must say no; brute force over Z_p as reference; the command line on what isn't there.
"""
import builtins
import cmath
import doctest
import functools
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import analyze as a  # noqa: E402
import grok_icl as g  # noqa: E402

torch.set_num_threads(1)
GROUPS = ("multiplicative", "additive")


def config(**changes):
    return g.Config(**{**dict(p=7, tasks=12, examples=6, depth=2, heads=2, embd=16, init_std=0.3,
                              lr=0.01, wd=0.1, batch=16, lessons="none", steps=4, warmup=1,
                              eval_every=2, device="cpu", amp="off"), **changes})


def planted_lab(model=None, **changes):
    """What open_lab returns, with an untrained or a planted model."""
    cfg = config(**changes)
    torch.manual_seed(0)
    return SimpleNamespace(model=model or g.GPT(cfg), cfg=cfg, split=g.make_split(cfg),
                           p=cfg.p, k=cfg.examples, observed=None,
                           heads=[f"{i}.{h}" for i in range(cfg.depth) for h in range(cfg.heads)])


def sequences(lab, n=64):
    return g.to_tokens(*a.contexts(lab, n, lab.k), lab.p)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def log(x, p):
    """Discrete logarithm by trial; 0 for 0."""
    base = g.powers(p)[1].item()
    return torch.tensor([next((k for k in range(p - 1) if pow(base, k, p) == v), 0)
                         for v in x.flatten().tolist()]).view(x.shape)


def angle(p, group, k, l):
    """Angle of character (k, l) at every (x, y), (p, p); meaningless at zeros if multiplicative."""
    x, y = g.grid(p).T.view(2, p, p)
    m = p if group == "additive" else p - 1
    u, v = (x, y) if group == "additive" else (log(x, p), log(y, p))
    return 2 * math.pi * (k * u + l * v) / m + 0.7

# -------------------------------------------------------------------------------------------------
# Probes and nulls
# -------------------------------------------------------------------------------------------------

def test_the_grid_asks_every_query_after_the_same_context():
    lab = planted_lab()
    (task, *_), (inputs, *_) = a.contexts(lab, 3, 5)
    tokens = a.query_grid(task, inputs, 7)
    assert tokens.shape == (49, 18) and (tokens[:, :15] == tokens[0, :15]).all()
    for n, (x, y, z) in enumerate(tokens[:, 15:].tolist()):
        assert (x, y) == divmod(n, 7) and z == (task[0] * x + task[1] * y) % 7


def test_what_is_observed_is_what_sequences_alone_show():
    """Sites at the query's y; and what each head adds to the stream, standardized."""
    lab = planted_lab()
    seen, added = a.observe(lab)
    assert a.observe(lab)[0] is seen                             # computed once
    for n, context in enumerate(zip(*a.contexts(lab, a.CONTEXTS, lab.k - 1))):
        tokens = a.query_grid(*context, 7)
        alone = a.record(a.sites(lab.model), lambda: lab.model(tokens, g.EVERY_TOKEN))
        for i, block in enumerate(lab.model.blocks):
            for site in (f"heads {i}", f"neurons {i}"):
                expected = alone[site][:, -2].T.unflatten(1, (7, 7))
                torch.testing.assert_close(seen[site][n], expected)
            for h in range(2):
                only = torch.zeros_like(alone[f"heads {i}"][:, -3:])
                only[..., 8 * h:8 * h + 8] = alone[f"heads {i}"][:, -3:, 8 * h:8 * h + 8]
                out = block.attention.out(only).unflatten(0, (7, 7)).detach()
                out = (out - out.mean(-1, keepdim=True)) / out.std(-1, keepdim=True, correction=0)
                for at, token in enumerate("xyz" if i == 0 else " y"):
                    if token == " ":                             # nothing is read there
                        assert (f"{i}.{h}", "x") not in added
                        continue
                    torch.testing.assert_close(added[f"{i}.{h}", token][n], out[:, :, at],
                                               atol=1e-2, rtol=1e-2)


def test_interception_changes_what_is_read_and_ends():
    lab = planted_lab()
    tokens = sequences(lab)[:, :-1]
    before = lab.model(tokens)
    changed = a.run_with({lab.model.norm: lambda x: 0 * x}, lambda: lab.model(tokens))
    assert (changed - lab.model.norm.bias @ lab.model.embedding.weight.T).abs().max() < 1e-6
    assert torch.equal(lab.model(tokens), before)


@pytest.mark.parametrize("p", [3, 7, 11, 13, 29])
def test_orders(p):
    order = a.orders(p, 5)
    assert order.shape == (6, 2, p - 1)
    assert all(sorted(row) == list(range(1, p)) for row in order.flatten(0, 1).tolist())
    assert torch.equal(order[0, 0], order[0, 1])
    assert p == 3 or not torch.equal(order[1, 0], order[1, 1])
    row = order[0, 0]
    assert all(row[(i + 1) % (p - 1)] == row[i] * row[1] % p for i in range(p - 1))
    assert g.powers(29)[1] == 27


def test_against_null(monkeypatch):
    """The null of the best of all is that of the best of each order, not of the best thing."""
    monkeypatch.setattr(a, "NULLS", 10)
    scores = iter([(5, 7), *((n, -n) for n in range(10))])
    rows = a.against_null(lambda x, y: torch.tensor(next(scores))[:, None], 5,
                          ["one", "two"], ["it"])
    assert list(rows) == ["one", "two", "best of all"]
    null = np.quantile(range(10), 0.95)
    assert rows["one"] == pytest.approx({"it": 5, "it null": null})
    assert rows["two"] == pytest.approx({"it": 7, "it null": np.quantile(range(-9, 1), 0.95)})
    assert rows["best of all"] == pytest.approx({"it": 7, "it null": null})

# -------------------------------------------------------------------------------------------------
# Shots, skills, attention
# -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("algorithm", ["ratio", "regression", "neither"])
def test_skills_of_exact_algorithms(algorithm):
    """Regression by the last two examples alone: so not where these are on one line."""
    found = a.measure_skills(planted_lab(exact(algorithm), examples=6))
    accuracy = found["accuracy"].numpy()                         # (shots, skills)
    assert found["shots"] == [1, 2, 4, 5] and found["right"].shape == (4, 7, 7)
    copies = (found["skill"] == 0).sum((1, 2))
    assert (copies <= torch.arange(1, 6)[[0, 1, 3, 4]]).all()    # at most one for each example
    if algorithm == "ratio":
        assert accuracy[:, :2].min() == 1                        # copies and ratio queries
    elif algorithm == "regression":
        assert np.nanmin(accuracy[1:, 2]) > 0.6
    if algorithm != "regression":                                # else it says 0: by chance
        assert np.nanmax(accuracy[:, 2]) < 0.4                   # chance, 1/7, on few tasks


def test_attention_planted_on_the_line():
    """One head looks evenly at earlier examples, one only at the z of those on the query's line."""
    p, k = 7, 8
    tokens = sequences(planted_lab(examples=k))
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
    (even, there), most = a.attention_to_line(weights, tokens, p)
    assert even.item() == pytest.approx(1, abs=1e-5)
    assert there.item() == pytest.approx(1 / np.mean(multiple), abs=1e-4) == most

# -------------------------------------------------------------------------------------------------
# Circles, characters, similarity
# -------------------------------------------------------------------------------------------------

def circle_and_null(plane):
    return a.against_null(lambda x, y: a.circles(plane, x, y)[None], len(plane),
                          ["it"], ["one", "two"])["it"]


def test_a_planted_circle_of_logarithms_is_found_and_one_of_residues_is_not():
    p = 13
    for group in GROUPS:
        z = torch.polar(torch.ones(p, p, dtype=torch.double), angle(p, group, 3, 0).double())
        both = z + 0.5 * torch.polar(torch.ones(p, p), angle(p, group, 0, 5))
        for plane, one, two in ((z, 1, 1), (both, 0.8, 1)):
            found = circle_and_null(plane)
            if group == "multiplicative":
                assert (found["one"], found["two"]) == pytest.approx((one, two), abs=1e-6)
            else:
                assert found["one"] < 0.6
            assert found["one null"] < 0.6


def test_a_line_is_no_circle_and_noise_has_none():
    p = 13
    for k in (6, 2):  # frequency 6 of 12 is real; the cosine of any other runs to and fro too
        line = angle(p, "multiplicative", k, 0).cos().to(torch.cfloat)
        assert a.circles(line, *a.orders(p, 0)[0])[0] < 1e-6
    plane = torch.complex(noise(p, p), noise(p, p, seed=1))
    found = circle_and_null(plane)
    assert found["one"] < found["one null"]


def test_the_example_in_the_docstring_of_circles():
    tests = doctest.DocTestFinder().find(a.circles, globs=vars(a).copy())
    assert doctest.DocTestRunner().run(tests[0]) == (0, 3)


def test_the_plane_holds_the_planted_variance():
    points = noise(3, 500, 6) * torch.tensor([5.0, 4, 1, 1, 1, 1])
    for plane, around in zip(a.plane_of(points), points - points.mean(1, keepdim=True)):
        assert plane.shape == (500,) and abs(plane.mean()) < 1e-6
        kept = plane.abs().square().sum() / around.square().sum()
        assert kept.item() == pytest.approx(41 / 45, abs=0.02)
        longer = around[:, 0]                                    # must be the first component
        assert abs(np.corrcoef(plane.real, longer)[0, 1]) > 0.95


@pytest.mark.parametrize("group", GROUPS)
def test_the_spectrum_of_planted_waves(group):
    p = 11
    waves = torch.stack([angle(p, group, 2, 3).cos(), angle(p, group, 4, -4).cos(),
                         3 * angle(p, group, 1, 0).cos() + angle(p, group, 0, 1).cos(),
                         sum(angle(p, group, k, 1).cos() for k in (1, 2, 3))])
    order = a.orders(p, 0)[0] if group == "multiplicative" else torch.arange(p).expand(2, -1)
    power = a.character_power(waves + 5, *order)
    m = len(order[0])
    assert power[0, 2, 3].item() == pytest.approx(0.25, abs=1e-5) == power[0, -2, -3].item()
    assert power[2, 1, 0].item() == pytest.approx(9 / 4, abs=1e-5)
    assert power[:, 0, 0].abs().max() == 0
    assert torch.allclose(a.conjugate(power), power, atol=1e-5)  # of real functions
    flipped = a.conjugate(torch.arange(float(m * m)).view(m, m))
    assert all(flipped[k, l] == (-k % m) * m + -l % m for k in range(m) for l in range(m))


def test_similarity_by_ratio_is_found_and_nothing_in_noise():
    p, (x, y) = 11, g.grid(11).T
    line = g.line_of(g.grid(p), p)
    apart = (x[:, None] != x) & (y[:, None] != y) & (x * y > 0) & (x * y > 0)[:, None]
    by_ratio = (line[:, None] == line).float() * 0.6 + 0.1
    planted = torch.stack((by_ratio, noise(p * p, p * p)))
    true, other = (a.ratio_gap(planted, apart, *order)
                   for order in a.orders(p, 1))
    assert true[0].item() == pytest.approx(0.6, abs=1e-5)
    assert abs(other[0]) < 0.2 and true[1].abs() < 0.1
    equal = (line[:, None] == line) & apart                      # and by masks, on noise
    expected = planted[1][equal].mean() - planted[1][apart & ~equal].mean()
    assert true[1].item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_strongest_pairs_of_characters_are_chosen():
    p, order = 11, g.powers(11)
    f = angle(p, "multiplicative", 2, 3).cos() + 0.5 * angle(p, "multiplicative", 1, 0).cos()
    sign = angle(p, "multiplicative", 5, 0).cos() / math.cos(0.7)       # is its own conjugate
    for n, pairs in ((1, {(2, 3), (8, 7)}), (2, {(2, 3), (8, 7), (1, 0), (9, 0)})):
        mask = a.strongest(f[None, None], order, n)[0]
        assert {(k, l) for k, l in mask.nonzero().tolist()} == pairs
    for height, first in ((0.6, {(2, 3), (8, 7)}), (0.8, {(5, 0)})):    # power .36, .64, of f .5
        mask = a.strongest((f + height * sign)[None, None], order, 1)[0]
        assert {(k, l) for k, l in mask.nonzero().tolist()} == first
    assert not a.strongest(torch.zeros(1, 1, p, p), order, 3).any()     # of nothing, nothing
    everything = a.strongest(noise(1, 1, p, p), order, 10 ** 6)         # but the mean
    assert everything.sum() == 99 and not everything[0, 0, 0]


def test_characters_are_kept_and_removed():
    p = 11
    one, two = angle(p, "multiplicative", 2, 3).cos(), angle(p, "multiplicative", 1, 0).cos()
    mask = torch.zeros(1, 10, 10, dtype=torch.bool)
    mask[0, 2, 3] = mask[0, -2, -3] = True
    kept = a.keep_characters((one + two + 5)[None], g.powers(p), mask)[0]
    torch.testing.assert_close(kept[1:, 1:], one[1:, 1:] + 5)
    torch.testing.assert_close(kept[0], (one + two + 5)[0])      # zeros stay as they are


def test_all_characters_kept_change_nothing_and_few_of_the_wrong_group_break_it(monkeypatch):
    """
    On a trained model: a few characters by logarithm are enough for block 0's heads, one by
    residue is not.
    """
    monkeypatch.setattr(a, "KEPT", (1, 4, 10 ** 6))
    lab = a.open_lab(ROOT / "assets" / "quick.pt")
    context = [c[-1] for c in a.contexts(lab, a.CONTEXTS + 1, lab.k // 2, a.SEED + 1)]
    tokens = a.query_grid(*context, lab.p)
    counts = (a.skill_of(tokens, lab.p)[:, -1] == 1) & (tokens[:, -3] > 0) & (tokens[:, -2] > 0)
    right = (a.answers(lab, tokens)[:, -1] == tokens[:, -1])[counts].float().mean().item()
    found = a.measure_fourier(lab)
    assert all(row[10 ** 6] == pytest.approx(right) for row in found["kept"].values())
    assert found["kept"]["heads 0, by logarithm"][4] > 0.9
    assert found["kept"]["heads 0, by residue"][1] < 0.6
    assert found["kept"]["heads 1, by random order"][4] < 0.6
    # the examples are nearer to one wave than most functions: not as in a random order
    true, random = a.orders(lab.p, 1)
    for f in found["examples"]:
        share = [(power := a.character_power(f, *order)).max() / power.sum()
                 for order in (true, random)]
        assert share[0] > 1.5 * share[1]

# -------------------------------------------------------------------------------------------------
# Interventions: planted models
# -------------------------------------------------------------------------------------------------

def exact(algorithm, p=7):
    """A model: Ratio Matching, or Modular Regression by the last two examples; 0 where it can't."""
    def answer(sequence, x, y):
        for u, v, w in sequence if algorithm == "ratio" else []:
            for c in range(p):
                if (c * u % p, c * v % p) == (x, y):
                    return c * w % p
        pairs = itertools.combinations(sequence[::-1], 2) if algorithm == "regression" else []
        for (u, v, w), (r, s, t) in pairs:
            for c, d in itertools.product(range(p), repeat=2):
                if (u * s - v * r) % p and ((c * u + d * r) % p, (c * v + d * s) % p) == (x, y):
                    return (c * w + d * t) % p
        return 0

    def model(tokens, asking=g.EACH_Y):
        logits = torch.zeros(*tokens.shape, p)
        for b, row in enumerate(tokens.tolist()):
            for t in range(1, len(row), 3):
                sequence = [row[i:i + 3] for i in range(0, t - 1, 3)]
                logits[b, t, answer(sequence, row[t - 1], row[t])] = 1
        return logits[:, asking]
    return model


def offset_by_trial(inputs, p):
    """Of each example, by trial: k such that y/x is base^k v/u; (n, k, 2) -> (n, k - 1)."""
    base = g.powers(p)[1].item()
    return torch.tensor([[next(k for k in range(p - 1)
                               if (y * u - pow(base, k, p) * v * x) % p == 0)
                          for u, v in examples] for *examples, (x, y) in inputs.tolist()])


def test_examples_stand_at_their_offsets():
    lab = planted_lab(p=11, tasks=40)
    offsets = torch.randint(10, (200, 3), generator=torch.Generator().manual_seed(1))
    tokens = a.at_offsets(lab, offsets)
    inputs = tokens.unflatten(1, (-1, 3))[..., :2]
    assert (inputs > 0).all() and len(inputs.flatten(0, 1).unique(dim=0)) == 100
    assert torch.equal(offset_by_trial(inputs, 11), offsets)
    known = set(map(tuple, lab.split["test_ood"].tolist()))
    for row in tokens.view(-1, 4, 3).tolist():
        assert any(all((c * x + d * y - z) % 11 == 0 for x, y, z in row) for c, d in known)


def solver_of(which, p=7):
    """A model that is exact on queries after two examples at offsets in `which`, for any order, and
    surest there; with more examples it takes the first such pair, with none it says 0."""
    regression = exact("regression", p)

    def model(tokens, asking=g.EACH_Y):
        logits = torch.zeros(len(tokens), 1, p)
        z = tokens[:, :1][:, :-tokens.size(1) % 3]               # any, if it isn't there
        sequences = torch.cat((tokens, z), dim=1).unflatten(1, (-1, 3))
        offsets = offset_by_trial(sequences[..., :2], p).tolist()
        for b, row in enumerate(offsets):
            good = [pair for pair in itertools.combinations(range(len(row)), 2)
                    if {row[i] for i in pair} in which]
            if good:
                chosen = sequences[b, [*good[0], -1]].flatten()[None, :-1]
                logits[b] = 9 * regression(chosen)[0, -1]
            else:
                logits[b, 0, 0] = 1
        return logits.expand(-1, tokens.size(1), -1)[:, asking]
    return model


def test_pairs_of_a_planted_solver_are_found(monkeypatch):
    monkeypatch.setattr(a, "EACH_PAIR", 10)
    lab = planted_lab(solver_of([{1, 3}, {2, 5}]))
    lab.split["test_ood"] = torch.tensor([(2, 3), (3, 5), (6, 4)])
    pairs = torch.combinations(torch.arange(1, 6))
    right = dict(zip(map(tuple, pairs.tolist()), a.accuracy_of_pairs(lab, pairs).tolist()))
    assert right.pop((1, 3)) == right.pop((2, 5)) == 1 and max(right.values()) < 0.5


def test_the_surest_pair_is_the_planted_one(monkeypatch):
    """One pair is surely right; the others agree on 0, less surely, and would win a vote; after
    more examples the model itself is wrong in every other sequence."""
    regression = exact("regression", 7)

    def model(tokens, asking=g.EACH_Y):
        logits = torch.zeros(len(tokens), 1, 7)
        z = tokens[:, :1][:, :-tokens.size(1) % 3]               # any, if it isn't there
        sequences = torch.cat((tokens, z), dim=1).unflatten(1, (-1, 3))
        right = regression(tokens)[:, -1].argmax(-1)
        for b, offsets in enumerate(offset_by_trial(sequences[..., :2], 7).tolist()):
            if len(offsets) > 2:
                logits[b, 0, (right[b] + b % 2) % 7] = 1
            elif {*offsets} == {1, 3}:
                logits[b, 0, right[b]] = 9
            else:
                logits[b, 0, 0], logits[b, 0, right[b]] = 3, -20
        return logits.expand(-1, tokens.size(1), -1)[:, asking]
    offsets = torch.tensor([3, 4, 1, 2])
    monkeypatch.setattr(a, "off_line", lambda lab, shots, n: a.at_offsets(
        lab, offsets[:shots].expand(64, -1)))
    rows = a.measure_shots(planted_lab(model, examples=6))
    assert rows[2] == {"model": 0, "surest pair": 0, "same where wrong": 1}  # 3 and 4
    for shots in (3, 4):                                         # now 3 and 1 are among them
        assert rows[shots] == {"model": 0.5, "surest pair": 1, "same where wrong": 0}


def tasks_by_search(example, query, answer, p):
    """All (a, b) that give an example (u, v, w) its w and a query (x, y) that answer."""
    (u, v, w), (x, y) = example, query
    return [(c, d) for c in range(p) for d in range(p)
            if (c * u + d * v - w) % p == 0 and (c * x + d * y - answer) % p == 0]


def test_each_answer_implies_the_task_that_a_search_finds():
    lab = planted_lab(p=7)
    tokens = a.off_line(lab, 3, 20)
    implied = a.implied_tasks(tokens, 7)
    for row, tasks in zip(tokens.tolist(), implied.tolist()):
        for i, answer in itertools.product(range(3), range(7)):
            assert tasks_by_search(row[3 * i:3 * i + 3], row[-3:-1], answer, 7) == [
                tuple(tasks[i][answer])]


def test_off_line_no_example_shares_a_line_with_another_or_the_query():
    lab = planted_lab(p=7)
    for row in a.off_line(lab, 4, 50).tolist():
        lines = [next(r for r in range(1, 7) if (r * x - y) % 7 == 0)
                 for x, y in zip(row[::3], row[1::3])]
        assert len({*lines}) == 5


def follower_of(name, order, p=11):
    """A model whose logit of z is |sum over the examples of exp(2 pi i log n / order)|^2, n being
    the a or b that the example implies; all by search."""
    @functools.cache
    def unit(example, query, answer):
        [task] = tasks_by_search(example, query, answer, p)
        n = torch.tensor([task["ab".index(name)]])
        return cmath.exp(2j * cmath.pi * log(n, p).item() / order) if n > 0 else 0

    def model(tokens, asking=g.EACH_Y):
        logits = torch.zeros(len(tokens), tokens.size(1), p)
        for b, row in enumerate(tokens.tolist()):
            *examples, query = [tuple(row[i:i + 3]) for i in range(0, len(row), 3)]
            for answer in range(p):
                units = [unit(example, query[:2], answer) for example in examples]
                logits[b, -1, answer] = abs(sum(units)) ** 2
        return logits[:, asking]
    return model


@pytest.mark.parametrize("name, order, m", [("a", 2, 5), ("b", 5, 2), ("b", 10, 1)])
def test_the_character_that_a_model_compares_is_found(name, order, m, monkeypatch):
    monkeypatch.setattr(a, "SEQUENCES", 4)
    lab = planted_lab(follower_of(name, order), p=11, tasks=40, examples=5)
    found = a.measure_characters(lab)
    assert found["component"] == name and found["weights"].argmax() == m - 1
    fit, other = found["R^2"][name], found["R^2"]["ba"["ab".index(name)]]
    random, others = found["R^2"]["random order"], found["R^2"]["other examples"]
    assert fit == pytest.approx(1, abs=1e-4) and found["share"] == pytest.approx(1, abs=1e-3)
    assert max(other, random) < 0.9 and others < 0.2


def test_alike_is_the_weighted_mean_over_pairs_that_a_head_looks_at():
    generator = torch.Generator().manual_seed(0)
    excess = torch.rand(2, 3, 5, generator=generator)
    angles = 6 * torch.rand(2, 5, generator=generator)
    units = torch.exp(1j * angles)
    for values, row in zip(units, angles.tolist()):
        top = bottom = 0
        for of_query in excess.flatten(0, 1).tolist():
            for i, j in itertools.permutations(range(5), 2):
                bottom += of_query[i] * of_query[j]
                top += of_query[i] * of_query[j] * math.cos(row[i] - row[j])
        assert a.alike(excess, values).item() == pytest.approx(top / bottom, abs=1e-5)
    assert a.alike(excess, units).tolist() == pytest.approx(
        [a.alike(excess, values).item() for values in units])


def test_heads_that_sort_examples_by_a_character_are_found(monkeypatch):
    """Four heads, each looks at the examples of one class of s - t, or of 1 - t/s; t is an
    example's x/y, s the query's. The classes are those of order 4, found by search."""
    monkeypatch.setattr(a, "SEQUENCES", 16)
    lab, p = planted_lab(p=13, examples=9), 13

    def sorter(by_ratio):
        def attention_to_examples(lab, tokens):
            weights = torch.full((len(tokens), 4, 8), 0.01)
            for row, of_row in zip(tokens.unflatten(1, (-1, 3)).tolist(), weights):
                *t, s = (next(r for r in range(p) if (r * y - x) % p == 0) for x, y, _ in row)
                by = pow(s, -1, p) if by_ratio else 1
                n = torch.tensor([(s - place) * by % p for place in t])
                for i, head in enumerate(log(n, p) % 4):
                    of_row[head, i] = 0.2
            return weights
        return attention_to_examples
    for by_ratio in (False, True):
        monkeypatch.setattr(a, "attention_to_examples", sorter(by_ratio))
        found = a.measure_sorting(lab)
        assert found["alike"][2] == pytest.approx(1, abs=1e-4)                   # order 4
        assert max(found["alike"][m] for m in (0, 1, 3, 4)) < 0.5 and found["alike null"] < 0.7
    monkeypatch.setattr(a, "attention_to_examples", lambda lab, tokens: torch.rand(
        len(tokens), 4, 8, generator=torch.Generator().manual_seed(0)))
    assert a.measure_sorting(lab)["alike"][2] < 0.1


class EvenSoftmax(torch.nn.Module):
    """Softmax, but the last y divides what it gives to the z of these examples evenly."""
    def __init__(self, examples):
        super().__init__()
        self.examples = examples

    def forward(self, scores):
        weights = scores.softmax(-1)
        total = sum(weights[:, :, -2, 3 * i + 2] for i in self.examples)
        for i in self.examples:
            weights[:, :, -2, 3 * i + 2] = total / len(self.examples)
        return weights


def test_attention_is_averaged_within_classes():
    lab = planted_lab(depth=3, p=11, examples=5, tasks=40, init_std=0.6)
    tokens = a.off_line(lab, 4, 200)
    said = [a.averaged_in_classes(lab, tokens, torch.tensor([classes]).expand(200, 4)).tolist()
            for classes in ([3, 1, 0, 2], [1, 0, 1, 5], [0, 0, 0, 0])]
    usual = a.answers(lab, tokens)[:, -1].tolist()
    for block in lab.model.blocks:
        block.attention.softmax = EvenSoftmax([0, 2])
    assert said[0] == usual != said[1] == a.answers(lab, tokens)[:, -1].tolist() != said[2]


def test_a_model_of_classes_is_told_by_averages_within_them(monkeypatch):
    """What counts in measure_sorting's averages: the best character's classes of s - t."""
    lab, p, seen = planted_lab(p=13, examples=9), 13, []
    best = torch.tensor([0.0, 0, 0, 1, 0, 0])                    # m = 4, of order 3
    monkeypatch.setattr(a, "alike", lambda excess, values: best if values.dim() == 2 else
                        torch.zeros(values.shape[:2]))
    monkeypatch.setattr(a, "averaged_in_classes", lambda lab, tokens, classes: seen.append(
        (tokens, classes)) or tokens[:, -1])
    assert a.measure_sorting(lab)["averaged"]["classes"] == 1
    tokens, classes = seen[0]
    for row, of_row in zip(tokens[:50].unflatten(1, (-1, 3)).tolist(), classes.tolist()):
        *t, s = (next(r for r in range(p) if (r * y - x) % p == 0) for x, y, _ in row)
        orders = log(torch.tensor([(s - place) % p for place in t]), p) % 3
        for (i, one), (j, two) in itertools.combinations(enumerate(orders.tolist()), 2):
            assert (one == two) == (of_row[i] == of_row[j])


def test_a_changed_label_matters_if_it_changes_the_class(monkeypatch):
    """A model that compares squares: the answer stays where the implied a keeps its class."""
    monkeypatch.setattr(a, "SEQUENCES", 8)
    rows = a.measure_labels(planted_lab(follower_of("a", 2), p=11, tasks=40))
    kept, changed = rows["log a mod 2"].values()                 # others may tie with an answer
    assert kept > 0.7 > 0.4 > changed
    assert [*rows] == ["log a mod 2", "log b mod 2"]             # of order 10
    assert abs(rows["log b mod 2"]["kept"] - rows["log b mod 2"]["changed"]) < 0.3


def test_by_how_much_a_label_changes_does_not_depend_on_the_query(monkeypatch):
    """One seed for both once made the change of z a function of the query's ratio."""
    asked = []
    monkeypatch.setattr(a, "centred_logits",
                        lambda lab, tokens: asked.append(tokens) or torch.rand(len(tokens), 11))
    a.measure_labels(planted_lab(p=11, tasks=40))
    tokens, changed = asked
    by, query = (changed - tokens)[:, 2] % 11, g.line_of(tokens[:, -3:-1], 11)
    assert len({*zip(by.tolist(), query.tolist())}) == 100       # all pairs of 1 to 10


def test_zeros_are_where_their_names_say(monkeypatch):
    """A model that is right just if its task has a = 0, then just if y = 0."""
    monkeypatch.setattr(a, "SEQUENCES", 16)
    lab = planted_lab(p=7, examples=8)
    lab.split["test_ood"] = torch.tensor([(0, 3), (2, 0), (3, 4), (0, 5)])
    lab.split["train_inputs"] = g.grid(7)
    for name, is_right in (("a", lambda z, y, n: n % 4 in (0, 3)), ("y", lambda z, y, n: y == 0)):
        def answers(lab, tokens):
            z, y = tokens[:, 2::3], tokens[:, 1::3]
            return torch.where(torch.as_tensor(
                [[bool(is_right(z[i, j], y[i, j], i)) for j in range(z.size(1))]
                 for i in range(len(z))]), z, (z + 1) % 7)
        monkeypatch.setattr(a, "answers", answers)
        found = a.measure_zeros(lab)
        assert found[name] == 1 and found["nothing"] == 0 and all(
            0 <= found[other] < 1 for other in "abxy" if other != name)
    monkeypatch.setattr(a, "answers", lambda lab, tokens: torch.where(
        a.skill_of(tokens, 7) == 2, (tokens[:, 2::3] + 1) % 7, tokens[:, 2::3]))
    assert {*a.measure_zeros(lab).values()} == {0}               # ratio queries don't count


class Carrier(torch.nn.Module):
    """A model that combines the first two examples, and whose heads of block 1 carry z/y, or z."""
    def __init__(self, carries, p=11):
        super().__init__()
        self.carries, self.p = carries, p
        self.blocks = [SimpleNamespace(attention=SimpleNamespace(out=torch.nn.Identity()),
                                       mlp=SimpleNamespace(down=torch.nn.Identity())) for _ in "01"]

    def forward(self, tokens, asking=g.EACH_Y):
        rows, (x, y) = tokens.tolist(), tokens[:, -3:-1].T      # the query is the last example
        tasks = [tasks_by_search(row[0:3], row[3:5], row[5], self.p)[0] for row in rows]
        z = (torch.tensor(tasks) * torch.stack((x, y), -1)).sum(-1) % self.p
        inverse = torch.tensor([0] + [pow(n, -1, self.p) for n in range(1, self.p)])
        held = z * inverse[y] % self.p if self.carries == "z/y" else z
        for i, block in enumerate(self.blocks):                  # block 0 carries what no one uses
            stream = torch.zeros(*tokens.shape, 1)
            stream[:, -2, 0] = held.float() if i else z.float() + 1
            now = block.attention.out(stream)[:, -2, 0].long()
            stream[:, -2, 0] = now * y % self.p if self.carries == "z/y" else now
            answer = block.mlp.down(stream)[:, -2, 0].long()
        logits = torch.zeros(*tokens.shape, self.p)
        logits[:, -2] = torch.nn.functional.one_hot(answer, self.p).float()
        return logits[:, asking]


@pytest.mark.parametrize("carries", ["z/y", "z"])
def test_what_heads_carry_is_found_by_an_exchange(carries, monkeypatch):
    monkeypatch.setattr(a, "SEQUENCES", 4)
    lab = planted_lab(Carrier(carries), p=11, tasks=40, examples=5)
    rows = a.measure_exchange(lab)
    assert rows["heads 0"]["stays"] == 1 == rows["heads 1"][carries]
    others = [share for name, share in rows["heads 1"].items() if name != carries]
    assert max(others) < 0.4 > rows["heads 0"]["z/y"]
    # Its MLP has what comes out of the multiplication.
    assert rows["heads and neurons 1"]["z"] == 1 > 0.4 > rows["heads and neurons 1"]["stays"]


def test_another_run_has_the_same_ratios_and_nothing_else():
    lab = planted_lab(p=11)
    ours, other = (a.off_line(lab, 3, 200, run).unflatten(1, (-1, 3)) for run in (0, 1))
    for one, two in zip(ours.flatten(0, 1).tolist(), other.flatten(0, 1).tolist()):
        assert (one[0] * two[1] - one[1] * two[0]) % 11 == 0
    same = (ours == other).all(1).float().mean(0)                # all x, all y, all z of a sequence
    assert same.max() < 0.1


class Program(torch.nn.Module):
    """Ratio Matching by the program, each number at a site of its own, as in the last block."""
    def __init__(self, divisor, p, forgets=None):
        super().__init__()
        self.divisor, self.p, self.forgets = divisor, p, forgets
        self.attention = SimpleNamespace(
            **{n: torch.nn.Identity() for n in ("query", "key", "value")})
        self.blocks = [SimpleNamespace(attention=self.attention)]

    def forward(self, tokens, asking=g.EACH_Y):
        x, y, z = tokens.unflatten(1, (-1, 3)).unbind(-1)        # (B, k)
        d, other = (x, y) if self.divisor == "x" else (y, x)
        inverse = torch.tensor([0] + [pow(n, -1, self.p) for n in range(1, self.p)])
        sent = {"query": other * inverse[d], "key": other * inverse[d], "value": z * inverse[d]}
        if self.forgets:
            sent[self.forgets] = {"query": x, "key": x, "value": z}[self.forgets]
        sent = {n: (v % self.p).repeat_interleave(3, 1) for n, v in sent.items()}       # (B, 3k)
        got = {n: getattr(self.attention, n)(v[..., None])[..., 0] for n, v in sent.items()}
        query, key, value = got["query"][:, 1::3], got["key"][:, 2::3], got["value"][:, 2::3]
        match = (query[:, :, None] == key[:, None]).tril(-1).long()                  # (B, k, k)
        fetched = value.gather(1, match.argmax(2))
        return F.one_hot((d * fetched % self.p).repeat_interleave(3, 1), self.p)[:, asking]


@pytest.mark.parametrize("divisor", "xy")
def test_the_program_is_recognized_number_by_number(divisor, monkeypatch):
    monkeypatch.setattr(a, "SEQUENCES", 16)
    lab = planted_lab(Program(divisor, 11), p=11, tasks=40, examples=6)
    found = a.measure_circuit(lab)
    assert found["divisor"] == divisor and found["nothing"] == 1
    assert all(row == {"follows": 1, "stays": 1} for row in found["numbers"].values())


@pytest.mark.parametrize("site, number", [("query", "ratio of the query"), (
    "key", "ratios of the examples"), ("value", "z over divisor")])
def test_a_program_that_sends_another_number_is_not(site, number, monkeypatch):
    monkeypatch.setattr(a, "SEQUENCES", 16)
    lab = planted_lab(Program("y", 11, forgets=site), p=11, tasks=40, examples=6)
    row = a.measure_circuit(lab)["numbers"][number]
    assert min(row.values()) < 0.5


def test_a_pair_takes_two_different_heads():
    fetches = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]).float()
    pairs = torch.combinations(torch.arange(1, 5))
    expected = [any(fetches[h, i] and fetches[k, j] for h, k in ((0, 1), (1, 0)))
                for i, j in pairs.tolist()]
    assert a.by_two_heads(fetches, pairs).tolist() == expected
    assert not a.by_two_heads(fetches[:1], pairs).any()          # one head alone solves none


def test_heads_that_fetch_are_found(monkeypatch):
    """Heads that look at offsets 2 and 3, which are the pair that is solved."""
    monkeypatch.setattr(a, "EACH_PAIR", 10)
    lab = planted_lab(solver_of([{2, 3}]), examples=5)
    lab.model.blocks = g.GPT(lab.cfg).blocks                     # for their modules' names alone
    lab.split["test_ood"] = torch.tensor([(2, 3), (3, 5), (6, 4)])
    at_offsets, asked = a.at_offsets, []
    monkeypatch.setattr(a, "at_offsets", lambda lab, o: asked.append(o) or at_offsets(lab, o))

    def record(modules, run, at=slice(None)):
        run()
        offsets = asked[-1]
        scores = torch.full((len(offsets), 2, 15, 15), -5.0)
        for head, wanted in ((0, 2), (1, 3)):
            scores[:, head, -2, 2:-1:3] += 9 * (offsets == wanted)
        even = torch.full_like(scores, -5.0)                     # looks at all examples alike
        even[:, :, -2, 2:-1:3] = 5
        return {0: scores, 1: even}
    monkeypatch.setattr(a, "record", record)
    found = a.measure_pairs(lab)
    assert found["heads"] == {"0.0": "2", "0.1": "3"} and found["solved"] == 1
    assert found["fetched"]["two heads"] == {
        "pairs": "1", "solved": "1", "expected": "0.1"}
    assert found["fetched"]["others"]["solved"] == "0"
    assert [*found["best"]][0] == "(2, 3)"
    assert (found["pairs"] == 1).nonzero().tolist() == [[2, 3], [3, 2]]


# -------------------------------------------------------------------------------------------------
# The command line
# -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    cfg = config(out=str(out), snapshots=True)
    run = g.make_run(cfg)
    g.train(run, cfg)
    return out


@pytest.fixture
def quick(monkeypatch):
    for name, value in dict(NULLS=10, CONTEXTS=2, SEQUENCES=16, KEPT=(1, 4)).items():
        monkeypatch.setattr(a, name, value)


def test_everything_for_a_run(tiny_run, tmp_path, quick, capsys):
    assert a.main([str(tiny_run), *a.SECTIONS, "--out", str(tmp_path)]) is None
    numbers = json.loads((tmp_path / "analysis.json").read_text())
    assert [*numbers] == [*a.SECTIONS] and numbers["pca"]["planes"] == "in analysis.npz"
    with np.load(tmp_path / "analysis.npz") as arrays:
        assert arrays["attention/maps"].shape == (2, 2, 15, 15)


def need_matplotlib():
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")


def test_pictures_of_a_run(tiny_run, tmp_path, quick, capsys):
    need_matplotlib()
    assert a.main([str(tiny_run), *a.SECTIONS, "--out", str(tmp_path)]) is None
    pictures = {f.name for f in tmp_path.iterdir()} - {"analysis.json", "analysis.npz"}
    names = ("skills", "skill_grid", "attention", "pca", "fourier", "similarity", "votes")
    assert pictures == {f"{n}.png" for n in names}


def test_the_shortest_sequences_can_be_analyzed(tmp_path, quick, capsys):
    """Two examples: one shot, too few for Modular Regression, no query with some on its line."""
    cfg = config(examples=2, out=str(tmp_path))
    run = g.make_run(cfg)
    g.save(run, cfg, "best.pt")
    assert a.main([str(tmp_path)]) is None
    parts = json.loads((tmp_path / "analysis.json").read_text())
    assert "fourier" in parts and not {"circuit", "votes"} & {*parts}
    assert a.main([str(tmp_path), "votes"]) == 2
    assert "votes: this model has" in capsys.readouterr().err


@pytest.mark.parametrize("p", [3, 5])
def test_small_moduli_can_be_analyzed(p, tmp_path, quick, capsys):
    """Fewer characters than KEPT, and one or no subgroup."""
    planted_run(tmp_path / "run", p=p, tasks=4)
    assert a.main([str(tmp_path / "run")]) is None
    assert "nan" not in capsys.readouterr().out


def test_without_matplotlib_the_numbers_are_there(tiny_run, tmp_path, quick, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args)
    monkeypatch.setattr(builtins, "__import__", without)
    assert a.main([str(tiny_run / "best.pt"), "skills", "fourier", "--out",
                   str(tmp_path)]) is None
    assert "pip install matplotlib" in capsys.readouterr().out and not list(tmp_path.glob("*.png"))
    assert "kept" in json.loads((tmp_path / "analysis.json").read_text())["fourier"]


def strict(path):
    """JSON as other programs read it, which know no NaN."""
    def refuse(name):
        raise ValueError(name)
    return json.loads(path.read_text(), parse_constant=refuse)


def test_json_is_json_also_where_a_number_is_missing(tmp_path):
    a.save(str(tmp_path), {"part": {"mean": math.nan, "most": math.inf, "row": torch.ones(2)}})
    assert strict(tmp_path / "analysis.json") == {
        "part": {"mean": None, "most": None, "row": "in analysis.npz"}}


def test_a_notebook_keeps_its_pictures_style(tiny_run, tmp_path, quick, capsys):
    need_matplotlib()
    import matplotlib
    matplotlib.rcParams["font.size"] = 23
    before = dict(matplotlib.rcParams)
    assert a.main([str(tiny_run / "best.pt"), "skills", "--out", str(tmp_path)]) is None
    assert dict(matplotlib.rcParams) == before
    matplotlib.rcdefaults()


def planted_run(out, **changes):
    """A run's folder with an untrained model."""
    cfg = config(out=str(out), **changes)
    run = g.make_run(cfg)
    out.mkdir(parents=True)
    g.save(run, cfg, "best.pt")


def test_a_folder_that_cannot_be_written_is_refused_before_measuring(tiny_run, monkeypatch, capsys):
    if not Path("/proc/self").exists():
        pytest.skip("needs a folder that even root can't write to")
    monkeypatch.setitem(a.SECTIONS, "pca", (lambda lab: pytest.fail("measured"), None, None))
    assert a.main([str(tiny_run), "pca", "--out", "/proc"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "/proc" in err


@pytest.mark.parametrize("argv, word", [
    (["nowhere"], "nowhere"), (["RUN", "nonsense"], "nonsense"),
    (["x.pt"], "x.pt: no such file"),
    ([], "RUN"), (["TEXT"], "text.pt"), (["RUN", "--bass", "3"], "--bass"),
    (["RUN", "--out", "TEXT/x"], "text.pt"), (["BARE"], "bare.pt: has no split")])
def test_bad_input_is_refused_in_one_line(argv, word, tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.pt"
    text.write_text("not a checkpoint")
    checkpoint, bare = g.load_checkpoint(ROOT / "assets" / "quick.pt")[0], tmp_path / "bare.pt"
    torch.save({name: checkpoint[name] for name in ("config", "model")}, bare)
    before = sorted(tiny_run.iterdir())
    assert a.main([w.replace("RUN", str(tiny_run)).replace("TEXT", str(text)).replace(
        "BARE", str(bare)) for w in argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and word in err and sorted(tiny_run.iterdir()) == before


def test_the_model_of_classes_uses_nothing_else_of_where_an_example_is():
    """The first row of regression.md's table of what heads sort by."""
    found = a.measure_sorting(a.open_lab(str(ROOT / "assets" / "classes.pt")))
    assert found["alike"].argmax() == 2                          # of order 4
    assert found["alike"][2].item() == pytest.approx(0.99, abs=0.02) and found["alike null"] < 0.7
    usual, classes, random = found["averaged"].values()
    assert usual > 0.98 < classes and random < 0.6


def checkpoints():
    folder = ROOT / "assets"
    return [pytest.param(row, id=row["file"]) for row in
            json.loads((folder / "results.json").read_text(encoding="utf-8"))]


@pytest.mark.parametrize("row", checkpoints())
def test_shipped_checkpoints_are_what_their_results_say(row):
    """results.json has the closing report's figures, novel queries; here on fewer sequences."""
    checkpoint, cfg, model = g.load_checkpoint(ROOT / "assets" / row["file"])
    assert checkpoint["step"] == row["step"] and (cfg.p, cfg.seed) == (row["p"], row["seed"])
    sets = g.eval_sequences(checkpoint["split"], "test_ood", 2048 // cfg.depth, cfg.examples,
                            cfg.p, cfg.seed + 2)
    for name in ("test_ood_train", "test_ood_test"):
        assert g.evaluate(model, sets[name])[1, -1].item() == pytest.approx(row[name], abs=0.05)
