"""Memorizing Transformers (arXiv 2203.08913): train them, measure them, use them. The command is in `cli.py`."""
