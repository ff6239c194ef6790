"""lkda's kernels in models of other packages: flash-linear-attention (`fla`) and transformers (`transformers`).

A module here imports the other package inside its functions, since none of them is needed for the rest of lkda.
"""
