"""EngineCore: one step at a time, on one thread. Plan, draft, one pass of the target, draw, commit, tell.

What a request yields depends on its prompt, parameters and seed alone: a pass gives a row the same bits whatever rows
share it, and the token at a position is drawn with noise that belongs to the seed and the position. So neighbours,
chunks, preemption, shared prefixes and speculation decide when a token comes, and none of them which.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from m3.engine.config import KV_DTYPES, EngineConfig, Shape, Speculation
from m3.engine.controller import Controller, PassCost
from m3.engine.core_thread import Counts
from m3.engine.kv_cache import PagePool
from m3.engine.logits_processor import LogitsProcessor, is_plain
from m3.engine.passes import DraftPass, TargetPass
from m3.engine.request import Event, Finished, PromptLogprobs, Reason, Request, Tokens
from m3.engine.rows import RowBuilder, SamplingTensors, page_table
from m3.engine.scheduler import Plan, Scheduler
from m3.engine.speculative import Drafter
from m3.models.decoder import Decoder
from m3.models.gated_eagle3 import GatedEagle3Config
from m3.models.refresh import refresh_weights
from m3kernels.checks import refuse
from m3kernels.decoder.program import MAX_MASK_WORDS
from m3kernels.spec_decode import tree_commit, tree_verify
from m3kernels.spec_decode.types import BITS, Tree, Verified

OP = "engine"
LEAST_PAGES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """A draft model: its config and tensors (m3.draft.layouts.load_draft), and how its weights are held."""

    config: GatedEagle3Config
    tensors: Mapping[str, Tensor]
    weights: str = "int4"


@dataclasses.dataclass(kw_only=True)
class Stats:
    """Counts since the engine was made."""

    steps: int = 0
    rows: int = 0  # computed by the target
    drawn: int = 0
    drafted: int = 0  # nodes verified, roots not counted
    accepted: int = 0
    trees: int = 0  # drafted and verified, one a request and step
    speculative_steps: int = 0
    preemptions: int = 0


@dataclasses.dataclass
class _Draw:
    """A request that draws in this pass: from ``nodes`` rows of logits from ``first`` on."""

    request: Request
    row: int  # of the pass
    nodes: int
    tree: int = -1  # of the trees drafted; -1: none

    @property
    def kind(self) -> tuple[int, bool, bool]:
        """Draws of one kind are made together."""
        return self.nodes, self.tree >= 0, is_plain(self.request.params)


class EngineCore:
    """Computes tokens for requests. Not thread-safe: one caller at a time (m3.engine.engine has threads).

    Args:
        model: the target; its tensors are used where they lie.
        draft, speculation: a draft model and how to use it; None decodes plainly.
        clock: seconds; requests' arrivals and deadlines are on it.
    Raises:
        ValueError: a draft that does not belong to the target, or sizes that do not fit.
    """

    def __init__(
        self,
        model: Decoder,
        config: EngineConfig | None = None,
        *,
        draft: Draft | None = None,
        speculation: Speculation | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        config = config or EngineConfig()
        limit = model.config.max_position_embeddings
        config = dataclasses.replace(config, max_context=min(config.max_context or limit, limit))
        self.speculation = speculation or Speculation()
        slots = max(shape.slots for shape in self.speculation.shapes) if draft else 1
        self.model, self.clock, self.version = model, clock, 0
        kv_dtype = KV_DTYPES[config.kv_dtype]
        self.config = dataclasses.replace(config, num_pages=_pages(model, config, draft is not None))
        positions = config.max_context + slots
        sizes: dict[str, Any] = {
            "pages": self.config.num_pages,
            "page_size": config.page_size,
            "kv_dtype": kv_dtype,
            "max_context": positions,
        }
        aux = draft.config.aux_layers if draft else ()
        self.drafter: Drafter | None = None
        if draft is not None:
            _check_draft(draft.config, model, self.speculation)
            embedding = draft.tensors.get("embed_tokens.weight", model.embedding)
            passes = DraftPass(draft.config, draft.tensors, embedding, weights=draft.weights, **sizes)
            self.drafter = Drafter(passes, self.speculation, config.page_size)
        self.target = TargetPass(model, aux_layers=aux, **sizes)
        self.device = self.target.device
        self.pool = PagePool(self.config.num_pages, config.page_size)
        self.scheduler = Scheduler(self.config, self.pool)
        self.controller = Controller(self.speculation.shapes, adaptive=self.speculation.adaptive)
        self.cost = PassCost(experts=model.config.num_experts > 0)
        self.stats = Stats()
        self._sampling = SamplingTensors(self.device)
        self._processors: dict[str, LogitsProcessor] = {}  # of running requests whose logits are adjusted
        self._prompt_logprobs: dict[str, PromptLogprobs] = {}
        self._ends = frozenset(model.config.eos_token_ids)

    # -- requests -----------------------------------------------------------------------------------------------------
    def check(self, request: Request) -> None:
        """Raises ValueError where the request can never be served."""
        vocabulary = self.model.config.vocab_size
        if not request.prompt or min(request.prompt) < 0 or max(request.prompt) >= vocabulary:
            raise refuse(OP, "prompt", f"one or more tokens in 0..{vocabulary - 1}", f"{request.prompt[:8]}")
        if len(request.tokens) >= self.scheduler.limit:
            want = f"fewer than {self.scheduler.limit} tokens (context {self.config.max_context}, cache of "
            want += f"{self.config.num_pages} pages of {self.config.page_size})"
            raise refuse(OP, "prompt", want, f"{len(request.tokens)}")
        params = request.params
        if any(token >= vocabulary for token, _ in params.logit_bias):
            raise refuse(OP, "logit_bias", f"tokens in 0..{vocabulary - 1}", f"{params.logit_bias}"[:200])
        if params.grammar is not None and params.grammar.vocab_size != vocabulary:
            want = f"one made for a vocabulary of {vocabulary}"
            raise refuse(OP, "grammar", want, f"{params.grammar.vocab_size}")

    def add(self, request: Request) -> None:
        """As the scheduler's add: ValueError, or QueueFull."""
        self.check(request)
        self.scheduler.add(request)

    def abort(self, id: str, reason: Reason = "abort") -> bool:
        """The next step tells. False where no such request is left."""
        return self.scheduler.abort(id, reason)

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    def new_request(self, id: str, prompt: Sequence[int], params: Any, seed: int) -> Request:
        """A request that arrives now."""
        prompt = list(prompt)
        return Request(id=id, prompt=prompt, params=params, seed=seed, arrival=self.clock(), tokens=list(prompt))

    def counts(self) -> Counts:
        """May be called on any thread: each number is right, if not of the same moment as its neighbour."""
        return Counts(
            pages_total=self.pool.num_pages,
            pages_used=self.pool.used,
            pages_cached=self.pool.cached,
            drafted=self.stats.drafted,
            accepted=self.stats.accepted,
            trees=self.stats.trees,
            preemptions=self.stats.preemptions,
            generated=self.stats.drawn,
        )

    # -- weights ------------------------------------------------------------------------------------------------------
    def update_weights(
        self, update: Mapping[str, Tensor] | Callable[[], None], version: int, *, keep_keys: bool = False
    ) -> None:
        """Between two steps: new weights in place, by checkpoint name, or by a function that writes them.

        Tokens from now on carry ``version``. Requests that run compute their keys anew, or with ``keep_keys`` go on
        with those of the old weights, as asynchronous RL does; finished beginnings are not shared any more.
        Raises ValueError, with nothing changed: a name or shape that the model does not have.
        """
        if callable(update):
            try:
                update()
            except ValueError as error:  # a ValueError of ours promises that nothing was changed
                raise RuntimeError(f"{OP}: update_weights: the function failed, perhaps half way: {error}") from error
        else:
            refresh_weights(self.model, update)
        self.target.rebuild()
        self.version = version
        self.pool.clear_prefixes()
        if not keep_keys:
            self.scheduler.preempt_all()

    # -- a step -------------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One pass of the target, and what it brought."""
        started = time.perf_counter()
        running = sum(request.drawn > 0 for request in self.scheduler.running)
        shape = self.controller.choose(running) if self.drafter is not None and running else None
        self.scheduler.lookahead = shape.slots if shape else 1
        plan = self.scheduler.plan(self.clock())
        if shape and plan.lookahead < shape.slots:
            shape = None
        events: list[Event] = []
        for request in plan.preempted:
            self._forget(request.id)
            self.stats.preemptions += 1
        for finished in plan.finished:
            self._forget(finished.id)
            events.append(finished)
        if not plan.decodes and not plan.prefills:
            return events
        tree = self._draft(plan.decodes, shape) if shape and plan.decodes else None
        events += self._run(plan, tree)
        if plan.decodes and not plan.prefills:
            tokens = sum(len(event.tokens) for event in events if isinstance(event, Tokens))
            self.controller.record(len(plan.decodes), shape, time.perf_counter() - started, tokens)
        return events

    def _forget(self, id: str) -> None:
        self._prompt_logprobs.pop(id, None)
        self._processors.pop(id, None)
        if self.drafter is not None:
            self.drafter.forget(id)

    def _draft(self, requests: list[Request], shape: Shape) -> Tree:
        assert self.drafter is not None
        config = self.model.config
        noise, threshold = None, self.speculation.shared_noise
        if threshold and all(r.params.temperature >= threshold and not r.params.top_k for r in requests):
            sampling = self._sampling.of(requests)
            noise = {"temperature": sampling["temperature"], "seed": sampling["seed"]}
        costs = None
        if self.speculation.adaptive and self.speculation.expert_budget and config.num_experts:
            costs = self.cost.table(len(requests) * shape.nodes)
        experts = (config.num_experts, config.num_experts_per_tok)
        return self.drafter.trees(requests, shape, noise, costs, experts)

    def _run(self, plan: Plan, tree: Tree | None) -> list[Event]:
        rows, draws = RowBuilder(self.config.page_size, self.device), []
        owed: list[tuple[Request, int, int, int]] = []  # prompt_logprobs: request, start, stop, row
        spans: list[tuple[Request, int, int]] = []  # rows of the pass whose hidden states belong to a request
        for request, start, stop in plan.prefills:
            if self.drafter is not None and (start == 0 or request.id not in self.drafter._known):
                self.drafter.begin(request, start)
            first = rows.add(request, request.tokens[start:stop], start)
            spans.append((request, first, stop - start))
            if stop == len(request.tokens):
                draws.append(_Draw(request, first + stop - start - 1, 1))
            if request.params.prompt_logprobs and not request.drawn and self._owes(request):
                owed.append((request, start, min(stop, len(request.prompt) - 1), first))
        if tree is None:
            for request in plan.decodes:
                first = rows.add(request, request.tokens[-1:], len(request.tokens) - 1)
                spans.append((request, first, 1))
                draws.append(_Draw(request, first, 1))
        causal = len(rows.requests)
        masks: dict[str, Any] = {}
        if tree is not None:
            masks = self._add_trees(rows, plan.decodes, tree, draws)
        draws.sort(key=lambda draw: not is_plain(draw.request.params))
        rows.picked = [draw.row + node for draw in draws for node in range(draw.nodes)]
        for _, start, stop, first in owed:
            rows.picked += range(first, first + stop - start)
        pass_started = time.perf_counter()
        outputs = self.target.program.run(rows.batch(causal, **masks))
        if tree is not None or self.cost.count < 64:
            touched, layers = self.target.program.experts_touched()
            self.cost.add(len(rows.tokens), touched / max(layers, 1), time.perf_counter() - pass_started)
        logits, hidden = outputs[0], outputs[1] if len(outputs) > 1 else None
        self.stats.steps += 1
        self.stats.rows += len(rows.tokens)
        events = self._prompt_events(owed, logits, sum(draw.nodes for draw in draws))
        for request, _, stop in plan.prefills:
            request.computed = stop
        if hidden is not None and self.drafter is not None:
            for request, first, count in spans:
                self.drafter.note(request, hidden[first : first + count].clone())
        events += self._draw(draws, logits, tree, hidden)
        if self.drafter is not None:
            alive = [request for request in self.scheduler.running if request.id in self.drafter._known]
            prefilled = {request.id for request, _, _ in plan.prefills}
            self.drafter.catch_up([r for r in alive if r.id in prefilled], 1)
            self.drafter.catch_up([r for r in alive if r.id not in prefilled])
        return events

    def _add_trees(self, rows: RowBuilder, requests: list[Request], tree: Tree, draws: list[_Draw]) -> dict[str, Any]:
        kept = (tree.candidates >= 0).sum(1).tolist()
        candidates, positions = tree.candidates.tolist(), tree.positions.tolist()
        causal = len(rows.requests)
        order = sorted(range(len(requests)), key=kept.__getitem__)  # equal sizes side by side
        for b in order:
            request, count = requests[b], kept[b]
            prefix = len(request.tokens) - 1
            first = rows.add_nodes(request, candidates[b][:count], positions[b][:count], prefix, prefix + count)
            draws.append(_Draw(request, first, count, tree=b))
        bits = torch.cat([tree.mask_bits[b, : kept[b]] for b in order])
        return {"tree_lens": [0] * causal + [kept[b] for b in order], "mask_bits": bits.contiguous()}

    # -- drawing ------------------------------------------------------------------------------------------------------
    def _draw(self, draws: list[_Draw], logits: Tensor, tree: Tree | None, hidden: Tensor | None) -> list[Event]:
        """Draws for groups of requests of one kind; then appends, commits, ends."""
        events: list[Event] = []
        first = 0
        for (nodes, drafted, plain), found in itertools.groupby(draws, key=lambda draw: draw.kind):
            group = list(found)
            requests = [draw.request for draw in group]
            block = logits[first : first + len(group) * nodes].view(len(group), nodes, -1)
            if drafted and tree is not None:
                order = torch.tensor([draw.tree for draw in group], device=self.device)
                parts = (tree.candidates, tree.next_token, tree.next_sibling)
                links = tuple(part[order, :nodes].contiguous() for part in parts)
            else:
                tokens = torch.tensor([[request.tokens[-1]] for request in requests], device=self.device)
                alone = torch.full_like(tokens, -1)
                links = (tokens, alone, alone)
            if plain:
                rows = _Rows(block, links)
            else:
                parents = tree.parents[order, :nodes] if drafted and tree is not None else links[1]
                rows = self._processed(requests, block, links, parents)
            events += self._draw_group(group, rows, hidden)
            first += len(group) * nodes
        return events

    def _processed(self, requests: list[Request], logits: Tensor, links: tuple[Tensor, ...], parents: Tensor) -> _Rows:
        """Rows of requests that adjust them: in a copy, or by a grammar's bits."""
        processors = [self._processor(request) for request in requests]
        trees = list(zip(processors, links[0].tolist(), parents.tolist(), strict=True))
        adjusted = None
        if any(processor.adjusts for processor in processors):
            adjusted = logits.clone()
            for rows, (processor, *nodes) in zip(adjusted, trees, strict=True):
                processor.adjust(rows, *nodes)
        bits = None
        if any(processor.matcher is not None for processor in processors):
            bits = torch.stack([processor.bits(*nodes) for processor, *nodes in trees])
        return _Rows(logits, links, adjusted, bits)

    def _processor(self, request: Request) -> LogitsProcessor:
        """Up to date with the request's tokens; made of them where it is new, or comes back after a preemption."""
        processor = self._processors.get(request.id)
        if processor is None:
            sizes = sorted(self._ends), self.model.config.vocab_size, self.device
            processor = self._processors[request.id] = LogitsProcessor(request, *sizes)
        processor.follow()
        return processor

    def _draw_group(self, group: list[_Draw], rows: _Rows, hidden: Tensor | None) -> list[Event]:
        requests = [draw.request for draw in group]
        logits, kinds = rows.logits, {request.params.logprobs for request in requests}
        first = next(iter(kinds)) if len(kinds) == 1 and (rows.adjusted is None or "raw" not in kinds) else "none"
        verified = self._verify(requests, rows, first)
        logprobs: dict[str, Tensor] = {}
        for kind in kinds - {"none"}:
            again = rows.raw(verified) if kind == "raw" and rows.adjusted is not None else rows
            found = verified if kind == first else self._verify(requests, again, kind)
            logprobs[kind] = found.logprobs
        if logits.shape[1] > 1:
            self._commit(requests, verified)
        events: list[Event] = []
        lengths, drawn, paths = verified.accept_length.tolist(), verified.tokens.tolist(), verified.accept_index
        for b, draw in enumerate(group):
            request, count = draw.request, lengths[b] + 1
            path = paths[b, :count].long()
            if hidden is not None and self.drafter is not None and draw.tree >= 0:
                self.drafter.note(request, hidden[draw.row + path])
            self.stats.trees += draw.tree >= 0
            self.stats.drafted += draw.nodes - 1
            self.stats.accepted += count - 1
            new = drawn[b][:count]
            kind = request.params.logprobs
            chances = None if kind == "none" else logprobs[kind][b, :count].tolist()
            top = None
            if request.params.top_logprobs:
                top = _top(logits[b, path], request.params.top_logprobs)
            events += self._append(request, new, chances, top, draw.nodes - 1, count - 1)
        if logits.shape[1] > 1:
            self.stats.speculative_steps += 1
        return events

    def _verify(self, requests: list[Request], rows: _Rows, logprobs: str) -> Verified:
        position = torch.tensor([len(request.tokens) for request in requests], device=self.device)
        return tree_verify(
            rows.logits if rows.adjusted is None else rows.adjusted,
            *rows.links,
            mode="coupled",
            position=position,
            grammar_bits=rows.bits,
            logprobs=logprobs,
            **self._sampling.of(requests),
        )

    def _commit(self, requests: list[Request], verified: Verified) -> None:
        """Keys of the path to where plain decoding puts them, unless they are there."""
        steps = torch.arange(verified.accept_index.shape[1], device=self.device)
        dense = (verified.accept_index == steps) | (verified.accept_index < 0)
        if bool(dense.all()):
            return
        caches = self.target.caches
        lens = torch.tensor([len(request.tokens) - 1 for request in requests], dtype=torch.int32, device=self.device)
        scales: dict[str, Any] = {}
        if caches[0].k_scale is not None:
            scales = {"k_scales": [c.k_scale for c in caches], "v_scales": [c.v_scale for c in caches]}
        paths = verified.accept_index, verified.accept_length
        keys, values = [cache.keys for cache in caches], [cache.values for cache in caches]
        tree_commit(*paths, keys, values, page_table(requests, self.device), lens, **scales)

    def _append(
        self,
        request: Request,
        new: list[int],
        logprobs: list[float] | None,
        top: list[list[tuple[int, float]]] | None,
        drafted: int,
        accepted: int,
    ) -> list[Event]:
        params = request.params
        stuck = -1 in new  # no token is allowed
        new = new[: new.index(-1)] if stuck else new
        reason: Reason | None = "error" if stuck else None
        kept = new[: self.scheduler.room(request)]
        if len(kept) < len(new):
            reason = "length"
        for place, token in enumerate(kept):
            ends = token in self._ends and (not params.ignore_eos or params.grammar is not None)
            if ends or token in params.stop_token_ids:
                kept, reason = kept[: place + params.keep_end], "stop"
                break
        request.tokens += kept
        request.computed = len(request.tokens) - 1
        self.stats.drawn += len(kept)
        events: list[Event] = []
        error: str | None = None
        if kept:
            cut = len(kept)
            events.append(
                Tokens(
                    id=request.id,
                    tokens=kept,
                    version=self.version,
                    logprobs=None if logprobs is None else logprobs[:cut],
                    top_logprobs=None if top is None else top[:cut],
                    drafted=drafted,
                    accepted=min(accepted, cut),
                )
            )
        if reason in (None, "error") and not self.scheduler.room(request):
            reason = "length"
        if reason == "error":
            reason, error = self._why_stuck(request, bool(kept))
        if reason is not None:
            finished = self._finish(request, reason, error)
            events.append(finished if kept else dataclasses.replace(finished, drafted=drafted))
        return events

    def _why_stuck(self, request: Request, moved: bool) -> tuple[Reason | None, str | None]:
        """Why no token may follow: the grammar is complete and the model has no end token, or something is wrong.

        moved: tokens came before; then an empty set may be a limit that was passed in the tree: None, to be seen.
        """
        processor = None if request.params.grammar is None else self._processor(request)
        if processor is not None and processor.matcher is not None:
            if processor.matcher.complete:
                return "stop", None
            if processor.matcher.error is not None:
                return "error", f"grammar: {processor.matcher.error}"
            if processor.doubtful and moved:
                return None, None
        return "error", "the model's logits are not numbers"

    def _finish(self, request: Request, reason: Reason, error: str | None = None) -> Finished:
        self._forget(request.id)
        return self.scheduler.finish(request, reason, error)

    # -- log-probabilities of prompts ---------------------------------------------------------------------------------
    def _owes(self, request: Request) -> bool:
        told = self._prompt_logprobs.get(request.id)
        return told is None or len(told.logprobs) < len(request.prompt) - 1

    def _prompt_events(self, owed: list[tuple[Request, int, int, int]], logits: Tensor, first: int) -> list[Event]:
        events: list[Event] = []
        for request, start, stop, _ in owed:
            rows = logits[first : first + stop - start]
            first += stop - start
            count = request.params.top_prompt_logprobs
            told = PromptLogprobs(id=request.id, logprobs=[], top_logprobs=[] if count else None)
            told = self._prompt_logprobs.setdefault(request.id, told)
            for row, token in zip(rows, request.prompt[start + 1 : stop + 1], strict=True):
                logprob, best = _prompt_logprob(row, token, count)
                told.logprobs.append(logprob)
                if told.top_logprobs is not None:
                    told.top_logprobs.append(best)
            if not self._owes(request):
                events.append(told)
        return events


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What requests of one kind draw from: (B, N, V) logits, the trees' links; a copy that was adjusted, and a
    grammar's bits, if any."""

    logits: Tensor
    links: tuple[Tensor, ...]
    adjusted: Tensor | None = None
    bits: Tensor | None = None

    def raw(self, verified: Verified) -> _Rows:
        """The logits as the model gave them, with nothing allowed but what was drawn: its path again."""
        requests, nodes, vocabulary = self.logits.shape
        words = torch.zeros(requests, nodes, -(-vocabulary // BITS), dtype=torch.int64)
        paths, drawn = verified.accept_index.tolist(), verified.tokens.tolist()
        for b, path in enumerate(paths):
            for node, token in zip(path, drawn[b], strict=True):
                if node >= 0 and token >= 0:
                    words[b, node, token // BITS] = 1 << (token % BITS)
        bits = words.to(torch.int32).to(self.logits.device)  # bit 31 wraps to the sign
        return _Rows(self.logits, self.links, None, bits)


def _prompt_logprob(row: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """log softmax(row)[token], and the likeliest ``count`` tokens; summed in fp64 and rounded to fp32: the same alone
    and in any chunk of a prompt."""
    wide = row.double()
    best = row.topk(min(count, len(row))).indices.tolist() if count else []
    told = (wide[[token, *best]] - wide.logsumexp(-1)).float().tolist()
    return told[0], list(zip(best, told[1:], strict=True))


def _top(logits: Tensor, count: int) -> list[list[tuple[int, float]]]:
    chances = logits.float().log_softmax(-1)
    best = chances.topk(min(count, chances.shape[1]), dim=-1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [list(zip(ids, values, strict=True)) for ids, values in pairs]


def _pages(model: Decoder, config: EngineConfig, draft: bool) -> int:
    """Pages that config asks for, or that its memory holds."""
    if config.num_pages:
        return config.num_pages
    sizes = model.config
    element = KV_DTYPES[config.kv_dtype].itemsize
    per_head = sizes.head_dim * element + (4 if config.kv_dtype == "int8" else 0)
    page = 2 * (sizes.num_layers + draft) * config.page_size * sizes.num_kv_heads * per_head
    pages = config.memory_mb * 10**6 // page
    if pages < LEAST_PAGES:
        raise refuse(OP, "memory_mb", f"at least {LEAST_PAGES * page // 10**6 + 1} for this model", config.memory_mb)
    enough = -(-(config.max_context + 1) // config.page_size) * config.max_running
    return min(pages, enough)


def _check_draft(draft: GatedEagle3Config, model: Decoder, speculation: Speculation) -> None:
    config = model.config
    wanted = (config.hidden_size, config.vocab_size)
    if (draft.target_hidden_size, draft.vocab_size) != wanted:
        got = f"{(draft.target_hidden_size, draft.vocab_size)}"
        raise refuse(OP, "draft", f"one for a target of hidden size and vocabulary {wanted}", got)
    if max(draft.aux_layers) > config.num_layers:
        raise refuse(OP, "draft", f"aux_layers of at most {config.num_layers}", draft.aux_layers)
    for shape in speculation.shapes:
        if shape.topk > draft.draft_vocab_size or shape.expanded > MAX_MASK_WORDS * BITS:
            want = f"topk of at most {draft.draft_vocab_size} (the draft's vocabulary), (steps - 1) * topk of at most "
            raise refuse(OP, "shapes", f"{want}{MAX_MASK_WORDS * BITS}", str(shape))
