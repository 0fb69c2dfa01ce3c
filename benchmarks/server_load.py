"""What a server bears: answers at once, tokens per second, time to the first token, memory, and clients that leave.

python benchmarks/server_load.py decode -m FOLDER [-b 1,2,4,8]   the engine alone: decode by how many answers are computed together
python benchmarks/server_load.py streams -m FOLDER [-n 200]      a server as a process: so many streams at once, every tenth vanishes
python benchmarks/server_load.py prompts -m FOLDER [-n 200]      so many long prompts at once: memory, and how soon /health answers
python benchmarks/server_load.py stall -m FOLDER [-l 4000]       how a long prompt delays the tokens of an answer that is running
"""
import argparse
import asyncio
import contextlib
import queue
import random
import statistics
import subprocess
import sys
import time

import httpx
import openai
import psutil

from edgeattn.apps.options import numbers, whole
from edgeattn.apps.server.engine import Engine
from edgeattn.apps.server.logits import Shaping
from edgeattn.apps.server.run import Job
from edgeattn.generation import SamplerOptions
from edgeattn.runtime import Model
from edgeattn.tokenizer import Tokenizer


def make_engine(args, parallel, ctx_size=None):
    model = Model.load(args.model, ctx_size=ctx_size)
    return Engine(model, Tokenizer(args.model), parallel=parallel).start()


def job(engine, prompt, count):
    never = tuple((token, -100.0) for token in engine.tokenizer.end_tokens)
    return Job(prompt, SamplerOptions(temperature=0), count, shaping=Shaping(never))


def times(engine, jobs):
    """[(time, index)] of the tokens as they come."""
    news, found, left = queue.Queue(), [], len(jobs)
    engine.submit(jobs, [lambda piece, i=i: news.put((time.perf_counter(), i, piece)) for i in range(len(jobs))])
    while left:
        when, index, piece = news.get()
        found.append((when, index))
        left -= piece.finish_reason is not None or piece.error is not None
    return found


def prompt_of(engine, tokens, seed):
    ids = random.Random(seed)
    return [ids.randrange(300, engine.model.vocab_size) for _ in range(tokens)]


def decode(args):
    print("| answers together | tokens/s of all | of each | against one |\n|---:|---:|---:|---:|")
    engine, one = make_engine(args, max(args.batch)), None
    for batch in [args.batch[0], *args.batch]:  # the first call loads what is loaded late, and is not counted
        rates = []
        for repetition in range(args.repetitions):
            found = times(engine, [job(engine, prompt_of(engine, args.prompt, 100 * repetition + i), args.tokens) for i in range(batch)])
            begun = max(min(when for when, index in found if index == i) for i in range(batch))  # all are decoding
            end = min(max(when for when, index in found if index == i) for i in range(batch))
            rates.append(sum(begun < when <= end for when, _ in found) / (end - begun))
        rate = statistics.median(rates)
        if one is None:
            one = 0
            continue
        one = one or rate
        print(f"| {batch} | {rate:.0f} | {rate / batch:.0f} | {rate / one:.2f}x |", flush=True)
    engine.close()


def stall(args):
    engine = make_engine(args, 2)
    times(engine, [job(engine, prompt_of(engine, args.long, 1), 2), job(engine, [400], 8)])
    found = times(engine, [job(engine, prompt_of(engine, 32, 2), 400), job(engine, prompt_of(engine, args.long, 3), 2)])
    first, other = ([when for when, index in found if index == i] for i in (0, 1))
    gaps = {"while the prompt is read": [b - a for a, b in zip(first, first[1:]) if b <= other[0]],
            "after it": [b - a for a, b in zip(first, first[1:]) if a > other[0]]}
    for name, seconds in gaps.items():
        if seconds:
            print(f"{name}: {len(seconds)} tokens, ms between them: median {1e3 * statistics.median(seconds):.0f}, "
                  f"most {1e3 * max(seconds):.0f}")
    print(f"time to the first token of the prompt of {args.long} tokens: {other[0] - first[0]:.2f} s")
    engine.close()


async def _stream(client, number, tokens, leave):
    began, first, count = time.perf_counter(), None, 0
    try:
        async with await client.chat.completions.create(model="any", stream=True, max_tokens=tokens, seed=number, messages=[
                {"role": "user", "content": f"Write about the number {number}."}], stream_options={"include_usage": True}) as stream:
            async for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    first = first or time.perf_counter() - began
                    if leave:
                        return "left", first, 1
                if chunk.usage:
                    count = chunk.usage.completion_tokens
    except openai.APIStatusError as error:
        return f"refused ({error.status_code})", None, 0
    return "finished" if count else "broken", first, count


@contextlib.contextmanager
def serving(args):
    """The process of a server."""
    command = [sys.executable, "-m", "edgeattn.apps.cli", "serve", "-m", args.model, "--port", str(args.port), "-np", str(args.parallel)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        while "http://" not in server.stderr.readline():
            assert server.poll() is None, "the server ended"
        yield psutil.Process(server.pid)
        server.terminate()


def prompts(args):
    words = random.Random(1).choices("mill river stone grain winter bread road the of and was in".split(), k=args.long)

    async def all_of_them(count, process):
        limits = httpx.Limits(max_connections=600)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{args.port}", timeout=900, limits=limits) as client:
            async def ask(number):
                return (await client.post("/v1/completions", json={"prompt": " ".join([str(number), *words]), "max_tokens": 1})).status_code
            asked, peak, delays = asyncio.gather(*map(ask, range(count))), 0, []
            while not asked.done():
                began = time.perf_counter()
                assert (await client.get("/health")).status_code == 200
                delays.append(time.perf_counter() - began)
                peak = max(peak, process.memory_info().rss)
                await asyncio.sleep(0.05)
            return await asked, peak, sorted(delays)
    with serving(args) as process:
        _, before, _ = asyncio.run(all_of_them(1, process))
        began = time.perf_counter()
        found, peak, delays = asyncio.run(all_of_them(args.streams, process))
        seconds, statuses = time.perf_counter() - began, ", ".join(f"{found.count(status)} got {status}" for status in sorted(set(found)))
        print(f"{args.streams} prompts of {args.long} words: {statuses}; {seconds:.1f} s")
        print(f"/health, ms: median {1e3 * statistics.median(delays):.0f}, most {1e3 * delays[-1]:.0f}; resident memory, MB: "
              f"{before / 1e6:.0f} after one prompt, at most {peak / 1e6:.0f}")


def streams(args):
    with serving(args) as process:
        peak = 0

        async def all_of_them(count):
            nonlocal peak
            address = f"http://127.0.0.1:{args.port}/v1"
            async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=900) as client:
                found = asyncio.gather(*[_stream(client, i, args.tokens, count > 1 and i % 10 == 9) for i in range(count)])
                while not found.done():
                    peak = max(peak, process.memory_info().rss)
                    await asyncio.sleep(0.1)
                return await found
        asyncio.run(all_of_them(1))
        before = peak
        for around in range(2):
            began = time.perf_counter()
            found = asyncio.run(all_of_them(args.streams))
            seconds = time.perf_counter() - began
            kinds = [kind for kind, *_ in found]
            print(f"{args.streams} streams: " + ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
                  + f"; {sum(count for _, _, count in found) / seconds:.0f} tokens/s of all, {seconds:.1f} s")
            firsts = sorted(first for _, first, _ in found if first)
            print(f"time to first token, s: median {statistics.median(firsts):.2f}, most {firsts[-1]:.2f}")
            print(f"resident memory of the server, MB: {before / 1e6:.0f} after one request, at most {peak / 1e6:.0f}, "
                  f"{process.memory_info().rss / 1e6:.0f} now", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("decode", "streams", "prompts", "stall"))
    parser.add_argument("-m", "--model", required=True, metavar="FOLDER", help="an exported folder")
    parser.add_argument("-b", "--batch", type=numbers(1), default=[1, 2, 4, 8], help="decode: answers together")
    parser.add_argument("-p", "--prompt", type=whole(1), default=32, help="decode: tokens of the prompts")
    parser.add_argument("-l", "--long", type=whole(1), default=4000, help="stall, prompts: tokens, or words, of long prompts")
    parser.add_argument("-t", "--tokens", type=whole(2), default=128, help="tokens of each answer")
    parser.add_argument("-r", "--repetitions", type=whole(1), default=3)
    parser.add_argument("-n", "--streams", type=whole(1), default=200)
    parser.add_argument("-np", "--parallel", type=whole(1), default=4)
    parser.add_argument("--port", type=whole(1), default=8099)
    args = parser.parse_args()
    {"decode": decode, "streams": streams, "prompts": prompts, "stall": stall}[args.what](args)


if __name__ == "__main__":
    main()
