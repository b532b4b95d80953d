"""The Triton kernels, which live in kernels/ at the top of the checkout; an installed package holds them here."""

from pathlib import Path

__path__.append(str(Path(__file__).parents[2] / "kernels"))
