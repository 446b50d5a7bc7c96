"""Methods that scale and shift what layers give: SSF and DiffFit.

    SSF        y <- gamma * y + beta       a channel each, after every linear layer and norm
    DiffFit    y <- gamma * y              one number, after attention and MLP; biases and norms train as well

Both fold into the layer before: W' = diag(gamma) W, b' = gamma b + beta. beta needs a bias there, which the
linear layers and norms of Llama's family have not: SSF is merged there only with `shift` off.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from scrimp.base.decoder_layers import decoder_layers
from scrimp.base.errors import ScrimpError
from scrimp.base.seeds import derive
from scrimp.tuning.deltas.parts import draw_normal
from scrimp.tuning.modules.attached import CHILD, AttachedTuning, Part, replace_first
from scrimp.tuning.targets import ALL_LINEAR, find_targets


class ScaleShift(Part):
    """y <- gamma * y + beta.

    Attributes:
        scale: gamma, (out,) float32, or (1,) for all channels.
        shift: beta, (out,) float32; None is zero, and does not train.
    """

    def __init__(self, scale: Tensor, shift: Tensor | None) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)
        self.shift = None if shift is None else nn.Parameter(shift)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the scaled and shifted output, in the layer's dtype."""
        return replace_first(output, self._scaled)

    def can_fold(self, module: nn.Module) -> bool:
        """Tell whether the layer has a bias for the shift, and one scale and bias for its output."""
        has_bias = getattr(module, "bias", None) is not None
        is_layer = isinstance(module, nn.Linear) or is_norm(module)
        return is_layer and (has_bias or self.shift is None)

    @torch.no_grad()
    def fold(self, module: nn.Module) -> None:
        """Scale the layer's weight and bias, and add the shift to the bias."""
        weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
        scale: Tensor = self.scale
        more = 0.0
        if isinstance(module, nn.Linear):
            scale = scale[:, None]
        else:
            more = _offset(module)
        weight.copy_((scale * (weight.float() + more) - more).to(weight.dtype))
        if bias is not None:
            shift = 0.0 if self.shift is None else self.shift
            bias.copy_((self.scale * bias.float() + shift).to(bias.dtype))

    def _scaled(self, y: Tensor) -> Tensor:
        scaled = y * self.scale
        return (scaled if self.shift is None else scaled + self.shift).to(y.dtype)


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a norm: nothing but a scale for each channel, perhaps with a shift."""
    own = dict(module.named_parameters(recurse=False))
    vectors = all(p.ndim == 1 and p.is_floating_point() for p in own.values())
    is_leaf = all(name == CHILD for name, _ in module.named_children())
    return is_leaf and "weight" in own and own.keys() <= {"weight", "bias"} and vectors


def SSF(
    *, shift: bool = True, std: float = 0.02, targets: tuple[str, ...] = (ALL_LINEAR,), seed: int = 0
) -> AttachedTuning:
    """SSF: scale and shift the features after every linear layer and every norm.

        y <- gamma * y + beta;   gamma ~ N(1, std^2), beta ~ N(0, std^2) a channel

    It folds into the layer: W' = diag(gamma) W, b' = gamma b + beta.

    Args:
        shift: Whether beta is there. Without it, layers that have no bias can be merged.
        std: Of the start; 0 begins with the model as it is. The authors' 0.02 does not: it was taken for
            vision transformers.
        targets: Which linear layers; norms are scaled in any case.
        seed: Of the start.

    Memory:
        32 bytes a channel: gamma, beta, gradients and AdamW's moments. For gamma's gradient every scaled
        output is kept, out numbers a token and layer: more than LoRA keeps.

    Raises:
        ScrimpError: `std` is negative, or a target matches nothing.

    References:
        Scaling & Shifting Your Features, Lian et al., NeurIPS 2022, arXiv 2210.08823.
    """
    if std < 0:
        raise ScrimpError(f"tune ssf: std {std} must not be negative")

    def find(model: nn.Module) -> dict[str, Part]:
        linear = {p.name: p.module.out_features for p in find_targets(model, targets, tune="ssf")}
        norms = {name: m.get_parameter("weight").shape[0] for name, m in model.named_modules() if is_norm(m)}
        return {
            name: _start(width, derive(seed, "ssf", name), shift, std)
            for name, width in {**linear, **norms}.items()
        }

    settings = {"shift": shift, "std": std, "targets": targets}
    return AttachedTuning(name="ssf", find=find, settings=settings)


def DiffFit(*, seed: int = 0) -> AttachedTuning:
    """DiffFit: biases, norms, and one scale for what attention and MLP of every layer give.

        y <- gamma * y, gamma = 1 at first

    gamma lies on the linear layer that ends attention or MLP, and folds into it. Biases and norms train where
    they are, in the base's dtype. Class embeddings, which the paper trains as well, language models have not.

    Args:
        seed: Nothing is drawn.

    Memory:
        12 bytes a bias and a channel of a norm (gradient, AdamW's moments), 16 a scale; for their gradients
        the inputs of norms and the scaled outputs are kept.

    References:
        DiffFit: Unlocking Transferability of Large Diffusion Models via Simple Parameter-Efficient
        Fine-Tuning, Xie et al., ICCV 2023, arXiv 2304.06648.
    """

    def find(model: nn.Module) -> dict[str, Part]:
        ends = set(_ends(model))
        if not ends:
            raise ScrimpError(
                f"tune difffit: {type(model).__name__} has no decoder layers with linear layers"
            )
        names = [name for name, module in model.named_modules() if module in ends]
        return {name: ScaleShift(torch.ones(1), None) for name in names}

    def own(model: nn.Module) -> list[str]:
        return [name for name, p in model.named_parameters() if p.ndim == 1 and p.is_floating_point()]

    return AttachedTuning(name="difffit", find=find, own=own)


def _start(width: int, seed: int, shift: bool, std: float) -> ScaleShift:
    scale = 1 + draw_normal(derive(seed, "scale"), (width,), std=std)
    return ScaleShift(scale, draw_normal(derive(seed, "shift"), (width,), std=std) if shift else None)


def _ends(model: nn.Module) -> Iterator[nn.Linear]:
    """Yield the linear layers that write to the residual stream: of each sub-layer, the last of its width."""
    for layer in decoder_layers(model):
        linear = [(name, m) for name, m in layer.named_modules() if isinstance(m, nn.Linear)]
        width = linear[0][1].in_features if linear else 0
        yield from {n.rpartition(".")[0]: m for n, m in linear if m.out_features == width}.values()


def _offset(norm: nn.Module) -> float:
    """Return what a norm adds to its weight: 1 in Gemma's, 0 in all others."""
    weight = norm.get_parameter("weight")
    zero = {name: torch.zeros_like(p) for name, p in norm.named_parameters()}
    ramp = torch.linspace(-1, 2, len(weight), dtype=weight.dtype, device=weight.device)
    return float(functional_call(norm, zero, (ramp,)).any())
