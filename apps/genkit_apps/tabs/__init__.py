"""The tabs, one file each, with ``TITLE`` and ``build(app)``, which draws inside the tab."""
