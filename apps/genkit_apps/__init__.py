"""The Gradio app of genkit: see what guidance does. ``genkit-demo`` starts it."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
