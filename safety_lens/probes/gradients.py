"""Exact gradients of every example's own loss with respect to every weight, from batched passes.

Examples of a batch do not interact, so the gradient of example n for a linear map is δ_nᵀ x_n: its inputs x and the
gradient δ at its outputs, both [pos, ·]. One forward and one backward serve all examples and all matrices; what is made
of the pair (SNIP, Wanda, Fisher, inner products with an update) is the caller's. Nothing of size [examples, weights]
exists, and no `.grad` is written.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens import HookedTransformer

from safety_lens.errors import DataError, HookNameError, ModelError
from safety_lens.forced import Continuation, checked_batches, unembedded
from safety_lens.frames import running, whole
from safety_lens.kv import right_padded
from safety_lens.models import check_hooks, named_hooks
from safety_lens.probes.matrices import Matrix
from safety_lens.progress import progressed
from safety_lens.streaming import is_streamed
from safety_lens.types import FwdHook, NamedHook

TOKEN_BUDGET = {"cpu": 1024, "mps": 2048, "cuda": 8192}


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a batch says about the tokens of its continuations: one entry per token, rows one after the other.

    logits: of the position before each token. targets: the tokens. row: whose they are, 0 … n_rows − 1. examples: the
    numbers of the rows in the caller's list.
    """

    logits: Float[Tensor, "token d_vocab"]
    targets: Int[Tensor, " token"]
    row: Int[Tensor, " token"]
    examples: Int[Tensor, " batch"]

    def summed(self, values: Float[Tensor, " token"]) -> Float[Tensor, " batch"]:
        """Sums by row."""
        return values.new_zeros(len(self.examples)).index_add(0, self.row, values)

    def mean(self, values: Float[Tensor, " token"]) -> Float[Tensor, " batch"]:
        """Means by row."""
        return self.summed(values) / self.summed(torch.ones_like(values))


Loss = Callable[[Predictions], Float[Tensor, " batch"]]
"""The loss of every row; logits come in float32 or wider."""


def response_nll(predictions: Predictions) -> Float[Tensor, " batch"]:
    """Mean negative log-likelihood of the tokens of each continuation, nats per token."""
    return predictions.mean(F.cross_entropy(predictions.logits, predictions.targets, reduction="none"))


def response_nll_sum(predictions: Predictions) -> Float[Tensor, " batch"]:
    """Negative log-likelihood of each continuation as a whole, nats."""
    return predictions.summed(F.cross_entropy(predictions.logits, predictions.targets, reduction="none"))


@dataclass(frozen=True, eq=False)
class Seen:
    """Inputs and output gradients of one matrix for the rows of one batch, float32 or wider.

    The gradient of row b is delta[b].T @ x[b]. Both are 0 at padding. examples: numbers of the rows in the caller's
    list.
    """

    matrix: Matrix
    examples: Int[Tensor, " batch"]
    x: Float[Tensor, "batch pos d_in"]
    delta: Float[Tensor, "batch pos d_out"]
    mask: Bool[Tensor, "batch pos"]

    def gradients(self) -> Float[Tensor, "batch d_out d_in"]:
        """The gradient of every row, spelled out."""
        return self.delta.transpose(1, 2) @ self.x


@dataclass(frozen=True, eq=False)
class SeenPoint:
    """The activation at a hook point and the gradient there, for the rows of one batch; 0 at padding."""

    hook: str
    examples: Int[Tensor, " batch"]
    value: Float[Tensor, "batch pos *shape"]
    grad: Float[Tensor, "batch pos *shape"]
    mask: Bool[Tensor, "batch pos"]


def example_gradients(
    model: HookedTransformer,
    examples: Sequence[Continuation],
    matrices: Sequence[Matrix] = (),
    see: Callable[[Seen], None] = lambda seen: None,
    *,
    loss: Loss = response_nll,
    points: Sequence[str] = (),
    see_point: Callable[[SeenPoint], None] = lambda seen: None,
    hooks: Sequence[FwdHook] = (),
    batch_size: int | str = "auto",
) -> Float[np.ndarray, " n"]:
    """Run every example once forward and once backward; hand out inputs and output gradients of every matrix.

    `see` is called once per matrix and batch while the backward pass runs, from the last block to the first; what it
    does not keep is freed. points: hook names inside the blocks whose activation and gradient `see_point` gets. hooks:
    edits under which everything runs. batch_size: rows of a batch, or "auto" by tokens.

    Returns: the loss of every example, in the order given.

    Raises:
        DataError: no example, or one with an empty prompt or continuation, or longer than the context.
        HookNameError: a point that the model does not have inside a block.
        ModelError: a streamed model (its weights are gone when the backward pass needs them), or a loss or gradient
            that is not finite; the message names the example.
    """
    if is_streamed(model):
        raise ModelError("gradients need the weights of every block at once: load the model without stream=True")
    check_hooks(model, points)
    if outside := [name for name in points if not name.startswith("blocks.")]:
        raise HookNameError(f"{outside[0]!r} is not inside a block: gradients are taken at hook points of blocks")
    named = named_hooks(model, hooks)
    losses = np.full(len(examples), np.nan)
    done = 0
    for batch in example_batches(model, examples, batch_size):
        progressed("examples with gradients", done, len(examples))
        done += len(batch)
        run = _Run(model, batch, [examples[i] for i in batch], see, see_point)
        with torch.inference_mode(False), torch.enable_grad(), run.watching(matrices, points):
            losses[batch] = run.pass_through(named, loss)
    return losses


class _Run:
    """One batch: what its hooks hold until the gradients arrive."""

    def __init__(
        self,
        model: HookedTransformer,
        numbers: Sequence[int],
        rows: Sequence[Continuation],
        see: Callable[[Seen], None],
        see_point: Callable[[SeenPoint], None],
    ) -> None:
        device = torch.device(model.cfg.device or "cpu")
        self.model, self.rows, self.see, self.see_point = model, rows, see, see_point
        self.tokens, mask = right_padded([(*row.prompt, *row.tokens[:-1]) for row in rows], device)
        self.attention_mask, self.mask = mask, mask.bool()
        self.padded = not bool(self.mask.all())
        self.numbers = torch.tensor(list(numbers), device=device)
        self.frame = whole(mask, torch.tensor([len(r.prompt) for r in rows], device=device), self.numbers)
        self.inputs: dict[str, Tensor] = {}
        self.readers: Counter[str] = Counter()
        self.root: Tensor | None = None

    @contextmanager
    def watching(self, matrices: Sequence[Matrix], points: Sequence[str]) -> Iterator[None]:
        """torch hooks on the modules around every matrix; all gone afterwards, whatever happens."""
        layers = [m.layer for m in matrices] + [int(name.split(".")[1]) for name in points]
        with ExitStack() as stack:

            def on(module: nn.Module, hook: Callable[..., Any], before: bool = False) -> None:
                add = module.register_forward_pre_hook if before else module.register_forward_hook
                handle = add(hook, with_kwargs=True)
                stack.callback(handle.remove)

            on(self.model.hook_dict[f"blocks.{min(layers, default=0)}.hook_resid_pre"], self._plant)
            for matrix in matrices:
                block = self.model.blocks[matrix.layer]
                on_input, source, on_output = SITES[matrix.kind]
                on(block.get_submodule(on_input), partial(self._keep, f"{matrix.layer}.{on_input}"), source)
                on(block.get_submodule(self._output(on_output, matrix)), partial(self._meet, matrix, on_input))
            for name in points:
                on(self.model.hook_dict[name], partial(self._at_point, name))
            yield

    def _output(self, site: str, matrix: Matrix) -> str:
        ungated = matrix.kind == "W_in" and not self.model.cfg.gated_mlp
        return "mlp.hook_pre" if ungated else site

    def pass_through(self, hooks: Sequence[NamedHook], loss: Loss) -> Float[np.ndarray, " batch"]:
        model = self.model
        with running(self.frame), model.hooks(fwd_hooks=list(hooks)):
            resid = model(self.tokens, attention_mask=self.attention_mask, stop_at_layer=model.cfg.n_layers)
        read = [resid[b, len(r.prompt) - 1 :][: len(r.tokens)] for b, r in enumerate(self.rows)]
        logits = unembedded(model, torch.cat(read)[None])[0]
        lengths = torch.tensor([len(r.tokens) for r in self.rows], device=logits.device)
        losses = loss(
            Predictions(
                logits if logits.dtype == torch.float64 else logits.float(),
                torch.tensor([t for r in self.rows for t in r.tokens], device=logits.device),
                torch.repeat_interleave(torch.arange(len(lengths), device=logits.device), lengths),
                self.numbers,
            )
        )
        self._finite(losses.detach(), "loss")
        del logits, read
        if losses.requires_grad:  # a loss that does not depend on the model has zero gradients: nothing to see
            assert self.root is not None
            torch.autograd.grad(losses.sum(), self.root)
        return losses.detach().double().cpu().numpy()

    def _finite(self, values: Tensor, what: str) -> None:
        if bool(values.sum().isfinite()):  # one pass; what follows takes five
            return
        good = values.isfinite().flatten(1).all(1) if values.ndim > 1 else values.isfinite()
        if not bool(good.all()):
            bad = int(self.numbers[~good][0])
            raise ModelError(
                f"example {bad} has a {what} that is not finite: its text, the model's weights or its half precision "
                "(try dtype float32) are to blame; nothing was scored"
            )

    # --- hooks -------------------------------------------------------------------------------------------------------

    def _plant(self, module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Tensor:
        """The graph starts here: below the first block that is asked for nothing needs a gradient."""
        self.root = out.detach().requires_grad_()
        return self.root

    def _keep(self, key: str, module: nn.Module, args: Any, kwargs: Any, *out: Tensor) -> None:
        value = out[0] if out else args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
        self.inputs[key] = self._masked(value.detach().flatten(2))

    def _meet(self, matrix: Matrix, site: str, module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
        key = f"{matrix.layer}.{site}"
        self.readers[key] += 1

        def arrived(grad: Tensor) -> None:
            delta = _wide(grad.flatten(2))  # exactly 0 at padding: nothing that is predicted sees it
            self._finite(delta, f"gradient at {matrix.name}")
            self.see(Seen(matrix, self.numbers, _wide(self.inputs[key]), delta, self.mask))
            self.readers[key] -= 1
            if not self.readers[key]:  # the graph keeps this function, and would keep the input with it
                del self.inputs[key]

        out.register_hook(arrived)

    def _at_point(self, name: str, module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
        value = out.detach()

        def arrived(grad: Tensor) -> None:
            grad = self._wide(grad)
            self._finite(grad, f"gradient at {name}")
            self.see_point(SeenPoint(name, self.numbers, self._wide(value), grad, self.mask))

        out.register_hook(arrived)

    def _wide(self, x: Tensor) -> Tensor:
        return self._masked(_wide(x))

    def _masked(self, x: Tensor) -> Tensor:
        return x * self.mask.view(*self.mask.shape, *[1] * (x.ndim - 2)) if self.padded else x


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


SITES = {
    "W_Q": ("attn", True, "attn.hook_q"),
    "W_K": ("attn", True, "attn.hook_k"),
    "W_V": ("attn", True, "attn.hook_v"),
    "W_O": ("attn.hook_z", False, "attn"),
    "W_gate": ("mlp", True, "mlp.hook_pre"),
    "W_in": ("mlp", True, "mlp.hook_pre_linear"),
    "W_out": ("mlp.hook_post", False, "mlp"),
}
"""Where the input of each linear map is seen, whether as the argument of that module, and where its output is."""


def example_batches(
    model: HookedTransformer, rows: Sequence[Continuation], batch_size: int | str
) -> Iterator[list[int]]:
    """Numbers of the rows of every batch, like lengths together. DataError: none, or one empty or too long."""
    if not rows:
        raise DataError("there is no example to take gradients of")
    # the longest first: what later batches need fits into the memory that the first has given back
    yield from reversed(checked_batches(model, rows, batch_size, TOKEN_BUDGET, "example"))
