"""Gradient attacks on image classifiers: one loop (``Attack``), many rules."""

from pyvit.attacks.attack import Attack, Counts
from pyvit.attacks.fgsm import FGSM
from pyvit.attacks.normalized import normalized
from pyvit.attacks.pgd import PGD

__all__ = ["FGSM", "PGD", "Attack", "Counts", "normalized"]
