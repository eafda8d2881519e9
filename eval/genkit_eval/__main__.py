"""``python -m genkit_eval``."""

from __future__ import annotations

from genkit_eval.cli import main

if __name__ == "__main__":
    main()
