"""genkit-eval: generate with several guidances on the same seeds, score them, report."""

from __future__ import annotations
