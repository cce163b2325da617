"""Make short stories for small language models with SmolLM2-135M-Instruct: sample, filter, split, train a tokenizer.

    python recipes/stories.py --model .cache/models/smollm2-135m --seconds 300 --out stories      # on one GPU

Writes train.txt and heldout.txt (stories apart by a line with a form feed), tokenizer/ and stories.json (what was
made, kept and dropped, and why). The split is by prompt: no prompt of a held-out story was used for training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BREAK = "\n\f\n"
END = "<|endoftext|>"
# One story in so many prompts is held out.
HELD_OUT = 12
FACTS = ("names", "kinds", "places", "things", "lessons")
# Every request starts with this, so its keys and values are computed once and stay in the cache.
PREFIX = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n"
)

# The commonest English words: a third of any story.
MOST_COMMON = """
the a an and to of in on it was is he she they his her their him them with that for you said i had but so not at all
be one day up out when who there were very can could my we me as by from then would what have little"""
COMMON = frozenset(MOST_COMMON.split())
WORDS = (60, 400)
PLAIN = str.maketrans(
    {0x201C: '"', 0x201D: '"', 0x2018: "'", 0x2019: "'", 0x2013: "-", 0x2014: "-", 0x2026: "...", 0xA0: " "}
)
CHATTER = re.compile(
    r"as an ai|language model|smollm|hugging face|sure,|certainly|this story|https?:|[*#_<>\[\]{}|]",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Request:
    """A prompt, and how the story is made to begin."""

    prompt: str
    opening: str


def requests(seed: int) -> Iterator[Request]:
    """Endlessly many requests, the same for a seed."""
    rng = random.Random(seed)
    lists = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    while True:
        facts = {key.removesuffix("s"): rng.choice(lists[key]) for key in FACTS}
        yield Request(
            rng.choice(lists["prompts"]).format(**facts), rng.choice(lists["openings"]).format(**facts)
        )


class Sampler:
    """Continuous batching in one fixed step: every slot feeds one token at its own position, forced or sampled.

    The KV cache is two tensors a layer, (slots, KV heads, length, head dim); a finished slot starts over behind the
    shared prefix. On a GPU the step is one CUDA graph.
    """

    def __init__(self, model: Any, tokenizer: Any, options: argparse.Namespace, device: torch.device) -> None:
        self.model, self.tokenizer, self.options, self.device = model, tokenizer, options, device
        slots, length, config = options.slots, options.length, model.config
        shape = (slots, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
        self.keys, self.values = (
            [torch.zeros(shape, dtype=model.dtype, device=device) for _ in range(config.num_hidden_layers)]
            for _ in range(2)
        )
        prefix = tokenizer(PREFIX, add_special_tokens=False)["input_ids"]
        self.prefix = len(prefix)
        self.tokens = torch.zeros(slots, length, dtype=torch.long, device=device)
        self.forced = torch.full((slots,), self.prefix, device=device)
        self.position = torch.zeros(slots, dtype=torch.long, device=device)
        self.done = torch.zeros(slots, dtype=torch.bool, device=device)
        self.seen = torch.zeros(slots, config.vocab_size, dtype=torch.bool, device=device)
        self.rows = torch.arange(slots, device=device)
        self.columns = torch.arange(length, device=device)
        self.pick: Callable[..., torch.Tensor] = torch.compile(_pick) if device.type == "cuda" else _pick
        self.tokens[:, : self.prefix] = torch.tensor(prefix, device=device)
        ALL_ATTENTION_FUNCTIONS.register("slots", self._attention)
        model.set_attn_implementation("slots")

    def _attention(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **extra: Any
    ) -> tuple[torch.Tensor, None]:
        """One query token a slot, (slots, heads, 1, head dim), against the slot's cache up to its position."""
        keys, values = self.keys[module.layer_idx], self.values[module.layer_idx]
        keys[self.rows, :, self.position] = key[:, :, 0]
        values[self.rows, :, self.position] = value[:, :, 0]
        # Query heads of one KV head become rows of one product: nothing is repeated.
        query = query.view(len(query), keys.shape[1], -1, keys.shape[-1])
        scores = (query @ keys.transpose(-1, -2)).float() * extra["scaling"]
        hidden = self.columns > self.position[:, None, None, None]
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1).to(values.dtype)
        return (weights @ values).view(len(query), 1, -1), None

    def _step(self) -> None:
        options = self.options
        ids = self.tokens.gather(1, self.position[:, None])
        logits = self.model(input_ids=ids, position_ids=self.position[:, None], use_cache=False).logits[:, 0]
        noise = torch.empty_like(logits, dtype=torch.float32).exponential_()
        sampled = self.pick(
            logits, noise, self.seen, options.temperature, options.min_p, options.repetition_penalty
        )
        after = (self.position + 1).clamp(max=options.length - 1)
        token = torch.where(after < self.forced, self.tokens.gather(1, after[:, None])[:, 0], sampled)
        token = torch.where(self.done, self.tokens.gather(1, after[:, None])[:, 0], token)
        self.tokens.scatter_(1, after[:, None], token[:, None])
        self.seen.scatter_(1, token[:, None], True)
        ended = (token == self.tokenizer.eos_token_id) & (after >= self.forced)
        self.done |= ended | (after == options.length - 1)
        self.position.copy_(torch.where(self.done, self.position, after))

    def _captured(self) -> Callable[[], None]:
        if self.device.type != "cuda":
            return self._step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay

    @torch.inference_mode()
    def run(
        self, queue: Iterator[Request], seconds: float = math.inf, stories: float = math.inf
    ) -> Iterator[tuple[Request, str, bool]]:
        """Requests, their stories and whether the model ended them itself, for so many seconds or stories."""
        step = self._captured()
        # All slots pass the prefix together, then hold requests.
        self.position.zero_()
        self.seen.zero_()
        self.done.zero_()
        self.forced.fill_(self.prefix)
        for _ in range(self.prefix - 1):
            step()
        held = [next(queue) for _ in range(self.options.slots)]
        self._fill(list(range(self.options.slots)), held)
        begin, finished, found = time.monotonic(), 0, []
        while time.monotonic() - begin < seconds and finished < stories:
            for _ in range(self.options.every):
                step()
            slots = self.done.nonzero()[:, 0].tolist()
            if not slots:
                continue
            index = torch.tensor(slots, device=self.device)
            found.append(
                ([held[slot] for slot in slots], self.tokens[index].cpu(), self.position[index].cpu())
            )
            for slot in slots:
                held[slot] = next(queue)
            self._fill(slots, [held[slot] for slot in slots])
            finished += len(slots)
            print(f"\r{time.monotonic() - begin:5.0f} s  {finished:,} stories", end="", flush=True)
        print()
        for group, tokens, positions in found:
            texts = self.tokenizer.batch_decode(
                [
                    row[self.prefix : last + 2].tolist()
                    for row, last in zip(tokens, positions.tolist(), strict=True)
                ],
                skip_special_tokens=False,
            )
            for request, text in zip(group, texts, strict=True):
                body = text.partition("<|im_start|>assistant\n")[2]
                yield (
                    request,
                    body.removesuffix(self.tokenizer.eos_token),
                    body.endswith(self.tokenizer.eos_token),
                )

    def _fill(self, slots: list[int], held: list[Request]) -> None:
        """Put requests into slots: their tokens after the prefix are forced, then the model goes on."""
        texts = [f"{r.prompt}<|im_end|>\n<|im_start|>assistant\n{r.opening}" for r in held]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        width = max(map(len, ids))
        padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        index = torch.tensor(slots, device=self.device)
        self.tokens[index, self.prefix : self.prefix + width] = padded.to(self.device)
        self.forced[index] = torch.tensor([self.prefix + len(row) for row in ids], device=self.device)
        self.position[index] = self.prefix - 1
        self.seen[index] = False
        self.done[index] = False


def _pick(
    logits: torch.Tensor,
    noise: torch.Tensor,
    seen: torch.Tensor,
    temperature: float,
    min_p: float,
    penalty: float,
) -> torch.Tensor:
    """Sample of each row of logits (rows, vocabulary): repetition penalty, temperature, then min-p.

    ``noise`` is exponential: the arg max of log p - log noise is a draw from p.
    """
    scores = logits.float()
    scores = torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
    scores = scores / temperature
    unlikely = scores < scores.amax(-1, keepdim=True) + math.log(min_p)
    return (scores - noise.clamp(min=1e-20).log()).masked_fill(unlikely, -math.inf).argmax(-1)


def clean(text: str, ended: bool) -> str:
    """Plain quotes, single blanks; a story that ran out of room ends with its last whole sentence."""
    text = text.translate(PLAIN).strip()
    if not ended:
        text = text[: max((m.end() for m in re.finditer(r'[.!?]["\']?(?=\s)', text)), default=0)]
    return re.sub(r"\n{2,}", "\n\n", re.sub(r"[ \t]+", " ", text)).strip()


def judge(made: tuple[str, bool]) -> tuple[str, str | None, list[int]]:
    """A story cleaned, why it is not kept (or None), and hashes of its word 8-grams."""
    text = clean(*made)
    words = re.findall(r"[a-z']+", text.lower())
    if not WORDS[0] <= len(words) <= WORDS[1]:
        return text, "length", []
    if not text.isascii() or sum(word in COMMON for word in words) < 0.3 * len(words):
        return text, "not English", []
    if CHATTER.search(text) or text[-1] not in ".!?\"'":
        return text, "not a story", []
    grams = list(zip(*(words[i:] for i in range(4)), strict=False))
    if len(set(grams)) < 0.88 * len(grams) or any(n > 3 for n in Counter(text.split("\n")).values()):
        return text, "repeats itself", []
    return text, None, [zlib.crc32(" ".join(words[i : i + 8]).encode()) for i in range(len(words) - 7)]


def held_out(prompt: str) -> bool:
    """Whether a prompt's stories are held out: by its hash, so that one prompt never falls on both sides."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4]) % HELD_OUT == 0


def read(file: Path) -> list[str]:
    """The stories of an earlier run."""
    return file.read_text(encoding="utf-8").removesuffix("\n").split(BREAK)


def train_tokenizer(stories: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with one special token, which begins and ends a story."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, clean_up_tokenization_spaces=False
    )


def main() -> None:
    options = parse()
    # Forked before there is a GPU context.
    pool = multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0)))
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    sampler = Sampler(model, tokenizer, options, device)

    made = list(sampler.run(requests(options.seed), options.seconds))
    dropped: Counter[str] = Counter()
    known: set[int] = set()
    sides: dict[bool, list[str]] = {False: [], True: []}
    for name, side in (("train", sides[False]), ("heldout", sides[True])):
        for story in read(options.add / f"{name}.txt") if options.add else ():
            known.update(judge((story, True))[2])
            side.append(story)
    judged = pool.imap(judge, [(text, ended) for _, text, ended in made], chunksize=256)
    for (request, *_), (story, reason, eights) in zip(made, judged, strict=True):
        if reason is None and sum(gram in known for gram in eights) > 0.25 * len(eights):
            reason = "near duplicate"
        if reason:
            dropped[reason] += 1
            continue
        known.update(eights)
        sides[held_out(request.prompt)].append(story)
    options.out.mkdir(parents=True, exist_ok=True)
    trained = train_tokenizer(sides[False], options.vocabulary)
    trained.save_pretrained(options.out / "tokenizer")
    report: dict[str, Any] = {"made": len(made), "dropped": dict(dropped), "seed": options.seed}
    for name, stories in (("train", sides[False]), ("heldout", sides[True])):
        (options.out / f"{name}.txt").write_text(BREAK.join(stories) + "\n", encoding="utf-8")
        tokens = sum(
            len(row)
            for i in range(0, len(stories), 1000)
            for row in trained(stories[i : i + 1000], add_special_tokens=False, verbose=False)["input_ids"]
        )
        report[name] = {"stories": len(stories), "tokens": tokens, "bytes": sum(map(len, stories))}
    (options.out / "stories.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, required=True, help="SmolLM2-135M-Instruct (recipes/smollm2.py)"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--add", type=Path, help="--out of an earlier run with another seed, to add to")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--slots", type=int, default=4096, help="stories in the making at once")
    parser.add_argument("--length", type=int, default=384, help="tokens of prompt and story together")
    parser.add_argument("--every", type=int, default=16, help="steps between looks for finished stories")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--min-p", type=float, default=0.1)
    parser.add_argument("--repetition-penalty", type=float, default=1.13)
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
