"""The matrices of a hooked model whose entries are scored, grouped and watched, in the layout of a linear map.

Every matrix is read as [d_out, d_in], as torch.nn.Linear keeps it, whatever shape TransformerLens gives it. Keys and
values of grouped-query attention come unexpanded, so that each stored number counts once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_lens.errors import HookNameError, ModelError
from safety_lens.streaming import is_streamed

KINDS = ("W_Q", "W_K", "W_V", "W_O", "W_gate", "W_in", "W_out")
"""The linear maps of a block. W_gate exists in gated MLPs only; W_in is then what HF calls up_proj."""

ATTENTION = ("W_Q", "W_K", "W_V", "W_O")


@dataclass(frozen=True)
class Matrix:
    """One linear map of one block.

    name: "blocks.3.attn.W_Q". Rows of W_Q, W_K and W_V and columns of W_O are numbered head · d_head + dimension (W_K
    and W_V by key-value head); rows of W_in and W_gate and columns of W_out are the MLP's hidden units.
    """

    name: str
    layer: int
    kind: str
    d_out: int
    d_in: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.d_out, self.d_in

    @property
    def numel(self) -> int:
        return self.d_out * self.d_in


def matrices_of(
    model: HookedTransformer, kinds: Iterable[str] | None = None, layers: Sequence[int] | None = None
) -> list[Matrix]:
    """The linear maps of the blocks, in the order of the forward pass.

    kinds: some of KINDS, default all that the model has. layers: default every block; negative counts from the end.

    Raises:
        HookNameError: a kind or block that the model does not have.
    """
    has = [kind for kind in KINDS if kind != "W_gate" or model.cfg.gated_mlp]
    wanted = has if kinds is None else list(kinds)
    for kind in wanted:
        if kind not in has:
            raise HookNameError(f"no matrix {kind!r} in a block of {model.cfg.model_name}; there are {', '.join(has)}")
    n = model.cfg.n_layers
    blocks = range(n) if layers is None else layers
    for layer in blocks:
        if not -n <= layer < n:
            raise HookNameError(f"block {layer} was asked for, but this model has {n}: 0 to {n - 1}")
    chosen = sorted({layer % n for layer in blocks})
    return [_matrix(model, layer, kind) for layer in chosen for kind in KINDS if kind in wanted]


def _matrix(model: HookedTransformer, layer: int, kind: str) -> Matrix:
    cfg = model.cfg
    heads = cfg.n_heads * cfg.d_head
    key_heads = (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head
    d_mlp = cfg.d_mlp or 4 * cfg.d_model
    shapes = {
        "W_Q": (heads, cfg.d_model),
        "W_K": (key_heads, cfg.d_model),
        "W_V": (key_heads, cfg.d_model),
        "W_O": (cfg.d_model, heads),
        "W_out": (cfg.d_model, d_mlp),
    }
    part = "attn" if kind in ATTENTION else "mlp"
    return Matrix(f"blocks.{layer}.{part}.{kind}", layer, kind, *shapes.get(kind, (d_mlp, cfg.d_model)))


def named_matrix(model: HookedTransformer, name: str) -> Matrix:
    """The matrix of this name.

    Raises:
        HookNameError: the model has no such matrix.
    """
    for matrix in matrices_of(model):
        if matrix.name == name:
            return matrix
    raise HookNameError(
        f"no matrix named {name!r}: names are such as 'blocks.0.attn.W_Q' or 'blocks.0.mlp.W_out', "
        f"blocks 0 to {model.cfg.n_layers - 1}"
    )


def parameter_of(model: HookedTransformer, matrix: Matrix | str) -> Tensor:
    """The hooked model's own parameter behind a matrix, in TransformerLens' shape (unexpanded for grouped queries)."""
    matrix = named_matrix(model, matrix) if isinstance(matrix, str) else matrix
    owner = model.get_submodule(matrix.name.rpartition(".")[0])
    unexpanded = f"_{matrix.kind}"
    found: Tensor | None = owner._parameters.get(unexpanded, owner._parameters.get(matrix.kind))
    assert found is not None, f"no parameter for {matrix.name}"
    return found


def weight_of(model: HookedTransformer, matrix: Matrix | str) -> Float[Tensor, "d_out d_in"]:
    """The weight of a matrix as a linear map; a view of the hooked parameter wherever its layout allows.

    Raises:
        ModelError: the model's blocks share one set of buffers (`load_model(stream=True)`).
    """
    if is_streamed(model):
        raise ModelError("a streamed model holds the weights of one block at a time: load it without stream=True")
    matrix = named_matrix(model, matrix) if isinstance(matrix, str) else matrix
    return as_map(parameter_of(model, matrix).detach(), matrix)


def as_map(tensor: Tensor, matrix: Matrix) -> Float[Tensor, "d_out d_in"]:
    """A tensor of the parameter's shape in TransformerLens, as [d_out, d_in]."""
    if matrix.kind in ("W_Q", "W_K", "W_V"):
        return rearrange(tensor, "head d_in d_head -> (head d_head) d_in")
    if matrix.kind == "W_O":
        return rearrange(tensor, "head d_head d_out -> d_out (head d_head)")
    return tensor.T


def as_parameter(values: Float[Tensor, "d_out d_in"], matrix: Matrix, d_head: int) -> Tensor:
    """[d_out, d_in] values in the shape that TransformerLens gives the parameter: the inverse of `as_map`."""
    if matrix.kind in ("W_Q", "W_K", "W_V"):
        return rearrange(values, "(head d_head) d_in -> head d_in d_head", d_head=d_head)
    if matrix.kind == "W_O":
        return rearrange(values, "d_out (head d_head) -> head d_head d_out", d_head=d_head)
    return values.T
