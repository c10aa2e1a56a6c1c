"""
Tests of grok_icl.py against references that share no code with it: brute force over Z_p, torch's own
attention, complex arithmetic, planted predictors, scripted curves, and runs that were interrupted.
"""
import csv
import dataclasses
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import bench  # noqa: E402
import grok_icl as g  # noqa: E402

torch.set_num_threads(1)          # tiny tensors: a second thread only waits for the first

TINY = dict(p=5, tasks=8, alpha=0.8, examples=4, depth=2, heads=2, embd=16, init_std=0.1, lr=0.01,
            wd=0.1, batch=16, steps=12, warmup=2, eval_every=4, patience=0, device="cpu")
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
    for (a, b), xys, tokens in zip(rows(tasks), inputs.tolist(), g.to_tokens(tasks, inputs, p).tolist()):
        assert tokens == [t for x, y in xys for t in (x, y, (a * x + b * y) % p)]


@pytest.mark.parametrize("p, n, choice", [(29, 512, "rectangular"), (7, 40, "rectangular"),
                                          (7, 47, "random"), (3, 1, "random"), (3, 4, "rectangular")])
def test_splits_are_disjoint_and_complete(p, n, choice):
    split = g.make_split(tiny(p=p, tasks=n, task_choice=choice, alpha=0.6))
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
    corners, added = tasks[:n // 4], tasks[n // 4:]
    for i, (a, b) in enumerate(corners):
        (c, b2), (a2, d), opposite = added[3 * i:3 * i + 3]
        assert (a2, b2) == (a, b) and opposite == (c, d) and c != a and d != b


@pytest.mark.parametrize("p, n", [(29, 840), (7, 48)])
def test_rectangles_that_do_not_fit_are_refused(p, n, capsys):
    with pytest.raises(SystemExit) as stop:
        g.choose_rectangles(p, n, torch.Generator().manual_seed(0))
    assert stop.value.code == 2 and "--task-choice random" in capsys.readouterr().err


def test_evaluation_draws_other_sequences_than_training(tmp_path, monkeypatch):
    """Were their seeds the same, the i.d. train set would hold the first training batches."""
    cfg = tiny(p=29, tasks=16, examples=8, steps=40, eval_every=40, out=str(tmp_path))
    seen, evaluated = set(), set()
    batch, evaluate = g.training_batch, g.evaluate
    monkeypatch.setattr(g, "training_batch", lambda *a: [b := batch(*a), seen.update(rows(b))][0])
    monkeypatch.setattr(g, "evaluate", lambda f, tokens: [evaluated.update(rows(tokens)), evaluate(f, tokens)][1])
    trained(cfg)
    assert len(seen) == 640 and len(evaluated) > 2000 and not seen & evaluated


def test_seed_decides_the_split():
    first, same, other = (g.make_split(tiny(seed=s)) for s in (0, 0, 1))
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_batches_are_balanced_and_share_their_inputs():
    p, k, per_task = 7, 5, 3
    split = g.make_split(tiny(p=p, tasks=12))
    batch = g.training_batch(split["id"], split["train_inputs"], per_task, k, p,
                             torch.Generator().manual_seed(0))
    assert batch.shape == (12 * per_task, 3 * k)
    sequences = batch.unflatten(1, (k, 3)).unflatten(0, (12, per_task))       # (task, sequence, k, 3)
    assert set(rows(sequences[..., :2].flatten(0, 2))) <= set(rows(split["train_inputs"]))
    for (a, b), of_task in zip(rows(split["id"]), sequences):
        x, y, z = of_task.unbind(-1)
        assert torch.equal(z, (a * x + b * y) % p)
        assert torch.equal(of_task[..., :2], sequences[0, ..., :2])           # shared across tasks
    assert not torch.equal(sequences[0, 0], sequences[0, 1])                  # but not within one


def test_every_training_input_is_drawn_evenly():
    inputs = g.grid(3)
    batch = g.training_batch(torch.tensor([(1, 0)]), inputs, 3000, 3, 3, torch.Generator().manual_seed(0))
    xy = batch.unflatten(1, (3, 3))[..., :2].flatten(0, 1)
    counts = torch.bincount(xy[:, 0] * 3 + xy[:, 1], minlength=9)             # 1000 expected, sd 30
    assert counts.min() > 850 and counts.max() < 1150


def test_lines_go_through_the_origin():
    p = 7
    line = {xy: n for xy, n in zip(rows(g.grid(p)), g.line_of(g.grid(p), p).tolist())}
    assert set(line.values()) == set(range(p + 1))
    for (x, y), (u, v) in itertools.combinations(line, 2):
        if (0, 0) not in ((x, y), (u, v)):
            assert (line[x, y] == line[u, v]) == any((c * x % p, c * y % p) == (u, v) for c in range(p))


@pytest.mark.parametrize("lines", [1, 2, 5])
def test_curriculum_keeps_each_sequence_to_few_lines(lines):
    p, inputs = 7, g.grid(7)[5:40]
    batch = g.training_batch(torch.tensor([(3, 1)]), inputs, 500, 12, p,
                             torch.Generator().manual_seed(0), lines)
    xy = batch.unflatten(1, (12, 3))[..., :2]
    assert set(rows(xy.flatten(0, 1))) == set(rows(inputs))                  # over sequences, all of them
    used = [set(g.line_of(sequence, p).tolist()) for sequence in xy]
    assert max(map(len, used)) == lines


def test_curriculum_grows_from_one_line_to_all():
    cfg = tiny(p=7, curriculum=600)
    assert [g.curriculum_lines(s, cfg) for s in (0, 199, 200, 400, 599, 600)] == [1, 1, 2, 4, 7, None]
    assert g.curriculum_lines(0, tiny(curriculum=0)) is None                 # the paper: none


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

def test_rotation_is_multiplication_by_a_unit_complex_number():
    cos, sin = g.rotary_tables(9, 8)
    x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    frequencies = torch.tensor([10_000 ** (-i / 4) for i in range(4)])
    turn = torch.polar(torch.ones(9, 4), torch.arange(9)[:, None] * frequencies)
    expected = torch.complex(x[..., :4], x[..., 4:]) * turn
    torch.testing.assert_close(g.rotate(x, cos, sin), torch.cat((expected.real, expected.imag), -1))


def test_rotary_scores_depend_on_distance_alone():
    cos, sin = g.rotary_tables(40, 8)
    gen = torch.Generator().manual_seed(0)
    q, k = torch.randn(8, generator=gen).expand(40, 8), torch.randn(8, generator=gen).expand(40, 8)
    scores = g.rotate(q, cos, sin) @ g.rotate(k, cos, sin).T
    for distance in range(-39, 40):
        line = scores.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), atol=1e-4, rtol=0)
    assert scores[0].std() > 0.1                                              # and depend on it they do


@pytest.mark.parametrize("at", [slice(None), slice(1, None, 3)])
def test_attention_equals_torchs_own(at):
    model, tokens = model_and_tokens()
    layer, x = model.blocks[0].attention, model.embedding(tokens)
    T, noted = x.size(1), {}
    ours = layer(x, tokens, (model.cos[:T], model.sin[:T]), model.future[:T, :T], at, noted.__setitem__)

    def heads(linear):
        return linear(x).view(len(x), T, 2, 8).transpose(1, 2)
    q, k = (g.rotate(heads(w), model.cos[:T], model.sin[:T]) for w in (layer.query, layer.key))
    theirs = F.scaled_dot_product_attention(q, k, heads(layer.value), is_causal=True)
    torch.testing.assert_close(ours, layer.out(theirs.transpose(1, 2).flatten(2))[:, at])
    torch.testing.assert_close(noted["heads"], theirs[:, :, at])
    torch.testing.assert_close(noted["attention"].sum(-1), torch.ones(noted["attention"].shape[:-1]))


@pytest.mark.parametrize("at", [slice(None), slice(1, None, 3)])
def test_one_row_a_residue_is_as_good_as_one_a_position(at):
    """The first block's shortcut: same output, same gradient of the embedding."""
    model, tokens = model_and_tokens()
    T, outs, grads = tokens.size(1), [], []
    for x in (model.embedding.weight, model.embedding(tokens)):
        outs.append(model.blocks[0].attention(x, tokens, (model.cos[:T], model.sin[:T]),
                                              model.future[:T, :T], at, lambda *_: None))
        grads.append(torch.autograd.grad(outs[-1].square().sum(), model.embedding.weight)[0])
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*grads)


def test_no_prediction_sees_its_answer_or_anything_later():
    model, tokens = model_and_tokens()
    before = model(tokens)
    for position in range(tokens.size(1)):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 7
        after = model(changed)
        for shot in range(before.size(1)):                       # predicted from positions 0 .. 3 shot + 1
            same = torch.equal(after[:, shot], before[:, shot])
            assert same == (position > 3 * shot + 1)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_last_block_shortcut_is_exact(depth):
    model, tokens = model_and_tokens(depth=depth)
    fast = model(tokens)
    fast.square().sum().backward()
    fast_grads = [w.grad.clone() for w in model.parameters()]
    model.zero_grad()
    full = model(tokens, everywhere=True)
    assert full.shape == (*tokens.shape, 7)
    full[:, 1::3].square().sum().backward()
    torch.testing.assert_close(fast, full[:, 1::3])
    for a, w in zip(fast_grads, model.parameters()):
        torch.testing.assert_close(a, w.grad, atol=1e-4, rtol=1e-4)


def test_the_record_is_what_the_model_computed_and_changes_nothing():
    model, tokens = model_and_tokens()
    record = {}
    logits = model(tokens, record, everywhere=True)
    assert torch.equal(logits, model(tokens, everywhere=True))
    B, T = tokens.shape
    shapes = {"attention": (B, 2, T, T), "heads": (B, 2, T, 8), "neurons": (B, T, 64), "residual": (B, T, 16)}
    for block in (0, 1):
        assert {n: record[f"{block}.{n}"].shape for n in shapes} == shapes
    # rebuild the residual stream from heads and neurons
    x = record["embedding"]
    for i, block in enumerate(model.blocks):
        x = x + record[f"{i}.heads"].transpose(1, 2).flatten(2) @ block.attention.out.weight.T
        x = x + record[f"{i}.neurons"] @ block.mlp.down.weight.T
        torch.testing.assert_close(x, record[f"{i}.residual"])
    torch.testing.assert_close(model.norm(x) @ model.embedding.weight.T, logits)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_benchmark_counts_what_torch_counts(depth):
    cfg = tiny(p=7, examples=6, depth=depth)
    tokens = random_tokens(7, 6, 16)
    with FlopCounterMode(display=False) as counted:
        g.z_loss(g.GPT(cfg), tokens).backward()
    assert bench.operations(cfg, 16) == counted.get_total_flops()


def test_the_benchmarks_variants_compute_the_same():
    model, _ = model_and_tokens()
    tokens = random_tokens(7, 5, 6)
    losses = [g.z_loss(model, tokens), bench.everywhere_loss(model, tokens)] + [
        g.z_loss(bench.with_class(model, old, new), tokens)
        for old, new in ((g.Attention, bench.FusedAttention), (g.Block, bench.EveryRow))]
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(4))


def test_initial_weights():
    torch.manual_seed(0)
    model = g.GPT(g.Config(p=29, depth=2))
    for name, w in model.named_parameters():
        if w.ndim == 2:
            expected = 0.02 / (math.sqrt(4) if "mlp.down" in name else 1)
            assert abs(w.std().item() / expected - 1) < 0.05, name
    # 2 blocks of 12 d^2, the embedding, and 5 LayerNorms: no biases, no separate read-out
    assert sum(w.numel() for w in model.parameters()) == 24 * 512 ** 2 + 29 * 512 + 5 * 2 * 512

# -------------------------------------------------------------------------------------------------
# Evaluation
# -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("p", [3, 5])
def test_oracles_against_enumeration_of_all_tasks(p):
    tokens = random_tokens(p, 4, 200, seed=1)
    tokens[0, :6] = torch.tensor([0, 0, 0, 0, 0, 0])             # the origin as example and as query
    ratio, regression = g.solvable(tokens, p)
    for b, sequence in enumerate(tokens.unflatten(1, (-1, 3)).tolist()):
        for t, (x, y, _) in enumerate(sequence):
            context = sequence[:t]
            answers = {(a * x + b_ * y) % p for a in range(p) for b_ in range(p)
                       if all((a * u + b_ * v) % p == w for u, v, w in context)}
            assert regression[b, t] == (len(answers) == 1)
            assert len(answers) in (1, p)                        # undetermined: anything goes
            assert ratio[b, t] == any((c * u % p, c * v % p) == (x, y)
                                      for u, v, _ in context for c in range(p))


def test_novel_queries_against_a_loop():
    tokens = random_tokens(3, 6, 50)
    for row, sequence in zip(g.novel_queries(tokens).tolist(), tokens.unflatten(1, (-1, 3)).tolist()):
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
    answers = torch.tensor([[answer(s, t) for t in range(6)] for s in tokens.unflatten(1, (-1, 3)).tolist()])
    batches = iter(answers.split(256))
    score = g.evaluate(lambda seen: one_hot(next(batches), p), tokens)
    oracle = g.oracle_accuracy(tokens, p)[0]
    torch.testing.assert_close(oracle, score + (1 - score) / p)  # the oracle guesses where it can't know
    assert 0.2 < score[1, -1] < score[0, -1] < 1                 # copying is easier than matching


def test_correct_answers_are_counted_in_integers():
    hits = torch.ones(70_000, 2, dtype=torch.bool)
    hits[0] = False                                              # bfloat16 or float16 would lose this one
    tokens = torch.zeros(70_000, 6, dtype=torch.long)
    tokens[:, 3] = 1
    assert g.accuracy(hits, tokens).tolist() == [[69_999 / 70_000] * 2] * 2


def test_no_novel_query_is_nan_and_not_good():
    tokens = torch.zeros(4, 6, dtype=torch.long)
    score = g.accuracy(torch.ones(4, 2, dtype=torch.bool), tokens)
    assert score[0].tolist() == [1, 1] and score[1, 0] == 1 and math.isnan(score[1, 1])
    assert not score[1, 1] >= g.PHASE_THRESHOLD


@pytest.mark.parametrize("good, name", [("1000", "in-distribution memorization"),
                                        ("1100", "in-distribution generalization"),
                                        ("1010", "o.o.d. memorization"), ("1111", "o.o.d. generalization"),
                                        ("1110", "none of the paper's")])
def test_phases_follow_the_papers_table(good, name):
    assert g.phase([c == "1" for c in good]) == name

# -------------------------------------------------------------------------------------------------
# Training
# -------------------------------------------------------------------------------------------------

def test_schedule_at_its_corners():
    f = [g.lr_factor(s, 10_000, 200_000) for s in (0, 5_000, 10_000, 105_000, 200_000)]
    assert f == pytest.approx([0.01, 0.505, 1, 0.55, 0.1])
    assert g.lr_factor(0, 0, 10) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_decay_groups(optimizer):
    cfg = tiny(optimizer=optimizer, wd=1.5, lr=0.03)
    model = g.GPT(cfg)
    optimizers = g.make_optimizers(model, cfg)
    names = {id(w): n for n, w in model.named_parameters()}
    groups = {names[id(w)]: (type(o).__name__, group["weight_decay"], group["lr"])
              for o in optimizers for group in o.param_groups for w in group["params"]}
    assert groups.keys() == set(names.values())
    for name, (kind, decay, lr) in groups.items():
        assert decay == (0 if "norm" in name else 1.5)
        matrix = "norm" not in name and name != "embedding.weight"
        assert kind == ("Muon" if matrix and optimizer == "muon" else "AdamW")
        assert lr == (g.MUON_ADAMW_LR if optimizer == "muon" and not matrix else 0.03)


def stop_at(curve, patience=3, chance=0.1):
    """Feed a curve point by point: (index kept, evaluations seen when it stopped or None)."""
    history = [{"val_ood_test": score} for score in curve]
    for n in range(1, len(curve) + 1):
        best, stop = g.early_stopping(history[:n], patience, chance)
        if stop:
            return best, n
    return best, None


def test_early_stopping_on_scripted_curves():
    plateau = [0.12, 0.1, 0.11] * 20
    assert stop_at(plateau + [0.5, 0.8, 0.9]) == (62, None)                  # the plateau ends no run
    assert stop_at(plateau + [0.5, 0.9, 0.8, 0.7, 0.6, 0.5]) == (61, 65)     # transience: 3 worse ones
    assert stop_at(plateau + [0.5, 0.9, 0.8, 0.7, 0.91]) == (64, None)       # a new best starts afresh
    assert stop_at(plateau) == (59, None)                                    # never rises: keeps the newest
    assert stop_at(plateau + [0.9] + [0.5] * 50, patience=0) == (60, None)   # 0: never stops


def run(argv, program=[str(ROOT / "grok_icl.py")], **kwargs):
    return subprocess.run([sys.executable, *program, *argv], capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=100, **kwargs)


def trained(cfg):
    run = g.start(cfg)
    g.claim_folder(run, cfg)
    return g.train(run, cfg)


def interrupted(cfg, step, monkeypatch):
    """Train, and get Ctrl-C within that step."""
    calls, batch = [], g.training_batch
    def interrupting(*args):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(*args)
    with monkeypatch.context() as patch:
        patch.setattr(g, "training_batch", interrupting)
        return trained(cfg)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_equals_an_uninterrupted_run_bit_for_bit(tmp_path, monkeypatch, optimizer):
    flags = ["--optimizer", optimizer]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained(tiny(optimizer=optimizer, out=str(whole)))

    assert interrupted(tiny(optimizer=optimizer, out=str(parts)), 6, monkeypatch) == 130
    for step in (6, 7, 8):                                       # then in pieces of a step, at 8 an evaluation
        assert torch.load(parts / "last.pt", weights_only=True)["step"] == step
        cfg, _, checkpoint = g.parse_config(["--resume", "--out", str(parts), "--max-minutes", "1e-9"])
        assert g.train(g.start(cfg, checkpoint), cfg) == 0
    cfg, _, checkpoint = g.parse_config(["--resume", "--out", str(parts), "--max-minutes", "0"])
    assert g.train(g.start(cfg, checkpoint), cfg) is None

    assert (whole / "metrics.csv").read_bytes() == (parts / "metrics.csv").read_bytes()
    for name in ("last.pt", "best.pt"):
        a, b = (torch.load(d / name, weights_only=True) for d in (whole, parts))
        assert a.pop("device") == b.pop("device") == "cpu"
        assert {**a.pop("config"), "out": ""} == {**b.pop("config"), "out": ""}
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_skips_steps_that_overflow_and_goes_on(tmp_path, monkeypatch, optimizer):
    """Also when stopped, and resumed, before the loss scale has come down and any step was taken. On a CPU."""
    real = g.mixed_precision
    def too_large(cfg, device):
        autocast, scaler = real(cfg, device)
        scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0 ** 22})
        return autocast, scaler
    monkeypatch.setattr(g, "mixed_precision", too_large)
    whole, parts = (tiny(optimizer=optimizer, amp="fp16", out=str(tmp_path / name)) for name in ("whole", "parts"))
    assert trained(whole) is None and interrupted(parts, 2, monkeypatch) == 130
    a, b = (g.load_checkpoint(f"{cfg.out}/last.pt") for cfg in (whole, parts))
    fresh = g.start(whole).model.state_dict()
    assert all(torch.equal(b["model"][name], w) for name, w in fresh.items())          # both steps were skipped
    assert not any(torch.equal(a["model"][name], w) for name, w in fresh.items() if w.ndim == 2)
    assert a["scaler"]["scale"] < b["scaler"]["scale"] == 2.0 ** 20
    assert g.train(g.start(parts, b), parts) is None
    b = g.load_checkpoint(f"{parts.out}/last.pt")
    assert a["history"] == b["history"] and all(torch.equal(a["model"][name], w) for name, w in b["model"].items())


def test_training_keeps_what_it_promises(tmp_path):
    """As a user would: train, read the files, run again, resume, interrupt."""
    out = tmp_path / "run"
    done = run([*TINY_FLAGS, "--batch", "15", "--out", str(out)])
    assert done.returncode == 0, done.stderr
    assert "--batch 15 becomes 16" in done.stdout and "Phase:" in done.stdout
    assert sorted(f.name for f in out.iterdir()) == ["best.pt", "config.json", "last.pt", "metrics.csv"]
    assert json.load(open(out / "config.json"))["tasks"] == 8
    with open(out / "metrics.csv") as f:
        metrics = list(csv.DictReader(f))
    assert [int(r["step"]) for r in metrics] == [4, 8, 12]
    assert all(0 <= float(r["val_ood_test"]) <= 1 for r in metrics)

    before = {f.name: f.read_bytes() for f in out.iterdir()}
    again = run([*TINY_FLAGS, "--out", str(out)])
    assert again.returncode == 2 and "--resume" in again.stderr
    differs = run(["--resume", "--out", str(out), "--lr", "0.5"])
    assert differs.returncode == 2 and "--lr 0.5 (saved: 0.01)" in differs.stderr
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    os.replace(out / "best.pt", tmp_path / "best.pt")            # the report will need it
    lost = run(["--resume", "--out", str(out)])
    assert lost.returncode == 2 and "best.pt" in lost.stderr and lost.stdout == ""     # before any work
    os.replace(tmp_path / "best.pt", out / "best.pt")
    same = run(["--resume", "--out", str(out)])                  # a finished run reports once more
    assert same.returncode == 0
    assert same.stdout[same.stdout.index("Best step"):] == done.stdout[done.stdout.index("Best step"):]


def one_error(stderr):
    """The program's last words, after its progress bar: one line, no traceback."""
    assert "Traceback" not in stderr
    return [line for line in stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    done = run([*TINY_FLAGS, "--lr", "1000", "--wd", "1000", "--out", str(tmp_path)])
    assert done.returncode == 1 and not (tmp_path / "best.pt").exists()
    assert len(one_error(done.stderr)) == 1 and "by step 4 the loss was nan" in done.stderr
    assert all(w.isfinite().all() for w in torch.load(tmp_path / "last.pt", weights_only=True)["model"].values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    """Not at an evaluation whose loss is still fine, and not when stopped by a signal."""
    cfg = tiny(out=str(tmp_path))
    batch, calls = g.training_batch, []
    for when in (4, 6):                                          # an evaluation; between two
        def breaking(*args):
            calls.append(1)
            if len(calls) == when:
                run.model.norm.weight.register_hook(lambda grad: grad * math.nan)
                os.kill(os.getpid(), signal.SIGINT)
            return batch(*args)
        monkeypatch.setattr(g, "training_batch", breaking)
        calls.clear()
        run = g.start(cfg)
        g.claim_folder(run, cfg)
        with pytest.raises(SystemExit, match=f"by step {when}"):
            g.train(run, cfg)
        for name in ("last.pt", "best.pt"):
            if (tmp_path / name).exists():
                checkpoint = torch.load(tmp_path / name, weights_only=True)
                assert checkpoint["step"] < when and checkpoint["model"]["norm.weight"].isfinite().all()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_full_disk_ends_the_run_and_leaves_the_files(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")                   # not on Windows
    interrupted(tiny(out=str(tmp_path)), 6, monkeypatch)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    full = run(["--resume", "--out", str(tmp_path)],
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    assert full.returncode == 1 and len(one_error(full.stderr)) == 1 and str(tmp_path) in full.stderr
    assert all((tmp_path / name).read_bytes() == before[name] for name in ("last.pt", "best.pt"))
    assert not list(tmp_path.glob("*.tmp"))                      # the disk is full enough
    assert run(["--resume", "--out", str(tmp_path)]).returncode == 0


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_resume(tmp_path, number, code):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, str(ROOT / "grok_icl.py"), *TINY_FLAGS, "--steps", "100000",
                                "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    deadline = time.time() + 60
    while not (out / "metrics.csv").exists() and time.time() < deadline:
        time.sleep(0.1)
    for _ in range(16):                                          # passed on by a launcher too: still the same one
        process.send_signal(number)
        time.sleep(0.05)
    stdout = process.communicate(timeout=60)[0]
    assert process.returncode == code and f"--resume --out {out}" in stdout
    assert "Finishing this step" in stdout                       # not torn out of the middle of one
    assert torch.load(out / "last.pt", weights_only=True)["step"] > 0


def test_a_second_signal_stops_at_once_unless_it_is_the_same_one(monkeypatch):
    left, now = [], [100.0]
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(g.time, "monotonic", lambda: now[0])
    with g.stop_signals() as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        now[0] += 0.5                                             # torchrun passes it on
        os.kill(os.getpid(), signal.SIGTERM)
        assert not left and [number for number, _ in caught] == [signal.SIGTERM] * 2
        now[0] += 2
        os.kill(os.getpid(), signal.SIGINT)
        assert left == [130]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks")
def test_a_killed_run_is_resumed_as_if_nothing_had_been():
    done = run(["--kills", "4"], program=[str(ROOT / "tests" / "kill.py")])
    assert done.returncode == 0 and "4 kills" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("resumed", [False, True])
def test_two_processes_follow_one(tmp_path, monkeypatch, resumed):
    """Under torchrun, from the start and from the middle of a run that one process began."""
    one, two = tmp_path / "one", tmp_path / "two"
    trained(tiny(out=str(one)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "grok_icl.py")]
    argv = [*TINY_FLAGS, "--out", str(two)]
    if resumed:
        interrupted(tiny(out=str(two)), 5, monkeypatch)
        argv = ["--resume", "--out", str(two)]
        piece = run([*argv, "--max-minutes", "1e-9"], program=torchrun)
        assert piece.returncode == 0 and piece.stdout.count("To go on") == 1, piece.stderr
        assert torch.load(two / "last.pt", weights_only=True)["step"] == 6      # both left after one more step
        argv += ["--max-minutes", "0"]
    done = run(argv, program=torchrun)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Phase:") == 1                      # one of them talks
    rows = [list(csv.DictReader(open(folder / "metrics.csv"))) for folder in (one, two)]
    assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]] == ["4", "8", "12"]
    assert [float(r["loss"]) for r in rows[0]] == pytest.approx([float(r["loss"]) for r in rows[1]], rel=1e-5)
    weights = [torch.load(folder / "last.pt", weights_only=True)["model"] for folder in (one, two)]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)
    assert sorted(f.name for f in two.iterdir()) == ["best.pt", "config.json", "last.pt", "metrics.csv"]


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch, capsys):
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", "0"), ("WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        g.parse_config(TINY_FLAGS)
    assert stop.value.code == 2 and "--batch 16" in (err := capsys.readouterr().err) and "3 processes" in err

# -------------------------------------------------------------------------------------------------
# Bad input: one line that names the flag and what would do, exit code 2, nothing touched
# -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, words", [
    (["--tasks", "510"], ["--tasks 510", "multiple of 4"]),
    (["--tasks", "841"], ["--tasks 841", "839"]),
    (["--tasks", "0"], ["--tasks 0"]),
    (["--tasks", "-4"], ["--tasks -4"]),
    (["--tasks", "840", "--batch", "2000"], ["--tasks 840"]),
    (["--tasks", "836", "--batch", "2000"], ["--tasks 836", "--task-choice random"]),
    (["--p", "15"], ["--p 15", "prime"]),
    (["--p", "2"], ["--p 2", "prime"]),
    (["--p", "-7"], ["--p -7", "prime"]),
    (["--p", "seven"], ["--p", "seven", "int"]),
    (["--alpha", "0"], ["--alpha 0"]),
    (["--alpha", "1"], ["--alpha 1"]),
    (["--alpha", "nan"], ["--alpha nan"]),
    (["--p", "3", "--tasks", "4", "--alpha", "0.1"], ["--alpha 0.1", "at least 2"]),
    (["--p", "3", "--tasks", "4", "--alpha", "0.9"], ["--alpha 0.9", "at least 2"]),
    (["--examples", "1"], ["--examples 1"]),
    (["--heads", "3"], ["--embd 512", "multiple of 6"]),
    (["--heads", "0"], ["--heads 0"]),
    (["--embd", "0"], ["--embd 0", "from 2"]),
    (["--alpha", "1e308"], ["--alpha 1e+308"]),
    (["--p", "1" + 200 * "0"], ["--p 1000"]),
    (["--steps", "1" + 400 * "0"], ["--steps 1000"]),
    (["--examples", "100000"], ["--examples 100000", "512"]),
    (["--curriculum", "300000"], ["--curriculum 300000", "200000"]),
    (["--out", ""], ["--out"]),
    (["--device", "meta"], ["--device meta", "cpu"]),
    (["--embd", "12"], ["--embd 12", "even"]),
    (["--depth", "0"], ["--depth 0"]),
    (["--batch", "511"], ["--batch 511", "--tasks (512)"]),
    (["--steps", "10000"], ["--steps 10000", "--warmup"]),
    (["--warmup", "-1"], ["--warmup -1"]),
    (["--lr", "0"], ["--lr 0"]),
    (["--lr", "inf"], ["--lr inf"]),
    (["--wd", "-0.1"], ["--wd -0.1"]),
    (["--init-std", "0"], ["--init-std 0"]),
    (["--curriculum", "-1"], ["--curriculum -1"]),
    (["--seed", "-1"], ["--seed -1"]),
    (["--eval-every", "0"], ["--eval-every 0"]),
    (["--patience", "-1"], ["--patience -1"]),
    (["--device", "cuda:99"], ["--device cuda:99", "cpu"]),
    (["--device", "gpu"], ["--device gpu", "cpu"]),
    (["--amp", "fp16", "--device", "cpu"], ["--amp fp16"]),
    (["--amp", "fp8"], ["--amp", "fp8", "bf16"]),
    (["--optimizer", "sgd"], ["--optimizer", "sgd", "muon"]),
    (["--preset", "desktop"], ["--preset", "desktop", "laptop"]),
    (["--task", "512"], ["--task"]),
    (["--resume"], ["last.pt"]),
])
def test_bad_input_is_refused_in_one_line(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["grok_icl.py", *argv])
    with pytest.raises(SystemExit) as stop:
        g.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and all(w in err for w in words), err
    assert not list(tmp_path.iterdir())


NUMBERS = [f.name for f in dataclasses.fields(g.Config) if f.type in (int, float)]
WORDS = ["task_choice", "optimizer", "device", "amp", "compile", "preset"]


@pytest.mark.parametrize("flag, value", [
    *((flag, value) for flag in NUMBERS for value in ("", "seven", "½", "-1", "nan", "9" * 400)),
    *((flag, value) for flag in WORDS for value in ("", "½", "-1"))])
def test_every_flag_refuses_what_it_cannot_be(flag, value, tmp_path, monkeypatch, capsys):
    """Wrong type, empty, unicode, negative, huge: one line that names flag and value, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    flag = "--" + flag.replace("_", "-")
    monkeypatch.setattr(sys, "argv", ["grok_icl.py", f"{flag}={value}"])
    with pytest.raises(SystemExit) as stop:
        g.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and flag in err and not list(tmp_path.iterdir())
    assert value in err or flag != "--device" and float(value) == math.inf and "inf" in err


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def put(*path, value):
    """A change to a checkpoint: the entry at the path becomes value, or goes where value is None."""
    def change(checkpoint):
        *parents, last = path
        for key in parents:
            checkpoint = checkpoint[key]
        if value is None:
            del checkpoint[last]
        else:
            checkpoint[last] = value
    return change


NAN, LONG = torch.full((16,), math.nan), torch.zeros(3, 2, dtype=torch.long)
MOMENT = ("optimizers", 0, "state", 0, "exp_avg")
MUTATIONS = {
    "no config": put("config", value=None), "config of another kind": put("config", value=[1]),
    "a field too few": put("config", "lr", value=None), "a field too many": put("config", "dropout", value=0.1),
    "a field of another type": put("config", "p", value="5"), "p not prime": put("config", "p", value=9),
    "other width": put("config", "embd", value=32), "other depth": put("config", "depth", value=3),
    "heads that do not fit": put("config", "heads", value=3), "fewer steps than were done": put("config", "steps", value=3),
    "no model": put("model", value=None), "no weight": put("model", "norm.weight", value=None),
    "a weight too many": put("model", "norm.scale", value=torch.ones(16)),
    "weight of another shape": put("model", "norm.weight", value=torch.ones(8)),
    "weights that are no numbers": put("model", "norm.weight", value=NAN),
    "a list for a weight": put("model", "norm.weight", value=[1.0] * 16),
    "integer weights": put("model", "norm.weight", value=torch.ones(16, dtype=torch.long)),
    "no split": put("split", value=None), "half a split": put("split", "val_ood", value=None),
    "an empty set": put("split", "test_ood", value=LONG[:0]), "residues above p": put("split", "id", value=LONG + 5),
    "residues below 0": put("split", "id", value=LONG - 1), "floats for residues": put("split", "id", value=LONG.float()),
    "triples": put("split", "id", value=torch.zeros(3, 3, dtype=torch.long)), "text for a split": put("split", value="id"),
    "no step": put("step", value=None), "step below 0": put("step", value=-1), "step beyond the end": put("step", value=13),
    "text for a step": put("step", value="6"), "history of another kind": put("history", value="abc"),
    "rows too short": put("history", value=[{"step": 5}]), "text in a row": put("history", 0, "loss", value="low"),
    "no history": put("history", value=None), "no loss": put("loss_sum", value=None),
    "loss of another shape": put("loss_sum", value=torch.ones(3)), "text for a count": put("loss_steps", value="two"),
    "a test task that was trained on": lambda c: c["split"]["test_ood"][0].copy_(c["split"]["id"][0]),
    "a test input that was trained on": lambda c: c["split"]["train_inputs"][0].copy_(c["split"]["test_inputs"][0]),
    "fewer tasks than --tasks": lambda c: c["split"].update(id=c["split"]["id"][:4], val_ood=torch.cat(
        (c["split"]["id"][4:], c["split"]["val_ood"]))),
    "columns in another order": lambda c: c["history"].append(dict(reversed(c["history"].pop().items()))),
    "a moment of another shape": put(*MOMENT, value=torch.zeros(3)), "text for a moment": put(*MOMENT, value="x"),
    "moments that are no numbers": lambda c: c["optimizers"][0]["state"][0]["exp_avg"].fill_(math.nan),
    "sparse moments": lambda c: c["optimizers"][0]["state"][0].update(exp_avg=torch.zeros(5, 16).to_sparse()),
    "rows that go back": lambda c: c["history"].append(c["history"][0]),
    "rows beyond the step": put("history", 0, "step", value=8),
    "a moment too few": put(*MOMENT, value=None), "no moments": put("optimizers", 0, "state", value={}),
    "no optimizers": put("optimizers", value=None), "an optimizer too few": put("optimizers", value=[]),
    "no generator": put("generator", value=None), "half a generator": put("generator", value=torch.zeros(5, dtype=torch.uint8)),
    "code": put("config", value=Exploit()), "code in the history": put("history", value=[Exploit()]),
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
        Path("last.pt").write_bytes({"empty": b"", "text": b"not a checkpoint", "truncated": last[:2000]}[kind])
    monkeypatch.setattr(sys, "argv", ["grok_icl.py", "--resume", "--out", "."])
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as stop:
        g.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "last.pt" in err
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_moments_that_share_one_number_get_memory_of_their_own(half_a_run):
    """torch.save keeps such views, and a fused optimizer writes past their end."""
    checkpoint = torch.load(io.BytesIO(half_a_run[0]), weights_only=True)
    moments = checkpoint["optimizers"][0]["state"][0]
    moments["exp_avg"] = torch.zeros(1).expand(moments["exp_avg"].shape)
    run = g.start(g.Config(**checkpoint["config"]), checkpoint)
    assert all(m.is_contiguous() for o in run.optimizers for state in o.state.values() for m in state.values())


def test_a_folder_with_somebody_elses_config_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        g.parse_config([*TINY_FLAGS, "--out", str(tmp_path)])
    assert stop.value.code == 2 and (tmp_path / "config.json").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    done = run([*TINY_FLAGS, "--out", str(tmp_path / "file" / "run")])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--out" in done.stderr
    assert (tmp_path / "file").read_text() == "mine"
