"""Drop-in modules: the names, arguments, group keys and arithmetic of the authors' packages.

    from galore_torch import GaLoreAdamW         from scrimp.optim.compat.galore_torch import GaLoreAdamW
    from apollo_torch import APOLLOAdamW    ->   from scrimp.optim.compat.apollo_torch import APOLLOAdamW
    from fira import FiraAdamW                   from scrimp.optim.compat.fira import FiraAdamW

Nothing else of a script changes, and the weights go the same way (to 1e-12 in float64, 1e-5 in float32,
over 50 steps). What a script gains: a state of plain named tensors, which `torch.load(weights_only=True)`
opens and from which a run resumes bit for bit; in float32 about half of GaLore's and Fira's state, where
theirs keep all singular vectors alive; updates inside the backward pass; messages for mistakes at
construction. Where a module deliberately differs, it says so.
"""

from __future__ import annotations

from scrimp.optim.compat import apollo_torch, fira, galore_torch

__all__ = ["apollo_torch", "fira", "galore_torch"]
