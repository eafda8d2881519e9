"""Networks whose features the metrics compare: built in, fetched on first use, or your own."""

from __future__ import annotations

from genkit_eval.extractors.base import MAIN as MAIN
from genkit_eval.extractors.base import Extractor as Extractor
from genkit_eval.extractors.base import Options as Options
from genkit_eval.extractors.custom import from_module as from_module
from genkit_eval.extractors.table import EXTRACTORS as EXTRACTORS
from genkit_eval.extractors.table import Given as Given
from genkit_eval.extractors.table import load_extractor as load_extractor
