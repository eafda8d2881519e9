"""Existing images: where they are found, in which order, and how they are decoded."""

from __future__ import annotations

from genkit_eval.images.dataset import Batch as Batch
from genkit_eval.images.dataset import Images as Images
from genkit_eval.images.problems import Problems as Problems
from genkit_eval.images.uri import open_images as open_images
from genkit_eval.images.view import CROPS as CROPS
from genkit_eval.images.view import View as View
