"""Tests; a package, so that they can share ``tests.toys`` and never pick up another project's ``tests``."""
