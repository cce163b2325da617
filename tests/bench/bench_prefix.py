"""What a language-model prefix saves: time to the first token, and many requests after one prompt.

    python -m tests.bench.bench_prefix [--device cuda] [--shape qwen3] [--tokens 2000] [--requests 64] [--steps 8]

The model has random weights (speed does not depend on them). One request is a question of 24 tokens, read and then
answered greedily for ``--steps`` tokens. ``recomputed``: every request carries the prompt; ``copied``: the prompt's
keys and values, repeated for each request, in transformers' own cache; ``concatenated``: loadstone's cache with any
attention; ``shared``: loadstone's cache read in place; ``read``: the first token by `PrefixCache.read`, on a GPU a CUDA
graph. Times are medians of ``--runs`` in one process, taken in turns;
memory is the peak above the model: allocated on a GPU, resident on a CPU (one process for each way). ``questions read``
is the time until all requests have their first token, within the same run. On a CPU the
recomputed requests are read one after another, ``--sample`` of them, and the time is extrapolated (``~``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

QUESTION = 24
WAYS = ("recomputed", "copied", "concatenated", "shared")
SHAPES = {
    "smollm2": ("LlamaConfig", {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    }),
    "qwen3": ("Qwen3Config", {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    }),
    "llama3-8b": ("LlamaConfig", {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    }),
    "tiny": ("LlamaConfig", {
        "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2")
    parser.add_argument("--layers", type=int, default=0, help="another depth than the shape's")
    parser.add_argument("--dtype", default="")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sample", type=int, default=1)
    parser.add_argument("--one", choices=WAYS)
    parser.add_argument("--json")
    args, _ = parser.parse_known_args()
    args.dtype = args.dtype or ("bfloat16" if args.device != "cpu" else "float32")
    if args.one:
        print(json.dumps(Setting(args).many(args.one)))
        return
    setting = Setting(args)
    found: dict[str, Any] = {"equal": setting.equality(), "first_token": setting.first_token()}
    show_single(args, found)
    found["requests"] = requests(args, setting)
    show_many(args, found["requests"])
    if args.json:
        Path(args.json).write_text(json.dumps(vars(args) | found, indent=1) + "\n")


class Setting:
    """A model with a prompt and questions, and each way to answer them."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        import transformers

        self.args, self.torch = args, torch
        kind, sizes = SHAPES[args.shape]
        options = {
            "max_position_embeddings": 8192,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "tie_word_embeddings": True,
        }
        if args.layers:
            sizes = sizes | {"num_hidden_layers": args.layers}
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**sizes, **options)
        with torch.device(args.device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
        self.model = model.eval().requires_grad_(False)
        draw = torch.Generator().manual_seed(1)
        vocabulary = sizes["vocab_size"]
        self.prompt = torch.randint(2, vocabulary, (1, args.tokens), generator=draw).to(args.device)
        self.questions = torch.randint(2, vocabulary, (args.requests, QUESTION), generator=draw).to(
            args.device
        )

    def prefix(self, share: bool) -> Any:
        from loadstone.context.prefix.fit import make_prefix

        return make_prefix(self.model, self.prompt, share=share)

    def answer(self, ids: Any, cache: Any, steps: int) -> Any:
        """Greedy answers by the plainest loop there is: (B, steps) tokens, first of them from the questions."""
        torch = self.torch
        chosen = []
        with torch.no_grad():
            for _ in range(max(1, steps)):
                out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids = out.logits[:, -1:].argmax(-1)
                chosen.append(ids)
                if len(chosen) == 1:
                    self.wait()
                    self.first_at = time.perf_counter()
        return torch.cat(chosen, 1)

    def way(self, way: str) -> Callable[[Any, int], Any]:
        """A function of (questions, steps) that answers them."""
        from transformers import DynamicCache

        torch, batch_of = self.torch, self.prompt.expand
        if way == "recomputed":

            def recomputed(questions: Any, steps: int) -> Any:
                ids = torch.cat([batch_of(len(questions), -1), questions], 1)
                return self.answer(ids, DynamicCache(config=self.model.config), steps)

            return recomputed
        if way == "copied":
            stock = DynamicCache(config=self.model.config)
            with torch.no_grad():
                self.model(input_ids=self.prompt, past_key_values=stock, use_cache=True, logits_to_keep=1)
            held = [(layer.keys, layer.values) for layer in stock.layers]

            def copied(questions: Any, steps: int) -> Any:
                cache = DynamicCache(config=self.model.config)
                for number, (keys, values) in enumerate(held):
                    cache.update(
                        keys.repeat(len(questions), 1, 1, 1), values.repeat(len(questions), 1, 1, 1), number
                    )
                return self.answer(questions, cache, steps)

            return copied
        self.model.set_attn_implementation("sdpa")
        cache = self.prefix(share=way == "shared")
        if way == "shared" and not cache.shares:
            raise SystemExit("attention could not be shared here")
        cache.share = way == "shared"
        return lambda questions, steps: self.answer(questions, cache.fork(batch=len(questions)), steps)

    def equality(self) -> dict[str, Any]:
        """Logits of a question after the prompt, against one pass over both; and against transformers' own cache."""
        from transformers import DynamicCache

        torch, question = self.torch, self.questions[:1]
        with torch.no_grad():
            whole = self.model(input_ids=torch.cat([self.prompt, question], 1)).logits[:, self.args.tokens :]
            stock = DynamicCache(config=self.model.config)
            self.model(input_ids=self.prompt, past_key_values=stock, use_cache=True, logits_to_keep=1)
            theirs = self.model(input_ids=question, past_key_values=stock).logits
            joined = self.prefix(share=False)
            ours = self.model(input_ids=question, past_key_values=joined.fork()).logits
            shared = self.prefix(share=True)
            in_place = shared.shares
            read_in_place = self.model(input_ids=question, past_key_values=shared.fork()).logits
            self.model.set_attn_implementation("sdpa")
        largest = whole.abs().max().item()
        apart = lambda logits: (logits.double() - whole.double()).abs().max().item() / largest  # noqa: E731
        return {
            "transformers' cache": apart(theirs),
            "concatenated": apart(ours),
            "concatenated, same bits as transformers' cache": torch.equal(ours, theirs),
            "shared": apart(read_in_place),
            "attention was shared": in_place,
        }

    def first_token(self) -> dict[str, float]:
        """Seconds to the first token of one request: the whole prompt read, and after the prefix."""
        ways = {name: self.way(name) for name in ("recomputed", "concatenated", "shared")}
        cache = self.prefix(share=True)
        ways["read"] = lambda question, _: cache.read(question)[0].argmax(-1)
        question = self.questions[:1]
        taken: dict[str, list[float]] = {name: [] for name in ways}
        # A graph is captured the second time.
        for run in range(-2, self.args.runs):
            for name, answer in ways.items():
                self.attention(name)
                seconds = self.timed(lambda answer=answer: answer(question, 1))
                if run >= 0:
                    taken[name].append(seconds)
        return {name: statistics.median(seconds) for name, seconds in taken.items()}

    def attention(self, way: str) -> None:
        """Joined attention for the shared way only: the others are what stock models do."""
        from loadstone.context.prefix.attention import NAME

        self.model.set_attn_implementation(NAME if way in ("shared", "read") else "sdpa")

    def timed(self, work: Callable[[], Any]) -> float:
        self.wait()
        begin = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - begin

    def wait(self) -> None:
        if self.args.device != "cpu":
            self.torch.cuda.synchronize()

    def many(self, way: str) -> dict[str, Any]:
        """All requests in one batch: median seconds and peak bytes above the model."""
        from loadstone.evaluation.measure import peak_bytes, reset_peak

        torch, args = self.torch, self.args
        device = torch.device(args.device)
        one_by_one = way == "recomputed" and args.device == "cpu"
        questions = self.questions[: args.sample] if one_by_one else self.questions
        self.attention("sdpa")
        before = self.resident()
        reset_peak(device)
        answer = self.way(way)
        self.attention(way)
        seconds, first = [], []
        answer(questions[:1], 1)
        for run in range(1 if one_by_one else args.runs):
            begin = time.perf_counter()
            seconds.append(self.timed(lambda: answer(questions, args.steps)))
            first.append(self.first_at - begin)
            if run == 0:
                peak = peak_bytes(device) - before
        factor = args.requests / len(questions)
        return {
            "read": statistics.median(first) * factor,
            "seconds": statistics.median(seconds) * factor,
            "megabytes": peak / 1e6,
            "extrapolated": factor != 1,
        }

    def resident(self) -> int:
        if self.args.device != "cpu":
            self.torch.cuda.empty_cache()
            return int(self.torch.cuda.memory_allocated())
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        return 0


def requests(args: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    if args.device != "cpu":
        found = {}
        for way in WAYS:
            try:
                found[way] = setting.many(way)
            except (RuntimeError, SystemExit) as error:
                found[way] = {"failed": " ".join(str(error).split())[:200]}
            setting.torch.cuda.empty_cache()
        return found
    del setting
    words = [
        f"--{name}={getattr(args, name)}"
        for name in ("shape", "layers", "dtype", "tokens", "requests", "steps", "sample")
    ]
    found = {}
    for way in WAYS:
        command = [sys.executable, "-m", "tests.bench.bench_prefix", "--one", way, "--runs=1", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
    return found


def show_single(args: argparse.Namespace, found: dict[str, Any]) -> None:
    print(f"\n{args.shape} shape, {args.dtype}, {args.device}, a prefix of {args.tokens} tokens")
    print(f"logits of {QUESTION} tokens after it, against one pass over all (relative to the largest):")
    for name, value in found["equal"].items():
        print(f"  {name:<50}{value if isinstance(value, bool) else format(value, '.2e')!s:>12}")
    first = found["first_token"]
    print("time to first token, ms:")
    for name, seconds in first.items():
        print(f"  {name:<16}{seconds * 1000:>10.1f}{first['recomputed'] / seconds:>9.1f}x")


def show_many(args: argparse.Namespace, found: dict[str, Any]) -> None:
    print(f"{args.requests} requests at once, {args.steps} tokens answered each:")
    print(f"  {'':<16}{'questions read, s':>18}{'answered, s':>14}{'MB above the model':>20}")
    for way, row in found.items():
        if "failed" in row:
            print(f"  {way:<16}{row['failed']}")
            continue
        mark = "~" if row["extrapolated"] else ""
        memory = "" if row["extrapolated"] else format(row["megabytes"], ".0f")
        print(
            f"  {way:<16}{mark + format(row['read'], '.3f'):>18}{mark + format(row['seconds'], '.3f'):>14}{memory:>20}"
        )


if __name__ == "__main__":
    main()
