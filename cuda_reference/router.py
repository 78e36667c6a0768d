"""LayerRouter in Torch, for training and inference: the steps, names and parameters of `flux_mlx.spec.router`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from flux_mlx.spec import Route, RouterConfig


def pool_queries(
    queries: torch.Tensor, pool_tokens: int, lengths: torch.Tensor | Sequence[int] | None = None
) -> torch.Tensor:
    """Mean over the first and the last P tokens and over the heads.

    Args:
        queries: `[B, L, HQ, D]`, after q_proj (and q_norm), before RoPE. Rows may be padded on the right.
        pool_tokens: P. A row shorter than 2P counts the overlap twice.
        lengths: Tokens of each row that are pooled, `[B]`, 1 to L: the prompt without its last token. None means L.

    Returns:
        `[B, D]` float32.

    Raises:
        ValueError: Not four axes, or lengths that the rows do not have.
    """
    if queries.dim() != 4 or 0 in queries.shape:
        raise ValueError(f"[pool_queries] expected non-empty queries [B, L, HQ, D], got {tuple(queries.shape)}.")
    B, L = queries.shape[:2]
    rows = [L] * B if lengths is None else [int(n) for n in lengths]
    if len(rows) != B or not all(1 <= n <= L for n in rows):
        raise ValueError(f"[pool_queries] expected {B} lengths in 1 to {L}, got {rows}.")
    if min(rows) == L:
        ends = torch.cat([queries[:, :pool_tokens], queries[:, -pool_tokens:]], dim=1)
        return ends.float().mean(dim=(1, 2))
    return torch.cat([pool_queries(queries[b : b + 1, :n], pool_tokens) for b, n in enumerate(rows)])


class LayerRouter(nn.Module):
    """Decides from the pooled queries of a prompt whether its layer computes full or sparse attention.

    The parameters are those of `RouterConfig.parameter_shapes`. They are kept in float32, and the network runs in
    float32 whatever autocast says.

    Args:
        head_dim: D.
        config: Bias of a fresh router (`init_bias`).
    """

    def __init__(self, head_dim: int, config: RouterConfig):
        super().__init__()
        d = head_dim
        self.encoder = nn.Sequential(nn.Linear(d, 8 * d), nn.SiLU(), nn.Linear(8 * d, 2 * d))
        self.head = nn.Sequential(nn.Linear(2 * d, 4 * d), nn.SiLU(), nn.Linear(4 * d, d), nn.SiLU(), nn.Linear(d, 2))
        self.reset_parameters(config.init_bias)

    @torch.no_grad()
    def reset_parameters(self, init_bias: float) -> None:
        """Fresh weights: uniform in +-1/sqrt(fan-in); the last layer gives (0, init_bias) to every prompt."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5
                layer.weight.uniform_(-bound, bound)
                layer.bias.uniform_(-bound, bound)
        self.head[-1].weight.zero_()
        self.head[-1].bias.copy_(torch.tensor([0.0, init_bias]))

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Route logits, float32 `[B, 2]` (0 speaks for SPARSE, 1 for FULL), of the pooled queries `[B, D]`."""
        with torch.autocast(pooled.device.type, enabled=False):
            return self.head(self.encoder(pooled.float()))


def p_full(logits: torch.Tensor) -> torch.Tensor:
    """softmax(logits)[1], `[B]`."""
    return torch.sigmoid(logits[:, 1] - logits[:, 0])


def decide(logits: torch.Tensor) -> list[Route]:
    """FULL iff logit 1 > logit 0, row by row; FULL, the safe one, if they are not numbers. Waits for the logits."""
    return [Route.SPARSE if sparse >= full else Route.FULL for sparse, full in logits.tolist()]
