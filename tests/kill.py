"""
Kill a training run at random moments, resume it, and compare with a run that nobody touched.

    python tests/kill.py                 100 kills; the suite makes a few of them
    python tests/kill.py --kills 1000

SIGKILL comes at a random time, or, at every other start, as soon as a file is being written. After
each, every file must be whole. A run ends when it has been resumed to its last step. Then its
weights, optimizer and random states, history and metrics.csv must be those of the untouched run,
bit for bit, and the next one begins. Needs os.fork, so not Windows.
"""
import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import grok_icl as g  # noqa: E402

torch.set_num_threads(1)
FLAGS = ("--p 5 --tasks 8 --alpha 0.8 --examples 4 --depth 2 --heads 2 --embd 16 --init-std 0.1 "
         "--lr 0.01 --wd 0.1 --batch 16 --lessons pairs --steps 40 --warmup 2 --eval-every 3 "
         "--patience 4 --device cpu").split()


def launch(argv):
    """The process id of a child that runs the program with these flags, silently."""
    child = os.fork()
    if child:
        return child
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.argv = ["grok_icl.py", *argv]
    code = 1
    try:
        g.EVAL_SEQUENCES, g.REPORT_SEQUENCES = 64, 64
        lessons = g.lessons                                   # soon learned, to come to the last
        g.lessons = lambda cfg: [g.replace(lesson, enough=0.2) for lesson in lessons(cfg)]
        code = g.main() or 0
    finally:
        os._exit(code)


def ended(child):
    """Its exit code, or None while it runs."""
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def flags_for(folder):
    """Start the run, or resume it where there is something to resume."""
    begun = os.path.exists(os.path.join(folder, "last.pt"))
    return ["--resume", "--out", folder] if begun else [*FLAGS, "--out", folder]


def files(folder):
    """What must not differ: (last.pt, best.pt, metrics.csv), without folder names, each whole."""
    kept = []
    for name in ("last.pt", "best.pt"):
        path = os.path.join(folder, name)
        kept.append(g.load_checkpoint(path)[0] if os.path.exists(path) else None)
        if kept[-1]:
            kept[-1]["config"]["out"] = ""
    path = os.path.join(folder, "metrics.csv")
    return *kept, Path(path).read_text() if os.path.exists(path) else ""


def check_after_kill(folder, whole):
    """Only the steps since the last evaluation are lost; no row is doubled, missing or torn."""
    last, _, metrics = files(folder)
    beginning = whole.startswith(metrics) and metrics[-1:] in ("", "\n")
    assert beginning, "metrics.csv is not the beginning of the untouched run's"
    rows = max(0, metrics.count("\n") - 1)
    saved = len(last["history"]) if last else 0
    assert rows - 1 <= saved <= rows, f"{rows} rows in metrics.csv, {saved} in last.pt"


def same(a, b):
    """Equal to the last bit, in nested dicts and lists of tensors and numbers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b                        # nan


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, kills, writing, runs, equal = random.Random(args.seed), 0, 0, 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        untouched = os.path.join(temporary, "untouched")
        begin = time.monotonic()
        assert os.waitpid(launch([*FLAGS, "--out", untouched]), 0)[1] == 0
        seconds, expected = time.monotonic() - begin, files(untouched)
        while kills < args.kills:
            folder = os.path.join(temporary, f"run{runs}")
            code = None
            while code is None:
                child, more = launch(flags_for(folder)), kills < args.kills
                at_write = rng.random() < 0.5 and more
                deadline = time.monotonic() + (rng.uniform(0, seconds) if more else 1e9)
                while (code := ended(child)) is None:
                    caught = (at_write and time.monotonic() > deadline - seconds / 2
                              and os.path.isdir(folder)
                              and any(name.endswith(".tmp") for name in os.listdir(folder)))
                    if caught or time.monotonic() > deadline + (seconds if at_write else 0):
                        os.kill(child, signal.SIGKILL)
                        os.waitpid(child, 0)
                        kills, writing = kills + 1, writing + caught
                        check_after_kill(folder, expected[2]) if os.path.isdir(folder) else None
                        break
                    if not at_write:
                        time.sleep(0.001)
            assert code == 0, f"a resumed run ended with code {code}"
            runs += 1
            equal += same(files(folder), expected)
    print(f"{kills} kills, {writing} of them while a file was being written; {runs} runs, "
          f"{equal} bit for bit as the untouched one")
    sys.exit(equal != runs)


if __name__ == "__main__":
    main()
