"""A small Qwen3-MoE that speaks: trained from random weights on text of this repository, for what is measured on it.

    python -m bench.small_moe --out runs/small_moe

Conversations: a prompt of m3/data/calibration.jsonl, and a passage of its domain's text: sentences of the cases that
come with m3 (clinical), chains of sums and differences (reasoning), documentation (general), source (code); Chinese
prompts of a domain are answered by others of it. A byte-level BPE of 2048 tokens, learnt on the same. Trained with
m3.train: a run that was stopped goes on, and the same seed gives the same weights. It knows nothing; its experts have
learnt to take different text, which is what it is for.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bench import record
from m3.algorithms import clip_forward_kl
from m3.models.tokenizer import Tokenizer
from m3.quantize.calibration import read_prompts
from m3.train.loop import MODEL, TrainConfig, train
from m3.train.optim import OptimConfig
from m3.train.policy_model import PolicyModel
from m3.train.stage import Objective, Stateless, StepBatch
from m3.train.streams import Sample

TOKENIZER, FILES = "tokenizer", ("tokenizer.json", "tokenizer_config.json")
VOCABULARY = 2048
END, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PASSAGE = 400  # characters, about


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallMoe:
    """Sizes of the model, and how it is trained."""

    layers: int = 4
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    experts: int = 16
    chosen: int = 2
    inner: int = 64  # of an expert
    steps: int = 1200
    batch: int = 24  # conversations
    length: int = 160  # tokens of one, at most
    lr: float = 2e-3
    seed: int = 0


# -- text -------------------------------------------------------------------------------------------------------------
def strings(value: Any) -> Iterator[str]:
    """The texts in JSON that have words in them."""
    if isinstance(value, str) and value.count(" ") > 2:
        yield value
    elif isinstance(value, dict):
        for key in value:
            yield from strings(value[key])
    elif isinstance(value, list):
        for one in value:
            yield from strings(one)


def cut(texts: list[str], joint: str) -> list[str]:
    """Passages of about PASSAGE characters, of whole texts."""
    found, row, size = [], list[str](), 0
    for text in texts:
        row.append(text)
        size += len(text) + len(joint)
        if size >= PASSAGE:
            found.append(joint.join(row)[: 2 * PASSAGE])
            row, size = [], 0
    return found


def sums(count: int, seed: int) -> list[str]:
    """Chains of right sums and differences."""
    chance = random.Random(f"sums {seed}")
    found = []
    for _ in range(count):
        now = chance.randrange(10, 100)
        steps = [f"Start with {now}."]
        for _ in range(10):
            other = chance.randrange(2, 50)
            sign = 1 if now < 50 or chance.random() < 0.5 else -1
            steps.append(f"{now} {'+' if sign > 0 else '-'} {other} = {now + sign * other}.")
            now += sign * other
        found.append(f"{' '.join(steps)} So the answer is {now}.")
    return found


def english_docs() -> list[str]:
    """Passages of the documentation."""
    paths = [record.ROOT / "README.md", *sorted((record.ROOT / "docs").rglob("*.md"))]
    return cut([line for path in paths for line in path.read_text("utf-8").split("\n") if line.strip()], "\n")


def passages() -> dict[tuple[str, str], list[str]]:
    """What answers prompts, by domain and language."""
    cases = [
        json.loads(path.read_text("utf-8")) for path in sorted((record.ROOT / "m3" / "data" / "cases").glob("*.json"))
    ]
    source = [
        path.read_text("utf-8")
        for folder in ("m3", "m3kernels")
        for path in sorted((record.ROOT / folder).rglob("*.py"))
    ]
    found = {
        ("clinical", "en"): cut([text for case in cases for text in strings(case)], " "),
        ("reasoning", "en"): sums(2000, 0),
        ("general", "en"): english_docs(),
        ("code", "en"): cut([line for text in source for line in text.split("\n")], "\n"),
    }
    for domain in ("clinical", "reasoning", "general", "code"):
        own = [one.text for one in read_prompts() if (one.domain, one.language) == (domain, "zh")]
        chance = random.Random(f"Chinese {domain}")
        found[domain, "zh"] = ["".join(chance.sample(own, 5)) for _ in range(200)]
    return found


class Talk:
    """Conversations: domains as often as each other, English twice as often as Chinese."""

    def __init__(self) -> None:
        self.texts = passages()
        self.kinds = sorted(self.texts)
        self.prompts = {
            kind: [one.text for one in read_prompts() if (one.domain, one.language) == kind] for kind in self.kinds
        }

    def draw(self, chance: random.Random) -> tuple[str, str, str]:
        """(domain, prompt, answer)."""
        kind = chance.choices(self.kinds, [2 if language == "en" else 1 for _, language in self.kinds])[0]
        return kind[0], chance.choice(self.prompts[kind]), chance.choice(self.texts[kind])


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, learnt on the same text."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    talk, chance = Talk(), random.Random("tokenizer")
    fast.train_from_iterator((text for _ in range(4000) for text in talk.draw(chance)[1:]), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / FILES[0]))
    settings = {"eos_token": END, "chat_template": TEMPLATE}
    (folder / FILES[1]).write_text(json.dumps(settings), encoding="utf-8")


# -- training ---------------------------------------------------------------------------------------------------------
class Conversations(Stateless):
    """Batches of conversations: cross-entropy on answers. (Clip-Forward-KL to a teacher that gives every token the
    probability 1.)"""

    objective = Objective(spec=clip_forward_kl.loss_spec())

    def __init__(self, tokenizer: Tokenizer, config: SmallMoe) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.talk = Talk()

    async def batch(self, step: int) -> StepBatch:
        """Of a step, whatever came before it."""
        chance = random.Random(f"{self.config.seed} {step}")
        samples = []
        for index in range(self.config.batch):
            domain, prompt, answered = self.talk.draw(chance)
            asked = self.tokenizer.chat([{"role": "user", "content": prompt}])[: self.config.length // 2]
            said = [*self.tokenizer.encode(answered), self.tokenizer.eos_token_id or 0]
            ids = torch.tensor([*asked, *said][: self.config.length])
            answer = torch.arange(len(ids)) >= len(asked)
            samples.append(
                Sample(
                    id=f"{step}-{index}",
                    ids=ids,
                    mask=answer.float(),
                    steps=answer.long() - 1,
                    teacher_logprobs=torch.zeros(len(ids)),
                    domain=domain,
                )
            )
        return StepBatch(step=step, samples=samples)


def random_model(config: SmallMoe, end: int) -> PolicyModel:
    """A Qwen3-MoE of random weights, from the seed."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        causal = transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(
                vocab_size=VOCABULARY,
                hidden_size=config.hidden,
                intermediate_size=4 * config.hidden,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads,
                head_dim=config.hidden // config.heads,
                num_experts=config.experts,
                num_experts_per_tok=config.chosen,
                moe_intermediate_size=config.inner,
                norm_topk_prob=True,
                max_position_embeddings=2048,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=end,
                pad_token_id=None,
            )
        )
    return PolicyModel(causal.float())


def made(out: Path, config: SmallMoe | None = None) -> Path:
    """The folder of the trained model; trained, or trained on, if it is not there."""
    config = config or SmallMoe()
    folder = out / TOKENIZER
    if not all((folder / name).is_file() for name in FILES):
        write_tokenizer(folder)
    model_folder = out / MODEL
    if (model_folder / FILES[1]).is_file():
        return model_folder
    tokenizer = Tokenizer(folder)
    begun = time.process_time()

    def told(done: int, steps: int, values: Mapping[str, float]) -> None:
        if done % 50 == 0:
            print(f"{done} of {steps}: loss {values['loss']:.3f}, {time.process_time() - begun:.0f} s", flush=True)

    settings = TrainConfig(
        steps=config.steps,
        max_tokens=config.batch * config.length,
        optim=OptimConfig(lr=config.lr, warmup=50, schedule="cosine", weight_decay=0.01),
        checkpoint_every=100,
        samples_every=0,
        seed=config.seed,
    )
    model = random_model(config, tokenizer.eos_token_id or 0)
    outcome = asyncio.run(train(Conversations(tokenizer, config), model, settings, out, progress=told))
    if outcome.model is None:
        sys.exit(128 + (outcome.signal or 0))
    for name in FILES:  # the last of them says that all is there
        (outcome.model / name).write_bytes((folder / name).read_bytes())
    return outcome.model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=SmallMoe.steps)
    parser.add_argument("--seed", type=int, default=SmallMoe.seed)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(made(arguments.out, SmallMoe(steps=arguments.steps, seed=arguments.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
