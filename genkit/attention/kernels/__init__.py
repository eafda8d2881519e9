"""Fused passes over memory that eager torch does not have. Each has a plain torch form with the same result, for all devices.

- :func:`qk_norm_rope`: norm (l2, RMS) and rotary positions of queries and keys.
- :func:`modulate`, :func:`gated_modulate`: AdaLN, and the gated sum before it.
- :func:`guidance_update`: CFG and APG.
- :func:`sample_logits`: guidance, temperature, top-k, top-p and the draw.
- :func:`usable`: whether a program would run; for callers that have a plain form of their own.

On CUDA, without gradients and outside ``torch.compile`` (which fuses the plain form itself), a Triton program runs;
``GENKIT_KERNELS=0`` in the environment turns that off, and a missing Triton or one that fails is reported once. With
``TRITON_INTERPRET=1`` set before Triton is imported, the programs run on the CPU, to be checked.
"""

from genkit.attention.kernels.guidance import guidance_update
from genkit.attention.kernels.launch import usable
from genkit.attention.kernels.modulate import gated_modulate, modulate
from genkit.attention.kernels.qk_norm_rope import qk_norm_rope
from genkit.attention.kernels.sample_logits import sample_logits

__all__ = ["gated_modulate", "guidance_update", "modulate", "qk_norm_rope", "sample_logits", "usable"]
