"""
How fast is a training step, and what are its parts worth?

    python tests/bench.py                                       the default, all lines, all examples
    python tests/bench.py --preset paper --tasks 64 --batch 64  the paper's model on a CPU
    python tests/bench.py --preset paper --tasks 64 --batch 64 --authors DIR
    python tests/bench.py --run out/quick                       the operations of a whole run

Takes the flags of grok_icl.py and trains some steps past the lessons, without writing. Variants
take turns, step by step, so that a busy machine is busy for all. Run by hand, not by pytest. DIR is
a copy of the authors' code (see authors.py).
"""
import argparse
import copy
import dataclasses
import os
import statistics
import sys
import tempfile
import time

import torch
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..")]
import authors  # noqa: E402
import grok_icl as g  # noqa: E402


def operations(cfg, batch, k, everywhere=False):
    """Floating-point operations of the matrix products in a step on batch sequences of k examples.

    Forward, for each position: keys and values, 4 C^2; where it asks (in the last block at y alone,
    unless everywhere) queries, output, MLP, 20 C^2, and attention, 4 T C; 2 C p for each logit
    vector. Backward: twice that."""
    C, T = cfg.embd, 3 * k - 1
    N, Q = batch * T, batch * (T if everywhere else k)
    asking = (cfg.depth - 1) * N + Q
    return 3 * (cfg.depth * N * 4 * C * C + asking * (20 * C * C + 4 * T * C) + 2 * C * cfg.p * Q)


def operations_of_run(folder):
    """Those of all training steps of a run, lesson by lesson, with reviews at every other step."""
    checkpoint, cfg, _ = g.load_checkpoint(os.path.join(folder, "last.pt"))
    course, total, first = g.lessons(cfg), 0, 0
    for lesson, last in zip(course, [*checkpoint["learned"], checkpoint["step"]]):
        for step in range(first, last):
            today = g.todays_lesson(lesson, step)
            total += operations(cfg, *g.batch_shape(today, cfg), today.score_y)
        first = last
    return total


class FusedAttention(g.Attention):
    """The same with torch's fused kernel in place of q.k, mask, softmax and weighted sum."""

    def forward(self, x, cos, sin, asking):
        T = x.size(1)
        q, k, v = (linear(inputs).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for linear, inputs in ((self.query, x[:, asking]), (self.key, x),
                                          (self.value, x)))
        q = g.rotate(q, cos[asking], sin[asking]).to(v.dtype)
        k = g.rotate(k, cos, sin).to(v.dtype)
        past = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()[asking]
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=past)
        return self.out(heads.transpose(1, 2).flatten(2))


def with_fused_attention(model):
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.attention.__class__ = FusedAttention
    return model


def z_loss(model, tokens):
    return g.training_loss(model, tokens)[0]


def everywhere_loss(model, tokens):
    """The same with the last block computed at all positions."""
    logits = model(tokens[:, :-1], g.EVERY_TOKEN)[:, 1::3]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 2::3].flatten())


class Stepper:
    """A run of its own that trains step by step."""

    def __init__(self, cfg, change=lambda model: model, loss=z_loss, compiled=False, autocast=True):
        self.cfg, self.run, self.loss = cfg, g.make_run(cfg), loss
        self.device = self.run.device
        self.run.model = change(self.run.model)
        self.run.optimizers = g.make_optimizers(self.run.model, cfg)
        self.model = torch.compile(self.run.model) if compiled else self.run.model
        off = torch.autocast(self.device.type, enabled=False)
        self.autocast = self.run.autocast if autocast else off
        self.split = {name: pairs.to(self.device) for name, pairs in self.run.split.items()}
        self.line = g.line_of(self.split["train_inputs"], cfg.p)

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(self):
        run = self.run
        batch = g.training_batch(self.split, self.line, g.lessons(self.cfg)[-1], self.cfg,
                                 run.generator)
        with self.autocast:
            loss = self.loss(self.model, batch)
        g.update_weights(run, loss, 1)

    def several(self, n):
        """Seconds a step over n steps."""
        begin = self.now()
        for _ in range(n):
            self.step()
        return (self.now() - begin) / n


def spread(values):
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def against_authors(folder, cfg, ours, rounds, block):
    """Seconds a step of the authors' loop and of ours, in turn: two lists. Theirs asks our iterator
    for each batch; there we time its last step, run our own, and time its loader's next batch."""
    steps = block * (rounds + 2)
    _, loader, _, _, train = authors.setup(folder, dataclasses.replace(cfg, steps=steps, warmup=1))
    times = [], []

    def in_turn():
        batches, spent, begin = iter(loader), 0, None
        for n in range(steps + 1):
            if begin:
                spent += ours.now() - begin                   # their step
            if n and n % block == 0:
                times[0].append(spent / block)
                times[1].append(ours.several(block))
                spent = 0
            begin = ours.now()
            batch = next(batches)
            spent += ours.now() - begin                       # their batch
            begin = ours.now()
            yield batch
    train(in_turn())
    return times[0][1:], times[1][1:]                         # the first block warms up


def main():
    parser = argparse.ArgumentParser(description="Has grok_icl.py's flags too.", allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=10, help="turns of each variant [10]")
    parser.add_argument("--authors", metavar="DIR", help="the authors' code, to run beside ours")
    parser.add_argument("--run", metavar="DIR", help="only print the operations of that run")
    own, rest = parser.parse_known_args()
    if own.run:
        return print(f"{own.run}: {operations_of_run(own.run):.2e} operations")
    cfg, _ = g.parse_config([*rest, "--out", os.path.join(tempfile.gettempdir(), "never made")])
    on_gpu = g.pick_device(cfg.device).type == "cuda"
    compiled = cfg.compile
    block, batch = 20 if on_gpu else 1, cfg.batch
    steppers = {"as trained": Stepper(cfg, compiled=compiled),
                "last block everywhere": Stepper(cfg, loss=everywhere_loss, compiled=compiled),
                "fused attention": Stepper(cfg, with_fused_attention, compiled=compiled),
                "no autocast": Stepper(cfg, autocast=False, compiled=compiled)}
    if compiled:
        steppers["not compiled"] = Stepper(cfg)
    print(f"{steppers['as trained'].device}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads; p {cfg.p}, {cfg.tasks} tasks, depth {cfg.depth}, "
          f"width {cfg.embd}, batch {batch}, {cfg.optimizer}", flush=True)
    for stepper in steppers.values():
        stepper.several(2 * block)                            # warm-up and compilation
    seconds = {name: [] for name in steppers}
    for _ in range(own.rounds):
        for name, stepper in steppers.items():
            seconds[name].append(stepper.several(block))
    trained = seconds.pop("as trained")
    print(f"step, {cfg.examples} examples: {spread([1e3 * s for s in trained])} ms, "
          f"{operations(cfg, batch, cfg.examples) / statistics.median(trained) / 1e9:,.0f} GFLOP/s")
    each = {lesson.name: operations(cfg, *g.batch_shape(lesson, cfg), lesson.score_y)
            for lesson in g.lessons(cfg)}
    print("operations of a step: " + ", ".join(f"{n:.3g} ({name})" for name, n in each.items()))
    print("time of a step, as a multiple of the step as trained: median (lowest to highest)")
    for name, values in seconds.items():
        print(f"  {name:30} {spread([v / t for v, t in zip(values, trained)])}")
    if own.authors:
        theirs, ours = against_authors(own.authors, cfg, steppers["as trained"], own.rounds, block)
        print(f"  {'the authors code':30} {spread([a / b for a, b in zip(theirs, ours)])}")


if __name__ == "__main__":
    main()
