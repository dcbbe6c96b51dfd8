"""What the models of both families hold alike: their spec, where and in which dtypes they compute, the transformer.

Decides the encoders' usual dtype. Knows no family: how parts are made, and what is computed with them, is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from ltxforge_kernels.choice import EAGER, Kernels
from ltxforge_kernels.qk_norm_rope import Rope
from torch import nn

from ltxforge.models.blocks import RunBlock, run_plainly
from ltxforge.models.vae_tiles import WHOLE
from ltxforge.quant.keep import Keep
from ltxforge.quant.report import BaseReport
from ltxforge.specs import ModelSpec

# Batches of one size follow each other. Eager rotation keeps full tables, 100 to 150 MB at 768x512x121.
ROPES_KEPT = 4


class HasTransformer(Protocol):
    """A family's parts, as far as they are needed here."""

    @property
    def transformer(self) -> Callable[[Keep], Any]: ...


class BaseModel:
    """Base of `LTXVideo` and `LTX2Video`; see `interface.VideoModel` for what each method promises.

    `dtype` is the transformer's. The encoders' dtypes are float32 on a CPU and bfloat16 elsewhere unless given. `keep`
    is how the transformer's weights are kept; it is set before they are loaded, else all are on the device in `dtype`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        rope: str,
        parts: HasTransformer,
        device: torch.device,
        dtype: torch.dtype,
        modalities: str,
        vae_dtype: torch.dtype | None,
        text_dtype: torch.dtype | None,
    ) -> None:
        usual = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.spec, self.rope, self.device, self.dtype, self.modalities = spec, rope, device, dtype, modalities
        self.vae_dtype, self.text_dtype = vae_dtype or usual, text_dtype or usual
        self._make_transformer = parts.transformer
        self._transformer: Any = None
        self.keep = Keep(device, dtype)
        self.kernels: Kernels = EAGER
        self.run_block: RunBlock = run_plainly
        self.make_room: Callable[[], None] = _nothing
        self.decode_tiling = WHOLE
        self._ropes: dict[Any, tuple[Rope, ...]] = {}

    @property
    def transformer(self) -> Any:
        assert self._transformer is not None, "the transformer is not loaded: call load_transformer()"
        return self._transformer

    def load_transformer(self) -> None:
        if self._transformer is None:
            self._transformer = self._make_transformer(self.keep).requires_grad_(False).eval()

    @property
    def base_report(self) -> BaseReport:
        """What became of the transformer's linear layers when it was loaded."""
        return self.transformer.base_report

    def blocks(self) -> Sequence[nn.Module]:
        return self.transformer.transformer_blocks

    def unused_modules(self) -> Sequence[nn.Module]:
        return ()

    def _ropes_of(self, key: Any, make: Callable[[], tuple[Rope, ...]]) -> tuple[Rope, ...]:
        """The rotary tables of one size of clip, made when they are first needed; the last few are kept."""
        if key not in self._ropes:
            while len(self._ropes) >= ROPES_KEPT:
                del self._ropes[next(iter(self._ropes))]
            self._ropes[key] = make()
            if self.kernels.of("qk_norm_rope") != "triton":
                for rope in self._ropes[key]:
                    rope.prepare()
        return self._ropes[key]


def _nothing() -> None:
    """Nothing is on the device only to be there sooner."""
