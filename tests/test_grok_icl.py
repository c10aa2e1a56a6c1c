"""
Tests of grok_icl.py against references that share no code with it: brute force over Z_p, torch's
own attention, complex arithmetic, planted predictors, scripted curves, and interrupted runs.
"""
import ast
import csv
import dataclasses
import errno
import io
import itertools
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import bench  # noqa: E402
import grok_icl as g  # noqa: E402

torch.set_num_threads(1)          # tiny tensors: a second thread only waits for the first
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

TINY = dict(p=5, tasks=8, alpha=0.8, examples=10, depth=2, heads=2, embd=16, init_std=0.1, lr=0.01,
            wd=0.1, batch=16, lessons="none", steps=12, warmup=2, eval_every=4, patience=0,
            device="cpu", amp="off")
TINY_FLAGS = [word for k, v in TINY.items() for word in (f"--{k.replace('_', '-')}", str(v))]


def tiny(**changes):
    return g.Config(**{**TINY, **changes})


def random_tokens(p, k, n, seed=0):
    """n sequences of k examples over all tasks and inputs of Z_p, (n, 3k)."""
    gen = torch.Generator().manual_seed(seed)
    return g.to_tokens(torch.randint(p, (n, 2), generator=gen),
                       torch.randint(p, (n, k, 2), generator=gen), p)


def model_and_tokens(p=7, examples=5, n=6, **changes):
    torch.manual_seed(0)
    cfg = tiny(p=p, examples=examples, **changes)
    return g.GPT(cfg), random_tokens(p, examples, n)[:, :-1]


def rows(tensor):
    return [tuple(row) for row in tensor.tolist()]

# -------------------------------------------------------------------------------------------------
# Data
# -------------------------------------------------------------------------------------------------

def test_z_is_the_task_applied_to_the_input():
    p, tasks = 7, torch.tensor([(3, 5), (0, 6)])
    inputs = torch.tensor([[(1, 2), (6, 6), (0, 4)], [(2, 2), (5, 1), (3, 0)]])
    sequences = g.to_tokens(tasks, inputs, p).tolist()
    for (a, b), xys, tokens in zip(rows(tasks), inputs.tolist(), sequences):
        assert tokens == [t for x, y in xys for t in (x, y, (a * x + b * y) % p)]


@pytest.mark.parametrize("p, n", [
    (29, 512), (7, 40), (3, 4)])
def test_splits_are_disjoint_and_complete(p, n):
    split = g.make_split(tiny(p=p, tasks=n, alpha=0.6))
    everything = set(itertools.product(range(p), repeat=2))
    tasks = rows(split["id"]) + rows(split["val_ood"]) + rows(split["test_ood"])
    inputs = rows(split["train_inputs"]) + rows(split["test_inputs"])
    assert len(tasks) == len(inputs) == p * p and set(tasks) == set(inputs) == everything
    assert len(split["id"]) == n and len(split["train_inputs"]) == round(0.6 * p * p)
    assert 0 <= len(split["test_ood"]) - len(split["val_ood"]) <= 1 and len(split["val_ood"]) > 0


@pytest.mark.parametrize("p, n", [(29, 512), (7, 40), (5, 16)])
def test_rectangles_are_rectangles(p, n):
    tasks = rows(g.choose_rectangles(p, n, torch.Generator().manual_seed(1)))
    assert len(set(tasks)) == len(tasks) == n
    for i in range(0, n, 4):
        (a, b), (c, b2), (a2, d), opposite = tasks[i:i + 4]
        assert (a2, b2) == (a, b) and opposite == (c, d) and c != a and d != b


@pytest.mark.parametrize("p, n", [(29, 840), (7, 48)])
def test_rectangles_that_do_not_fit_are_refused(p, n):
    with pytest.raises(g.BadInput, match=f"--tasks {n}"):
        g.choose_rectangles(p, n, torch.Generator().manual_seed(0))


def test_evaluation_draws_other_sequences_than_training(tmp_path, monkeypatch):
    """Were their seeds the same, the i.d. train set would hold the first training batches."""
    cfg = tiny(p=29, tasks=16, examples=8, steps=40, eval_every=40, out=str(tmp_path))
    seen, evaluated = set(), set()
    batch, evaluate = g.training_batch, g.evaluate
    monkeypatch.setattr(g, "training_batch", lambda *a: [b := batch(*a), seen.update(rows(b))][0])
    monkeypatch.setattr(g, "evaluate",
                        lambda f, tokens: [evaluated.update(rows(tokens)), evaluate(f, tokens)][1])
    trained(cfg)
    assert len(seen) == 640 and len(evaluated) > 2000 and not seen & evaluated


def test_seed_decides_the_split():
    first, same, other = (g.make_split(tiny(seed=s)) for s in (0, 0, 1))
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_fewer_tasks_are_some_of_the_same():
    few, many = (g.make_split(tiny(p=13, tasks=n)) for n in (20, 84))
    assert rows(few["id"]) == rows(many["id"])[:20]
    assert torch.equal(few["train_inputs"], many["train_inputs"])
    shared = set(rows(few["test_ood"])) & set(rows(many["test_ood"]))
    assert len(shared) > 30                                      # of 43


def lesson(cfg, name):
    """The lesson of that name of a run that has all of them."""
    return next(l for kind in ("pairs", "squares")
                for l in g.lessons(dataclasses.replace(cfg, lessons=kind)) if l.name == name)


def quickly(monkeypatch, enough=0.1):
    """From now on lessons are short and soon learned, so that a short run has several."""
    lessons = g.lessons
    monkeypatch.setattr(g, "LOOK_EVERY", 2)
    monkeypatch.setattr(g, "lessons", lambda cfg: [
        dataclasses.replace(l, enough=enough, steps=min(12, l.steps)) for l in lessons(cfg)])


def batch_of(cfg, lesson=None, inputs=None, seed=0):
    """(split, a training batch (B, k, 3)), by default free, over all inputs to train on or those
    given."""
    split = g.make_split(cfg)
    if inputs is not None:
        split["train_inputs"] = inputs
    line = g.line_of(split["train_inputs"], cfg.p)
    batch = g.training_batch(split, line, lesson or g.lessons(cfg)[-1], cfg,
                             torch.Generator().manual_seed(seed))
    return split, batch.unflatten(1, (-1, 3))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("batch", [36, 30, 8])
def test_batches_are_balanced_and_share_their_inputs_or_not(batch, shared):
    cfg = tiny(p=7, tasks=12, batch=batch, examples=20, shared_inputs=shared)
    split, sequences = batch_of(cfg)
    assert sequences.shape == (batch, 20, 3)
    assert set(rows(sequences[..., :2].flatten(0, 1))) <= set(rows(split["train_inputs"]))
    fits = [[(a, b) for a, b in rows(split["id"])
             if all((a * x + b * y - z) % 7 == 0 for x, y, z in s)] for s in sequences.tolist()]
    assert all(len(tasks) == 1 for tasks in fits)                # 20 examples tell which
    for n in (12, 24, 36):                                       # no task again before all
        assert len({task for tasks in fits[n - 12:n] for task in tasks}) == len(fits[n - 12:n])
    different = [{tuple(s.flatten().tolist()) for s in sequences[n - 12:n, :, :2]}
                 for n in (12, 24, 36)]
    assert sum(map(len, different)) == (math.ceil(batch / 12) if shared else batch)


def test_every_training_input_is_drawn_evenly():
    _, sequences = batch_of(tiny(p=3, tasks=4, batch=12_000, examples=3), inputs=g.grid(3))
    xy = sequences[..., :2].flatten(0, 1)
    counts = torch.bincount(xy[:, 0] * 3 + xy[:, 1], minlength=9)             # 4000 expected, sd 60
    assert counts.min() > 3700 and counts.max() < 4300


def test_lines_go_through_the_origin():
    p = 7
    line = {xy: n for xy, n in zip(rows(g.grid(p)), g.line_of(g.grid(p), p).tolist())}
    assert set(line.values()) == set(range(p + 1))
    for (x, y), (u, v) in itertools.combinations(line, 2):
        if (0, 0) not in ((x, y), (u, v)):
            multiple = any((c * x % p, c * y % p) == (u, v) for c in range(p))
            assert (line[x, y] == line[u, v]) == multiple


@pytest.mark.parametrize("name, shape", [
    ("1 line", (480, 8)), ("2 lines", (480, 8)), ("4 lines", (160, 16)), ("free", (80, 24))])
def test_few_lines_take_few_examples_and_more_sequences(name, shape):
    cfg = tiny(p=7, tasks=12, batch=80, examples=24, lessons="lines")
    course = {l.name: l for l in g.lessons(cfg)}
    assert [*course] == ["1 line", "2 lines", "4 lines", "free"]
    assert batch_of(cfg, course[name])[1].shape == (*shape, 3)
    assert g.batch_shape(course[name], cfg) == shape


def test_the_paper_has_free_sequences_alone():
    plain = g.Config(**g.PRESETS["paper"])
    [free] = g.lessons(plain)
    assert g.batch_shape(free, plain) == (1024, 32)


@pytest.mark.parametrize("depth, p, examples, last", [
    (2, 29, 32, "16 lines"), (3, 29, 32, "squares"), (4, 13, 24, "row with gaps"),
    (4, 3, 32, "2 lines"), (4, 13, 2, "8 lines")])
def test_deeper_models_get_lessons_for_pairs_where_there_are_pairs(depth, p, examples, last):
    names = [l.name for l in g.lessons(tiny(depth=depth, p=p, examples=examples, lessons="auto"))]
    more = [] if last.endswith("lines") else ["each line once"]
    assert names[-2 - len(more):] == [last, *more, "free"] and names[0] == "1 line"


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("lines", [1, 2, 5])
def test_lessons_of_lines_keep_each_sequence_to_few(lines, shared):
    p, some = 7, g.grid(7)[5:40]
    cfg = tiny(p=p, tasks=12, batch=200, examples=24, shared_inputs=shared)
    _, sequences = batch_of(cfg, g.Lesson("few", lines, 24), some)
    xy = sequences[..., :2]
    assert set(rows(xy.flatten(0, 1))) == set(rows(some))        # over sequences, all of them
    used = [frozenset(g.line_of(sequence, p).tolist()) for sequence in xy]
    assert max(map(len, used)) == lines
    if lines == 1:                                               # a line of their own each
        assert (len(set(used[:12])) == 1) == shared


def slope(x, y, p):
    """y/x by search, None on the axis x = 0."""
    return next((r for r in range(p) if (r * x - y) % p == 0), None) if x else None


@pytest.mark.parametrize("shared", [False, True])
def test_in_a_row_each_line_is_the_next_power_of_one_generator(shared):
    p, cfg = 13, tiny(p=13, tasks=12, batch=60, examples=20, shared_inputs=shared)
    split, sequences = batch_of(cfg, lesson(cfg, "row"))
    slopes = [[slope(x, y, p) for x, y, _ in s] for s in sequences.tolist()]
    ratios = {b * pow(a, -1, p) % p for s in slopes for a, b in zip(s, s[1:])}
    assert len(ratios) == 1                                      # one g, and its powers are all
    assert len({pow(g_, e, p) for g_ in ratios for e in range(p - 1)}) == p - 1
    assert {s[0] for s in slopes} == {*range(1, p)} or shared    # it starts anywhere
    assert {*rows(sequences[..., :2].flatten(0, 1))} <= {*rows(split["train_inputs"])}


def test_each_line_comes_once_in_any_order():
    p, cfg = 7, tiny(p=7, tasks=12, batch=60, examples=20)
    _, sequences = batch_of(cfg, lesson(cfg, "each line once"))
    slopes = [tuple(slope(x, y, p) for x, y, _ in s) for s in sequences.tolist()]
    assert all({*s} == {None, *range(p)} and len(s) == p + 1 for s in slopes)
    assert len({*slopes}) > 50 and {s[0] for s in slopes} == {None, *range(p)}


SQUARES = {p: {n * n % p for n in range(1, p)} for p in (19, 29)}


@pytest.mark.parametrize("p", SQUARES)
@pytest.mark.parametrize("name", ["side", "squares"])
def test_where_all_slopes_are_squares_an_example_excludes_half_of_the_answers(p, name):
    """On a side for one reason: all places x/y less those before them are squares."""
    cfg = tiny(p=p, tasks=80, batch=60, examples=20)
    split, sequences = batch_of(cfg, lesson(cfg, name))
    fits = [[a for a, b in rows(split["id"]) if all((a * x + b * y - z) % p == 0
                                                    for x, y, z in s)] for s in sequences.tolist()]
    assert all({*slopes} & SQUARES[p] for slopes in fits)
    assert {a for [a, *_] in fits} == {a for a, _ in rows(split["id"])} & SQUARES[p]
    steps = []
    for sequence in sequences.tolist():
        places = [slope(y, x, p) if x else 0 for x, y, _ in sequence]                # x/y
        for i, place in enumerate(places):
            steps += [place is not None and s is not None and (place - s) % p in SQUARES[p]
                      for s in places[:i]]
    assert all(steps) == (name == "side")


def test_without_a_square_the_tasks_are_as_they_are():
    cfg = tiny(p=5, tasks=4, batch=60)
    split, line = g.make_split(cfg), g.line_of(g.grid(5), 5)
    split |= {"id": torch.tensor([[2, 0], [3, 1]]), "train_inputs": g.grid(5)}
    batch = g.training_batch(split, line, lesson(cfg, "squares"), cfg, torch.Generator())
    assert len(batch) == 60


def test_on_an_axis_all_x_are_0_or_all_y():
    cfg = tiny(p=7, tasks=12, batch=60, examples=20)
    _, sequences = batch_of(cfg, g.Lesson("axis", 1, 8, "axis"))
    zero = (sequences[..., :2] == 0).all(1)                      # all x, all y: (sequences, 2)
    assert zero.any(1).all() and zero.float().mean(0).min() > 0.3


def test_a_line_without_inputs_to_train_on_is_replaced():
    p, cfg = 5, tiny(p=5, tasks=8, batch=60)
    some = g.grid(5)[5:]                                         # none has x = 0
    _, sequences = batch_of(cfg, lesson(cfg, "each line once"), some)
    assert {*rows(sequences[..., :2].flatten(0, 1))} <= {*rows(some)}


@pytest.mark.parametrize("skill, name", [(g.RATIO, "ratio"), (g.REGRESSION, "regression")])
def test_a_lesson_is_learned_when_enough_of_its_queries_are_right(skill, name):
    """Those that the algorithm can answer, counted by hand; the others don't count."""
    one = torch.tensor([[1, 0, 3, 0, 1, 2, 2, 0, 6, 3, 3, 1]])   # (1, 0), (0, 1), then 2 (1, 0)
    tokens = one.expand(100, -1)                                 # and (3, 3), by both; mod 7
    tell = {"ratio": [2], "regression": [2, 3]}[name]
    for share, learned in ((0.89, False), (0.92, True)):
        answers = tokens[:, 2::3].clone()
        wrong = round(100 * len(tell) * (1 - share))             # all at the last that counts
        answers[:wrong, tell[-1]] += 1
        answers[:, [i for i in range(4) if i not in tell]] = 0
        logits = F.one_hot(answers % 7, 7).float()
        assert g.is_learned(g.Lesson("", 1, 4, skill=skill), tokens, logits, 7) == learned


def test_gaps_spread_examples_over_more_positions():
    cfg, generator = tiny(examples=9), torch.Generator().manual_seed(0)
    spread = g.Lesson("", 1, 4, gaps=True)
    drawn = torch.stack([g.positions_of_tokens(spread, 4, cfg, generator) for _ in range(1500)])
    examples = F.pad(drawn, (0, 1), value=99).view(-1, 4, 3)     # 4 examples, 6 positions: 15 ways
    assert (examples[:, :3].diff(dim=2) == 1).all() and (examples[..., 0] % 3 == 0).all()
    counts = drawn.unique(dim=0, return_counts=True)[1]
    assert len(counts) == 15 and counts.min() > 60 and counts.max() < 145     # 100 each, sd 10
    assert (examples[..., 0].diff(dim=1) > 0).all() and drawn.max() == 16
    for settled, l in ((cfg, g.Lesson("", 4, 4)), (tiny(examples=4), spread)):
        assert g.positions_of_tokens(l, 4, settled, generator).tolist() == list(range(11))


def test_the_loss_is_of_z_and_on_demand_of_y():
    """Against one forward pass for each scored token, that ends before it."""
    model, _ = model_and_tokens()
    batch = random_tokens(7, 5, 6)

    def nats(first):
        at = range(first, 15, 3)
        return sum(F.nll_loss(model(batch[:, :t], g.EVERY_TOKEN)[:, -1].log_softmax(-1),
                              batch[:, t]) for t in at) / len(at)
    loss, logits = g.training_loss(model, batch)
    torch.testing.assert_close(loss, nats(2))
    both, same = g.training_loss(model, batch, score_y=True)
    torch.testing.assert_close(both, nats(1) + nats(2))
    torch.testing.assert_close(logits, same)


def test_a_run_goes_through_its_lessons_and_reviews(tmp_path, monkeypatch):
    """In order; every other step of a lesson with reviews is one of them; y on one line alone."""
    seen, batch, loss = [], g.training_batch, g.training_loss
    monkeypatch.setattr(g, "training_batch",
                        lambda *a: [seen.append([a[2].name]), batch(*a)][1])
    monkeypatch.setattr(g, "training_loss",
                        lambda *a: [seen[-1].append(a[3]), loss(*a)][1])
    monkeypatch.setattr(g, "is_learned", lambda *a: True)
    quickly(monkeypatch)
    monkeypatch.setattr(g, "LOOK_EVERY", 4)
    cfg = tiny(lessons="pairs", steps=6, out=str(tmp_path))
    run = g.make_run(cfg)
    os.makedirs(cfg.out, exist_ok=True)
    g.train(run, cfg)
    course = g.lessons(cfg)
    assert run.learned == [*range(4, 4 * len(course), 4)] and run.step == run.learned[-1] + 6
    for step, (name, score_y) in enumerate(seen):
        l = course[min(step // 4, len(course) - 1)]
        reviews = l.reviews or [l]
        assert name == (l if step % 2 else reviews[step // 2 % len(reviews)]).name
        assert score_y == (name == "1 line")


def test_a_review_does_not_tell_whether_a_lesson_is_learned(tmp_path, monkeypatch):
    """Looks at steps that are all reviews, in a lesson that has any."""
    monkeypatch.setattr(g, "is_learned", lambda *a: True)
    quickly(monkeypatch)
    monkeypatch.setattr(g, "todays_lesson", lambda l, step: [*l.reviews, l][0])
    cfg = tiny(lessons="pairs", out=str(tmp_path))
    run = g.make_run(cfg)
    os.makedirs(cfg.out, exist_ok=True)
    g.train(run, cfg)
    assert g.current_lesson(run).name == "row"                   # the first with a review


def test_a_lesson_that_is_not_learned_ends_the_run(tmp_path, monkeypatch, capsys):
    quickly(monkeypatch, enough=1.0)
    assert g.main([*TINY_FLAGS, "--lessons", "lines", "--out", str(tmp_path)]) is None
    out = capsys.readouterr().out
    assert 'ends at step 12 within the lesson "1 line"' in out and "1 line, learned" not in out


def test_evaluation_sets_hold_what_their_names_say():
    cfg = tiny(p=7, tasks=12, examples=6)
    split = g.make_split(cfg)
    sets = g.eval_sequences(split, "val_ood", 64, cfg.examples, cfg.p, seed=3)
    assert list(sets) == ["id_train", "id_test", "val_ood_train", "val_ood_test"]
    for name, tokens in sets.items():
        kind, side = name.rsplit("_", 1)
        tasks = set(rows(split[kind]))
        for sequence in tokens.unflatten(1, (-1, 3)).tolist():
            assert {(x, y) for x, y, _ in sequence} <= set(rows(split[f"{side}_inputs"]))
            assert any(all((a * x + b * y) % 7 == z for x, y, z in sequence) for a, b in tasks)
    again = g.eval_sequences(split, "val_ood", 64, cfg.examples, cfg.p, seed=3)
    assert all(torch.equal(sets[name], again[name]) for name in sets)

# -------------------------------------------------------------------------------------------------
# Model
# -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("base", [1e4, 1e8])
def test_rotation_is_multiplication_by_a_unit_complex_number(base):
    cos, sin = g.rotary_tables(torch.arange(9), 8, base)
    x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    frequencies = torch.tensor([base ** (-i / 4) for i in range(4)])
    turn = torch.polar(torch.ones(9, 4), torch.arange(9)[:, None] * frequencies)
    expected = torch.complex(x[..., :4], x[..., 4:]) * turn
    torch.testing.assert_close(g.rotate(x, cos, sin), torch.cat((expected.real, expected.imag), -1))


def test_a_model_turns_by_the_base_of_its_settings(monkeypatch):
    tables, bases = g.rotary_tables, []
    monkeypatch.setattr(g, "rotary_tables", lambda *args: bases.append(args[2]) or tables(*args))
    model, tokens = model_and_tokens(rope_base=1e8)
    model(tokens)
    assert bases == [1e8] and g.Config().rope_base == 1e4        # that of models without a setting


def test_rotary_scores_depend_on_distance_alone():
    cos, sin = g.rotary_tables(torch.arange(40), 8, 1e4)
    gen = torch.Generator().manual_seed(0)
    q, k = torch.randn(8, generator=gen).expand(40, 8), torch.randn(8, generator=gen).expand(40, 8)
    scores = g.rotate(q, cos, sin) @ g.rotate(k, cos, sin).T
    for distance in range(-39, 40):
        line = scores.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), atol=1e-4, rtol=0)
    assert scores[0].std() > 0.1                                 # and depend on it they do


@pytest.mark.parametrize("asking", [g.EVERY_TOKEN, g.EACH_Y])
@pytest.mark.parametrize("positions", [
    [*range(14)], [0, 1, 2, 6, 7, 8, 9, 10, 11, 12, 13, 14, 21, 22]])
def test_attention_equals_torchs_own(asking, positions):
    """Also where short sequences have gaps; a rotation is a product with a complex number."""
    model, tokens = model_and_tokens(examples=8)
    layer, x, weights = model.blocks[0].attention, model.embedding(tokens[:, :14]), []
    layer.softmax.register_forward_hook(lambda module, args, output: weights.append(output))
    ours = layer(x, *g.rotary_tables(torch.tensor(positions), 8, 1e4), asking)
    angles = torch.outer(torch.tensor(positions), 10_000 ** (-torch.arange(4) / 4))

    def heads(linear):
        return linear(x).view(len(x), 14, 2, 8).transpose(1, 2)

    def turned(u):
        z = torch.complex(*u.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((z.real, z.imag), -1)
    q, k = turned(heads(layer.query)), turned(heads(layer.key))
    theirs = F.scaled_dot_product_attention(q, k, heads(layer.value), is_causal=True)
    torch.testing.assert_close(ours, layer.out(theirs.transpose(1, 2).flatten(2))[:, asking])
    torch.testing.assert_close(weights[0] @ heads(layer.value), theirs[:, :, asking])


def test_the_model_sees_the_positions_it_is_told():
    """0, 1, 2, ... by default, and a shift of all of them changes nothing; a gap does."""
    model, tokens = model_and_tokens()
    positions = torch.arange(tokens.size(1))
    plain = model(tokens)
    assert torch.equal(plain, model(tokens, positions=positions))
    torch.testing.assert_close(plain, model(tokens, positions=positions + 5), atol=1e-4, rtol=1e-4)
    apart = model(tokens, positions=positions + 3 * (positions >= 6))
    assert torch.equal(plain[:, :2], apart[:, :2])
    assert not torch.allclose(plain[:, 2:], apart[:, 2:])


def test_no_prediction_sees_its_answer_or_anything_later():
    model, tokens = model_and_tokens()
    before = model(tokens)
    for position in range(tokens.size(1)):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 7
        after = model(changed)
        for shot in range(before.size(1)):               # predicted from positions 0 .. 3 shot + 1
            same = torch.equal(after[:, shot], before[:, shot])
            assert same == (position > 3 * shot + 1)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_last_block_shortcut_is_exact(depth):
    model, tokens = model_and_tokens(depth=depth)
    fast = model(tokens)
    fast.square().sum().backward()
    fast_grads = [w.grad.clone() for w in model.parameters()]
    model.zero_grad()
    full = model(tokens, g.EVERY_TOKEN)
    assert full.shape == (*tokens.shape, 7)
    full[:, 1::3].square().sum().backward()
    torch.testing.assert_close(fast, full[:, 1::3])
    for a, w in zip(fast_grads, model.parameters()):
        torch.testing.assert_close(a, w.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_benchmark_counts_what_torch_counts(depth):
    cfg = tiny(p=7, examples=6, depth=depth)
    tokens = random_tokens(7, 6, 16)
    with FlopCounterMode(display=False) as counted:
        bench.z_loss(g.GPT(cfg), tokens).backward()
    assert bench.operations(cfg, 16, 6) == counted.get_total_flops()


def test_the_benchmark_counts_a_whole_run(tmp_path, monkeypatch):
    """Also as lessons change: sequences become longer, y is no longer scored, reviews come."""
    quickly(monkeypatch, enough=-1)
    monkeypatch.setattr(g, "evaluate", lambda model, tokens: torch.zeros(2, 20))
    with FlopCounterMode(display=False) as counted:
        trained(tiny(examples=20, optimizer="adamw", lessons="pairs", out=str(tmp_path)))
    assert len(g.load_checkpoint(tmp_path / "last.pt")[0]["learned"]) == 6
    assert bench.operations_of_run(tmp_path) == counted.get_total_flops()


def test_the_benchmarks_variants_compute_the_same():
    model, _ = model_and_tokens()
    tokens = random_tokens(7, 5, 6)
    losses = [bench.z_loss(model, tokens), bench.everywhere_loss(model, tokens),
              bench.z_loss(bench.with_fused_attention(model), tokens)]
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(3))


def test_initial_weights():
    torch.manual_seed(0)
    model = g.GPT(g.Config(**g.PRESETS["paper"]))
    for name, w in model.named_parameters():
        if w.ndim == 2:
            expected = 0.02 / (math.sqrt(4) if "mlp.down" in name else 1)
            assert abs(w.std().item() / expected - 1) < 0.05, name
    # 2 blocks of 12 d^2, the embedding, and 5 LayerNorms: no biases, no separate read-out
    assert sum(w.numel() for w in model.parameters()) == 24 * 512 ** 2 + 29 * 512 + 5 * 2 * 512

# -------------------------------------------------------------------------------------------------
# Evaluation
# -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("p", [3, 5, 7])
def test_oracles_against_enumeration_of_all_tasks(p):
    def rule(a, b, x, y):
        return (a * x + b * y) % p                               # exercise 3 changes this
    tokens = random_tokens(p, 4, 200, seed=1)
    tokens[0, :6] = torch.tensor([0, 0, 0, 0, 0, 0])             # the origin: example and query
    ratio, regression = g.solvable(tokens, p)
    for n, sequence in enumerate(tokens.unflatten(1, (-1, 3)).tolist()):
        for t, (x, y, z) in enumerate(sequence):
            context = sequence[:t]
            answers = {rule(a, b, x, y) for a in range(p) for b in range(p)
                       if all(rule(a, b, u, v) == w for u, v, w in context)}
            assert z in answers
            assert regression[n, t] == (len(answers) == 1)
            assert len(answers) in (1, p)                        # undetermined: anything goes
            # Ratio Matching: for each task the query's z is the same multiple of one example's
            assert ratio[n, t] == any(
                all(rule(a, b, x, y) == c * rule(a, b, u, v) % p for a in range(p)
                    for b in range(p)) for u, v, _ in context for c in range(p))


def test_novel_queries_against_a_loop():
    tokens = random_tokens(3, 6, 50)
    sequences = tokens.unflatten(1, (-1, 3)).tolist()
    for row, sequence in zip(g.novel_queries(tokens).tolist(), sequences):
        xy = [(x, y) for x, y, _ in sequence]
        assert row == [q not in xy[:t] for t, q in enumerate(xy)]


def one_hot(answers, p):
    return F.one_hot(answers, p).float()


def test_a_perfect_predictor_scores_one_everywhere():
    tokens = random_tokens(7, 6, 600)
    answers = iter(tokens.split(256))
    score = g.evaluate(lambda seen: one_hot(next(answers)[:, 2::3], 7), tokens)
    assert score.shape == (2, 6) and (score == 1).all()


def test_a_ratio_matcher_scores_what_its_oracle_says():
    """Answers c z_i where an example lies on the query's line, and wrongly elsewhere."""
    p, tokens = 5, random_tokens(5, 6, 300)

    def answer(sequence, t):
        x, y, z = sequence[t]
        for u, v, w in sequence[:t]:
            for c in range(p):
                if (c * u % p, c * v % p) == (x, y):
                    return c * w % p
        return (z + 1) % p
    answers = torch.tensor([[answer(s, t) for t in range(6)]
                            for s in tokens.unflatten(1, (-1, 3)).tolist()])
    batches = iter(answers.split(256))
    score = g.evaluate(lambda seen: one_hot(next(batches), p), tokens)
    oracle = g.oracle_accuracy(tokens, p)[0]
    torch.testing.assert_close(oracle, score + (1 - score) / p)  # it guesses what it can't know
    assert 0.2 < score[1, -1] < score[0, -1] < 1                 # copying is easier than matching


def test_correct_answers_are_counted_in_integers():
    hits = torch.ones(70_000, 2, dtype=torch.bool)
    hits[0] = False                                              # lost in bfloat16 or float16
    tokens = torch.zeros(70_000, 6, dtype=torch.long)
    tokens[:, 3] = 1
    assert g.accuracy(hits, tokens).tolist() == [[69_999 / 70_000] * 2] * 2


def test_no_novel_query_is_nan():
    tokens = torch.zeros(4, 6, dtype=torch.long)
    score = g.accuracy(torch.ones(4, 2, dtype=torch.bool), tokens)
    assert score[0].tolist() == [1, 1] and score[1, 0] == 1 and math.isnan(score[1, 1])


@pytest.mark.parametrize("good, name", [
    ("1000", "in-distribution memorization"), ("1100", "in-distribution generalization"),
    ("1010", "o.o.d. memorization"), ("1111", "o.o.d. generalization"),
    ("1110", "none of the paper's")])
def test_phases_follow_the_papers_table(good, name):
    """Halfway from chance 0.2 to a Ratio Matcher's 0.6 or 0.8 is 0.4 or 0.5. nan is never good."""
    ratio = [0.6, 0.8, 0.6, 0.8]
    for above, below in ((0.01, 0.01), (0.3, math.nan)):
        model = [(0.2 + r) / 2 + (above if c == "1" else -below) for c, r in zip(good, ratio)]
        assert g.phase(model, ratio, 5) == name

# -------------------------------------------------------------------------------------------------
# Training
# -------------------------------------------------------------------------------------------------

def factors(cfg, steps, learned=()):
    return [g.lr_factor(SimpleNamespace(step=s, learned=[*learned], lessons=g.lessons(cfg)), cfg)
            for s in steps]


def test_schedule_at_its_corners():
    paper = tiny(warmup=10_000, steps=200_000, lr_end=0.1)
    assert factors(paper, (0, 5_000, 10_000, 105_000, 200_000)) == pytest.approx(
        [0.01, 0.505, 1, 0.55, 0.1])
    assert factors(tiny(warmup=0), [0]) == [1]
    late = tiny(warmup=100, steps=700, lr_end=0.1, lessons="lines")      # p = 5 has three lessons
    assert factors(late, (50, 100, 579), [40, 500]) == pytest.approx([0.505, 1, 1])
    assert factors(late, (580, 930, 1280), [40, 500, 580]) == pytest.approx([1, 0.55, 0.1])


def test_the_schedule_of_pairs_follows_their_lessons():
    cfg = tiny(warmup=100, steps=700, lr_end=0.1, lessons="pairs")
    course = g.lessons(cfg)
    for n, l in enumerate(course[:-1]):
        assert factors(cfg, [900], range(100, 100 + n)) == [l.rate]
    learned = range(200, 200 + len(course) - 1)
    begin, rate = learned[-1], course[-1].rate
    assert factors(cfg, (begin, begin + 350, begin + 700), learned) == pytest.approx(
        [rate, 0.55 * rate, 0.1 * rate])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_decay_groups(optimizer):
    cfg = tiny(optimizer=optimizer, wd=1.5, lr=0.03, embd_lr=0.002)
    model = g.GPT(cfg)
    optimizers = g.make_optimizers(model, cfg)
    names = {id(w): n for n, w in model.named_parameters()}
    groups = {names[id(w)]: (type(o).__name__, group["weight_decay"], group["peak_lr"])
              for o in optimizers for group in o.param_groups for w in group["params"]}
    assert groups.keys() == set(names.values())
    for name, (kind, decay, lr) in groups.items():
        matrix = "norm" not in name and name != "embedding.weight"
        assert decay == (0 if "norm" in name else 1.5)
        assert kind == ("Muon" if matrix and optimizer == "muon" else "AdamW")
        assert lr == (0.03 if matrix else 0.002)


def stop_at(curve, patience=3):
    """Feed a curve point by point: (index kept, evaluations seen when it stopped or None)."""
    cfg = tiny(p=5, patience=patience)
    run = SimpleNamespace(history=[], step=0, learned=[], lessons=g.lessons(cfg))
    for n, score in enumerate(curve, 1):
        run.history.append({"val_ood_test": score})
        if g.is_over(run, cfg):
            return g.best_evaluation(run.history, 1 / 5), n
    return g.best_evaluation(run.history, 1 / 5), None


def test_early_stopping_on_scripted_curves():
    plateau = [0.12, 0.1, 0.11] * 20
    # the plateau ends no run; three worse ones do (transience), unless a new best starts afresh
    assert stop_at(plateau + [0.5, 0.8, 0.9]) == (62, None)
    assert stop_at(plateau + [0.5, 0.9, 0.8, 0.7, 0.6, 0.5]) == (61, 65)
    assert stop_at(plateau + [0.5, 0.9, 0.8, 0.7, 0.91]) == (64, None)
    assert stop_at(plateau) == (59, None)                                   # no rise: the newest
    assert stop_at(plateau + [0.9] + [0.5] * 50, patience=0) == (60, None)  # 0: never stops


def run(argv, program=[str(ROOT / "grok_icl.py")], **kwargs):
    return subprocess.run([sys.executable, *program, *argv], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=100, **kwargs)


def trained(cfg):
    run = g.make_run(cfg)
    os.makedirs(cfg.out, exist_ok=True)
    g.save(run, cfg, "last.pt")
    g.train(run, cfg)


def interrupted(cfg, step, monkeypatch, checkpoint=None):
    """Train, and get Ctrl-C within that step, counted from the start or the checkpoint."""
    with monkeypatch.context() as patch:
        at_step(patch, step, raising(KeyboardInterrupt()))
        run = g.make_run(cfg, checkpoint)
        os.makedirs(cfg.out, exist_ok=True)
        with pytest.raises(KeyboardInterrupt):
            g.train(run, cfg)


@pytest.mark.parametrize("changes", [
    dict(optimizer="adamw"), dict(amp="bf16"), dict(shared_inputs=True),
    dict(lessons="lines", steps=6), dict(lessons="pairs", steps=6),
    dict(lessons="squares", p=19, tasks=40, steps=6),
    *(pytest.param(dict(device="cuda", amp=amp), marks=needs_cuda)
      for amp in ("off", "bf16"))])
def test_resume_equals_an_uninterrupted_run_bit_for_bit(tmp_path, monkeypatch, changes):
    quickly(monkeypatch, enough=-1)                              # so that lessons change too
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained(tiny(**changes, out=str(whole)))

    interrupted(tiny(**changes, out=str(parts)), 6, monkeypatch)
    for more in (3, 6, 1):
        cfg, checkpoint = g.parse_config(["--resume", "--out", str(parts)])
        interrupted(cfg, more, monkeypatch, checkpoint)
    assert 0 < torch.load(parts / "last.pt", weights_only=True)["step"] < 12
    cfg, checkpoint = g.parse_config(["--resume", "--out", str(parts)])
    g.train(g.make_run(cfg, checkpoint), cfg)

    assert (whole / "metrics.csv").read_bytes() == (parts / "metrics.csv").read_bytes()
    for name in ("last.pt", "best.pt"):
        a, b = (torch.load(d / name, weights_only=True) for d in (whole, parts))
        assert a.pop("device") == b.pop("device") == changes.get("device", "cpu")
        assert {**a.pop("config"), "out": ""} == {**b.pop("config"), "out": ""}
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert len(a["learned"]) == len(g.lessons(cfg)) - 1


@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_computes_what_the_cpu_does(compiled):
    """Loss, logits and gradients in float32, in both shapes of the loss and with gaps."""
    cfg = tiny(p=7, examples=8)
    models = [g.GPT(cfg), g.GPT(cfg).cuda()]
    models[1].load_state_dict(models[0].state_dict())
    tokens = random_tokens(7, 6, 20)
    positions = torch.tensor([0, 1, 2, 6, 7, 8, 9, 10, 11, 12, 13, 14, 18, 19, 20, 21, 22])
    for score_y, gaps in ((True, positions), (False, positions), (False, None)):
        seen = []
        for model, device in zip(models, ("cpu", "cuda")):
            model.zero_grad()
            call = torch.compile(model) if compiled and device == "cuda" else model
            there = gaps if gaps is None else gaps.to(device)
            loss, logits = g.training_loss(call, tokens.to(device), there, score_y)
            loss.backward()
            seen.append([t.detach().cpu() for t in (
                loss, logits, *(w.grad for w in model.parameters()))])
        torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)


@needs_cuda
def test_a_compiled_run_on_cuda_learns_and_reports(tmp_path):
    """As a user would; its checkpoint is read on a CPU."""
    done = run([*TINY_FLAGS, "--device", "auto", "--amp", "auto", "--compile",
                "--steps", "150", "--eval-every", "50", "--out", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    assert "on cuda" in done.stdout and "Phase:" in done.stdout
    checkpoint, cfg, model = g.load_checkpoint(tmp_path / "best.pt")
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert float(rows[-1]["loss"]) < math.log(5) - 0.05          # of five residues, below chance's
    tokens = g.eval_sequences(checkpoint["split"], "val_ood", 512, 10, 5, cfg.seed + 1)["id_train"]
    again = g.evaluate(model, tokens)[0, -1].item()              # bfloat16 there, float32 here
    assert abs(again - checkpoint["history"][-1]["id_train"]) < 0.05


def test_training_keeps_what_it_promises(tmp_path):
    """As a user would: train, read the files, run again, resume, interrupt."""
    out = tmp_path / "run"
    done = run([*TINY_FLAGS, "--out", str(out)])
    assert done.returncode == 0, done.stderr
    assert "batch 16" in done.stdout and "Phase:" in done.stdout
    assert sorted(f.name for f in out.iterdir()) == ["best.pt", "last.pt", "metrics.csv"]
    with open(out / "metrics.csv") as f:
        metrics = list(csv.DictReader(f))
    assert [int(r["step"]) for r in metrics] == [4, 8, 12]
    assert all(0 <= float(r["val_ood_test"]) <= 1 for r in metrics)

    before = {f.name: f.read_bytes() for f in out.iterdir()}
    again = run([*TINY_FLAGS, "--out", str(out)])
    assert again.returncode == 2 and again.stderr.count("\n") == 1
    assert "holds a run" in again.stderr and "with --resume" in again.stderr
    differs = run(["--resume", "--out", str(out), "--lr", "0.5"])
    assert differs.returncode == 2 and "--lr 0.5" in differs.stderr and "0.01" in differs.stderr
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    os.replace(out / "best.pt", tmp_path / "best.pt")            # the report will need it
    lost = run(["--resume", "--out", str(out)])
    assert lost.returncode == 2 and "best.pt" in lost.stderr and lost.stdout == ""
    os.replace(tmp_path / "best.pt", out / "best.pt")
    same = run(["--resume", "--out", str(out)])                  # a finished run reports once more
    assert same.returncode == 0
    assert (same.stdout[same.stdout.index("Best step"):]
            == done.stdout[done.stdout.index("Best step"):])


def one_error(stderr):
    """The program's last words, after its progress bar: one line, no traceback."""
    assert "Traceback" not in stderr
    return [line for line in stderr.replace("\r", "\n").splitlines() if "error: " in line]


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    """Though the loss of that step was still fine."""
    def breaking():
        run.model.norm.weight.register_hook(lambda grad: grad * math.nan)
    cfg = tiny(out=str(tmp_path))
    run = g.make_run(cfg)
    at_step(monkeypatch, 8, breaking)
    with pytest.raises(g.BadInput, match="at step 8 weights not finite"):
        g.train(run, cfg)
    for name in ("last.pt", "best.pt"):
        checkpoint = torch.load(tmp_path / name, weights_only=True)
        assert checkpoint["step"] == 4
        assert checkpoint["model"]["norm.weight"].isfinite().all()


def test_the_report_is_of_the_weights_in_best_pt(tmp_path, monkeypatch, capsys):
    """A kill between the two files can leave best.pt newer than last.pt's history."""
    monkeypatch.setattr(g, "REPORT_SEQUENCES", 64)
    cfg = tiny(out=str(tmp_path))
    trained(cfg)
    run = g.make_run(cfg, g.load_checkpoint(f"{tmp_path}/last.pt")[0])
    run.step = 7
    g.save(run, cfg, "best.pt")
    run.step = 12
    g.report(run, cfg)
    assert "Best step 7 of 12" in capsys.readouterr().out


def test_the_report_shows_what_model_and_oracles_score_on_novel_queries(
        tmp_path, monkeypatch, capsys):
    """The model here is right on a query just if x < 2; copies don't count."""
    monkeypatch.setattr(g, "REPORT_SEQUENCES", 256)
    cfg = tiny(out=str(tmp_path))
    run = g.make_run(cfg)
    g.save(run, cfg, "best.pt")
    monkeypatch.setattr(g, "evaluate", lambda model, t: g.accuracy(t[:, 0::3] < 2, t))
    g.report(run, cfg)
    out = capsys.readouterr().out
    for name, t in g.eval_sequences(run.split, "test_ood", 256, 10, 5, cfg.seed + 2).items():
        kind, side = ("o.o.d." if "ood" in name else "i.d."), name.split("_")[-1]
        novel = [i for i, row in enumerate(t.unflatten(1, (-1, 3))[..., :2].tolist())
                 if row[-1] not in row[:-1]]
        right = sum(t[i, -3].item() < 2 for i in novel) / len(novel)
        expected = [right, *(o[1, -1].item() for o in g.oracle_accuracy(t, 5))]
        row = next(line for line in out.splitlines() if line.startswith(f"{kind} tasks, {side}"))
        assert row.split()[4:] == [f"{100 * v:.1f}" for v in expected]


def test_ctrl_c_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    argv = [*TINY_FLAGS, "--steps", "100000", "--out", str(out)]
    process = subprocess.Popen([sys.executable, str(ROOT / "grok_icl.py"), *argv],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not (out / "best.pt").exists() and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert "same command with --resume" in stdout
    assert torch.load(out / "last.pt", weights_only=True)["step"] % 4 == 0


def at_step(monkeypatch, step, action):
    """Training calls action before its batch number `step`; action may raise."""
    batch, calls = g.training_batch, itertools.count(1)

    def acting(*args):
        if next(calls) == step:
            action()
        return batch(*args)
    monkeypatch.setattr(g, "training_batch", acting)


def raising(error):
    def action():
        raise error
    return action


def no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOSPC, "No space left")])
def test_what_runs_out_loses_nothing(error, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 6, raising(error))
        with pytest.raises(type(error)):
            g.main([*TINY_FLAGS, "--out", str(tmp_path)])
    assert g.load_checkpoint(tmp_path / "last.pt")[0]["step"] == 4
    assert g.main(["--resume", "--out", str(tmp_path)]) is None


@pytest.mark.parametrize("writes", range(1, 9))
def test_a_full_disk_leaves_whole_files(writes, tmp_path, monkeypatch, capsys):
    """Full from some write on: at the start, at an evaluation's best.pt, metrics.csv or last.pt."""
    done, replace = itertools.count(1), os.replace
    monkeypatch.setattr(g.os, "replace",
                        lambda *f: no_space() if next(done) >= writes else replace(*f))
    argv = [*TINY_FLAGS, "--out", str(tmp_path)]
    if writes == 1:                                              # nothing is trained yet
        assert g.main(argv) == 2 and "No space left" in capsys.readouterr().err
    else:
        with pytest.raises(OSError, match="No space left"):
            g.main(argv)
    names = {f.name for f in tmp_path.iterdir() if f.suffix != ".tmp"}
    assert names <= {"last.pt", "best.pt", "metrics.csv"} and ("last.pt" in names) == (writes > 1)
    for name in names - {"metrics.csv"}:
        g.load_checkpoint(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks")
def test_a_killed_run_is_resumed_as_if_nothing_had_been():
    done = run(["--kills", "2"], program=[str(ROOT / "tests" / "kill.py")])
    assert done.returncode == 0 and "2 kills" in done.stdout, done.stdout + done.stderr

# -------------------------------------------------------------------------------------------------
# Surroundings: variables that others set, a notebook's process, a cluster's restart
# -------------------------------------------------------------------------------------------------

def test_variables_of_others_change_nothing(tmp_path, monkeypatch):
    for name, value in dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="x", MPLBACKEND="nonsense",
                            PYTHONOPTIMIZE="2").items():
        monkeypatch.setenv(name, value)
    done = run([*TINY_FLAGS, "--out", str(tmp_path)])
    assert done.returncode == 0 and "Phase:" in done.stdout, done.stderr


def test_nothing_is_made_for_a_run_that_can_not_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert g.main([*TINY_FLAGS, "--device", "cuda:99", "--out", "new/run"]) == 2
    assert not list(tmp_path.iterdir())


def test_one_command_starts_a_run_and_goes_on_with_it(tmp_path, monkeypatch):
    """As a cluster does, which restarts a job with the command it was started with."""
    argv = [*TINY_FLAGS, "--resume", "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        at_step(patch, 6, raising(KeyboardInterrupt()))
        assert g.main(argv) == 130
    assert g.main(argv) is None                                  # goes on
    assert g.main(argv) is None                                  # is over; reports once more
    steps = [r["step"] for r in csv.DictReader((tmp_path / "run/metrics.csv").open())]
    assert steps == ["4", "8", "12"]


def test_sequences_may_be_longer_than_those_trained_on():
    model, _ = model_and_tokens(examples=5)
    assert model(random_tokens(7, 40, 2)[:, :-1]).shape == (2, 40, 7)


def test_a_file_gets_each_line_at_once_and_no_bars(tmp_path):
    """stdout and stderr as nohup or SLURM have them."""
    argv = [*TINY_FLAGS, "--steps", "100000", "--eval-every", "100", "--out", str(tmp_path / "run")]
    with (open(tmp_path / "err", "w") as err, open(tmp_path / "log", "w") as log,
          subprocess.Popen([sys.executable, str(ROOT / "grok_icl.py"), *argv], stdout=log,
                           stderr=err, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process):
        deadline = time.time() + 60                              # no buffer is full by then
        while "step" not in (tmp_path / "log").read_text() and time.time() < deadline:
            time.sleep(0.05)
        running = process.poll() is None
        process.kill()
    assert running and "step    100" in (tmp_path / "log").read_text()
    assert (tmp_path / "err").read_text() == ""


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
def test_it_trains_without_a_stdout(tmp_path):
    """As a daemon may start it."""
    argv = [sys.executable, str(ROOT / "grok_icl.py"), *TINY_FLAGS, "--out", str(tmp_path)]
    assert subprocess.run(f"{shlex.join(argv)} >&-", shell=True, timeout=100).returncode == 0


def test_no_assert_decides_about_what_a_user_gives():
    """python -O leaves them out."""
    for name in ("grok_icl.py", "analyze.py"):
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree))

# -------------------------------------------------------------------------------------------------
# Bad input: one line that names the flag and what would do, exit code 2, nothing touched
# -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, words", [
    (["--tasks", "510"], ["--tasks 510", "multiple of 4"]),
    (["--tasks", "841"], ["--tasks 841", "839"]),
    (["--tasks", "836"], ["--tasks 836", "take fewer"]),
    (["--p", "15"], ["--p 15", "prime"]),
    (["--p", "2"], ["--p 2", "from 3"]),
    (["--p", "seven"], ["--p", "seven", "int"]),
    (["--alpha", "0"], ["--alpha 0"]),
    (["--alpha", "nan"], ["--alpha nan"]),
    (["--p", "3", "--tasks", "4", "--alpha", "0.1"], ["--alpha 0.1", "at least 2"]),
    (["--p", "3", "--tasks", "4", "--alpha", "0.9"], ["--alpha 0.9", "at least 2"]),
    (["--heads", "3"], ["--heads 3", "--embd 128"]),
    (["--embd", "12"], ["--embd 12", "even"]),
    (["--steps", "100"], ["--steps 100", "--warmup"]),
    (["--out", ""], ["--out"]),
    (["--device", "meta"], ["--device meta", "cpu"]),
    (["--device", "cuda:99"], ["--device cuda:99", "cpu"]),
    (["--device", "gpu"], ["--device gpu", "cpu"]),
    (["--lessons", "pairs", "--examples", "2"], ["--lessons pairs", "auto"]),
    (["--lessons", "pairs", "--p", "3", "--tasks", "4"], ["--lessons pairs", "auto"]),
    (["--lessons", "squares", "--examples", "2"], ["--lessons squares", "auto"]),
    (["--lessons", "squares", "--p", "17", "--tasks", "40"], ["--lessons squares", "below 19"]),
    (["--lessons", "all"], ["--lessons", "all", "pairs"]),
    (["--amp", "fp8"], ["--amp", "fp8", "bf16"]),
    (["--optimizer", "sgd"], ["--optimizer", "sgd", "muon"]),
    (["--preset", "desktop"], ["--preset", "desktop", "quick"]),
    (["--task", "512"], ["--task"]),
])
def test_bad_input_is_refused_in_one_line(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert g.main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(w in err for w in words), err
    assert not list(tmp_path.iterdir())


NUMBERS = [f.name for f in dataclasses.fields(g.Config) if f.type in (int, float)]
WORDS = ["lessons", "optimizer", "device", "amp", "preset"]


@pytest.mark.parametrize("flag, value", [
    *((flag, value) for flag in NUMBERS for value in ("", "seven", "½", "-1", "nan", "9" * 400)),
    *((flag, value) for flag in WORDS for value in ("", "½", "-1"))])
def test_every_flag_refuses_what_it_cannot_be(flag, value, tmp_path, monkeypatch, capsys):
    """Wrong type, empty, unicode, negative, huge: one line with flag and value; nothing written."""
    monkeypatch.chdir(tmp_path)
    flag = "--" + flag.replace("_", "-")
    assert g.main([f"{flag}={value}"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and flag in err and not list(tmp_path.iterdir())
    assert value in err or flag != "--device" and float(value) == math.inf and "inf" in err


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def put(*path, value):
    """A change to a checkpoint: the entry at the path becomes value, or goes if value is None."""
    def change(checkpoint):
        *parents, last = path
        for key in parents:
            checkpoint = checkpoint[key]
        if value is None:
            del checkpoint[last]
        else:
            checkpoint[last] = value
    return change


MUTATIONS = {
    "other width": put("config", "embd", value=32),
    "no lessons": put("learned", value=None),
    "no weight": put("model", "norm.weight", value=None), "no split": put("split", value=None),
    "no history": put("history", value=None),
    "weight of another shape": put("model", "norm.weight", value=torch.ones(8)),
    "an optimizer too few": put("optimizers", value=[]), "code": put("config", value=Exploit()),
}


@pytest.fixture(scope="module")
def half_a_run(tmp_path_factory):
    """The bytes of a last.pt and a best.pt of a run that was stopped at step 6 of 12."""
    folder = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        interrupted(tiny(out=str(folder)), 6, patch)
    return (folder / "last.pt").read_bytes(), (folder / "best.pt").read_bytes()


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "foreign", *MUTATIONS])
def test_bad_checkpoints_are_refused(kind, half_a_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    last, best = half_a_run
    Path("best.pt").write_bytes(best)
    if kind in MUTATIONS:
        checkpoint = torch.load(io.BytesIO(last), weights_only=True)
        MUTATIONS[kind](checkpoint)
        torch.save(checkpoint, "last.pt")
    elif kind == "foreign":
        torch.save({"model": {}, "epoch": 3}, "last.pt")
    else:
        contents = {"empty": b"", "text": b"not a checkpoint", "truncated": last[:2000]}
        Path("last.pt").write_bytes(contents[kind])
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    assert g.main(["--resume", "--out", "."]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "last.pt" in err
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    done = run([*TINY_FLAGS, "--out", str(tmp_path / "file" / "run")])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--out" in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_a_seed_that_does_not_fit_the_split_is_refused(half_a_run, tmp_path, capsys):
    """Both files agree, but the tasks in them are another seed's."""
    for name, content in zip(("last.pt", "best.pt"), half_a_run):
        changed = torch.load(io.BytesIO(content), weights_only=True)
        changed["config"]["seed"] += 1
        torch.save(changed, tmp_path / name)
    assert g.main(["--resume", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "doesn't fit its own config" in err or "damaged" in err


def test_resume_refuses_a_preset_that_differs(half_a_run, tmp_path, capsys):
    for name, content in zip(("last.pt", "best.pt"), half_a_run):
        (tmp_path / name).write_bytes(content)
    assert g.main(["--resume", "--preset", "quick", "--out", str(tmp_path)]) == 2
    assert "--p 13" in capsys.readouterr().err


def test_resume_with_the_same_preset_keeps_what_was_set(tmp_path, monkeypatch):
    """A preset's eval_every (paper: 1000) doesn't undo the flag that the run was started with."""
    monkeypatch.setitem(g.PRESETS, "paper", dict(p=5, eval_every=1000))
    flags = ["--preset", "paper", *TINY_FLAGS, "--out", str(tmp_path)]
    cfg, _ = g.parse_config(flags + ["--eval-every", "3"])
    g.save(g.make_run(cfg), cfg, "last.pt")
    resume = ["--resume", "--preset", "paper", "--out", str(tmp_path)]
    assert g.parse_config(resume)[0] == dataclasses.replace(cfg, resume=True)
    assert g.parse_config(resume + ["--eval-every", "7"])[0].eval_every == 7


@pytest.mark.parametrize("name", ["metrics.csv", "best.pt", "notes.txt"])
def test_what_is_left_of_a_run_is_not_overwritten(name, tmp_path, capsys):
    (tmp_path / name).write_text("mine")
    assert g.main([*TINY_FLAGS, "--out", str(tmp_path)]) == 2
    assert "holds a run" in capsys.readouterr().err
    assert g.main([*TINY_FLAGS, "--resume", "--out", str(tmp_path)]) == 2    # without last.pt
    assert "last.pt: no such file" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"
