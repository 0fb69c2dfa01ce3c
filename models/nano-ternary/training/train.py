"""Distil models/nano into a ternary model on one GPU, from nothing but nano: its samples, and facts planted in them.

Usage: train.py ../../nano OUT_DIR --seconds 290
"""
import argparse
import json
import queue
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from facts import Facts
from safetensors.torch import load_file, save_file
from student import CONFIG, Student
from teacher import Teacher
from tokenizers import Tokenizer

torch.backends.cuda.matmul.allow_tf32 = True
MATRIX_RATE, OTHER_RATE = 0.02, 3e-3
PHASES = ((0.62, 1024, 0.15), (0.86, 4096, 0.35), (1.01, 8192, 0.40))  # until which progress, tokens a row, share of look-up chats


class Muon:
    """Momentum whose updates are orthogonalised by Newton-Schulz iteration."""

    def __init__(self, params, momentum=0.95):
        self.params, self.momentum, self.buffers = params, momentum, [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, rate):
        torch._foreach_lerp_(self.buffers, [p.grad for p in self.params], 1 - self.momentum)
        shapes = {}
        for p, buffer in zip(self.params, self.buffers):
            shapes.setdefault(tuple(p.shape), []).append((p, p.grad.lerp(buffer, self.momentum)))
        for (rows, cols), pairs in shapes.items():
            g = torch.stack([u for _, u in pairs]).bfloat16()
            g = g if rows <= cols else g.mT
            g = g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)
            for _ in range(5):
                a = g @ g.mT
                g = 3.4445 * g + (-4.7750 * a + 2.0315 * a @ a) @ g
            g = (g if rows <= cols else g.mT).float() * max(1.0, rows / cols) ** 0.5
            torch._foreach_add_([p for p, _ in pairs], list(g.unbind()), alpha=-rate)


def divergence(hidden, table, goal, goal_table, weights):
    """KL(teacher || student) of the next token, weighted mean."""
    wanted = F.log_softmax(F.linear(goal, goal_table).float(), -1)
    got = F.log_softmax(F.linear(hidden, table).float(), -1)
    return ((wanted.exp() * (wanted - got)).sum(-1) * weights).sum() / weights.sum()


def prefetch(facts, progress, tokens, pin):
    """Batches of the phase that training is in, made by a thread."""
    out = queue.Queue(8)

    def work():
        while True:
            _, length, share = next(phase for phase in PHASES if progress["at"] < phase[0])
            length = min(length, tokens)
            arrays = [torch.from_numpy(a) for a in facts.batch(tokens // length, length, share)]
            out.put((length, *((a.pin_memory() for a in arrays) if pin else arrays)))
    threading.Thread(target=work, daemon=True).start()
    return out


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("teacher", type=Path)
    ap.add_argument("out", type=Path)
    ap.add_argument("--seconds", type=float, default=290)
    ap.add_argument("--tokens-per-step", type=int, default=131_072)
    ap.add_argument("--sample-share", type=float, default=0.27, help="of the time, to sample text")
    ap.add_argument("--a48-share", type=float, default=0.14, help="of the time, for the int4-activation phase")
    ap.add_argument("--rows", type=int, default=4096)
    args = ap.parse_args()
    start, device = time.time(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "log.txt", "w", buffering=1) as log:
        run(args, start, device, lambda line: (print(line, flush=True), log.write(line + "\n")))


def run(args, start, device, say):
    torch.manual_seed(0)
    teacher = Teacher(load_file(args.teacher / "model.safetensors"), json.loads((args.teacher / "config.json").read_text()), device)
    tokenizer = Tokenizer.from_file(str(args.teacher / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    until = start + args.sample_share * args.seconds
    context, segment = (1024, 128) if device.type == "cuda" else (32, 16)  # a CPU is for trying the script out
    texts = [teacher.sample(args.rows // 4, 4 * context, end, start + 0.4 * (until - start), 2 * segment)]
    say(f"sampled {texts[0].shape} in {time.time() - start:.0f} s")
    while len(texts) < 2 or time.time() < until:
        texts.append(teacher.sample(args.rows, context, end, until + 3, segment))
    stream = np.concatenate([np.insert(text, 0, end, axis=1).ravel() for text in texts])
    say(f"sampled {len(stream) / 1e6:.1f} M tokens in {time.time() - start:.0f} s: {tokenizer.decode(texts[-1][0].tolist())[:300]!r}")
    if device.type == "cuda":
        torch.cuda.empty_cache()

    student = Student().to(device)
    first = stream[:min(len(stream) // context, 64) * context].astype(np.int64)
    student.cut_from(teacher, torch.from_numpy(first).to(device), context)
    loss_of = divergence
    if device.type == "cuda":
        teacher.compile()
        student.compile_parts()
        loss_of = torch.compile(divergence, dynamic=False)
    progress = {"at": 0.0}
    batches = prefetch(Facts(tokenizer, stream), progress, args.tokens_per_step, device.type == "cuda")
    whole = start + args.seconds
    train(args, student, teacher, loss_of, batches, progress, whole - args.a48_share * args.seconds - 5, False, say)
    save(student, args.out / "model.safetensors")
    say(f"saved the b1.58 model at {time.time() - start:.0f} s")
    train(args, student, teacher, loss_of, batches, progress, whole - 5, True, say)
    save(student, args.out / "model_a48.safetensors")
    say(f"done at {time.time() - start:.0f} s; {json.dumps(CONFIG)}")


def train(args, student, teacher, loss_of, batches, progress, until, a4, say):
    """Until the clock says so. The second phase (a4) is shorter, at rows of 4,096 tokens and at a rate that falls from a tenth."""
    named = list(student.named_parameters())
    matrices = [p for n, p in named if p.dim() == 2 and n != "embed"]
    muon = Muon(matrices)
    adam = torch.optim.AdamW([p for n, p in named if p.dim() != 2 or n == "embed"], lr=0.0, betas=(0.9, 0.95), weight_decay=0.0,
                             fused=True)
    start, step, average, saved = time.time(), 0, None, time.time()
    while time.time() < until:
        at = (time.time() - start) / (until - start)
        progress["at"] = 0.7 if a4 else at
        length, ids, weights = batches.get()
        ids, weights = (x.to(student.embed.device, non_blocking=True).view(-1) for x in (ids, weights))
        strength = torch.tensor(1.0 if a4 else min(1.0, at / 0.15), device=ids.device)
        goal = teacher.hidden(ids, length)
        hidden, table = student(ids, length, strength, a4)
        loss = loss_of(hidden, table, goal, teacher.w["embed_tokens.weight"], weights)
        loss.backward()
        rate = min(1.0, (step + 1) / 60) * (0.2 * (1 - at) if a4 else 1.0 if at < 0.4 else max(0.02, (1 - at) / 0.6))
        torch.nn.utils.clip_grad_norm_(adam.param_groups[0]["params"], 1.0)
        for group in adam.param_groups:
            group["lr"] = OTHER_RATE * rate
        adam.step()
        muon.step(MATRIX_RATE * rate)
        student.zero_grad(set_to_none=True)
        step += 1
        if step == 1 or step % 25 == 0:
            value = float(loss.detach())
            average = value if average is None else 0.7 * average + 0.3 * value
            seconds = time.time() - start
            say(f"{'a4.8' if a4 else 'b1.58'} step {step} rows of {length} KL {value:.4f} average {average:.4f} "
                f"{step * ids.numel() / 1e6:.0f} M tokens {seconds:.0f} s {step * ids.numel() / seconds / 1e3:.0f} k/s")
            if not a4 and time.time() - saved > 60:
                save(student, args.out / "model.safetensors")
                saved = time.time()


def save(student, path):
    save_file(student.packed(), path, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
