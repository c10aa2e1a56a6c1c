"""
How fast is a training step, and how far is it from what the machine can do?

    python tests/bench.py                                       the default, all lines, all examples
    python tests/bench.py --preset paper --tasks 64 --batch 64  the paper's model on a CPU
    python tests/bench.py --preset paper --tasks 64 --batch 64 --authors DIR

Takes the flags of grok_icl.py and trains for some steps, at the peak rate and past the curriculum,
without writing anything. Variants take turns, step by step, within one run, so that a busy machine
is busy for all of them; each has the median, lowest and highest of its ratios to the step as
trained. Run by hand; pytest does not collect it.

DIR is a copy of https://github.com/ablghtianyi/ICL_Modular_Arithmetic (needs pandas, schedulefree
and rotary_embedding_torch): its data loader, model, loss and metrics run in its own training loop.
"""
import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import grok_icl as g  # noqa: E402


def operations(cfg, batch, k):
    """
    Floating-point operations of the matrix products in a training step on batch sequences of k examples.

    Forward, with N = batch (3k - 1) positions of which Q = batch k predict a z, length T = 3k - 1, width
    C, a multiplication and an addition counted as two; in the last block only Q positions ask:

        keys, values              4 C^2 for each of N positions
        queries, output, MLP      20 C^2 for each position that asks
        attention                 4 T C for each position that asks: q.k and the weighted sum
        logits                    2 C p for each z

    The backward pass is twice that. Not counted: LayerNorm, softmax, rotation, and the optimizer.
    """
    C, T = cfg.embd, 3 * k - 1
    N, Q = batch * T, batch * k
    asking = (cfg.depth - 1) * N + Q
    return 3 * (cfg.depth * N * 4 * C * C + asking * (20 * C * C + 4 * T * C) + 2 * C * cfg.p * Q)

# -------------------------------------------------------------------------------------------------
# Variants
# -------------------------------------------------------------------------------------------------

class FusedAttention(g.Attention):
    """The same with torch's fused kernel in place of q.k, mask, softmax and weighted sum."""

    def forward(self, x, at=slice(None)):
        T = x.size(1)
        q, k, v = (linear(inputs).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for linear, inputs in ((self.query, x[:, at]), (self.key, x), (self.value, x)))
        q = g.rotate(q, self.cos[:T][at], self.sin[:T][at]).to(v.dtype)
        k = g.rotate(k, self.cos[:T], self.sin[:T]).to(v.dtype)
        mask = self.future[:T, :T][at].to(v.dtype)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(heads.transpose(1, 2).flatten(2))


def with_fused_attention(model):
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.attention.__class__ = FusedAttention
    return model


def z_loss(model, tokens):
    """The loss of train(): mean cross-entropy of the z tokens."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 2::3].flatten())


def everywhere_loss(model, tokens):
    """The same with the last block computed at all positions."""
    logits = model(tokens[:, :-1], everywhere=True)[:, 1::3]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 2::3].flatten())


class Stepper:
    """A run of its own that trains step by step."""

    def __init__(self, cfg, change=lambda model: model, loss=z_loss, compiled=False, autocast=True):
        self.cfg, self.run, self.loss = cfg, g.start(cfg), loss
        self.device = self.run.device
        self.run.model = change(self.run.model)
        self.run.optimizers = g.make_optimizers(self.run.model, cfg)
        self.model = torch.compile(self.run.model) if compiled else self.run.model
        self.autocast = self.run.autocast if autocast else nullcontext()
        self.split = {name: pairs.to(self.device) for name, pairs in self.run.split.items()}
        self.line = g.line_of(self.split["train_inputs"], cfg.p)

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def batch(self):
        return g.training_batch(self.split, self.line, self.cfg, self.cfg.p + 1, self.run.generator)

    def step(self):
        run, batch = self.run, self.batch()
        with self.autocast:
            loss = self.loss(self.model, batch)
        run.scaler.scale(loss).backward()
        for optimizer in run.optimizers:
            run.scaler.step(optimizer)
            optimizer.zero_grad()
        run.scaler.update()

    def several(self, n):
        """Seconds a step over n steps."""
        begin = self.now()
        for _ in range(n):
            self.step()
        return (self.now() - begin) / n


def product_rate(stepper):
    """Operations a second of a large square matrix product, in the type that training uses."""
    n = 8192 if stepper.device.type == "cuda" else 2048
    a, b, best = torch.randn(n, n, device=stepper.device), torch.randn(n, n, device=stepper.device), 0
    with stepper.autocast:
        dtype = (a[:8, :8] @ b[:8, :8]).dtype
    a, b = a.to(dtype), b.to(dtype)
    for _ in range(6):                                # the first one warms up
        begin = stepper.now()
        a @ b
        best = max(best, 2 * n ** 3 / (stepper.now() - begin))
    return best


def spread(values):
    return f"{statistics.median(values):6.2f} ({min(values):.2f} to {max(values):.2f})"

# -------------------------------------------------------------------------------------------------
# The authors' code
# -------------------------------------------------------------------------------------------------

def against_authors(folder, cfg, ours, rounds, block):
    """
    Seconds a step of the authors' training loop and of ours, taken in turn: two lists.

    Their loop asks our iterator for each batch. There we time what it did since the last one, run our
    own steps, and then time their loader making the next batch.
    """
    sys.path[:0] = [folder, os.path.join(folder, "pre_training")]
    sys.argv, argv = sys.argv[:1], sys.argv
    import icl_grokking as theirs
    from _src import task_utils, train_utils
    sys.argv = argv
    device = ours.device.type
    flags = dict(device=device, mixed_precision=device == "cuda", n_layer=cfg.depth, n_embd=cfg.embd,
                 n_head=cfg.heads, p=cfg.p, base=cfg.p, n_tasks_pl=cfg.tasks // 4, n_point_per_row=cfg.examples,
                 data_pct=100 * cfg.alpha, bs=cfg.per_task * cfg.tasks, lr=cfg.lr, wd=cfg.wd, n_val_step=0,
                 n_ckpts=0, steps=block * (rounds + 2), warmup_steps=1)
    args = theirs.parser.parse_args([str(word) for name, value in flags.items() for word in (f"--{name}", value)])
    args.dtype = torch.bfloat16 if args.mixed_precision else torch.float32
    args.ngpu_per_node = 1
    args.tasks = task_utils.parallelogram_tasks_with_shared_components(
        task_utils.generate_all_unique_sublists(args, args.n_tasks_pl), args)
    args.n_tasks, args.n_ood_tasks, args.ood_bs = len(args.tasks), 8, 8
    data, _, tokenizer = theirs.prepare_data(args, args.tasks)
    args.vocab_size, args.max_digits, args.dim = len(tokenizer), tokenizer.max_digits, 3 * tokenizer.max_digits
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo",      # their sampler asks for one
                                         store=torch.distributed.HashStore(), rank=0, world_size=1)
    loader, sampler = theirs.get_train_dataloader(data.view(args.n_tasks, len(data) // args.n_tasks, -1), args.bs, args)
    model = theirs.RoPETransformer(theirs.RoPEFlashAttention, args).to(device)
    times = [], []

    def in_turn():
        batches, spent, begin = iter(loader), 0, None
        for n in range(args.steps + 1):
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
    scaler = theirs.GradScaler(enabled=args.mixed_precision)
    with tempfile.TemporaryDirectory() as temporary:
        train_utils.train_tf_icl(torch.compile(model) if device == "cuda" else model, model, in_turn(), [], [], [], None,
                                 scaler, args, torch.device(device), data_prefix=os.path.join(temporary, "x"))
    return times[0][1:], times[1][1:]                         # the first block warms up


def main():
    parser = argparse.ArgumentParser(description="Time a training step; takes the flags of grok_icl.py too.",
                                     allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=10, help="how often each variant takes its turn [10]")
    parser.add_argument("--authors", metavar="DIR", help="a copy of the authors' code, to run beside ours")
    own, rest = parser.parse_known_args()
    try:
        cfg, _ = g.parse_config([*rest, "--out", os.path.join(tempfile.mkdtemp(), "run")])
    except ValueError as e:
        sys.exit(f"error: {e}")
    on_gpu = g.pick_device(cfg.device).type == "cuda"
    compiled = cfg.compile == "on" or cfg.compile == "auto" and on_gpu
    block, batch = 20 if on_gpu else 1, cfg.per_task * cfg.tasks
    trained = Stepper(cfg, compiled=compiled)
    variants = {"last block at every position": dict(loss=everywhere_loss),
                "fused attention": dict(change=with_fused_attention),
                "no autocast": dict(autocast=False)}
    if compiled:
        variants["not compiled"] = dict(compiled=False)
    variants = {name: Stepper(cfg, **{"compiled": compiled, **change}) for name, change in variants.items()}
    print(f"{trained.device}, torch {torch.__version__}, {torch.get_num_threads()} threads; p {cfg.p}, {cfg.tasks} tasks, "
          f"depth {cfg.depth}, width {cfg.embd}, {cfg.examples} examples, batch {batch}, {cfg.optimizer}", flush=True)
    for stepper in (trained, *variants.values()):
        stepper.several(2 * block)                            # warm-up and compilation
    seconds, rates, ratios = [], [], {name: [] for name in variants}
    for _ in range(own.rounds):
        seconds.append(trained.several(block))
        for name, stepper in variants.items():
            ratios[name].append(stepper.several(block) / seconds[-1])
        rates.append(product_rate(trained))
    second, rate = statistics.median(seconds), statistics.median(rates)
    print(f"step                {1e3 * second:8,.1f} ms ({1e3 * min(seconds):,.1f} to {1e3 * max(seconds):,.1f})")
    for k in sorted({min(cfg.examples, k) for k in (8, 16, 32)}):
        print(f"operations a step   {operations(cfg, batch, k):8.3g} with {k} examples")
    done = operations(cfg, batch, cfg.examples)
    print(f"achieved            {done / second / 1e9:8,.0f} GFLOP/s, {done / second / rate:.0%} of a large matrix product "
          f"({rate / 1e9:,.0f})\n\ntime of a step, as a multiple of the step as trained: median (lowest to highest)")
    for name, values in ratios.items():
        print(f"  {name:30} {spread(values)}")
    if own.authors:
        theirs, ours = against_authors(own.authors, cfg, trained, own.rounds, block)
        print(f"authors' step {1e3 * statistics.median(theirs):,.1f} ms, ours {1e3 * statistics.median(ours):,.1f} ms, "
              f"ratio {spread([a / b for a, b in zip(theirs, ours)])}")


if __name__ == "__main__":
    main()
