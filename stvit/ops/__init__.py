"""Super token attention, as functions and as a module.

Source: "Vision Transformer with Super Token Sampling", https://arxiv.org/abs/2211.11167, section 3.

Super token attention has three steps. `sample_super_tokens` groups pixels softly into a few super tokens.
Self-attention refines the super tokens. `upsample_super_tokens` gives each pixel a weighted sum of the refined tokens
around it. The module `SuperTokenAttention` does all three.

Both functions check their arguments and call a backend that `stvit.ops.backends` chooses: `stvit.ops.reference`, the
definition in plain PyTorch, or the Triton kernels of `stvit.ops.triton`. Traced and exported graphs contain
`stvit.ops.portable` instead of the reference.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from torch import nn

from stvit.ops import layers, portable, reference, triton
from stvit.ops.backends import can_run_triton, check_backend, choose_backend, compute_dtype, why_not_triton

__all__ = [
    "SuperTokenAttention",
    "can_run_triton",
    "sample_super_tokens",
    "upsample_super_tokens",
    "why_not_triton",
]

MAX_STOKEN_SIZE = 512
MAX_N_ITER = 100
# Up to this many tokens, plain attention is faster to train than fused attention on a CPU in 16-bit precision.
MAX_UNFUSED_TOKENS = 200


# torch.fx must not trace into the public functions, because their checks do not work on symbolic tensors.
@torch.fx.wrap
def sample_super_tokens(
    x: torch.Tensor, stoken_size: int | tuple[int, int], n_iter: int = 1, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups pixels softly into super tokens (section 3.2, equations 2 to 5).

    The map is cut into cells of `stoken_size`, with zeros added at the right and bottom. Each super token starts as the
    mean of its cell. Each round has two steps. First, every pixel is associated with the 3x3 super tokens around its
    cell. Then every super token becomes the weighted mean of the pixels in the 3x3 cells around it. Gradients flow only
    through the last weighted mean; the association is a constant.

    Args:
        x: Pixel features (B, C, H, W) of any floating dtype and memory format. B can be 0.
        stoken_size: Height and width of a cell in pixels, each at least 1.
        n_iter: Rounds of association and averaging, at least 1.
        backend: "reference", "triton", or "auto" for Triton if it can run (`can_run_triton`) and the reference
            otherwise. The environment variable STVIT_OPS_BACKEND overrides this argument.

    Returns:
        Super tokens (B, C, ceil(H / h), ceil(W / w)), and the association (B, 9, H, W) of each pixel with the nine
        super tokens around its cell, row by row. Entry 4 is the cell's own token. The nine entries sum to 1. Entries
        outside the grid belong to tokens that are zero. The association has no gradient.

    Raises:
        ValueError: If an argument has a wrong type, shape or value, or the requested backend cannot run.
    """
    _check_pixels(x, "x")
    size, n_iter = _cell_size(stoken_size), _check_n_iter(n_iter)
    if not torch.jit.is_scripting():
        if choose_backend(backend, x) == "triton":
            return triton.sample_super_tokens(x, size, n_iter)
        if portable.is_exporting():
            return portable.sample_super_tokens(x, size, n_iter)
    return reference.sample_super_tokens(x, size, n_iter)


@torch.fx.wrap
def upsample_super_tokens(
    tokens: torch.Tensor,
    association: torch.Tensor,
    stoken_size: int | tuple[int, int],
    backend: str = "auto",
) -> torch.Tensor:
    """Returns the weighted sum of the super tokens around each pixel (section 3.3).

    Args:
        tokens: Super tokens (B, C, ceil(H / h), ceil(W / w)).
        association: Weights (B, 9, H, W), as returned by `sample_super_tokens`.
        stoken_size: Height and width of a cell in pixels, as passed to `sample_super_tokens`.
        backend: Backend, as in `sample_super_tokens`.

    Returns:
        Pixel features (B, C, H, W).

    Raises:
        ValueError: If an argument has a wrong type, shape or value, the shapes of the two tensors do not match, or the
            requested backend cannot run.
    """
    _check_pixels(tokens, "tokens")
    _check_pixels(association, "association")
    h, w = _cell_size(stoken_size)
    if not torch.jit.is_tracing():  # tracing would warn that it cannot record a check of sizes
        _check_fit(tokens, association, h, w)
    if not torch.jit.is_scripting():
        if choose_backend(backend, tokens) == "triton":
            return triton.upsample_super_tokens(tokens, association, (h, w))
        if portable.is_exporting():
            return portable.upsample_super_tokens(tokens, association, (h, w))
    return reference.upsample_super_tokens(tokens, association, (h, w))


class SuperTokenAttention(nn.Module):
    """Super token attention (section 3).

    The module samples super tokens, applies self-attention, and upsamples the result. With a `stoken_size` of 1x1,
    every pixel is its own token and the module is plain multi-head self-attention.

    The attribute `fused_attn` selects PyTorch's fused attention. Its initial value is timm's setting
    (`timm.layers.set_fused_attn` or TIMM_FUSED_ATTN).
    """

    fused_attn: torch.jit.Final[bool]

    def __init__(
        self,
        dim: int,
        stoken_size: int | tuple[int, int] = 8,
        n_iter: int = 1,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Creates the projections with random weights.

        Args:
            dim: Channels of the input and the output.
            stoken_size: Height and width of a super token's cell in pixels, each from 1 to 512.
            n_iter: Rounds of association and averaging, from 1 to 100.
            num_heads: Number of attention heads, which must divide `dim`.
            qkv_bias: Whether the projection to queries, keys and values has a bias.
            attn_drop: Dropout rate of the attention weights.
            proj_drop: Dropout rate of the output.
            backend: Backend of sampling and upsampling, see `sample_super_tokens`.
            device: Device of the parameters.
            dtype: Dtype of the parameters.

        Raises:
            ValueError: If an argument has a wrong type or value.
        """
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if dim < 1 or num_heads < 1 or dim % num_heads != 0:
            raise ValueError(f"dim must be divisible by num_heads, got dim={dim} and num_heads={num_heads}")
        for name, rate in (("attn_drop", attn_drop), ("proj_drop", proj_drop)):
            if not 0.0 <= rate <= 1.0:
                raise ValueError(f"{name} must be between 0 and 1, got {rate}")
        self.dim = dim
        self.backend = check_backend(backend)
        self.stoken_size = _cell_size(stoken_size)
        self.n_iter = _check_n_iter(n_iter)
        # Limits for configurations from other people: even a tiny image needs the memory of one cell.
        if max(self.stoken_size) > MAX_STOKEN_SIZE:
            raise ValueError(f"stoken_size must be at most {MAX_STOKEN_SIZE} in each axis, got {stoken_size}")
        if n_iter > MAX_N_ITER:
            raise ValueError(f"n_iter must be at most {MAX_N_ITER}, got {n_iter}")
        self.num_heads = num_heads
        self.fused_attn = use_fused_attn()
        # Order of the output channels, as in the authors' code: queries, keys and values of the first head, then those
        # of the next head.
        self.qkv = nn.Conv2d(dim, 3 * dim, kernel_size=1, bias=qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Conv2d(dim, dim, kernel_size=1, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns pixel features after super token attention.

        Args:
            x: Pixel features (B, dim, H, W), with H and W at least 1.

        Returns:
            Pixel features (B, dim, H, W).

        Raises:
            ValueError: If `x` has a wrong shape or is not of a floating dtype.
        """
        _check_module_input(x, self.dim)
        if self.stoken_size == (1, 1):
            return self.attend(x)
        tokens, association = sample_super_tokens(x, self.stoken_size, self.n_iter, self.backend)
        return upsample_super_tokens(self.attend(tokens), association, self.stoken_size, self.backend)

    @torch.jit.unused
    def can_add(self, residual: torch.Tensor, x: torch.Tensor) -> bool:
        """Returns whether `add_to` accepts these tensors.

        The block must have super tokens, and the Triton kernels must be able to run.
        """
        return (
            self.stoken_size != (1, 1)
            and not isinstance(x, torch.fx.Proxy)
            and choose_backend(self.backend, x) == "triton"
            and x.dim() == 4
            and x.numel() > 0
            and residual.shape == x.shape
            and residual.dtype == compute_dtype(x)
        )

    @torch.jit.unused
    def add_to(self, residual: torch.Tensor, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Returns residual + scale * self(x), added by the kernel that upsamples.

        Args:
            residual: Map (B, dim, H, W), see `can_add`.
            x: Pixel features (B, dim, H, W).
            scale: Factor of each image, (B,); None for one.
        """
        _check_module_input(x, self.dim)
        tokens, association = sample_super_tokens(x, self.stoken_size, self.n_iter, self.backend)
        return triton.add_super_tokens(residual, self.attend(tokens), association, self.stoken_size, scale)

    def attend(self, tokens: torch.Tensor) -> torch.Tensor:
        """Applies multi-head self-attention among all tokens (equation 6).

        Fused attention does not allocate an attention matrix. Attention without fusion has forward-mode derivatives and
        derivatives of any order. Few tokens in 16-bit precision are trained without fusion on a CPU.
        """
        tokens = self.mix(tokens)
        if torch.jit.is_scripting():
            tokens = self.proj(tokens)
        else:
            tokens = layers.pointwise(self.proj, tokens)
        return self.proj_drop(tokens)

    def mix(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the attention before its projection, (B, dim, Hs, Ws)."""
        B, C, Hs, Ws = tokens.shape
        q, k, v = self.project(tokens)  # (B, heads, Hs * Ws, dim / heads)
        return self.mix_heads(q, k, v).reshape(B, Hs, Ws, C).permute(0, 3, 1, 2)

    def mix_heads(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Applies attention to queries, keys and values, (B, heads, S, d) each.

        Returns:
            The weighted values (B, S, heads, d).
        """
        if self.fused_attn and (torch.jit.is_scripting() or not (self.training and _is_slow_to_train(q))):
            tokens = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            attn = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, S, S)
            tokens = self.attn_drop(attn.softmax(dim=-1)) @ v
        return tokens.transpose(1, 2)

    def project(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Projects tokens to queries, keys and values.

        Args:
            tokens: Tokens (B, dim, Hs, Ws).

        Returns:
            Queries, keys and values, (B, heads, Hs * Ws, dim / heads) each.
        """
        # Copies only maps that are not channels_last. Without the copy, PyTorch would allocate their attention matrix
        # on a CPU.
        if torch.jit.is_scripting():
            qkv = self.qkv(tokens)
        else:
            qkv = layers.pointwise(self.qkv, tokens)
        return self.split_heads(qkv.flatten(2).transpose(1, 2).contiguous())

    def split_heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Splits projected tokens (B, S, 3 * dim) into queries, keys and values.

        Returns:
            Three tensors (B, heads, S, dim / heads).
        """
        qkv = qkv.unflatten(2, (self.num_heads, 3 * self.dim // self.num_heads)).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=3)
        return q, k, v

    def extra_repr(self) -> str:
        return f"dim={self.dim}, stoken_size={self.stoken_size}, n_iter={self.n_iter}, num_heads={self.num_heads}"


@torch.jit.unused  # TorchScript compiles both sides of "or"
def _is_slow_to_train(q: torch.Tensor) -> bool:
    """Returns whether attention is faster in training without fusion.

    The backward pass of PyTorch's fused attention on a CPU works in blocks that few tokens do not fill. In 16-bit
    precision it is up to seven times as slow as the plain formula (docs/speed.md).

    Args:
        q: Queries (B, heads, tokens, channels).
    """
    if isinstance(q, torch.fx.Proxy) or not q.requires_grad or q.device.type != "cpu":
        return False
    # The dtype first: a comparison of the number of tokens would fix it in an exported program.
    return q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] <= MAX_UNFUSED_TOKENS


def _cell_size(stoken_size: int | tuple[int, int]) -> tuple[int, int]:
    size = (stoken_size, stoken_size) if isinstance(stoken_size, int) else stoken_size
    if not torch.jit.is_scripting() and not _are_two_integers(size):
        raise ValueError(f"stoken_size must be an integer or a pair of integers, got {stoken_size}")
    if size[0] < 1 or size[1] < 1:
        raise ValueError(f"stoken_size must be at least 1 in each axis, got {size[0]}x{size[1]}")
    return size[0], size[1]


@torch.jit.ignore
def _are_two_integers(size: Any) -> bool:
    return isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(axis, int) for axis in size)


def _check_n_iter(n_iter: int) -> int:
    if not isinstance(n_iter, int) or n_iter < 1:
        raise ValueError(f"n_iter must be an integer of at least 1, got {n_iter}")
    return n_iter


def _check_pixels(x: torch.Tensor, name: str) -> None:
    if x.dim() != 4:
        raise ValueError(f"{name} must be 4-D (B, C, H, W), got shape {list(x.shape)}")
    if not torch.jit.is_tracing() and x.shape[1] < 1:
        raise ValueError(f"{name} must have at least one channel, got shape {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must have a floating dtype, got {x.dtype}")


def _check_fit(tokens: torch.Tensor, association: torch.Tensor, h: int, w: int) -> None:
    H, W = association.shape[2], association.shape[3]
    Hs, Ws = (H + h - 1) // h, (W + w - 1) // w
    if association.shape[1] != 9:
        raise ValueError(f"association must have 9 channels, got shape {list(association.shape)}")
    if tokens.device != association.device:
        raise ValueError(
            f"tokens and association must be on the same device, got {tokens.device} and {association.device}"
        )
    if tokens.shape[0] != association.shape[0]:
        raise ValueError(
            f"tokens and association must have the same batch size, got {tokens.shape[0]} and {association.shape[0]}"
        )
    if tokens.shape[2] != Hs or tokens.shape[3] != Ws:
        raise ValueError(
            f"tokens must be a grid of {Hs}x{Ws} for an association of {H}x{W} pixels and a stoken_size of {h}x{w}, "
            f"got {tokens.shape[2]}x{tokens.shape[3]}"
        )


@torch.fx.wrap
def _check_module_input(x: torch.Tensor, dim: int) -> None:
    _check_pixels(x, "x")
    if not torch.jit.is_tracing() and x.shape[1] != dim:
        raise ValueError(f"x must have dim={dim} channels, got shape {list(x.shape)}")
