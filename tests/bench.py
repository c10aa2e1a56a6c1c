"""
How fast is a training step, where does its time go, and how far is it from what the machine can do?

    python tests/bench.py --preset laptop
    python tests/bench.py --tasks 64 --batch 64                 the paper's model on a CPU
    python tests/bench.py --tasks 64 --batch 64 --authors DIR   and against the authors' code

Takes the flags of grok_icl.py and trains for some steps (peak rate, no curriculum) without writing anything. Variants take turns,
step by step, within one run, so that a busy machine is busy for all of them; each has the median, lowest
and highest of its ratios to the step as trained. Run by hand; pytest does not collect it.

DIR is a copy of https://github.com/ablghtianyi/ICL_Modular_Arithmetic (needs pandas, schedulefree and
rotary_embedding_torch): its data loader, model, loss and metrics run in its own training loop.
"""
import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import grok_icl as g  # noqa: E402


def operations(cfg, batch):
    """
    Floating-point operations of the matrix products in one training step on batch sequences.

    Forward, with N = batch (3k - 1) positions of which Q = batch k predict a z, length T = 3k - 1,
    width C and p residues, a multiplication and an addition counted as two:

        queries, keys, values     6 C^2 a row: N rows, but p in the first block, and Q queries in the last
        attention                 4 T C for each position that asks: q.k and the weighted sum
        its output and the MLP    2 C^2 + 16 C^2 for each position that asks
        logits                    2 C p for each z

    where N positions ask in all blocks but the last, and Q there. The backward pass is twice that. Not
    counted: LayerNorm, softmax, rotation, and the optimizer (Muon's own products among them).
    """
    k, p, C = cfg.examples, cfg.p, cfg.embd
    T = 3 * k - 1
    N, Q, total = batch * T, batch * k, 0
    for i in range(cfg.depth):
        ask = Q if i == cfg.depth - 1 else N
        rows, asking = (N, ask) if i else (p, p)
        total += 4 * C * C * rows + 2 * C * C * asking + (4 * T * C + 18 * C * C) * ask
    return 3 * (total + 2 * C * p * Q)


# -------------------------------------------------------------------------------------------------
# Variants of the model
# -------------------------------------------------------------------------------------------------

class FusedAttention(g.Attention):
    """The same with torch's fused kernel in place of q.k, mask, softmax and weighted sum."""

    def forward(self, rows, tokens, rotary, future, at, note):
        cos, sin = rotary
        v = self.project(self.value, rows, tokens)
        q = g.rotate(self.project(self.query, rows, tokens, at), cos[at], sin[at]).to(v.dtype)
        k = g.rotate(self.project(self.key, rows, tokens), cos, sin).to(v.dtype)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=future[at].to(v.dtype))
        return self.out(heads.transpose(1, 2).flatten(2))


class EveryRow(g.Block):
    """The first block projects every position, as the others do."""

    def forward(self, x, rows, *rest):
        return super().forward(x, x, *rest)


def with_class(model, old, new):
    """A copy of the model in which the modules of class old are of class new."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is old:
            module.__class__ = new
    return model


def everywhere_loss(model, tokens):
    """z_loss with the last block computed at all positions."""
    logits = model(tokens[:, :-1], everywhere=True)[:, 1::3]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 2::3].flatten())

# -------------------------------------------------------------------------------------------------
# One step, and its parts
# -------------------------------------------------------------------------------------------------

class Stepper:
    """A run of its own that trains step by step: `part` times each part of the step."""

    def __init__(self, cfg, change=lambda model: model, loss=g.z_loss, compiled=False, autocast=True):
        self.cfg, self.run, self.loss = cfg, g.start(cfg), loss
        self.device, self.seconds = self.run.device, {}
        self.run.model = change(self.run.model)
        self.run.optimizers = g.make_optimizers(self.run.model, cfg)
        self.model = torch.compile(self.run.model) if compiled else self.run.model
        self.autocast = self.run.autocast if autocast else nullcontext()
        self.tasks, self.inputs = (self.run.split[k].to(self.device) for k in ("id", "train_inputs"))

    def part(self, name, work, timed):
        if not timed:
            return work()
        begin = self.now()
        result = work()
        self.seconds.setdefault(name, []).append(self.now() - begin)
        return result

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def batch(self):
        return g.training_batch(self.tasks, self.inputs, self.cfg.per_task, self.cfg.examples, self.cfg.p, self.run.generator)

    def step(self, timed=False):
        run = self.run
        def forward():
            with self.autocast:
                return self.loss(self.model, batch)
        def update():
            for optimizer in run.optimizers:
                run.scaler.step(optimizer)
                optimizer.zero_grad()
            run.scaler.update()
        batch = self.part("batch", self.batch, timed)
        loss = self.part("forward", forward, timed)
        self.part("backward", run.scaler.scale(loss).backward, timed)
        self.part("optimizer", update, timed)

    def several(self, n):
        """Seconds a step over n steps."""
        begin = self.now()
        for _ in range(n):
            self.step()
        return (self.now() - begin) / n


def product_rate(device, autocast):
    """Operations a second of a large square matrix product, in the type that training uses; best of 5."""
    n = 8192 if device.type == "cuda" else 2048
    a, b, best = torch.randn(n, n, device=device), torch.randn(n, n, device=device), 0
    with autocast:
        dtype = (a[:8, :8] @ b[:8, :8]).dtype
    a, b = a.to(dtype), b.to(dtype)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(6):                                # the first one warms up
        wait()
        begin = time.perf_counter()
        a @ b
        wait()
        best = max(best, 2 * n ** 3 / (time.perf_counter() - begin))
    return best


def spread(values):
    return f"{statistics.median(values):6.2f} ({min(values):.2f} to {max(values):.2f})"

# -------------------------------------------------------------------------------------------------
# The authors' code
# -------------------------------------------------------------------------------------------------

@torch.no_grad()
def largest_difference(ours, theirs, tokens):
    """
    Give the authors' model our weights; (largest difference of the logits of z, largest logit), float32.

    Their rotation pairs the numbers 0 and 1, 2 and 3, ... of a head, ours the first half with the second: the
    same model, if a head's queries and keys are put in that order. Matrices are made five times as large: with the
    initial ones attention is nearly even, whatever the rotation.
    """
    ours = copy.deepcopy(ours)
    for weight in ours.parameters():
        weight *= 5 if weight.ndim == 2 else 1
    def pairs(linear):
        return linear.weight.unflatten(0, (ours.blocks[0].attention.heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    state = {"transformer.wte.weight": ours.embedding.weight, "lm_head.weight": ours.embedding.weight,
             "transformer.ln_f.weight": ours.norm.weight, "transformer.ln_f.bias": ours.norm.bias}
    for i, block in enumerate(ours.blocks):
        a = block.attention
        values = {"attn.to_qkv.weight": torch.cat((pairs(a.query), pairs(a.key), a.value.weight)),
                  "attn.o.weight": a.out.weight, "mlp.c_fc.weight": block.mlp.up.weight,
                  "mlp.c_proj.weight": block.mlp.down.weight, "ln_1.weight": block.norm1.weight,
                  "ln_1.bias": block.norm1.bias, "ln_2.weight": block.norm2.weight, "ln_2.bias": block.norm2.bias}
        state |= {f"transformer.h.{i}.{name}": value for name, value in values.items()}
    theirs.load_state_dict(theirs.state_dict() | state)
    a, b = ours(tokens[:, :-1]), theirs(tokens[:, :-1])[:, 1::3]
    return (a - b).abs().max().item(), b.abs().max().item()


def against_authors(folder, cfg, ours, rounds, block):
    """
    largest_difference of a step's batch, and seconds a step of the authors' training loop and of ours, taken in
    turn: two lists.

    Their loop asks our iterator for each batch. There we time what it did since the last one, run our
    own steps, and then time their loader making the next batch.
    """
    sys.path[:0] = [folder, os.path.join(folder, "pre_training")]
    sys.argv, argv = sys.argv[:1], sys.argv
    import icl_grokking as theirs
    from _src import task_utils, train_utils
    sys.argv = argv
    device = ours.device.type
    args = theirs.parser.parse_args([
        "--device", device, "--mixed_precision", str(device == "cuda"), "--n_layer", str(cfg.depth), "--n_embd", str(cfg.embd),
        "--n_head", str(cfg.heads), "--p", str(cfg.p), "--base", str(cfg.p), "--n_tasks_pl", str(cfg.tasks // 4),
        "--n_point_per_row", str(cfg.examples), "--data_pct", str(100 * cfg.alpha), "--bs", str(cfg.per_task * cfg.tasks),
        "--lr", str(cfg.lr), "--wd", str(cfg.wd), "--n_val_step", "0", "--n_ckpts", "0", "--steps", str(block * (rounds + 2)),
        "--warmup_steps", "1"])
    args.dtype = torch.bfloat16 if args.mixed_precision else torch.float32
    args.ngpu_per_node = 1
    args.tasks = task_utils.parallelogram_tasks_with_shared_components(
        task_utils.generate_all_unique_sublists(args, args.n_tasks_pl), args)
    args.n_tasks, args.n_ood_tasks, args.ood_bs = len(args.tasks), 8, 8
    data, _, tokenizer = theirs.prepare_data(args, args.tasks)
    args.vocab_size = cfg.p                                   # their tokenizer has signs besides
    difference = largest_difference(ours.run.model, theirs.RoPETransformer(theirs.RoPEFlashAttention, args).to(device),
                                    ours.batch())
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
    return difference, times[0][1:], times[1][1:]             # the first block warms up

# -------------------------------------------------------------------------------------------------
# The table
# -------------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description="Time a training step; takes the flags of grok_icl.py as well.",
                                     allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=10, help="how often each variant takes its turn [10]")
    parser.add_argument("--authors", metavar="DIR", help="a copy of the authors' code, to run beside ours")
    parser.error = g.die
    own, rest = parser.parse_known_args()
    if own.rounds < 1:
        g.die(f"--rounds {own.rounds}: must be at least 1")
    if own.authors is not None and not os.path.isfile(os.path.join(own.authors, "pre_training", "icl_grokking.py")):
        g.die(f"--authors {own.authors or repr('')}: must be a copy of their repository, with pre_training/icl_grokking.py")
    with tempfile.TemporaryDirectory() as temporary:          # never made: nothing is written
        cfg, _, _ = g.parse_config([*rest, "--out", os.path.join(temporary, "run")])
    on_gpu = g.pick_device(cfg.device).type == "cuda"
    compiled = cfg.compile == "on" or cfg.compile == "auto" and on_gpu
    block = 20 if on_gpu else 1
    trained = Stepper(cfg, compiled=compiled)
    batch = cfg.per_task * cfg.tasks
    variants = {"first block at every position": dict(change=partial(with_class, old=g.Block, new=EveryRow)),
                "last block at every position": dict(loss=everywhere_loss),
                "fused attention": dict(change=partial(with_class, old=g.Attention, new=FusedAttention))}
    if compiled:
        variants["not compiled"] = dict(compiled=False)
    if cfg.amp not in ("auto", "off") or on_gpu and cfg.amp == "auto":
        variants["float32"] = dict(autocast=False)
    variants = {name: Stepper(cfg, **{"compiled": compiled, **change}) for name, change in variants.items()}

    print(f"{trained.device}, torch {torch.__version__}, {torch.get_num_threads()} threads; p {cfg.p}, {cfg.tasks} tasks, depth "
          f"{cfg.depth}, width {cfg.embd}, {cfg.examples} examples, batch {batch}, {cfg.optimizer}", flush=True)
    begin = trained.now()
    trained.step()
    print(f"first step {trained.now() - begin:.1f} s (warm-up{' and compilation' if compiled else ''})")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trained.several(2 * block)
    if on_gpu:
        memory = torch.cuda.max_memory_allocated()
    else:
        import resource                                       # not on Windows
        memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rates, ratios = [product_rate(trained.device, trained.autocast)], {name: [] for name in variants}
    for stepper in variants.values():
        stepper.several(2)
    seconds = []
    for _ in range(own.rounds):
        seconds.append(trained.several(block))
        for name, stepper in variants.items():
            ratios[name].append(stepper.several(block) / seconds[-1])
        rates.append(product_rate(trained.device, trained.autocast))
    for _ in range(own.rounds):
        trained.step(timed=True)
    sets = g.eval_sequences(trained.run.split, "val_ood", g.EVAL_SEQUENCES, cfg.examples, cfg.p, 1)
    begin = trained.now()
    for tokens in sets.values():
        with trained.autocast:
            g.evaluate(trained.run.model, tokens.to(trained.device))
    evaluation = trained.now() - begin

    second, done, rate = statistics.median(seconds), operations(cfg, batch), statistics.median(rates)
    print(f"\nstep                 {1e3 * second:10,.1f} ms ({1e3 * min(seconds):,.1f} to {1e3 * max(seconds):,.1f})\n"
          f"steps/s              {1 / second:10,.2f}\ntokens/s             {3 * cfg.examples * batch / second:10,.0f}\n"
          f"operations a step    {done:10.3g}\nachieved             {done / second / 1e9:10,.0f} GFLOP/s\n"
          f"matrix product       {rate / 1e9:10,.0f} GFLOP/s ({min(rates) / 1e9:,.0f} to {max(rates) / 1e9:,.0f})\n"
          f"utilization          {done / second / rate:10.0%}\n"
          f"peak memory          {memory / 2**30:10.2f} GiB{'' if on_gpu else ' (the process)'}")
    print("\npart of the step, timed one by one")
    for name, times in trained.seconds.items():
        print(f"  {name:18} {1e3 * statistics.median(times):10,.1f} ms")
    print(f"  {'evaluation':18} {1e3 * evaluation / cfg.eval_every:10,.1f} ms ({1e3 * evaluation:,.0f} every {cfg.eval_every} "
          f"steps: {evaluation / (evaluation + cfg.eval_every * second):.1%} of the run)")
    print("\ntime of a step, as a multiple of the step as trained: median (lowest to highest)")
    for name, values in ratios.items():
        print(f"  {name:30} {spread(values)}")
    if own.authors:
        (difference, largest), theirs, ours = against_authors(own.authors, cfg, trained, own.rounds, block)
        print(f"\nauthors' model with our weights: logits up to {largest:.1f}, difference at most {difference:.1e}\n"
              f"authors' step {1e3 * statistics.median(theirs):,.1f} ms, ours {1e3 * statistics.median(ours):,.1f} ms, ratio "
              f"{spread([a / b for a, b in zip(theirs, ours)])}")


if __name__ == "__main__":
    main()
