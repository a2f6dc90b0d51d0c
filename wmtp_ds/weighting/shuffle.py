"""The control of every weighting: the same weights on other tokens."""

import torch
from torch import Tensor


def shuffle_weights(weights_GL: Tensor, decisions_GL: Tensor, row_ids_G: Tensor) -> Tensor:
    """Each sequence's weights, dealt anew to its decisions: what is left of a method if placement does not matter.

    Sums, means and every other statistic of a sequence's weights stay as they are. A row's permutation follows from its
    id, so its weights fall on the same wrong tokens in each epoch, as true weights fall on the same right ones, on any
    number of ranks and after a resume.

    Args:
        weights_GL: ``[G, L]``, one sequence a row.
        decisions_GL: bool ``[G, L]``, the positions whose weights are dealt; others keep theirs.
        row_ids_G: int64 ``[G]``.

    Returns:
        ``[G, L]``, of the dtype of ``weights_GL``.
    """
    shuffled_GL = weights_GL.clone()
    generator = torch.Generator()
    for sequence, row_id in enumerate(row_ids_G.tolist()):
        places_N = decisions_GL[sequence].nonzero().flatten()
        generator.manual_seed(row_id & (2**63 - 1))
        order_N = torch.randperm(len(places_N), generator=generator).to(places_N.device)
        shuffled_GL[sequence, places_N] = weights_GL[sequence, places_N[order_N]]
    return shuffled_GL
