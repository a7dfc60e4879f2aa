"""Device, precision and threads as plain values; nothing is probed at import."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where and how precisely a model runs.

    device: "cpu", "cuda" or "mps".
    precision: "bf16" means bf16 autocast over fp32 weights; "fp32" means no autocast.
    reason: why this precision was chosen, for the resolved recipe.
    """

    device: str
    precision: Precision
    reason: str

    def autocast(self) -> AbstractContextManager[Any]:
        """A context in which matrix products run in this runtime's precision."""
        import torch

        if self.precision == "bf16":
            return torch.autocast(self.device, torch.bfloat16)
        return nullcontext()


def has_native_bf16(device: str) -> bool:
    """Whether the device multiplies bf16 matrices in hardware (a capability, never a timing)."""
    import torch

    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device == "cpu":
        # Exactly the test oneDNN's own bf16 kernels make: avx512_bf16 or AMX on x86, bf16 on ARM.
        caps = torch.backends.cpu.get_cpu_capability()
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
        return bool(native or amx or "SVE" in caps)
    return False


def detect(precision: str = "auto", device: str | None = None) -> Runtime:
    """Choose the device, and the precision by capability where it is "auto"."""
    import torch

    if device is None:
        mps = getattr(torch.backends, "mps", None)
        device = "cuda" if torch.cuda.is_available() else "mps" if mps is not None and mps.is_available() else "cpu"
    if precision == "fp32":
        return Runtime(device=device, precision="fp32", reason="asked for")
    if precision == "bf16":
        return Runtime(device=device, precision="bf16", reason="asked for")
    if has_native_bf16(device):
        return Runtime(device=device, precision="bf16", reason=f"{device} multiplies bf16 natively")
    return Runtime(device=device, precision="fp32", reason=f"{device} has no native bf16 products")
