"""
The authors' training beside ours: their loader, model, optimizer, schedule and loop, our split and
our evaluation.

    python tests/authors.py DIR --preset paper --p 7 ... --out out/theirs

DIR is a copy of https://github.com/ablghtianyi/ICL_Modular_Arithmetic; it needs pandas,
schedulefree and rotary_embedding_torch. The flags are those of grok_icl.py, and --out gets a
metrics.csv with the same columns. Run by hand, not by pytest.
"""
import os
import sys
import tempfile

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import grok_icl as g  # noqa: E402


def setup(folder, cfg):
    """Their arguments for our config, their loader over our split, their model, their loop."""
    sys.path[:0] = [folder, os.path.join(folder, "pre_training")]
    sys.argv, argv = sys.argv[:1], sys.argv
    import icl_grokking as theirs
    from _src import train_utils
    sys.argv = argv
    device = g.pick_device(cfg.device)
    half = cfg.amp != "off" and device.type == "cuda"
    flags = dict(device=device.type, mixed_precision=half, n_layer=cfg.depth, n_embd=cfg.embd,
                 n_head=cfg.heads, p=cfg.p, base=cfg.p, n_point_per_row=cfg.examples, bs=cfg.batch,
                 lr=cfg.lr, wd=cfg.wd, steps=cfg.steps, warmup_steps=cfg.warmup, n_ckpts=0,
                 n_val_step=0, steps_per_record=10**9, seed=cfg.seed)
    args = theirs.parser.parse_args([f"--{name}={value}" for name, value in flags.items()])
    args.dtype = torch.bfloat16 if half else torch.float32
    args.vocab_size, args.max_digits, args.dim = cfg.p, 1, 3
    args.n_tasks, args.n_ood_tasks, args.ood_bs, args.ngpu_per_node = cfg.tasks, 8, 8, 1
    torch.manual_seed(cfg.seed)
    torch.distributed.init_process_group("nccl" if half else "gloo",       # the sampler wants one
                                         store=torch.distributed.HashStore(), rank=0, world_size=1)
    split = g.make_split(cfg)
    every = g.to_tokens(split["id"], split["train_inputs"].expand(cfg.tasks, -1, -1), cfg.p)
    loader, sampler = theirs.get_train_dataloader(every.view(cfg.tasks, -1, 3), cfg.batch, args)
    model = theirs.RoPETransformer(theirs.RoPEFlashAttention, args).to(device)

    def train(batches):
        scaler = theirs.GradScaler(enabled=half)
        with tempfile.TemporaryDirectory() as temporary:
            train_utils.train_tf_icl(
                torch.compile(model) if device.type == "cuda" else model, model, batches, [], [],
                [], None, scaler, args, device, data_prefix=os.path.join(temporary, "x"))
    return split, loader, sampler, model, train


def main(folder, *argv):
    cfg, _ = g.parse_config(argv)
    split, loader, sampler, model, train = setup(folder, cfg)
    sets = {name: tokens.to(g.pick_device(cfg.device)) for name, tokens in g.eval_sequences(
        split, "val_ood", g.EVAL_SEQUENCES, cfg.examples, cfg.p, cfg.seed + 1).items()}
    os.makedirs(cfg.out)
    rows = []

    def look(step):
        model.eval()
        row = {"step": step}
        for name, tokens in sets.items():
            found = g.evaluate(lambda t: model(t)[:, 1::3], tokens)[:, -1]
            row[name], row[f"{name}_novel"] = found.tolist()
        model.train()
        rows.append(row)
        lines = [",".join(map(str, v)) for v in (row, *(r.values() for r in rows))]
        with open(os.path.join(cfg.out, "metrics.csv"), "w") as f:
            f.write("\n".join(lines) + "\n")
        print("step {step:6d}  i.d. {id_train:.2f}/{id_test:.2f}  o.o.d. "
              "{val_ood_train:.2f}/{val_ood_test:.2f}".format(**row), flush=True)

    def batches():
        """Their batches; when they ask for the next one, their model may be looked at."""
        step = 0
        while True:
            sampler.set_epoch(step)
            for batch in loader:
                if step and step % cfg.eval_every == 0:
                    look(step)
                yield batch
                step += 1
    train(batches())
    look(cfg.steps)


if __name__ == "__main__":
    main(*sys.argv[1:])
