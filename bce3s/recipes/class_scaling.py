"""How the weight of the contrastive term follows the number of classes (docs/methods.md, "How the weights scale with K")."""

from __future__ import annotations

PUBLISHED_WEIGHT = 0.1


def contrastive_weight(num_classes: int) -> float:
    """λ_ss = min(0.1, 10/K²): the published 0.1 up to 10 classes, where it was measured not to collapse.

    The repulsion from all K rows of the memory is a force ∝ K that answers to projections some ∝ K/B steps old. Such a feedback overshoots
    once force times delay, ∝ λ_ss·K², passes a bound; then all projections point one way, and the term has no gradient left. Measured on
    real images, n = 1 each: no collapse at λ_ss·K² = 10 and 40, collapse at 40 (another set), 100 and 1,000 (docs/methods.md).
    """
    return min(PUBLISHED_WEIGHT, 10.0 / num_classes**2)
