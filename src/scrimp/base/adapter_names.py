"""The files in an adapter's folder."""

from __future__ import annotations

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"  # peft's
BASE = "scrimp.json"  # which base it belongs to
COMPRESSED = "adapter_compeft.safetensors"  # in the place of the tensors
