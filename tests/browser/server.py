"""The app in a process of its own, with a folder of runs to look at."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from genkit_eval.extractors import Extractor
from genkit_eval.metrics import Sample
from genkit_eval.metrics.moments import moments_of
from genkit_eval.references import Reference

from tests.eval.standins import FakePipeline, Runner, tiny_features

ROOT = Path(__file__).parents[2]
#: Seconds from the start of the process to the page, on a busy machine.
PATIENCE = 180
RUN = "tiny"
GUIDANCES = ("none", "CFG(2.0)", "CFG(10.0)")


class Server:
    """A running app.

    Attributes:
        url: of the page, ends in "/".
    """

    def __init__(self, folder: Path) -> None:
        self._log = folder / "app.log"
        make_run(folder / "runs" / RUN)
        command = [sys.executable, "-m", "genkit_apps", "--port", "0", "--runs", str(folder / "runs")]
        paths = os.pathsep.join([*(str(ROOT / name) for name in ("", "eval", "apps")), os.environ.get("PYTHONPATH", "")])
        offline = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": paths}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env={**os.environ, **offline})
        try:
            self.url = self._wait()
        except BaseException:
            self.stop()
            raise

    def log(self) -> str:
        """All that the app has written so far."""
        return self._log.read_text("utf-8", "replace")

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait(self) -> str:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if match := re.search(r"genkit-demo is at (http://127\.0\.0\.1:\d+/)", self.log()):
                return match[1]
            if self._process.poll() is not None:
                break
            time.sleep(0.1)
        raise RuntimeError(f"the app did not start:\n{self.log()}")


def make_run(out: Path) -> None:
    """What a real run of genkit-eval leaves, of a tiny pipeline and tiny features."""
    pixels = torch.randint(256, (60, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    features = tiny_features(pixels)
    extractor = Extractor("fake/projection", "TINY", "e" * 64, "none", tiny_features, variant="tiny")
    reference = Reference(Sample(features, moments=moments_of(features)), "fake/reference", "a" * 64, 60, "random noise")
    Runner(extractor, reference, out)(FakePipeline(), *GUIDANCES)
