"""The clipping bounds of a weight that lose least at its output: a search over the grid of every group, no gradients.

With e = Q(W; low, high) - W and H = XᵀX / rows of the Linear's quantized inputs, ‖X eᵀ‖² = Σ_rows e H eᵀ. For one group g, with the errors of
the others fixed, it is quadratic in e_g alone:

    e_g H_gg e_gᵀ + 2 e_g r_gᵀ + const,   r_g = Σ_{g' ≠ g} e_g' H_g'g

Groups are visited in turn, some sweeps; all rows at once. Candidates: both bounds kept at one ratio, then each bound around the best.
"""
